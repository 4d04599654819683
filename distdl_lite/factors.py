"""How the dims of a tensor lie over a grid when they come from reshaping others: each is a row-major product of factors.

A factor is a `Dim`: (B, C, H, W) cut along H and W, flattened behind C, has a last dim of two factors, which keep their cuts
where no box could say what a rank holds. Axes that no factor names are those along which ranks hold copies. Standard
library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from distdl_lite.grid import Grid, balanced, ravel
from distdl_lite.layout import Dim, Range, Shape, ranges_of

Factors = tuple[Dim, ...]  # of one dim, the outermost first
Dims = tuple[Factors, ...]  # of a tensor


def uncut(length: int) -> Dim:
    """A factor that every rank holds all of."""
    return Dim(((0, length),))


def cut(length: int, axes: Sequence[int], grid: Grid) -> Dim:
    """A factor in balanced blocks along some axes of a grid.

    >>> cut(7, (1,), Grid((2, 3), range(6))).ranges
    ((0, 3), (3, 5), (5, 7))
    """
    axes = tuple(a for a in axes if grid.shape[a] > 1)
    return Dim(ranges_of(balanced(length, math.prod(grid.shape[a] for a in axes))), axes)


def feature_axes(grid: Grid) -> tuple[int, ...]:
    """The axes of a grid that may cut channels of weights: the second one, of channels."""
    return (1,) if grid.dim > 1 and grid.shape[1] > 1 else ()


def blocks(shape: Shape, axes: Sequence[int | None], grid: Grid) -> Dims:
    """The dims of a tensor in balanced blocks, each along an axis of the grid or whole."""
    return tuple((uncut(n) if a is None else cut(n, (a,), grid),) for n, a in zip(shape, axes, strict=True))


def dims_of(boxes: Iterable[Dim]) -> Dims:
    """The dims of a layout, each of one factor."""
    return tuple((uncut(dim.stop) if len(dim.ranges) == 1 else dim,) for dim in boxes)


def length_of(dim: Dim) -> int:
    """The global length of a factor."""
    return dim.stop


def size_of(factors: Iterable[Dim]) -> int:
    """The global length of a dim."""
    return math.prod(map(length_of, factors))


def shape_of_dims(dims: Dims) -> Shape:
    """The global shape of a tensor."""
    return tuple(map(size_of, dims))


def axes_of(factors: Iterable[Dim]) -> tuple[int, ...]:
    """The axes that cut a dim."""
    return tuple(a for dim in factors for a in dim.axes)


def all_axes(dims: Dims) -> frozenset[int]:
    """The axes that cut a tensor."""
    return frozenset(a for factors in dims for a in axes_of(factors))


def range_at(dim: Dim, grid: Grid, index: Sequence[int]) -> Range:
    """The range of a factor that the rank at an index of the grid holds."""
    return dim.ranges[ravel([index[a] for a in dim.axes], [grid.shape[a] for a in dim.axes]) if dim.axes else 0]


def local_shape(dims: Dims, grid: Grid, index: Sequence[int]) -> Shape:
    """The shape of the block of the rank at an index of the grid."""
    ranges = ([range_at(dim, grid, index) for dim in factors] for factors in dims)
    return tuple(math.prod(max(stop - start, 0) for start, stop in of_dim) for of_dim in ranges)


def merged(factors: Iterable[Dim]) -> Factors:
    """The same dim in the fewest factors: an uncut one joins the one before it.

    >>> merged([Dim(((0, 2), (2, 3)), (0,)), uncut(5)])
    (Dim(ranges=((0, 10), (10, 15)), axes=(0,), period=None),)
    """
    found: list[Dim] = []
    for dim in factors:
        n = length_of(dim)
        if not dim.axes and dim.ranges == ((0, 1),):
            continue
        if found and not dim.axes:
            found[-1] = Dim(tuple((a * n, b * n) for a, b in found[-1].ranges), found[-1].axes)
        else:
            found.append(dim)
    return tuple(found) or (uncut(1),)


def split(dim: Dim, lengths: Sequence[int]) -> Factors | None:
    """A factor as a product of some of the given lengths, None where its cuts do not fall on their boundaries.

    >>> split(Dim(((0, 10), (10, 15)), (0,)), (3, 5)) == (Dim(((0, 2), (2, 3)), (0,)), uncut(5))
    True
    """
    if not dim.axes:
        return tuple(map(uncut, lengths))
    first = next((i for i, n in enumerate(lengths) if n > 1), 0)
    inner = math.prod(lengths[first + 1 :])
    if not lengths or not inner or any(a % inner or b % inner for a, b in dim.ranges):
        return None
    outer = Dim(tuple((a // inner, b // inner) for a, b in dim.ranges), dim.axes)
    return tuple(outer if i == first else uncut(n) for i, n in enumerate(lengths))


def boundaries(lengths: Sequence[int]) -> list[int]:
    """The strides of dims of these lengths in row-major order, the innermost first, and after them the number of elements."""
    found = [1]
    for n in reversed(lengths):
        found.append(found[-1] * n)
    return found


def common_lengths(*many: Sequence[int]) -> list[int] | None:
    """The lengths of factors of which the dims of all given lengths are products, None where there are none.

    >>> common_lengths([6, 4], [3, 8]), common_lengths([2, 3], [3, 2])
    ([3, 2, 4], None)
    """
    points = sorted({point for lengths in many for point in boundaries(lengths)})
    if 0 in points or any(b % a for a, b in pairwise(points)):
        return None
    return [b // a for a, b in pairwise(points)][::-1]


def refined(factors: Iterable[Dim], lengths: Sequence[int]) -> Factors | None:
    """The same dim in factors of the given lengths, None where cuts do not fall on their boundaries."""
    found: list[Dim] = []
    left = list(lengths)
    for dim in factors:
        mine: list[int] = []
        while math.prod(mine) < length_of(dim):
            mine.append(left.pop(0))
        parts = split(dim, mine) if math.prod(mine) == length_of(dim) else None
        if parts is None:
            return None
        found += parts
    return tuple(found)


def reshaped(dims: Dims, shape: Shape) -> Dims | None:
    """The dims of a tensor of another shape with the same elements on each rank, None where its cuts do not allow it."""
    flat = merged(dim for factors in dims for dim in factors)
    if any(
        dim.axes and length_of(dim) == 1 for dim in flat
    ):  # some ranks hold nothing, which the other dims could not say
        return None
    lengths = common_lengths([length_of(dim) for dim in flat], shape)
    parts = None if lengths is None else refined(flat, lengths)
    if parts is None:
        return None
    found, left = [], list(parts)
    for n in shape:
        mine: list[Dim] = []
        while size_of(mine) < n:
            mine.append(left.pop(0))
        found.append(merged(mine))
    return tuple(found)


def is_inside(held: Dim, wanted: Dim) -> bool:
    """Whether every rank holds all that it wants of a factor."""
    if held.period or wanted.period:
        return False
    if len(held.ranges) > 1 and held.axes != wanted.axes:
        return False
    ranges = held.ranges if len(held.ranges) > 1 else held.ranges * len(wanted.ranges)
    return all((a <= c and d <= b) or c >= d for (a, b), (c, d) in zip(ranges, wanted.ranges, strict=True))
