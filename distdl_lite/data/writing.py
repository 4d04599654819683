"""Blocks of tensors into files, in pieces and with one writer for each chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distdl_lite import layout as lay
from distdl_lite.agreement import check_alike, refused_together
from distdl_lite.data.boxes import Axes, axes_of, part, parts_of, snapped
from distdl_lite.data.sources import located
from distdl_lite.data.targets import Target, target_of
from distdl_lite.grid import Grid, indices
from distdl_lite.layout import Box, Dim, Layout, Shape
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition, partition_of
from distdl_lite.plan import plan

MOST_BYTES = 2**22  # of a piece


def write_blocks(
    target: Any,
    block: torch.Tensor,
    P: Any,
    *,
    dims: Sequence[int | None] | None = None,
    sample: int | Sequence[int] | None = None,
    samples: int | None = None,
    chunks: Sequence[int] | None = None,
) -> None:
    """Write a tensor that is cut over `P` into one array of a file; all ranks of `P` call it together.

    Parameters
    ----------
    target : path, str or (path, str)
        ``"x.npy"``, ``"x.zarr"``, ``"file.zarr::name"`` or ``"file.h5::name"``. An array that is there is written into, and must
        have the tensor's dtype, and shape but for the samples; else it is made. To have it compressed, make it before.
    block : torch.Tensor
        This rank's block, ``(N, ...)``, of any size, on any device. A rank outside `P` passes a zero-volume tensor.
    P : Partition or communicator
        One axis per dim of the tensor, the first of which are the samples.
    dims : sequence of int or None, optional
        For each axis of `P` the dim of the array that it cuts; None where the array has none, as the tensor has length one. By
        default one to one.
    sample : int or sequence of int, optional
        Where the samples go: from this one on; or this rank's rows each to one of these, as a `ShardBatchSampler` dealt them. By
        default the tensor's samples are all that the array has.
    samples : int, optional
        How many samples a new array has, where `sample` is given.
    chunks : sequence of int, optional
        Of a new array. By default HDF5 datasets have none, and those of a Zarr array are the largest block of a sample, halved
        along its longest dim until it has at most 2**20 points.

    Raises
    ------
    TypeError, ValueError, RuntimeError, ImportError
        On all ranks of `P`, naming the rank and the file: if blocks, arguments and array do not fit, or a rank cannot write, as
        on a full disk. What has been written then stays.

    Notes
    -----
    Blocks move to the chunk boundaries next to where they are cut, by one exchange for each piece of about 4 MiB a rank, and
    each rank writes its chunks alone. One rank writes all of an HDF5 file, whose library takes one writer. A rank holds some
    pieces beside its block.

    Examples
    --------
    >>> import tempfile, numpy, torch
    >>> from distdl_lite.testing import spmd
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/x.npy"
    ...     def body(world):
    ...         P = world.grid((1, 2))
    ...         write_blocks(path, P.cut(torch.arange(6).view(2, 3)), P)
    ...     _ = spmd(2, body)
    ...     numpy.load(path).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    P = partition_of(P)
    name = f"write_blocks: rank {P.world_transport.rank}, {target}"
    if not P.active:
        if block.numel() and block.dim():
            raise ValueError(f"{name}: a rank outside {P} passed a tensor of shape {tuple(block.shape)}")
        return
    with refused_together(P, name):
        file, dtype = target_of(*located(target)), _numpy_dtype(block)
        rows = sample if isinstance(sample, int) or sample is None else [int(i) for i in sample]
    told = P.allgather_data((str(target), tuple(block.shape), rows, dtype, (dims, samples, chunks))) or ()
    targets, shapes, rows_of, *same = (dict(zip(P.ranks, values, strict=True)) for values in zip(*told, strict=True))
    for what, values in zip(("target", "dtype", "dims, samples and chunks"), (targets, *same), strict=True):
        check_alike(what, values, f"write_blocks: {targets[P.ranks[0]]}")
    with refused_together(P, name):
        have = lay.blocks_from_shapes(P.grid_of_ranks, shapes)
        numbers = _numbers(have, rows_of)
        axes = _axes(dims, have)
    wanted = axes.back((len(numbers) if sample is None else samples, *lay.global_shape_of(have)[1:]))
    with refused_together(P, name):
        if P.rank == 0:
            _make(file, wanted, dtype, chunks, axes.back((1, *lay.shape_of(_largest(have)[1:]))))
            found = file.found()
    shape, kept, stored = P.broadcast_data(found if P.rank == 0 else None)
    with refused_together(P, name):
        fits = len(shape) == len(wanted) and all(n in (k, None) for n, k in zip(wanted, shape, strict=True))
        if not fits or kept != dtype:
            raise ValueError(f"the array there has shape {shape} and {kept}, the tensor is {dtype} and needs {wanted}")
        by_axis = axes.of(stored)
        _check_rows(have, numbers, axes.of(shape)[0], 1 if file.by_one else by_axis[0])
    _write(file, block.detach(), P, name, axes, numbers, have, _aligned(have, by_axis, file.by_one), by_axis)


def _numpy_dtype(block: torch.Tensor) -> np.dtype:
    if not isinstance(block, torch.Tensor):
        raise TypeError(f"a tensor is needed, not {type(block).__name__}")
    try:
        return torch.empty(0, dtype=block.dtype).numpy().dtype
    except TypeError:
        raise TypeError(f"NumPy has no dtype like {block.dtype}: convert the tensor before") from None


