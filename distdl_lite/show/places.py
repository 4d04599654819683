"""Where the boxes of layouts stand in a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distdl_lite import layout as lay
from distdl_lite.factors import blocks
from distdl_lite.grid import Grid, ravel
from distdl_lite.layout import Box, Dim, Layout, Range, shape_of
from distdl_lite.partition import Partition

GAP = 0.06  # between boxes that stand apart, of the longest dim
_MOST_RANKS = 1024
Rectangle = tuple[float, float, float, float]  # left, top, width, height


def layout_of(
    P: Partition | Grid | Layout | Sequence[int],
    shape: Sequence[int] | None = None,
    axes: Sequence[int | None] | None = None,
) -> Layout:
    """A layout, or that of the balanced blocks of a tensor over a grid."""
    if isinstance(P, Layout):
        return P
    if isinstance(P, Partition):
        P = P.grid_of_ranks
    if not isinstance(P, Grid):
        if not isinstance(P, Sequence) or not all(isinstance(n, int) and n > 0 for n in P):
            raise TypeError(f"a Partition, a Layout or the shape of a grid is needed, not {P!r}")
        P = Grid(tuple(P), range(math.prod(P)))
    if shape is None:
        raise ValueError(f"a grid of shape {P.shape} needs the shape of a tensor to cut")
    if axes is None:
        return lay.balanced_blocks(P, shape)
    if len(axes) != len(shape) or any(a is not None and not -P.dim <= a < P.dim for a in axes):
        raise ValueError(
            f"axes {tuple(axes)} do not fit a tensor of shape {tuple(shape)} and a grid of shape {P.shape}"
        )
    return Layout(P, tuple(dim for (dim,) in blocks(tuple(shape), [a if a is None else a % P.dim for a in axes], P)))


def whole_of(box: Box) -> Box:
    """A box in its own coordinates."""
    return tuple((0, n) for n in shape_of(box))


def full_boxes(layout: Layout) -> dict[int, Box]:
    """The boxes of the ranks that hold something."""
    found = {rank: layout.box(rank) for rank in layout.grid.ranks}
    return {rank: box for rank, box in found.items() if box is not None and 0 not in shape_of(box)}


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks, those that follow each other as first and last."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("\N{EN DASH}".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def drawn_dims(layouts: Sequence[Layout], dims: Sequence[int] | None, most: int) -> tuple[int, ...]:
    """The dims to draw, at most so many: those given, else of a tensor of more dims those that are cut, and then the last.

    Raises
    ------
    ValueError
        If there is no dim, or those given are not some of the tensor's, each once and in order.
    """
    count = len(layouts[0].dims)
    if not count:
        raise ValueError("a tensor without dims cannot be drawn")
    if dims is not None:
        chosen = tuple(dims)
        if not 1 <= len(chosen) <= most or list(chosen) != sorted({d for d in chosen if 0 <= d < count}):
            raise ValueError(f"dims={chosen} are not 1 to {most} of the {count} dims of the tensor in their order")
        return chosen
    if count <= most:
        return tuple(range(count))
    cut = [d for d in range(count) if any(len(set(layout.dims[d].ranges)) > 1 for layout in layouts)][-most:]
    uncut = [d for d in reversed(range(count)) if d not in cut]
    return tuple(sorted((cut + uncut)[: max(len(cut), 2)]))


def check_size(grid: Grid) -> None:
    """Raise ValueError for a grid of too many ranks."""
    if grid.size > _MOST_RANKS:
        raise ValueError(f"a picture has room for {_MOST_RANKS} ranks, not for {grid.size}")


def span(dim: Dim) -> Range:
    """From where to where the ranges of a dim reach; an empty one gets one point, so that it has a place."""
    full = [r for r in dim.ranges if r[0] < r[1]] or [(0, 1)]
    return min(start for start, _ in full), max(stop for _, stop in full)


DrawnDims = tuple[int | None, ...]  # None: the thickness of a strip, for a tensor of one dim


@dataclass(frozen=True)
class Line:
    """Where the ranges of a dim begin in a picture, where the first does, and how far they reach."""

    starts: tuple[float, ...]
    low: float
    size: float


@dataclass(frozen=True)
class Places:
    """Where the boxes of a layout are drawn.

    Ranks that no drawn dim tells apart, such as those that hold copies, have pictures of the tensor of their own, below and
    beside each other.

    Attributes
    ----------
    dims : tuple of int or None
        The drawn dims, the last one to the right and the one before downwards.
    starts : dict
        By rank, where its box begins in each drawn dim.
    lines : tuple of Line
        One picture of the tensor in each drawn dim.
    sizes : tuple of float
        How far all pictures reach in each drawn dim.
    thickness : float
        Of a strip.
    """

    dims: DrawnDims
    starts: dict[int, tuple[float, ...]]
    lines: tuple[Line, ...]
    sizes: tuple[float, ...]
    thickness: float

    @property
    def low(self) -> tuple[float, ...]:
        """Where all of it begins in each drawn dim."""
        return tuple(line.low for line in self.lines)

    def part(self, rank: int, local: Box) -> tuple[tuple[float, float], ...]:
        """Start and length, in each drawn dim, of a part of a rank's box in its local coordinates."""
        sides = [(0, self.thickness) if d is None else local[d] for d in self.dims]
        pairs = zip(self.starts[rank], sides, strict=True)
        return tuple((first + start, stop - start) for first, (start, stop) in pairs)

    def rectangle(self, rank: int, local: Box) -> Rectangle:
        """The same of two drawn dims."""
        (top, height), (left, width) = self.part(rank, local)
        return left, top, width, height


