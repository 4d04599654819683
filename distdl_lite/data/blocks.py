"""Blocks of samples that no rank holds whole: read from files, and statistics over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, get_worker_info

from distdl_lite.agreement import check_alike, is_unanimous, refused_together
from distdl_lite.data.boxes import axes_of, snapped, touched
from distdl_lite.data.sources import MOST_BYTES, source_of
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Box, Dim, Layout, Shape, haloed, ranges_of, shape_of
from distdl_lite.nn.inputs import zero_volume_tensor
from distdl_lite.nn.options import listed
from distdl_lite.operator import Operator
from distdl_lite.partition import partition_of
from distdl_lite.plan import plan


class Amplification(NamedTuple):
    """Bytes of the chunks that are read over bytes that are needed.

    Attributes
    ----------
    everywhere, here : float
        By all ranks together, and by this rank.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> blocks = dl.testing.spmd(2, lambda world: dl.data.Blocks(torch.ones(4, 6), world.grid((1, 2))).amplification)
    >>> blocks[0].everywhere
    1.0
    """

    everywhere: float
    here: float


class Blocks(Dataset[Any]):
    """A dataset of this rank's block of each sample of an array that no rank need hold whole.

    The first axis of `P` is the batch: samples lie along it, and samplers deal them over it. A sample is a tensor with a dim for
    each other axis, of which a rank reads its block alone. So a batch is a tensor cut over `P`.

    Parameters
    ----------
    source
        What is sliced: a NumPy array or torch tensor; an h5py, Zarr or netCDF4 array or an xarray DataArray; or where to find it:
        ``"x.npy"``, ``"x.zarr"``, ``"file.h5::name"``, ``"file.nc::name"``, ``"file.zarr::name"`` or a pair of path and name. A
        list of these is an array with one dim more, of as many samples.
    P : Partition or communicator
        The samples' grid. A rank outside reads nothing and gets tensors of shape ``(0,)``.
    dims : sequence of int, str or None, optional
        For each axis of `P` the dim of the source that it cuts, by number or by an xarray's name; None stands for a new dim of
        length one, in the first place for a source that is one sample. By default one to one.
    halo : sequence of int or (int, int), optional
        Points to the left and right that are read, too, for each axis of `P`, 0 for the first. They end at the global edge, as
        those of ``dnn.HaloExchange(P, halo)``.
    align : {None, "chunks"}
        Whether blocks end where the source's chunks do, next to the balanced cut points, so that no chunk is read twice.
        Networks take such blocks, too.
    share_chunks : bool
        Whether each chunk is read by one rank, which sends its parts to the ranks that need them. All ranks then make the dataset
        together, and those of one sample read it together, in the same order, and not in the workers of a DataLoader.
    transform : callable, optional
        Is given each block and returns what the dataset gives.

    Attributes
    ----------
    shape : tuple of int
        Of a whole sample.
    dtype : torch.dtype
        Of the blocks as they are read. Bytes are in the machine's order.
    layout : Layout
        The blocks without halo. Ranks of one sample are a team.
    box : tuple of (int, int) or None
        Of this rank's block with its halo; None on a rank outside.

    Raises
    ------
    TypeError, ValueError
        If the source is no such thing, torch lacks its dtype, or an argument does not fit. With `share_chunks` all ranks of `P`
        raise the same; also where a rank cannot read, which is a RuntimeError.
    ImportError
        If the source's library is missing, with the command that installs it.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite.testing import spmd
    >>> volumes = torch.arange(2 * 5 * 3).view(2, 5, 3)
    >>> def body(world):
    ...     blocks = Blocks(volumes, world.grid((1, 2, 1)), halo=(0, 1, 0))
    ...     return len(blocks), tuple(blocks[1].shape), blocks.bounds
    >>> spmd(2, body)
    [(2, (4, 3), ((0, 3, 5), (0, 3))), (2, (3, 3), ((0, 3, 5), (0, 3)))]
    """

    def __init__(
        self,
        source: Any,
        P: Any,
        *,
        dims: Sequence[int | str | None] | None = None,
        halo: Sequence[int | tuple[int, int]] | None = None,
        align: str | None = None,
        share_chunks: bool = False,
        transform: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        P = partition_of(P)
        self.P, self.rank, self.transform = P, P.world_transport.rank, transform
        self._shared: Operator | None = None
        if not share_chunks:
            self._set(source, dims, halo, align, False)
            return
        with refused_together(P, f"Blocks: rank {self.rank}"):
            self._set(source, dims, halo, align, True)
        told = P.allgather_data((self._whole, self._chunks, str(self.dtype), self.bounds, self._wanted.dims))
        check_alike("source and arguments", dict(zip(P.ranks, told or (0,), strict=False)), "Blocks")
        self._shared = Operator(plan(self._read, self._wanted, self.rank), P.world_transport, "Blocks")
        alone = P.create_cartesian_topology_partition(P.shape)
        self._team = alone.create_cartesian_subtopology_partition([axis > 0 for axis in range(P.dim)])

    def _set(self, source: Any, dims: Any, halo: Any, align: str | None, shares: bool) -> None:
        P, self.source = self.P, source_of(source)
        self._axes = axes_of(dims, P.shape, self.source.shape, self.source.names)
        self._whole, self._chunks = self._axes.of(self.source.shape), self._axes.of(self.source.chunks)
        if align not in (None, "chunks"):
            raise ValueError(f"Blocks: align={align!r} is neither None nor 'chunks'")
        pairs = [listed(h, 2) for h in (halo or [0] * P.dim)]
        if len(pairs) != P.dim or any(len(pair) != 2 or min(pair) < 0 for pair in pairs) or any(pairs[0]):
            raise ValueError(
                f"Blocks: halo={halo} does not have a number from 0 on, or a pair, for each of {P.dim} axes, and 0 for the first"
            )
        even = [balanced(n, p) for n, p in zip(self.shape, P.shape[1:], strict=True)]
        whole_chunks = [snapped(cut, chunk) for cut, chunk in zip(even, self._chunks[1:], strict=True)]
        self.layout = _over_samples(P.grid_of_ranks, whole_chunks if align else even)
        self._wanted = haloed(self.layout, pairs[1:])
        self._read = _over_samples(P.grid_of_ranks, whole_chunks) if shares else self._wanted

    @property
    def shape(self) -> Shape:
        return self._whole[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def box(self) -> Box | None:
        return self._wanted.box(self.rank)

    @property
    def bounds(self) -> tuple[tuple[int, ...], ...]:
        """Per dim of a sample the cut points of its blocks."""
        return tuple((dim.ranges[0][0], *(stop for _, stop in dim.ranges)) for dim in self.layout.dims)

    @property
    def coords(self) -> Any:
        """The labels of this rank's block, with its halo, and of all samples, where the source is an xarray; else none."""
        return {} if self.box is None else self.source.coords(self._axes.slices(((0, self._whole[0]), *self.box)))

    @property
    def amplification(self) -> Amplification:
        """The bytes that are read, by whole chunks, for each byte of blocks with their halos; at least 1.0 without sharing."""
        n, chunk = self._whole[0], self._chunks[0]
        samples = sum(touched((i, i + 1), chunk, n) for i in range(n)) / max(n, 1)
        index = self.layout.grid.index(self.rank)
        everywhere, here = [samples], [samples]
        for axis, (read, needed) in enumerate(zip(self._read.dims, self._wanted.dims, strict=True), 1):
            sizes = [touched(wanted, self._chunks[axis], self._whole[axis]) for wanted in read.ranges]
            wanted = [stop - start for start, stop in needed.ranges]
            everywhere.append(sum(sizes) / max(sum(wanted), 1))
            here.append(1.0 if index is None or not wanted[index[axis]] else sizes[index[axis]] / wanted[index[axis]])
        return Amplification(math.prod(everywhere), math.prod(here))

    def __len__(self) -> int:
        return self._whole[0]

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Blocks: there is no sample {index} of {len(self)}")
        number = range(len(self))[index]
        if self.box is None:
            return zero_volume_tensor(dtype=self.dtype)
        block = self.read(number, self.box) if self._shared is None else self._received(number, self._shared)
        return block if self.transform is None else self.transform(block)

    def read(self, number: int, box: Box) -> torch.Tensor:
        """A box of a sample as it is stored, which this process reads by itself."""
        if 0 in shape_of(box):
            return torch.empty(shape_of(box), dtype=self.dtype)
        found = self.source.read(self._axes.slices(((number, number + 1), *box)))
        return self._axes.tensor(found)[0].contiguous()

    def _received(self, number: int, shared: Operator) -> torch.Tensor:
        if get_worker_info() is not None:
            raise RuntimeError(
                "Blocks: with share_chunks ranks read together, which the workers of a DataLoader cannot"
            )
        team = self._team.team
        if not is_unanimous(team, number):
            everyone = team.world.gather_objects(team, number)
            check_alike("sample", dict(zip(team, everyone, strict=True)), "Blocks")
        box = self._read.box(self.rank)
        assert box is not None
        with refused_together(self._team, f"Blocks: rank {self.rank}, {self.source.name}"):
            mine = self.read(number, box)
        return shared.apply(mine)

    def __getstate__(self) -> dict[str, Any]:
        if self._shared is not None:
            raise TypeError("Blocks: with share_chunks a dataset stays in its process")
        return {**self.__dict__, "P": None}  # a worker is no rank


