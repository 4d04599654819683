"""Blocks read from files and written to them, each beside slices of the whole array."""

from __future__ import annotations

import errno
import os
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks, shared_folder
from torch.utils.data import DataLoader
from twins import assert_refused, uneven

from distdl_lite.data import Blocks, Collate, ShardBatchSampler, statistics, targets, write_blocks, writing
from distdl_lite.data.boxes import Axes, part, parts_of, snapped
from distdl_lite.data.sources import located, opened, torch_dtype
from distdl_lite.partition import Partition
from distdl_lite.testing import spmd
from distdl_lite.transport import current

h5py, zarr, xarray = (pytest.importorskip(name) for name in ("h5py", "zarr", "xarray"))
pytest.importorskip("netCDF4")

SHAPE, CHUNKS = (4, 7, 10, 3), (1, 3, 4, 3)


def whole(dtype: str = "<i4", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def write_all(folder: Path, array: np.ndarray) -> None:
    """The array in a file of each kind."""
    np.save(folder / "a.npy", array)
    np.save(folder / "fortran.npy", np.asfortranarray(array))
    for number, sample in enumerate(array):
        np.save(folder / f"{number}.npy", sample)
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("in/chunks", data=array, chunks=CHUNKS, compression="gzip")
        file.create_dataset("plain", data=array)
    zarr.create_array(str(folder / "a.zarr"), shape=array.shape, dtype=array.dtype, chunks=CHUNKS)[:] = array
    group = zarr.open_group(str(folder / "group.zarr"), mode="w")
    group.create_array("x/y", shape=array.shape, dtype=array.dtype, chunks=CHUNKS)[:] = array
    labels = {"time": np.arange(4), "lat": np.linspace(-90, 90, 7)}
    data = xarray.Dataset({"t": (("time", "lat", "lon", "level"), array)}, labels)
    data.to_netcdf(folder / "a.nc", encoding={"t": {"chunksizes": CHUNKS}})


def sources(folder: Path) -> dict[str, tuple[Any, bool]]:
    """What to open, by name, and whether it is in chunks."""
    import netCDF4

    return {
        "array": (np.load(folder / "a.npy"), False),
        "tensor": (torch.from_numpy(np.load(folder / "a.npy")), False),
        "npy": (folder / "a.npy", False),
        "fortran": (folder / "fortran.npy", False),
        "memmap": (np.load(folder / "a.npy", mmap_mode="r"), False),
        "view": (np.load(folder / "a.npy", mmap_mode="r")[:], False),
        "files": ([folder / f"{number}.npy" for number in range(4)], False),
        "hdf5": (h5py.File(folder / "a.h5", "r")["in/chunks"], True),
        "hdf5 path": (f"{folder / 'a.h5'}::in/chunks", True),
        "plain": ((folder / "a.h5", "plain"), False),
        "zarr": (zarr.open_array(str(folder / "a.zarr"), mode="r"), True),
        "zarr path": (str(folder / "a.zarr"), True),
        "group": ((folder / "group.zarr", "x/y"), True),
        "netcdf": (netCDF4.Dataset(folder / "a.nc")["t"], True),
        "netcdf path": (f"{folder / 'a.nc'}::t", True),
        "xarray": (xarray.open_dataset(folder / "a.nc")["t"], True),
        "xarray in memory": (xarray.load_dataset(folder / "a.nc")["t"], True),
    }


def expected(x: torch.Tensor, P: Any, cuts: Any, halo: Any) -> torch.Tensor:
    """This rank's block of a sample, with its halo; cut by hand."""
    slices = []
    for cut, index, (left, right), n in zip(cuts, P.index[1:], halo[1:], x.shape, strict=True):
        start, stop = cut[index], cut[index + 1]
        slices.append(slice(max(0, start - left), min(n, stop + right)) if start < stop else slice(start, stop))
    return x[tuple(slices)]


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        n, chunk, parts = rng.randint(0, 20), rng.randint(1, 6), rng.randint(1, 4)
        cuts = (0, *sorted(rng.randint(0, n) for _ in range(3)), n)
        boundaries = sorted({*range(0, n, chunk), n})
        moved = snapped(cuts, chunk)
        assert sorted(moved) == list(moved)
        assert all(abs(m - c) == min(abs(b - c) for b in boundaries) for m, c in zip(moved, cuts, strict=True))
        box = moved[1:3]
        pieces = [part(box, chunk, number, parts) for number in range(parts)]
        assert [i for piece in pieces for i in range(*piece)] == list(range(*box))
        assert all(piece[0] in boundaries for piece in pieces if piece[0] < piece[1])
    assert parts_of((512, 512, 512), (1, 1, 1), 2**22) == (32, 1, 1)
    assert parts_of((1, 64, 64), (1, 64, 8), 256) == (1, 1, 8)
    axes, x = Axes((None, 2, 0, None, 1)), torch.rand(2, 3, 4)
    assert axes.tensor(x).shape == (1, 4, 2, 1, 3)
    assert torch.equal(axes.array(axes.tensor(x)), x)
    assert axes.back(axes.of(x.shape)) == x.shape


# ---- reading ---------------------------------------------------------------------------------------------------------

GRIDS = (
    ((1, 2, 2, 1), None, (0, 0, 0, 0)),
    ((2, 1, 2, 1), (0, 1, 2, 3), (0, (1, 2), 1, 0)),
    ((1, 1, 3, 1), (0, -1, 2, 1), (0, 1, (0, 9), 1)),
    ((1, 1, 1, 4), (3, 2, 1, 0), (0, 0, (2, 1), (1, 0))),
    ((1, 1, 2, 1, 2), (None, 0, 1, 2, 3), (0, 0, 1, 2, 0)),
    ((1, 2, 1, 2, 1), (0, None, 1, 2, 3), (0, 0, 0, 1, 0)),
)


@on_ranks(4, mpi=True)
def test_each_kind_of_source(world: Partition) -> None:
    """Blocks are slices of the whole, balanced or whole chunks, read by each rank or once; also after a pickle."""
    with shared_folder(world) as folder:
        if world.rank == 0:
            write_all(folder, whole())
        world.allgather_data(None)
        for number, (name, (source, in_chunks)) in product(range(2), sources(folder).items()):
            grid, dims, halo = GRIDS[(len(name) + number) % len(GRIDS)]
            P, pairs = world.grid(grid), [(h, h) if isinstance(h, int) else h for h in halo]
            x = Axes(tuple(None if d is None else d % 4 for d in dims or range(4))).tensor(torch.from_numpy(whole()))
            for options in ({}, {"align": "chunks"}, {"share_chunks": True}):
                blocks = Blocks(source, P, dims=dims, halo=halo, **options)
                assert (len(blocks), blocks.shape, blocks.dtype) == (len(x), tuple(x.shape[1:]), torch.int32), name
                if "align" not in options:
                    assert blocks.bounds == P.bounds(x.shape)[1:]
                if not P.active:
                    assert blocks[0].shape == (0,)
                    continue
                index = len(x) - 1 - P.index[0]
                wanted = expected(x[index], P, blocks.bounds, pairs)
                assert torch.equal(blocks[index], wanted), (name, grid, options)
                if not blocks._shared:
                    assert torch.equal(pickle.loads(pickle.dumps(blocks))[index], wanted), name
                    assert torch.equal(blocks.layout and blocks.read(index, blocks.box), wanted)
                is_once = not in_chunks or "align" in options
                if not any(map(any, pairs)) or (is_once and not in_chunks and not blocks._shared):
                    assert (blocks.amplification.everywhere == 1.0) == (is_once or bool(blocks._shared)), name
        blocks = Blocks(f"{folder / 'a.nc'}::t", world.grid((1, 2, 2, 1)), dims=("time", "lon", "lat", "level"))
        latitudes = range(4) if blocks.P.index[2] == 0 else range(4, 7)
        assert blocks.coords["lat"].values.tolist() == [30.0 * i - 90 for i in latitudes]
        assert blocks.coords["time"].shape == (4,)
        del blocks


@on_ranks(4, mpi=True)
def test_each_chunk_is_read_once(world: Partition) -> None:
    """The chunks that reads touch, by their slices; what is counted is what `amplification` says."""
    P, read = world.grid((1, 2, 2, 1)), []
    with shared_folder(world) as folder:
        if world.rank == 0:
            write_all(folder, whole())
        world.allgather_data(None)
        for options in ({}, {"align": "chunks"}, {"share_chunks": True, "halo": (0, 1, 1, 0)}):
            blocks = Blocks(folder / "a.zarr", P, **options)
            blocks.source = Seen(blocks.source, read)
            block = blocks[1]
            slices, chunks = read.pop(), []
            for s, chunk, n in zip(slices, CHUNKS, SHAPE, strict=True):
                chunks.append(
                    {(i // chunk * chunk, min(i // chunk * chunk + chunk, n)) for i in range(s.start, s.stop)}
                )
            touched = set(product(*chunks))
            points = sum(int(np.prod([b - a for a, b in chunk])) for chunk in touched)
            ranks = world.allgather_data((points, block.numel(), touched))
            everywhere = sum(p for p, *_ in ranks) / sum(n for _, n, _ in ranks)
            assert blocks.amplification == pytest.approx((everywhere, points / block.numel()))
            assert (everywhere > 1.3, everywhere <= 1.0) == (not options, bool(options))
            if options:
                assert sum(len(found) for *_, found in ranks) == len(set().union(*(found for *_, found in ranks))) == 9
    several = Blocks(source_in_chunks((4, 2)), world.grid((1, 1)))
    assert several.amplification.everywhere == (4 * 4 + 4 * 4 + 2 * 2) / 10


class Seen:
    """A source whose reads are listed."""

    def __init__(self, source: Any, read: list[Any]) -> None:
        self.source, self.slices, self.name = source, read, source.name

    def read(self, slices: Any) -> torch.Tensor:
        self.slices.append(slices)
        return self.source.read(slices)


def source_in_chunks(chunks: tuple[int, ...]) -> Any:
    made = zarr.create_array({}, shape=(10, 6), chunks=chunks, dtype="f4")
    made[:] = 1
    return made


DTYPES = ("<f2", ">f4", ">f8", "|b1", "|i1", ">i2", "<u2", ">u4", "<u8", "<c8", ">c16")


@on_ranks(2, mpi=True)
def test_dtypes(world: Partition) -> None:
    P, shape = world.grid((1, 2, 1)), (2, 5, 3)
    with shared_folder(world) as folder:
        for dtype in DTYPES:
            array, path = whole(dtype, shape), folder / dtype.strip("<>|")
            if world.rank == 0:
                np.save(f"{path}.npy", array)
                with h5py.File(f"{path}.h5", "w") as file:
                    file.create_dataset("x", data=array, chunks=(1, 4, 2))
                made = zarr.create_array(f"{path}.zarr", shape=shape, dtype=dtype, chunks=(1, 4, 2))
                made[:] = array
            world.allgather_data(None)
            for source, shares in product((f"{path}.npy", f"{path}.h5::x", f"{path}.zarr", array), (False, True)):
                block, native = Blocks(source, P, share_chunks=shares)[1], array.astype(array.dtype.newbyteorder("="))
                assert block.dtype is torch_dtype(native.dtype, "")
                assert torch.equal(block, P.cut(torch.from_numpy(native))[1])
            for target in (f"{path}.out.npy", f"{path}.out.h5::x", f"{path}.out.zarr"):
                mine = P.cut(torch.from_numpy(native))
                write_blocks(target, mine, P)
                assert torch.equal(torch.stack(list(Blocks(target, P))), mine)
    for wrong in ("M8[s]", "g", "U3"):
        with pytest.raises(TypeError, match="torch has no dtype for NumPy's"):
            Blocks(np.zeros(shape, wrong), P)


# Zarr and xarray keep threads, and Python warns of forks beside them.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_of_data_loaders(tmp_path: Path) -> None:
    """Forked after the parent has read, with prefetch; the batch is cut, too, and the last one empty on half of the ranks."""
    array = whole()
    write_all(tmp_path, array)
    for name, (source, _) in sources(tmp_path).items():
        if name in ("tensor", "view", "fortran", "plain", "group"):  # no other way than the rest
            continue

        def made(world: Partition, source: Any = source) -> tuple[Any, ...]:
            P = world.grid((2, 2, 1, 1))
            blocks = Blocks(source, P, transform=_doubled)
            return blocks, ShardBatchSampler(3, P, 1, shuffle=False), blocks[0], P.index, blocks.bounds

        for blocks, batches, _, index, (cuts, *_) in spmd(4, made)[1::2]:
            loader = DataLoader(
                blocks, batch_sampler=batches, collate_fn=Collate(blocks), num_workers=1, prefetch_factor=2
            )
            wanted = 2 * torch.from_numpy(array)[[[0, 2], [1]][index[0]], cuts[1] : cuts[2]]
            found = list(loader)
            assert [len(x) for x in found] == [[1, 1], [1, 0]][index[0]], name
            assert torch.equal(torch.cat(found), wanted), name


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_shared_chunks_stay_with_the_ranks() -> None:
    (blocks,) = spmd(1, lambda world: Blocks(whole(), world.grid((1, 1, 1, 1)), share_chunks=True))
    with pytest.raises(
        RuntimeError, match="with share_chunks ranks read together, which the workers of a DataLoader cannot"
    ):
        list(DataLoader(blocks, num_workers=1))
    with pytest.raises(TypeError, match="with share_chunks a dataset stays in its process"):
        pickle.dumps(blocks)


# ---- statistics ------------------------------------------------------------------------------------------------------


@on_ranks(4, mpi=True)
def test_statistics(world: Partition) -> None:
    """Of numbers far from zero, whose squares in float32 say nothing; halos and copies do not count."""
    x = 1e4 + torch.randn(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    for grid in ((2, 1, 2, 1), (1, 2, 1, 2), (3, 1, 1, 1)):
        P = world.grid(grid)
        for dim, over in ((None, (0, 1, 2, 3)), (0, (0, 2, 3)), (-1, (0, 1, 2))):
            mean, std = statistics(Blocks(x, P, halo=(0, 0, 1, 2), transform=_doubled), dim)
            if not P.active:
                assert mean.shape == std.shape == (0,)
                continue
            torch.testing.assert_close(mean, 2 * x.double().mean(over), rtol=1e-14, atol=0)
            torch.testing.assert_close(std, 2 * x.double().std(over, correction=0), rtol=1e-9, atol=0)
            assert len(set(P.allgather_data((tuple(mean.view(-1).tolist()), tuple(std.view(-1).tolist()))))) == 1
    one = statistics(Blocks(x[0], world.grid((2, 1, 2, 1)), dims=(None, 0, 1, 2)))
    assert one.mean.item() == pytest.approx(x[0].double().mean().item(), rel=1e-14)
    P = world.grid((1, 1, 2, 2))
    cut = Blocks(x, P, transform=lambda t: t[1:] if world.rank == 2 else t)
    assert_refused(
        world, P, lambda: statistics(cut), "statistics: rank 2, numpy: a sample's block is a tensor of shape (2, 4, 3)"
    )
    assert_refused(world, P, lambda: statistics(Blocks(x, P), 3), "statistics: rank 0", IndexError)


# ---- writing ---------------------------------------------------------------------------------------------------------

TARGETS = ("a.npy", "a.h5::in/x", "a.zarr", "group.zarr::p/q")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MOST_BYTES", 1024)


def read_back(target: str) -> torch.Tensor:
    return torch.from_numpy(np.array(opened(*located(target))[:]))


def block_of(x: torch.Tensor, P: Any, cuts: Any) -> torch.Tensor:
    """This rank's block of a whole tensor between cut points."""
    if not P.active:
        return x.new_empty(0)
    return x[tuple(slice(*cut[i : i + 2]) for cut, i in zip(cuts, P.index, strict=True))]


@pytest.mark.usefixtures("small_pieces")
@on_ranks(4, mpi=True)
def test_written_blocks(world: Partition) -> None:
    """Uneven, some empty, over any grid, in pieces; again into the same file."""
    rng = random.Random(1)
    with shared_folder(world) as folder:
        for number in range(8):
            grid = rng.choice(((1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 1, 4), (4, 1, 1, 1), (1, 1, 3, 1)))
            P, shape, target = world.grid(grid), (rng.randint(1, 4), 5, 9, 6), f"{folder}/{number}{TARGETS[number % 4]}"
            x, cuts = torch.arange(np.prod(shape)).view(shape).float(), uneven(rng, shape, grid)
            axes = Axes(rng.choice(((0, 1, 2, 3), (0, 3, 1, 2))))
            chunks = None if number % 4 == 0 else axes.back((1, rng.randint(1, 5), rng.randint(1, 9), 4))
            for factor in (1, 2):
                write_blocks(target, factor * block_of(x, P, cuts), P, dims=axes.dims, chunks=chunks)
                world.allgather_data(None)
                assert torch.equal(read_back(target), factor * axes.array(x)), (target, grid, cuts)
                world.allgather_data(None)


@pytest.mark.usefixtures("small_pieces")
@on_ranks(4, mpi=True)
def test_sample_after_sample(world: Partition) -> None:
    """From one on, or where a sampler says, with the batch cut; volumes without samples; chunks of several samples."""
    x = torch.arange(6 * 4 * 5).view(6, 4, 5)
    with shared_folder(world) as folder:
        for (number, name), grid in product(enumerate(TARGETS), ((2, 2, 1), (1, 1, 3))):
            P, targets = world.grid(grid), [f"{folder}/{number}{sum(grid)}{i}{name}" for i in range(4)]
            for i in range(0, 6, 2):
                write_blocks(targets[0], P.cut(x[i : i + 2]), P, sample=i, samples=6)
            mine = P.cut(x, (None, 1, 2))
            for rows in ShardBatchSampler(6, P, 2):
                write_blocks(targets[1], mine[rows] if P.active else mine, P, sample=rows, samples=6)
            write_blocks(targets[2], P.cut(x[:1]), P, dims=(None, 1, 0))
            write_blocks(targets[3], P.cut(x), P, chunks=None if number == 0 else (3, 2, 2))
            world.allgather_data(None)
            for target, wanted in zip(targets, (x, x, x[0].T, x), strict=True):
                assert torch.equal(read_back(target), wanted), (target, grid)
            world.allgather_data(None)


@pytest.mark.usefixtures("small_pieces")
def test_one_rank_writes_each_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a Zarr array keeps several chunks in a shard, which is then what is written whole."""
    puts: list[tuple[int, tuple[slice, ...]]] = []
    put = targets._Zarr.put
    monkeypatch.setattr(targets._Zarr, "put", lambda self, s, x: (puts.append((current().rank, s)), put(self, s, x)))
    rng, shape = random.Random(2), (2, 12, 10)
    for number, (chunks, shards) in enumerate((((1, 5, 3), None), ((1, 2, 3), (1, 4, 6)), ((1, 7, 10), None))):
        target, x, grid = tmp_path / f"{number}.zarr", torch.rand(shape), rng.choice(((1, 2, 2), (2, 1, 2)))
        zarr.create_array(str(target), shape=shape, dtype="f4", chunks=chunks, shards=shards)
        cuts = uneven(rng, shape, grid)

        def body(world: Partition, target: Any = target, x: Any = x, grid: Any = grid, cuts: Any = cuts) -> None:
            write_blocks(target, block_of(x, P := world.grid(grid), cuts), P)

        spmd(4, body)
        assert torch.equal(read_back(str(target)), x)
        written = [
            {
                (rank, *(i // n for i, n in zip(at, shards or chunks, strict=True)))
                for at in product(*(range(s.start, s.stop) for s in place))
            }
            for rank, place in puts
        ]
        counts = Counter(chunk for found in written for _, *chunk in found for chunk in [tuple(chunk)])
        assert set(counts.values()) == {1}  # in one piece, by one rank
        puts.clear()


# ---- refusals --------------------------------------------------------------------------------------------------------


@on_ranks(3, mpi=True)
def test_refusals(world: Partition) -> None:
    """All ranks raise the same text, also where one alone is wrong; a file that was there is as it was."""
    P, odd, rank = world.grid((1, 2, 1)), world.rank == 1, world.rank
    x = torch.zeros(2, 5, 4)
    mine = P.cut(x)
    with shared_folder(world) as folder:
        if rank == 0:
            np.save(folder / "there.npy", np.ones((2, 5, 4), "f4"))
            (folder / "broken.h5").write_text("this is no HDF5")
            zarr.create_array(str(folder / "several.zarr"), shape=(4, 5, 4), chunks=(3, 5, 4), dtype="f4")
        world.allgather_data(None)

        def write(
            target: str = "new.npy", block: torch.Tensor = mine, P: Any = P, **options: Any
        ) -> Callable[[], None]:
            return lambda: write_blocks(
                folder / target if "::" not in target else f"{folder}/{target}", block, P, **options
            )

        two = world.grid((2, 1, 1))
        cases: tuple[tuple[Callable[[], None], str, Any], ...] = (
            (
                write(block=mine.double() if odd else mine),
                "the ranks disagree: rank 1: dtype float64, others float32",
                ValueError,
            ),
            (
                write(block=mine[:, :, 1:] if odd else mine),
                "the blocks form no tensor product: rank 1 has shape",
                ValueError,
            ),
            (write(block=mine[0] if odd else mine), "rank 1: a tensor of shape (2, 4) has 2 dims", ValueError),
            (
                write(block=mine.bfloat16()),
                "NumPy has no dtype like torch.bfloat16: convert the tensor before",
                TypeError,
            ),
            (write(block=None if odd else mine), "write_blocks: rank 1", TypeError),
            (
                write("there.npy", mine.double()),
                "the array there has shape (2, 5, 4) and float32, the tensor is float64",
                ValueError,
            ),
            (write("there.npy", mine[..., :1]), "the array there has shape (2, 5, 4)", ValueError),
            (write("there.npy", mine, sample=1), "samples [1, 2] are not different ones of 2", ValueError),
            (write("there.npy", mine, sample=[0, 0]), "samples [0, 0] are not different ones of 2", ValueError),
            (write("there.npy", mine, sample=[0]), "does not name a sample for each of 2 rows", ValueError),
            (write("there.npy", mine, sample=int(odd)), "the ranks disagree: rank", ValueError),
            (write("there.npy", mine, sample=[0, int(odd)]), "the ranks disagree: rank", ValueError),
            (write(sample=0), "there is no such array yet: samples= says how many samples a new one has", ValueError),
            (write(dims=(None, 0, 1)), "a tensor of shape (2, 5, 4) is longer than one along axes [0]", ValueError),
            (write(dims=(0, 1)), "cannot be cut as dims=[0, 1] over a grid of shape (1, 2, 1)", ValueError),
            (write("no/folder/x.npy"), "write_blocks: rank 0", RuntimeError),
            (write("x.nc::t"), "netCDF files are read only", ValueError),
            (write("x.h5"), "which array of it? Write", ValueError),
            (write("broken.h5::x"), "write_blocks: rank 0", RuntimeError),
            (write("new.npy", chunks=(1, 1, 1)), "a .npy file has no chunks", ValueError),
        )
        for attempt, text, error in cases:
            assert_refused(world, P, attempt, text, error)
        attempt = write("several.zarr", two.cut(x), two, sample=1)
        assert_refused(world, two, attempt, "a chunk has 3 samples, and several ranks have samples of one", ValueError)
        if rank == 2:
            with pytest.raises(ValueError, match=r"write_blocks: rank 2, .*: a rank outside"):
                write(block=x)()
        world.allgather_data(None)
        assert not (folder / "new.npy").exists()
        assert np.load(folder / "there.npy").all()

        file = folder / ("there.npy" if not odd else "absent.npy")
        text = "Blocks: rank 1: FileNotFoundError"
        assert_refused(world, P, lambda: Blocks(file, P, share_chunks=True), text, RuntimeError)
        shorter = torch.zeros(2, 5, 3 if odd else 4)
        text = "Blocks: the ranks disagree: rank"
        assert_refused(world, P, lambda: Blocks(shorter, P, share_chunks=True), text)
        if rank == 0:
            np.save(folder / "0.npy", np.zeros((5, 4)))
            np.save(folder / "1.npy", np.zeros((5, 4)))
        world.allgather_data(None)
        blocks = Blocks([folder / "0.npy", folder / ("0.npy" if not odd else "1.npy")], P, share_chunks=True)
        if odd:
            (folder / "1.npy").unlink()
        assert_refused(world, P, lambda: blocks[1], "Blocks: rank 1, 2 files like ", RuntimeError)
        assert_refused(world, P, lambda: blocks[int(odd)], "Blocks: the ranks disagree: rank")
        assert not P.active or blocks[0].any().item() is False


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        (
            np.zeros((2, 3)),
            {},
            r"an array of shape \(2, 3\) with dims \[0, 1\] cannot be cut one to one over a grid of shape \(1, 2, 1\)",
        ),
        (np.zeros((2, 3, 4)), {"dims": (0, 1, 1)}, r"cannot be cut as dims=\[0, 1, 1\]"),
        (np.zeros((2, 3, 4)), {"dims": (0, "lat", 1)}, r"cannot be cut as dims=\[0, 'lat', 1\]"),
        (
            np.zeros((2, 3, 4)),
            {"halo": (1, 0, 0)},
            r"halo=\(1, 0, 0\) does not have a number from 0 on, or a pair, for each of 3 axes",
        ),
        (np.zeros((2, 3, 4)), {"halo": (0, -1, 0)}, r"halo=\(0, -1, 0\)"),
        (np.zeros((2, 3, 4)), {"align": "chunk"}, "align='chunk' is neither None nor 'chunks'"),
        ([], {}, "a list of no files has no samples"),
        ("x.h5", {}, r"x.h5: which array of it\? Write x.h5::NAME"),
    ],
)
def test_blocks_refuse(given: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        spmd(2, lambda world: Blocks(given, world.grid((1, 2, 1)), **options))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, whole())
    for path, module, extra in (
        ("a.h5::plain", "h5py", "hdf5"),
        ("a.zarr", "zarr", "zarr"),
        ("a.nc::t", "xarray", "netcdf"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"{module} is needed .* 'distdl_lite\[{extra}\]'"):
                spmd(1, lambda world, path=path: Blocks(f"{tmp_path}/{path}", world.grid((1, 1, 1, 1))))
    for path, text in (("a.h5::no", "has no dataset 'no', but "), ("a.nc::no", "has no variable 'no', but ")):
        with pytest.raises(ValueError, match=text):
            spmd(1, lambda world, path=path: Blocks(f"{tmp_path}/{path}", world.grid((1, 1, 1, 1))))
    with pytest.raises(TypeError, match="dict is neither an array nor the path of one"):
        spmd(1, lambda world: Blocks({}, world.grid((1, 1, 1, 1))))
    (tmp_path / "1.npy").unlink()
    np.save(tmp_path / "1.npy", np.zeros(3))
    files = [tmp_path / "0.npy", tmp_path / "1.npy"]
    with pytest.raises(ValueError, match=r"1.npy has shape \(3,\) and torch.float64, the first file \(7, 10, 3\)"):
        spmd(1, lambda world: Blocks(files, world.grid((1, 1, 1, 1)))[1])


@pytest.mark.parametrize("target", TARGETS)
def test_a_rank_that_cannot_write(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, in the middle of a tensor or where the file is made."""
    x = torch.zeros(1, 64, 64)
    kind = type(targets.target_of(*located(f"{tmp_path}/{target}")))
    writer = 0 if kind.by_one else 1

    def full(self: Any, *arguments: Any) -> None:
        if current().rank == writer:
            raise OSError(errno.ENOSPC, "No space left on device")

    def body(world: Partition) -> None:
        P = world.grid((1, 2, 1))
        text = f"write_blocks: rank {writer}, {tmp_path}/{target}: OSError: [Errno 28] No space left on device"
        assert_refused(world, P, lambda: write_blocks(f"{tmp_path}/{target}", P.cut(x), P), text, RuntimeError)

    for method in ("put", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, full)
            spmd(2, body)
    spmd(2, lambda world: write_blocks(f"{tmp_path}/{target}", world.grid((1, 2, 1)).cut(x), world.grid((1, 2, 1))))


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"rank 0, .*a.npy: OSError: .Errno 28. No space left on device"):
        spmd(2, lambda world: write_blocks(tmp_path / "a.npy", world.grid((2,)).cut(torch.ones(3)), world.grid((2,))))
    assert not list(tmp_path.iterdir())