def placed(layout: Layout, dims: DrawnDims, gap: float) -> Places:
    """Where boxes are drawn: at their coordinates for a gap of 0, else one after the other, so far apart.

    The gap is a share of the longest drawn dim; pictures of copies are always apart.
    """
    drawn = [layout.dims[d] for d in dims if d is not None]
    longest = max(stop - start for start, stop in map(span, drawn))
    thickness = max(0.2 * longest, 1.0)
    lines = [_line(None if d is None else layout.dims[d], gap * longest, thickness) for d in dims]
    others = [a for a in range(layout.grid.dim) if a not in {a for dim in drawn for a in dim.axes}]
    shape = [layout.grid.shape[a] for a in others]
    count = math.prod(shape)
    columns = math.isqrt(count) if None not in dims else 1 if dims[0] is None else count
    columns = max(columns, 1)
    apart, starts = 0.15 * max(line.size for line in lines), dict[int, tuple[float, ...]]()
    for rank in layout.grid.ranks:
        index = layout.grid.index(rank)
        assert index is not None
        tile = divmod(ravel([index[a] for a in others], shape), columns)
        moved = (0,) * (len(dims) - 2) + (tile if len(dims) == 2 else (0, sum(tile)))
        starts[rank] = tuple(
            line.starts[_position(layout, d, index)] + times * (line.size + apart)
            for line, d, times in zip(lines, dims, moved, strict=True)
        )
    times = (math.ceil(count / columns), columns) if len(dims) == 2 else (1, 1, count)
    sizes = tuple((n - 1) * (line.size + apart) + line.size for n, line in zip(times, lines, strict=True))
    return Places(dims, starts, tuple(lines), sizes, thickness)


def _position(layout: Layout, d: int | None, index: Sequence[int]) -> int:
    """Which of a dim's ranges the rank at an index has."""
    axes = () if d is None else layout.dims[d].axes
    return ravel([index[a] for a in axes], [layout.grid.shape[a] for a in axes])


def _line(dim: Dim | None, gap: float, thickness: float) -> Line:
    if dim is None:
        return Line((0.0,), 0.0, thickness)
    low, high = span(dim)
    if not gap:
        return Line(tuple(float(start) for start, _ in dim.ranges), float(low), float(high - low))
    starts, place = list[float](), 0.0
    for start, stop in dim.ranges:
        starts.append(place)
        place += stop - start + gap if start < stop else 0.0
    return Line(tuple(starts), 0.0, max(place - gap, 1.0))