def _numbers(have: Layout, rows: Mapping[int, Any]) -> list[int]:
    """The sample of each row of the tensor, from what the ranks say."""
    if not all(isinstance(given, list) for given in rows.values()):
        check_alike("sample", rows)
    numbers: list[int] = []
    for position, (start, stop) in enumerate(have.dims[0].ranges):
        given = {rank: rows[rank] for rank in have.grid.members({0: position})}
        check_alike("sample", given)
        first = next(iter(given.values()))
        mine = first if isinstance(first, list) else list(range((first or 0) + start, (first or 0) + stop))
        if len(mine) != stop - start:
            raise ValueError(
                f"sample={mine} does not name a sample for each of {stop - start} rows of ranks {list(given)}"
            )
        numbers += mine
    return numbers


def _axes(dims: Sequence[int | None] | None, have: Layout) -> Axes:
    lengths = lay.global_shape_of(have)
    given = list(range(len(lengths)) if dims is None else dims)
    none = [axis for axis, d in enumerate(given) if d is None]
    if any(lengths[axis] != 1 for axis in none if axis < len(lengths)):
        raise ValueError(
            f"dims={given}: a tensor of shape {lengths} is longer than one along axes {none}, which have no dim"
        )
    return axes_of(dims, have.grid.shape, (0,) * (len(given) - len(none)), None)


def _make(file: Target, shape: tuple[int | None, ...], dtype: np.dtype, chunks: Any, block: Shape) -> None:
    """Make the array unless it is there."""
    if not file.exists():
        if None in shape:
            raise ValueError("there is no such array yet: samples= says how many samples a new one has")
        file.create(shape, dtype, None if chunks is None else tuple(chunks), block)


def _check_rows(have: Layout, numbers: list[int], length: int, chunk: int) -> None:
    """Raise ValueError if samples are not in the array, or are written twice, or two ranks would write one chunk."""
    if len(set(numbers)) != len(numbers) or any(not 0 <= i < length for i in numbers):
        raise ValueError(f"samples {numbers} are not different ones of {length}")
    owners: dict[int, int] = {}
    for position, (start, stop) in enumerate(have.dims[0].ranges):
        for number in numbers[start:stop]:
            if owners.setdefault(number // chunk, position) != position:
                raise ValueError(
                    f"a chunk has {chunk} samples, and several ranks have samples of one: make chunks of one sample"
                )


def _aligned(have: Layout, chunks: Shape, by_one: bool) -> Layout:
    """What each rank writes: its block, cut where chunks begin; or all by the first rank."""
    if by_one:
        alone = Grid((1,) * have.grid.dim, (have.grid.ranks[0],))
        return lay.blocks(alone, [(0, n) for n in lay.global_shape_of(have)])
    samples, *cuts = [(0, *(stop for _, stop in dim.ranges)) for dim in have.dims]
    return lay.blocks(have.grid, [samples, *(snapped(cut, chunk) for cut, chunk in zip(cuts, chunks[1:], strict=True))])


def _largest(layout: Layout) -> Box:
    return tuple((0, max(stop - start for start, stop in dim.ranges)) for dim in layout.dims)


def _write(
    file: Target,
    block: torch.Tensor,
    P: Partition,
    name: str,
    axes: Axes,
    numbers: list[int],
    have: Layout,
    need: Layout,
    chunks: Shape,
) -> None:
    """Move the blocks piece by piece to who writes them."""
    rank, units, error = P.world_transport.rank, (1, *chunks[1:]), None
    writes = need.box(rank) is not None
    with refused_together(P, name):
        if writes:
            file.open()
    stays = have.same_boxes(need)
    counts = parts_of(lay.shape_of(_largest(need)), units, max(1, MOST_BYTES // block.element_size()))
    for number in indices(counts):
        piece = _piece(need, units, number, counts)
        moved = _moved(block, have, piece, P, stays)
        try:
            if writes and error is None and moved.numel():
                _put(file, axes, numbers, piece.box(rank), moved.cpu())
        except Exception as raised:
            error = raised
        del moved  # before the next one is made
        # Also lets no rank run ahead, whose pieces would wait in its memory for a slow writer.
        if not stays and P.world_transport.agree(P.team, int(error is not None)):
            break
    with refused_together(P, name):
        try:
            if error is not None:
                raise error
        finally:
            if writes:
                file.close()


def _moved(block: torch.Tensor, have: Layout, piece: Layout, P: Partition, stays: bool) -> torch.Tensor:
    """This rank's part of a piece."""
    rank = P.world_transport.rank
    if not stays:
        return Operator(plan(have, piece, rank), P.world_transport, "write_blocks").apply(block)
    sides = zip(piece.box(rank) or (), have.box(rank) or (), strict=True)
    return block[tuple(slice(a - start, b - start) for (a, b), (start, _) in sides)]


def _piece(need: Layout, units: Sequence[int], number: Sequence[int], counts: Sequence[int]) -> Layout:
    """One of so many pieces, per dim, of what each rank writes."""
    parts = zip(need.dims, units, number, counts, strict=True)
    dims = (Dim(tuple(part(whole, unit, i, k) for whole in dim.ranges), dim.axes) for dim, unit, i, k in parts)
    return Layout(need.grid, tuple(dims))


def _put(file: Target, axes: Axes, numbers: list[int], box: Box, x: torch.Tensor) -> None:
    """Write a box of the tensor: at once where its samples follow each other in the array, else one by one."""
    (start, stop), *rest = box
    rows = numbers[start:stop]
    step = len(rows) if rows == list(range(rows[0], rows[0] + len(rows))) else 1
    for i in range(0, len(rows), step):
        place = (rows[i], rows[i] + step)
        file.put(axes.slices((place, *rest)), axes.array(x[i : i + step]).numpy())
