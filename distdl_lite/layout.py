"""Layouts: which box of a global index space each rank of a grid holds.

A layout is a rank grid and, per tensor dim, the ranges its axes hand out. Boxes are made on demand, so a layout of 65,536
ranks costs its few hundred cut points. Standard library only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise, product

from distdl_lite.grid import Grid, balanced, indices, ravel, unravel

Range = tuple[int, int]
Box = tuple[Range, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dim:
    """How one tensor dim is spread over a grid.

    Attributes
    ----------
    ranges : tuple of (start, stop)
        One half-open range per index along `axes` (row-major if there are several).
    axes : tuple of int
        The grid axes that choose the range; empty where every rank holds the same range.
    period : int or None
        Length after which the dim repeats, for circular padding.
    """

    ranges: tuple[Range, ...]
    axes: tuple[int, ...] = ()
    period: int | None = None

    @cached_property
    def _starts(self) -> list[int]:
        """The least start from each position on: an empty range, which has no halo, may start after the next one."""
        return list(accumulate((start for start, _ in reversed(self.ranges)), min))[::-1]

    @cached_property
    def _stops(self) -> list[int]:
        """The greatest stop up to each position."""
        return list(accumulate((stop for _, stop in self.ranges), max))

    @cached_property
    def stop(self) -> int:
        """The greatest stop."""
        return max(stop for _, stop in self.ranges)

    @cached_property
    def overlaps(self) -> bool:
        """Whether two positions hold the same point, also one a period away."""
        full = sorted(r for r in self.ranges if r[0] < r[1])  # they may be rotated
        if any(a[1] > b[0] for a, b in pairwise(full)):
            return True
        return self.period is not None and bool(full) and full[-1][1] - full[0][0] > self.period

    def meeting(self, wanted: Range) -> range:
        """Positions whose range may meet `wanted`."""
        return range(bisect_right(self._stops, wanted[0]), bisect_left(self._starts, wanted[1]))


@dataclass(frozen=True)
class Layout:
    """Which box each rank of a grid holds.

    Parameters
    ----------
    grid : Grid
        The ranks that hold anything.
    dims : tuple of Dim
        One per tensor dim.
    team_axes : tuple of int
        The axes whose index is a rank's key: ranks of different keys never meet.

    Examples
    --------
    >>> from distdl_lite.grid import Grid
    >>> from distdl_lite.layout import balanced_blocks
    >>> rows = balanced_blocks(Grid((2, 1), (0, 1)), (5, 3))
    >>> rows.box(0), rows.box(1)
    (((0, 3), (0, 3)), ((3, 5), (0, 3)))
    """

    grid: Grid
    dims: tuple[Dim, ...]
    team_axes: tuple[int, ...] = ()

    def box(self, rank: int) -> Box | None:
        """The box `rank` holds, None if the grid does not hold the rank."""
        index = self.grid.index(rank)
        return None if index is None else self.box_at(index)

    def box_at(self, index: Sequence[int]) -> Box:
        """The box of the rank at a Cartesian index."""
        return tuple(dim.ranges[self._position(dim, index)] for dim in self.dims)

    def _position(self, dim: Dim, index: Sequence[int]) -> int:
        axes = dim.axes
        return ravel([index[a] for a in axes], [self.grid.shape[a] for a in axes]) if axes else 0

    def key(self, rank: int) -> tuple[int, ...] | None:
        """The team of `rank`, None if the grid does not hold the rank."""
        index = self.grid.index(rank)
        return None if index is None else tuple(index[a] for a in self.team_axes)

    def members(self, key: Sequence[int]) -> Iterator[int]:
        """The ranks of one team in row-major order."""
        return self.grid.members(dict(zip(self.team_axes, key, strict=True)))

    @cached_property
    def free_axes(self) -> tuple[int, ...]:
        """Axes longer than one along which the ranks of a team differ."""
        return tuple(a for a, n in enumerate(self.grid.shape) if n > 1 and a not in self.team_axes)

    @cached_property
    def cut_axes(self) -> tuple[int, ...]:
        """The free axes that cut a dim; along the other free axes the ranks hold copies."""
        used = {a for dim in self.dims if len(set(dim.ranges)) > 1 for a in dim.axes}
        return tuple(a for a in self.free_axes if a in used)

    @cached_property
    def is_empty(self) -> bool:
        """Whether no rank holds anything, as some dim is empty on all."""
        return any(all(start >= stop for start, stop in dim.ranges) for dim in self.dims)

    @cached_property
    def overlaps(self) -> bool:
        """Whether a point may be held by two ranks of one team."""
        if self.is_empty:
            return False
        if self.cut_axes != self.free_axes:
            return True
        return any(dim.overlaps for dim in self.dims if set(dim.axes) & set(self.free_axes) or dim.period)

    def same_boxes(self, other: Layout) -> bool:
        """Whether every rank holds the same box in both layouts, and no other rank a copy of it."""
        return not self.overlaps and self._squeezed() == other._squeezed()

    def _squeezed(self) -> tuple[Sequence[int], Shape, tuple[Dim, ...]]:
        """Ranks, grid shape and dims without the axes of length one."""
        kept = [axis for axis, n in enumerate(self.grid.shape) if n > 1]
        dims = tuple(replace(dim, axes=tuple(kept.index(a) for a in dim.axes if a in kept)) for dim in self.dims)
        return self.grid.ranks, tuple(self.grid.shape[a] for a in kept), dims

    def replicas(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's team that hold the same box, sorted."""
        index = self.grid.index(rank)
        if index is None:
            return ()
        fixed = {a: index[a] for a in (*self.cut_axes, *self.team_axes)}
        return tuple(sorted(self.grid.members(fixed)))

    def first_holders(self) -> Layout:
        """The layout without its copies: of ranks that hold the same box only the first of the grid stays."""
        copied = [a for a in self.free_axes if a not in self.cut_axes]
        shape = tuple(1 if a in copied else n for a, n in enumerate(self.grid.shape))
        return replace(self, grid=Grid(shape, tuple(self.grid.members(dict.fromkeys(copied, 0)))))

    def meeting(self, wanted: Box, key: Sequence[int], periods: Sequence[int | None]) -> Iterator[Meeting]:
        """The boxes of team `key` that meet `wanted`, also shifted by a period, in row-major order of their ranks.

        The shift of a meeting is what must be added to a coordinate of this layout to give one of `wanted`'s.
        """
        fixed = dict(zip(self.team_axes, key, strict=True))
        shifts = [(0,) if n is None else (-n, 0, n) for n in periods]
        choices = [self._choices(axis, fixed, wanted, shifts) for axis in range(self.grid.dim)]
        known: dict[Box, list[tuple[Box, Shape]]] = {}  # of copies many ranks hold the same box
        for index in product(*choices):
            box = self.box_at(index)
            if box not in known:
                known[box] = list(_intersections(box, wanted, shifts))
            for piece, shift in known[box]:
                yield self.grid.rank(index), piece, shift

    def _choices(self, axis: int, fixed: dict[int, int], wanted: Box, shifts: Sequence[Sequence[int]]) -> Sequence[int]:
        """Indices along one axis whose ranges may meet the wanted box."""
        if axis in fixed:
            return (fixed[axis],)
        found: Sequence[int] = range(self.grid.shape[axis])
        for dim, (start, stop), moves in zip(self.dims, wanted, shifts, strict=True):
            if dim.axes == (axis,):
                near = {i for move in moves for i in dim.meeting((start - move, stop - move))}
                found = sorted(near.intersection(found))
        return found


