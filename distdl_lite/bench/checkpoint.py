"""Checkpoints of weights that are cut over ranks, beside four processes that write and read their quarter by hand."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file

from distdl_lite.bench.table import Row
from distdl_lite.bench.unet import step_of
from distdl_lite.checkpoint.load import load
from distdl_lite.checkpoint.save import save
from distdl_lite.nn.linear.linear import DistributedLinear
from distdl_lite.partition import Partition

RANKS = (4,)
_LAYERS, _FEATURES = 16, 4096  # 1 GiB
_REPETITIONS = 5


def rows(P: Partition, seconds: float) -> list[Row]:
    """Saves on 4 ranks, loads on 3 of what 4 have saved, and training steps while a save is under way."""
    folder = Path(P.broadcast_data(tempfile.mkdtemp(dir=Path.cwd()) if P.rank == 0 else None))
    try:
        return _rows(P, folder)
    finally:
        P.allgather_data(None)
        if P.rank == 0:
            shutil.rmtree(folder)


def _rows(P: Partition, folder: Path) -> list[Row]:
    net, three = weights(P), P.create_partition_inclusive(range(3))
    other = weights(three) if three.active else torch.nn.Module()
    mine = {name: p.detach() for name, p in net.named_parameters()}
    file = folder / f"by_hand_{P.rank}"

    def by_hand(flushed: bool) -> None:
        save_file(mine, file)
        if flushed:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())

    def ours() -> None:
        if P.rank == 0:
            shutil.rmtree(folder / "ours", ignore_errors=True)
        save(folder / "ours", model=net)

    def read_by_hand() -> None:
        with torch.no_grad():
            for name, values in load_file(file).items():
                mine[name].copy_(values)

    size = "1 GiB, cut over 4 ranks"
    saved, written, flushed = _medians(P, [ours, lambda: by_hand(False), lambda: by_hand(True)])
    read, found = _medians(
        P, [lambda: load(folder / "ours", model=other, P=three) if three.active else None, read_by_hand]
    )
    return [
        Row("save; other writes a quarter each", size, "saved", saved, written, "s", 1.3),
        Row("save; other flushes it, too", size, "saved", saved, flushed, "s"),
        Row("load on 3 ranks; other reads a quarter each on 4", size, "loaded", read, found, "s", 1.5),
        _while_saving(P, net, folder),
    ]


def weights(P: Partition) -> torch.nn.Module:
    """Linear layers whose rows are cut over the ranks."""
    root, line, rows = P.grid((1, 1)), P.grid((1, P.size)), P.grid((P.size, 1))
    return torch.nn.Sequential(
        *(DistributedLinear(root, line, rows, _FEATURES, _FEATURES, bias=False) for _ in range(_LAYERS))
    )


def _medians(P: Partition, calls: Sequence[Callable[[], None]]) -> list[float]:
    """Median seconds of calls that take turns, of the slowest rank."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_REPETITIONS + 1):
        for call, seen in zip(calls, times, strict=True):
            seen.append(max(P.allgather_data(_timed(P, call)) or ()))
    return [median(seen[1:]) for seen in times]


def _while_saving(P: Partition, net: torch.nn.Module, folder: Path) -> Row:
    """Steps of a U-Net while the weights are written, beside steps without."""
    step = step_of(P.grid((1, 1, P.size, 1)))
    during, alone = [], []
    for number in range(_REPETITIONS):
        for _ in range(3):
            alone.append(_timed(P, step))
        saving = save(folder / f"while_{number}", model=net, wait=False, keep=1)
        while not all(P.allgather_data(saving.is_done) or ()):
            during.append(_timed(P, step))
        saving.wait()
    return Row(
        "U-Net while 1 GiB is saved; other: nothing is",
        f"{len(during)} steps",
        "step",
        median(during),
        median(alone),
        "s",
        1.25,
    )


def _timed(P: Partition, call: Callable[[], None]) -> float:
    P.world_transport.agree(P.team, 0)
    began = perf_counter()
    call()
    return perf_counter() - began