def _over_samples(grid: Grid, cuts: Sequence[Sequence[int]]) -> Layout:
    """Blocks of a sample over all axes but the first, of the ranks that have the sample."""
    return Layout(grid, tuple(Dim(ranges_of(cut), (axis,)) for axis, cut in enumerate(cuts, 1)), (0,))


class Statistics(NamedTuple):
    """What `statistics` finds of all samples.

    Attributes
    ----------
    mean, std : torch.Tensor
        Of float64: 0-dim, or one for each index of a dim; zero-volume on a rank outside.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> x = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    >>> found = dl.testing.spmd(2, lambda world: dl.data.statistics(dl.data.Blocks(x, world.grid((1, 2)))))
    >>> found[0].mean.item(), found[0].std.item()
    (2.0, 1.0)
    """

    mean: torch.Tensor
    std: torch.Tensor


class _Moments(NamedTuple):
    """How many values there are, their mean, and the sum of their squared distances from it."""

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    def joined(self, other: _Moments) -> _Moments:
        """Of both sets of values (Chan, Golub and LeVeque, 1983, formula 1.5)."""
        count, away = self.count + other.count, other.mean - self.mean
        share = other.count / count.clamp(min=1)
        squares = self.squares + other.squares + away.square() * self.count * share
        return _Moments(count, self.mean + away * share, squares)