Meeting = tuple[int, Box, Shape]


def _intersections(box: Box, wanted: Box, shifts: Sequence[Sequence[int]]) -> Iterator[tuple[Box, Shape]]:
    per_dim = []
    for (start, stop), (low, high), moves in zip(box, wanted, shifts, strict=True):
        pieces = [(max(start + move, low), min(stop + move, high), move) for move in moves]
        per_dim.append([piece for piece in pieces if piece[0] < piece[1]])
    for choice in product(*per_dim):
        yield tuple((low, high) for low, high, _ in choice), tuple(move for _, _, move in choice)


def shape_of(box: Box) -> Shape:
    """Shape of a box.

    >>> shape_of(((2, 5), (0, 0)))
    (3, 0)
    """
    return tuple(max(stop - start, 0) for start, stop in box)


def uncovered(box: Box, covers: Sequence[Box]) -> list[Box]:
    """The rest of a box without the boxes that cover parts of it, as disjoint boxes.

    >>> uncovered(((0, 4), (0, 4)), [((0, 4), (1, 4))])
    [((0, 4), (0, 1))]
    """
    rest = [box]
    for cover in covers:
        rest = [piece for part in rest for piece in _without(part, cover)]
    return rest


def _without(box: Box, cover: Box) -> Iterator[Box]:
    """The rest of a box beside another, cut off one dim after the other."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, cover, strict=True))
    if any(start >= stop for start, stop in common):
        if all(start < stop for start, stop in box):
            yield box
        return
    for dim, ((start, stop), (low, high)) in enumerate(zip(box, common, strict=True)):
        for side in ((start, low), (high, stop)):
            if side[0] < side[1]:
                yield (*common[:dim], side, *box[dim + 1 :])


def ranges_of(cuts: Sequence[int]) -> tuple[Range, ...]:
    """Ranges between cut points.

    >>> ranges_of((0, 4, 7))
    ((0, 4), (4, 7))
    """
    return tuple(pairwise(cuts))


def blocks(grid: Grid, cuts: Sequence[Sequence[int]]) -> Layout:
    """Blocks over a grid: tensor dim d is cut along axis d at the points ``cuts[d]``.

    >>> blocks(Grid((2, 1), (0, 1)), [(0, 4, 7), (0, 5)]).box(1)
    ((4, 7), (0, 5))
    """
    for axis, cut in enumerate(cuts):
        if len(cut) != grid.shape[axis] + 1 or any(a > b for a, b in ranges_of(cut)):
            raise ValueError(f"cut points {tuple(cut)} do not cut axis {axis} of a grid of shape {grid.shape}")
    if len(cuts) != grid.dim:
        raise ValueError(f"{len(cuts)} dims cannot be cut over a grid of shape {grid.shape}")
    return Layout(grid, tuple(Dim(ranges_of(cut), (axis,)) for axis, cut in enumerate(cuts)))


def balanced_blocks(grid: Grid, global_shape: Sequence[int]) -> Layout:
    """Balanced blocks of a tensor over a grid with one axis per dim."""
    if len(global_shape) != grid.dim:
        raise ValueError(f"a tensor of shape {tuple(global_shape)} cannot be cut over a grid of shape {grid.shape}")
    return blocks(grid, [balanced(n, p) for n, p in zip(global_shape, grid.shape, strict=True)])


def whole(grid: Grid, global_shape: Sequence[int], team_axes: Sequence[int] = ()) -> Layout:
    """The whole tensor on every rank of the grid."""
    return Layout(grid, tuple(Dim(((0, n),)) for n in global_shape), tuple(team_axes))


def copies(grid: Grid, team_axes: Sequence[int], shapes: Mapping[tuple[int, ...], Shape]) -> Layout:
    """A whole tensor per team, `shapes` giving its shape by key; all ranks of a team hold all of it."""
    team_axes = tuple(team_axes)
    keys = list(indices([grid.shape[a] for a in team_axes]))
    dims = []
    for d in range(len(shapes[keys[0]])):
        ranges = tuple((0, shapes[key][d]) for key in keys)
        dims.append(Dim(ranges[:1]) if len(set(ranges)) == 1 else Dim(ranges, team_axes))
    return Layout(grid, tuple(dims), team_axes)


class BlockShapes(Mapping[int, Shape]):
    """The local shapes of blocks by rank, made on demand from the lengths along each axis of their grid."""

    def __init__(self, grid: Grid, lengths: tuple[tuple[int, ...], ...]) -> None:
        self.grid, self.lengths = grid, lengths

    def __getitem__(self, rank: int) -> Shape:
        index = self.grid.index(rank)
        if index is None:
            raise KeyError(rank)
        return tuple(length[i] for length, i in zip(self.lengths, index, strict=True))

    def __iter__(self) -> Iterator[int]:
        return iter(self.grid.ranks)

    def __len__(self) -> int:
        return self.grid.size


def cuts_from_shapes(
    grid: Grid, shapes: Mapping[int, Shape], axes: Sequence[int | None] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The cut points of the blocks whose local shapes are given by rank.

    Parameters
    ----------
    axes : sequence, optional
        The axis of the grid that cuts each dim, None for a whole one; by default one to one.

    Raises
    ------
    ValueError
        If a shape has another number of dims than there are axes, or the shapes are no tensor product, that is, two
        ranks with the same index along an axis disagree about their length there. The text names the rank.

    Examples
    --------
    >>> cuts_from_shapes(Grid((2,), (0, 1)), {0: (4,), 1: (3,)})
    ((0, 4, 7),)
    """
    if isinstance(shapes, BlockShapes) and shapes.grid == grid and axes is None:
        return tuple(tuple(accumulate(length, initial=0)) for length in shapes.lengths)
    axes = range(grid.dim) if axes is None else axes
    told: list[dict[int, tuple[int, int]]] = [{} for _ in axes]  # length by index, with the rank that has said it first
    for position, rank in enumerate(grid.ranks):
        shape, index = shapes[rank], unravel(position, grid.shape)
        if len(shape) != len(axes):
            raise ValueError(
                f"rank {rank}: a tensor of shape {tuple(shape)} has {len(shape)} dims, its partition of shape "
                f"{grid.shape} has {len(axes)} axes"
            )
        for d, axis in enumerate(axes):
            i = 0 if axis is None else index[axis]
            length, other = told[d].setdefault(i, (shape[d], rank))
            if length != shape[d]:
                place = "hold all of it" if axis is None else f"stand at index {i} of axis {axis}"
                raise ValueError(
                    f"the blocks form no tensor product: rank {rank} has shape {tuple(shape)}, rank {other} has "
                    f"{tuple(shapes[other])}; both {place}, so dim {d} must agree"
                )
    return tuple(tuple(accumulate((of[i][0] for i in range(len(of))), initial=0)) for of in told)


