"""The seven primitives: each is the two layouts it moves between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import edge_pad
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call
from distdl_lite.nn.movement import Movement, into
from distdl_lite.nn.options import listed, plain
from distdl_lite.partition import Partition, check_axes, integers_of


def _matched_axes(name: str, small: Grid, large: Grid) -> tuple[int, ...]:
    """The axes along which the padded `small` equals `large`; elsewhere it must be one."""
    if small.dim > large.dim:
        raise ValueError(f"{name}: a partition of shape {small.shape} has more axes than one of shape {large.shape}")
    shape = small.padded(large.dim).shape
    wrong = [axis for axis in range(large.dim) if shape[axis] not in (1, large.shape[axis])]
    if wrong:
        raise ValueError(
            f"{name}: cannot match a partition of shape {small.shape} to {large.shape}: axes {wrong} differ and are not 1"
        )
    return tuple(axis for axis in range(large.dim) if shape[axis] == large.shape[axis])


class Broadcast(Movement):
    """Copies of each of P_x's tensors on all ranks of P_y that NumPy's broadcasting of the partitions assigns to it.

    P_x is padded on the left with axes of length one; along each axis it equals P_y or is one. The ranks with equal index
    on the equal axes form a team, whose one member of P_x gives its tensor to all members of P_y. Shapes may differ from
    team to team. The adjoint is `SumReduce` with the partitions swapped.

    Parameters
    ----------
    P_x, P_y : Partition
        Source and target.
    transpose_src, transpose_dest : bool
        Read that partition's shape and index in reverse before matching.
    preserve_batch : bool
        Whether ranks that receive nothing get ``(batch, 0)`` rather than ``(0,)``.

    Raises
    ------
    ValueError
        If the shapes do not broadcast, or, transposed, more than one matched axis is longer than 1 (which DistDL leaves
        ambiguous).

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     one, both = world.grid((1,)), world.grid((2,))
    ...     x = torch.tensor([5.0, 7.0]) if one.active else dl.zero_volume_tensor()
    ...     return dl.nn.Broadcast(one, both)(x).tolist()
    >>> dl.testing.spmd(2, body)
    [[5.0, 7.0], [5.0, 7.0]]
    """

    def __init__(
        self,
        P_x: Partition,
        P_y: Partition,
        transpose_src: bool = False,
        transpose_dest: bool = False,
        preserve_batch: bool = True,
    ) -> None:
        super().__init__(P_x, P_y, preserve_batch)
        self.transpose_src, self.transpose_dest = transpose_src, transpose_dest
        source = P_x.grid_of_ranks.transposed() if transpose_src else P_x.grid_of_ranks
        target = P_y.grid_of_ranks.transposed() if transpose_dest else P_y.grid_of_ranks
        name = type(self).__name__
        self._teams = self._matched(name, source, target)
        dim = max(source.dim, target.dim)
        self._source, self._target = source.padded(dim), target.padded(dim)
        long = [axis for axis in self._teams if self._source.shape[axis] > 1]
        if (transpose_src or transpose_dest) and len(long) > 1:
            raise ValueError(
                f"{name}: transposed, with axes {long} matched, it is ambiguous which ranks belong together"
            )

    def _matched(self, name: str, source: Grid, target: Grid) -> tuple[int, ...]:
        return _matched_axes(name, source, target)

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        by_team = _shape_of_teams(type(self).__name__, self._source, self._teams, shapes)
        return lay.copies(self._source, self._teams, by_team), lay.copies(self._target, self._teams, by_team)


class SumReduce(Broadcast):
    """The sum of P_x's tensors over the ranks that NumPy's broadcasting of P_y to P_x puts together, on the ranks of P_y.

    P_y is padded on the left with axes of length one; along each axis it equals P_x or is one. All tensors of a team have
    the same shape. The adjoint is `Broadcast` with the partitions swapped.

    Parameters
    ----------
    P_x, P_y, transpose_src, transpose_dest, preserve_batch
        As of `Broadcast`, with the matching rule reversed.

    Raises
    ------
    ValueError
        As there; also if shapes in a team differ.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     both, one = world.grid((2,)), world.grid((1,))
    ...     return dl.nn.SumReduce(both, one)(torch.tensor([1.0, world.rank])).tolist()
    >>> dl.testing.spmd(2, body)
    [[2.0, 1.0], [[], []]]
    """

    def _matched(self, name: str, source: Grid, target: Grid) -> tuple[int, ...]:
        return _matched_axes(name, target, source)


def _shape_of_teams(
    name: str, grid: Grid, team_axes: Sequence[int], shapes: Mapping[int, Shape]
) -> dict[tuple[int, ...], Shape]:
    """The local shape of each team, which all its members must share."""
    found: dict[tuple[int, ...], tuple[int, Shape]] = {}
    for rank in grid.ranks:
        index = grid.index(rank)
        assert index is not None
        first, shape = found.setdefault(tuple(index[a] for a in team_axes), (rank, shapes[rank]))
        if shape != shapes[rank]:
            raise ValueError(f"{name}: cannot add shape {shapes[rank]} of rank {rank} and {shape} of rank {first}")
    return {key: shape for key, (_, shape) in found.items()}


class _AlongAxes(Movement):
    """Base of the primitives over some axes of one partition, given them or those that are kept."""

    def __init__(
        self, P_x: Partition, moved: Iterable[int] | None, kept: Iterable[int] | None, moved_name: str
    ) -> None:
        super().__init__(P_x, P_x)
        name = type(self).__name__
        if (moved is None) == (kept is None):
            raise ValueError(f"{name}: exactly one of {moved_name} and axes_keep must be given")
        given_name, given = (moved_name, moved) if kept is None else ("axes_keep", kept)
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(f"{name}: {given_name}={given!r} is no sequence of axes")
        try:
            axes = check_axes(given, P_x.dim)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        others = tuple(axis for axis in range(P_x.dim) if axis not in axes)
        self._axes_moved, self.axes_keep = (axes, others) if kept is None else (others, axes)

    def extra_repr(self) -> str:
        return f"P_x={self.P_x.shape}, axes_keep={self.axes_keep}"


class AllSumReduce(_AlongAxes):
    """The sum over the ranks of P_x that differ in the reduced axes, on all of them. Its own adjoint.

    Parameters
    ----------
    P_x : Partition
    axes_reduce, axes_keep : iterable of int
        The axes summed over, or the others; exactly one is given.

    Raises
    ------
    ValueError
        If not exactly one of the two is given, an axis does not exist, or shapes in a team differ.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     total = dl.nn.AllSumReduce(world.grid((2,)), axes_reduce=[0])
    ...     return total(torch.tensor([1.0, world.rank])).tolist()
    >>> dl.testing.spmd(2, body)
    [[2.0, 1.0], [2.0, 1.0]]
    """

    def __init__(
        self, P_x: Partition, axes_reduce: Iterable[int] | None = None, axes_keep: Iterable[int] | None = None
    ) -> None:
        super().__init__(P_x, axes_reduce, axes_keep, "axes_reduce")

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        grid = self.P_x.grid_of_ranks
        X = lay.copies(grid, self.axes_keep, _shape_of_teams("AllSumReduce", grid, self.axes_keep, shapes))
        return X, X


class AllGather(_AlongAxes):
    """The concatenation of P_x's blocks along the gathered axes, on all the ranks that differ there.

    Its adjoint is `ReduceScatter`.

    Parameters
    ----------
    P_x : Partition
        One axis per tensor dim.
    axes_all_gather, axes_keep : iterable of int
        The axes gathered along, or the others; exactly one is given.

    Raises
    ------
    ValueError
        If not exactly one of the two is given, an axis does not exist, or the blocks form no tensor product.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     gather = dl.nn.AllGather(world.grid((2,)), axes_all_gather=[0])
    ...     return gather(torch.full((2 - world.rank,), float(world.rank))).tolist()
    >>> dl.testing.spmd(2, body)
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """

    def __init__(
        self, P_x: Partition, axes_all_gather: Iterable[int] | None = None, axes_keep: Iterable[int] | None = None
    ) -> None:
        super().__init__(P_x, axes_all_gather, axes_keep, "axes_all_gather")

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        grid = self.P_x.grid_of_ranks
        X = replace(lay.blocks_from_shapes(grid, shapes), team_axes=self.axes_keep)
        return X, lay.gathered(X, self._axes_moved)


class ReduceScatter(_AlongAxes):
    """The sum over the ranks that differ in the scattered axes, cut in balanced blocks along these axes.

    Every rank passes a tensor that is whole along the scattered axes. The adjoint is `AllGather`.

    Parameters
    ----------
    P_x : Partition
        One axis per tensor dim.
    axes_reduce_scatter, axes_keep : iterable of int
        The axes summed and scattered along, or the others; exactly one is given.

    Raises
    ------
    ValueError
        If not exactly one of the two is given, an axis does not exist, or lengths along scattered dims differ.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     scatter = dl.nn.ReduceScatter(world.grid((2,)), axes_reduce_scatter=[0])
    ...     return scatter(torch.tensor([1.0, 2.0, 3.0])).tolist()
    >>> dl.testing.spmd(2, body)
    [[2.0, 4.0], [6.0]]
    """

    def __init__(
        self, P_x: Partition, axes_reduce_scatter: Iterable[int] | None = None, axes_keep: Iterable[int] | None = None
    ) -> None:
        super().__init__(P_x, axes_reduce_scatter, axes_keep, "axes_reduce_scatter")

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        grid = self.P_x.grid_of_ranks
        cuts = list(lay.cuts_from_shapes(grid, shapes))
        for axis in self._axes_moved:
            lengths = [stop - start for start, stop in lay.ranges_of(cuts[axis])]
            if len(set(lengths)) > 1:
                raise ValueError(f"ReduceScatter: lengths {lengths} along dim {axis} differ, they are added up")
            cuts[axis] = balanced(lengths[0], grid.shape[axis])
        Y = replace(lay.blocks(grid, cuts), team_axes=self.axes_keep)
        return lay.gathered(Y, self._axes_moved), Y


class Repartition(Movement):
    """Blocks over P_x, of any sizes, to balanced blocks over P_y: scatter, gather, transpose, move.

    The adjoint is the Repartition back to the blocks that came in.

    Parameters
    ----------
    P_x, P_y : Partition
        One axis per tensor dim each; they may be disjoint, overlap or be equal.
    preserve_batch : bool
        Whether ranks that receive nothing get ``(batch, 0)`` rather than ``(0,)``.
    bounds : sequence of sequences of int, optional
        Cut points per dim of the output blocks, in place of balanced ones.

    Raises
    ------
    ValueError
        If the partitions have different numbers of axes, the tensor another one, the blocks form no tensor product, or
        the bounds do not cut the tensor.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     rows, columns = world.grid((2, 1)), world.grid((1, 2))
    ...     x = rows.cut(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    ...     return dl.nn.Repartition(rows, columns)(x).tolist()
    >>> dl.testing.spmd(2, body)
    [[[1.0, 2.0], [4.0, 5.0]], [[3.0], [6.0]]]
    """

    def __init__(
        self,
        P_x: Partition,
        P_y: Partition,
        preserve_batch: bool = True,
        bounds: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(P_x, P_y, preserve_batch)
        if P_x.dim != P_y.dim:
            raise ValueError(f"Repartition: partitions of shape {P_x.shape} and {P_y.shape} differ in number of axes")
        self.output_bounds = None if bounds is None else tuple(tuple(integers_of("bounds", cut)) for cut in bounds)

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        X = lay.blocks_from_shapes(self.P_x.grid_of_ranks, shapes)
        n = lay.global_shape_of(X)
        if self.output_bounds is None:
            return X, lay.balanced_blocks(self.P_y.grid_of_ranks, n)
        Y = lay.blocks(self.P_y.grid_of_ranks, self.output_bounds)
        if lay.global_shape_of(Y) != n or any(cut[0] for cut in self.output_bounds):
            raise ValueError(f"Repartition: bounds {self.output_bounds} do not cut a tensor of shape {n}")
        return X, Y


class HaloExchange(Movement):
    """Each block grown by what its neighbours hold, however many neighbours that takes; an empty block stays empty.

    The adjoint adds each halo to the points it was copied from.

    Parameters
    ----------
    P_x : Partition
        One axis per tensor dim.
    halo : sequence of int or (int, int)
        Per dim the number of points to the left and right.
    boundary : {"none", "zeros", "circular", "reflect", "replicate"}
        What lies beyond the global edge: nothing, zeros, the other end, the mirror image without the edge point, or the
        edge point again.

    Raises
    ------
    TypeError
        If the halo is one number.
    ValueError
        If the halo does not fit the grid, is negative, the boundary is unknown, or it needs more points than there are.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((2,))
    ...     return dl.nn.HaloExchange(P, [(1, 2)], boundary="zeros")(P.cut(torch.arange(5.0))).tolist()
    >>> dl.testing.spmd(2, body)
    [[0.0, 0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 0.0, 0.0]]
    """

    def __init__(self, P_x: Partition, halo: Sequence[int | tuple[int, int]], boundary: str = "none") -> None:
        super().__init__(P_x, P_x)
        if not isinstance(halo, Iterable):
            raise TypeError(f"HaloExchange: halo={halo!r} is no sequence, a number or a pair for each dim is needed")
        halo = plain(halo)
        pairs = [listed(h, 2) for h in halo]
        fits = all(len(pair) == 2 and all(isinstance(h, int) and h >= 0 for h in pair) for pair in pairs)
        if len(pairs) != P_x.dim or not fits:
            raise ValueError(f"HaloExchange: a halo of {list(halo)} does not fit a partition of shape {P_x.shape}")
        if boundary not in lay.BOUNDARIES:
            raise ValueError(f"HaloExchange: boundary {boundary!r} is none of {', '.join(lay.BOUNDARIES)}")
        self.halo, self.boundary = tuple(pairs), boundary

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        X = lay.blocks_from_shapes(self.P_x.grid_of_ranks, shapes)
        return X, lay.haloed(X, self.halo, self.boundary)

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        operator, dtype = self._operator(input[0])
        inputs = agreed_inputs(self, self.P_x)
        X, Y = self.layouts(inputs.shapes)
        box, held = X.box(self._distdl_transport.rank), Y.box(self._distdl_transport.rank)
        assert box is not None
        assert held is not None
        wanted = tuple(
            (start - left, stop + right) if start < stop else (start, stop)
            for (start, stop), (left, right) in zip(box, self.halo, strict=True)
        )
        pad = None
        if self.boundary in ("reflect", "replicate"):
            pad = edge_pad(wanted, held, lay.global_shape_of(X), self.boundary)
        if pad is None:
            return lambda layer, x: into(operator, x, dtype)
        return lambda layer, x: pad(into(operator, x, dtype))

    def extra_repr(self) -> str:
        return f"P_x={self.P_x.shape}, halo={self.halo}, boundary={self.boundary!r}"