def statistics(blocks: Blocks, dim: int | None = None) -> Statistics:
    """The mean and the standard deviation of all samples, in one pass in float64; each point counts once.

    Ranks read the samples that `ShardSampler` without shuffling deals them, their blocks without halo, and apply the dataset's
    `transform`, which keeps the shape. All ranks of the dataset's partition call this together.

    Parameters
    ----------
    blocks : Blocks
    dim : int, optional
        The dim of a sample, such as the channels, for each index of which there are statistics of its own.

    Returns
    -------
    Statistics
        ``mean`` and ``std`` of all ranks' values, the same on all ranks; 0-dim, or of shape ``(shape[dim],)``. The variance is
        divided by the number of values.

    Raises
    ------
    IndexError, ValueError, RuntimeError
        On all ranks, naming the rank and the file: if there is no such dim, values are complex, `transform` changes the shape, or
        a file cannot be read.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite.testing import spmd
    >>> x = torch.tensor([[1.0, 3.0, 5.0], [1.0, 3.0, 5.0]])
    >>> spmd(2, lambda world: statistics(Blocks(x, world.grid((1, 2)))).mean.item())
    [3.0, 3.0]
    """
    P, mine = blocks.P, None
    if not P.active:
        return Statistics(zero_volume_tensor(dtype=torch.float64), zero_volume_tensor(dtype=torch.float64))
    with refused_together(P, f"statistics: rank {blocks.rank}, {blocks.source.name}"):
        mine = reduce(_Moments.joined, _moments(blocks, dim))
    count, mean, squares = reduce(_Moments.joined, P.allgather_data(mine))
    shape = () if dim is None else (-1,)
    return Statistics(mean.view(shape), (squares / count).sqrt().view(shape))


def _moments(blocks: Blocks, dim: int | None) -> Iterator[_Moments]:
    """Those of parts of this rank's blocks, after those of nothing."""
    channels, (first, last) = 1, (0, 1)
    box = blocks.layout.box(blocks.rank)
    if dim is not None:
        dim = range(len(blocks.shape))[dim]
        channels, (first, last) = blocks.shape[dim], box[dim]
    yield _Moments(*torch.zeros(3, channels, dtype=torch.float64))
    for number in range(blocks.P.index[0], len(blocks), blocks.P.shape[0]):
        x = blocks.read(number, box)
        x = x if blocks.transform is None else blocks.transform(x)
        if x.shape != shape_of(box) or x.is_complex():
            raise ValueError(
                f"a sample's block is a tensor of shape {tuple(x.shape)} and {x.dtype}, not real numbers of {shape_of(box)}"
            )
        rows = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1)
        for piece in rows.split(max(1, MOST_BYTES // 8 // max(1, len(rows))), 1) if rows.numel() else ():
            found = torch.zeros(3, channels, dtype=torch.float64)
            variance, mean = torch.var_mean(piece.double(), 1, correction=0)
            found[:, first:last] = torch.stack([torch.full_like(mean, piece.shape[1]), mean, variance * piece.shape[1]])
            yield _Moments(*found)