def blocks_from_shapes(grid: Grid, shapes: Mapping[int, Shape], axes: Sequence[int | None] | None = None) -> Layout:
    """The layout of the blocks whose local shapes are given by rank, as `cuts_from_shapes` finds it."""
    cuts = cuts_from_shapes(grid, shapes, axes)
    axes = range(grid.dim) if axes is None else axes
    return Layout(grid, tuple(Dim(ranges_of(c), () if a is None else (a,)) for c, a in zip(cuts, axes, strict=True)))


def global_shape_of(layout: Layout) -> Shape:
    """The shape that the layout's boxes cover."""
    return tuple(max((stop for _, stop in dim.ranges), default=0) for dim in layout.dims)


def gathered(layout: Layout, axes: Sequence[int]) -> Layout:
    """Blocks that are no longer cut along the given axes; ranks that differ only there hold the same."""
    dims = tuple(
        Dim(((dim.ranges[0][0], dim.ranges[-1][1]),)) if set(dim.axes) & set(axes) else dim for dim in layout.dims
    )
    return replace(layout, dims=dims)


def haloed(layout: Layout, halo: Sequence[Range], boundary: str = "none") -> Layout:
    """Blocks grown by ``(left, right)`` per dim; an empty block stays empty.

    Beyond the global edge the boxes stop (``"none"``), reach out to where nobody holds anything (``"zeros"``), come round
    (``"circular"``), or hold what a reflection or replication reads (``"reflect"``, ``"replicate"``).
    """
    dims = []
    for dim, (left, right), n in zip(layout.dims, halo, global_shape_of(layout), strict=True):
        grown = [(start - left, stop + right) if start < stop else (start, stop) for start, stop in dim.ranges]
        dims.append(bounded(replace(dim, ranges=tuple(grown)), n, boundary))
    return replace(layout, dims=tuple(dims))


