"""The memory that ranks take to write and read a file in blocks, and reads of slabs beside the same slices by hand."""

from __future__ import annotations

import gc
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distdl_lite.bench.table import Row, interleaved
from distdl_lite.data.blocks import Blocks
from distdl_lite.data.sources import located, opened
from distdl_lite.data.writing import write_blocks
from distdl_lite.partition import Partition

RANKS = (4,)
GIB = 2.0  # of the file; that of which slabs are read has half of it
_FILES = {"npy": "x.npy", "HDF5": "x.h5::x", "Zarr": "x.zarr"}


def rows(P: Partition, seconds: float) -> list[Row]:
    """Memory above what is taken before, the rank with the most; then times."""
    folder = Path(P.broadcast_data(tempfile.mkdtemp() if P.rank == 0 else None))
    try:
        return [
            *(row for kind in _FILES for row in _memory(P, kind, folder)),
            *(_slabs(P, kind, f"{folder}/slabs-{_FILES[kind]}", seconds) for kind in ("HDF5", "Zarr")),
        ]
    finally:
        P.allgather_data(None)
        if P.rank == 0:
            shutil.rmtree(folder)


def _memory(P: Partition, kind: str, folder: Path) -> list[Row]:
    """A 4-D array that is one sample, over a square of ranks."""
    grid, dims, shape = P.grid((1, 1, 2, 2, 1)), (None, 0, 1, 2, 3), (4, round(64 * GIB), 1024, 1024)
    path = f"{folder}/{_FILES[kind]}"
    _written(f"{folder}/small-{_FILES[kind]}", grid, dims, (4, 2, 8, 8))  # what imports and first messages take
    peaks = [_peak(lambda: _written(path, grid, dims, shape)), _peak(lambda: Blocks(path, grid, dims=dims)[0])]
    quarter = 4 * torch.Size(shape).numel() / 4 / 2**20
    made = [
        Row(
            f"{kind}, other is a rank's block",
            "x".join(map(str, shape)),
            mode,
            max(P.allgather_data(peak)),
            quarter,
            "MiB",
            1.2,
        )
        for mode, peak in zip(("write", "read"), peaks, strict=True)
    ]
    if P.rank == 0:
        where, _ = located(path)
        shutil.rmtree(where) if where.is_dir() else where.unlink()
    return made


def _written(path: str, grid: Any, dims: Any, shape: tuple[int, ...]) -> None:
    block = torch.rand([s.stop - s.start for s in grid.block((1, *shape))])
    write_blocks(path, block, grid, dims=dims)


def _peak(call: Callable[[], Any]) -> float:
    """The most MiB that this process takes during a call, above what it takes before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # begins to look for the most anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _slabs(P: Partition, kind: str, path: str, seconds: float) -> Row:
    """Each rank reads its quarter of a file in chunks."""
    grid, shape = P.grid((1, 4, 1, 1)), (round(128 * GIB), 1024, 1024)
    block = torch.rand([s.stop - s.start for s in grid.block((1, *shape))])
    write_blocks(path, block, grid, dims=(None, 0, 1, 2), chunks=(16, 256, 256))
    blocks, by_hand = Blocks(path, grid, dims=(None, 0, 1, 2)), opened(*located(path))
    slices = tuple(slice(*side) for side in blocks.box)
    assert torch.equal(blocks[0], block[0])
    ours, other = interleaved(P, [lambda: blocks[0], lambda: torch.from_numpy(by_hand[slices])], 4 * seconds)
    return Row(f"slabs of {kind}, other is by hand", "x".join(map(str, shape)), "read", ours, other, times=1.1)