BOUNDARIES = ("none", "zeros", "circular", "reflect", "replicate")


def bounded(dim: Dim, length: int, boundary: str) -> Dim:
    """A dim whose ranges may leave ``[0, length)``, made to hold what the boundary rule reads.

    Raises
    ------
    ValueError
        If a reflection needs more than ``length - 1`` points, a circular boundary more than `length`, or any of the
        three modes reads an empty dim.
    """
    out = max((max(-start, stop - length) for start, stop in dim.ranges if start < stop), default=0)
    limit = {"circular": length, "reflect": length - 1, "replicate": 0 if length == 0 else out}.get(boundary, out)
    if out > max(limit, 0):
        raise ValueError(f"a {boundary} boundary of {out} needs more than the {length} points of the dim")
    if boundary == "zeros":
        return dim
    if boundary == "circular":
        return replace(dim, period=length) if out else dim
    return replace(dim, ranges=tuple(_read(r, length, boundary) for r in dim.ranges))


def _read(wanted: Range, length: int, boundary: str) -> Range:
    """The range inside ``[0, length)`` that a clipped, reflected or replicated one reads."""
    start, stop = wanted
    low, high = min(max(start, 0), length), max(min(stop, length), 0)
    if start >= stop:
        return low, low

    def depth(outside: int) -> int:
        """How far from the edge the points are that so many points outside it are read from."""
        return 0 if boundary == "none" or outside <= 0 else 1 if boundary == "replicate" else outside + 1

    low, high = min(low, length - depth(stop - length)), max(high, depth(-start))
    return low, max(low, high)


def read_by_kernel(
    outputs: Sequence[int], kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0
) -> tuple[Range, ...]:
    """The input ranges that output blocks of a sliding kernel read, before the boundary rule is applied.

    Output range [a, b) reads ``[s a - p, s (b - 1) - p + d (k - 1) + 1)``; an empty one reads nothing.

    >>> read_by_kernel((0, 2, 4), kernel=3, padding=1)
    ((-1, 3), (1, 5))
    """
    return tuple(
        (stride * a - padding, stride * (b - 1) - padding + dilation * (kernel - 1) + 1)
        if a < b
        else (stride * a - padding, stride * a - padding)
        for a, b in ranges_of(outputs)
    )


def read_by_transposed_kernel(
    outputs: Sequence[int], kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0
) -> tuple[Range, ...]:
    """The input ranges that output blocks of a transposed convolution gather, which may leave the dim.

    Output range [a, b) reads the inputs i with ``a <= i s - p + d (k - 1)`` and ``i s - p < b``; an empty one none.

    >>> read_by_transposed_kernel((0, 3, 7), kernel=3, stride=2, padding=1)
    ((0, 2), (1, 4))
    """
    firsts = [-((dilation * (kernel - 1) - padding - a) // stride) for a in outputs]
    stops = [(b - 1 + padding) // stride + 1 for b in outputs]
    return tuple(
        (first, max(first, stop) if a < b else first)
        for (a, b), first, stop in zip(ranges_of(outputs), firsts, stops[1:], strict=False)
    )
