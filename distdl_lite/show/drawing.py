"""What the pictures share: matplotlib, colours, labels, and where the boxes of layouts stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distdl_lite.grid import Grid, ravel
from distdl_lite.layout import Box, Dim, Layout, Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[float, float, float]
Rectangle = tuple[float, float, float, float]  # left, top, width, height

DARK = (0.2, 0.2, 0.2)
BLACK, WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
# Those of Okabe and Ito, which also people who see few colours tell apart.
_HUES = (0x56B4E9, 0xE69F00, 0x009E73, 0xCC79A7, 0xF0E442, 0x0072B2, 0xD55E00, 0x888888)
_SHADES = ((WHITE, 0.0), (WHITE, 0.5), (BLACK, 0.4), (WHITE, 0.72))
_MOST_RANKS = 1024
_FLATTEST = 0.2  # a picture's height over its width, or the other way round; what is longer is squeezed


def pyplot() -> Any:
    """matplotlib.pyplot.

    Raises
    ------
    ImportError
        If there is no matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "distdl_lite[pictures]"') from error
    return plt


def colour(rank: int) -> Colour:
    """The colour of a rank in all pictures, as red, green and blue from 0 to 1.

    The first eight are those of Okabe and Ito (2008), which also colour-blind people tell apart; they follow lighter and darker, and
    after 32 ranks again.

    Raises
    ------
    ValueError
        If the rank is negative.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> [round(part, 2) for part in dl.show.colour(1)]
    [0.9, 0.62, 0.0]
    """
    if rank < 0:
        raise ValueError(f"a rank is not negative, {rank} has no colour")
    turn, number = divmod(rank, len(_HUES))
    hue = _HUES[number]
    plain = (hue >> 16) / 255, (hue >> 8 & 255) / 255, (hue & 255) / 255
    return mixed(plain, *_SHADES[turn % len(_SHADES)])


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """A colour with a share of another."""
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return red, green, blue


def pale(rank: int) -> Colour:
    """A rank's colour behind words and arrows."""
    return mixed(colour(rank), WHITE, 0.5)


def deep(rank: int) -> Colour:
    """A rank's colour for lines."""
    return mixed(colour(rank), BLACK, 0.3)


def readable_on(ground: Colour) -> str:
    """Black or white."""
    return "black" if 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 0.5 else "white"


def axes_of(ax: Axes | None, ratio: float, inches: float = 5.5) -> Axes:
    """The Axes given, or those of a new figure for a picture of this height over its width."""
    if ax is not None:
        return ax
    ratio = min(max(ratio, _FLATTEST), 1 / _FLATTEST)
    width, height = (inches, inches * ratio) if ratio < 1 else (inches / ratio, inches)
    return pyplot().figure(figsize=(max(width, 1.5) + 0.8, height + 0.9), layout="constrained").subplots()


def frame(ax: Axes, left: float, right: float, top: float, bottom: float) -> None:
    """Set the limits, to scale unless that would be a line, with y downwards."""
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ratio = (bottom - top) / (right - left)
    ax.set_box_aspect(min(max(ratio, _FLATTEST), 1 / _FLATTEST))
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)


def points(ax: Axes) -> tuple[float, float]:
    """How many points of a font a unit of the drawn Axes takes, to the right and down."""
    ax.apply_aspect()
    window, scale = ax.get_window_extent(), 72 / ax.figure.dpi
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return scale * window.width / abs(right - left), scale * window.height / abs(top - bottom)


def fitting(text: str, width: float, height: float) -> float | None:
    """The size of the font for a text in a box of so many points, None where it could not be read."""
    size = min(11.0, 0.8 * height, width / (0.7 * len(text)))
    return size if size >= 4.5 else None


def label(ax: Axes, text: str, place: Rectangle, ground: Colour, scale: tuple[float, float], **options: Any) -> None:
    """A text in the middle of a rectangle, upright or turned, if it fits."""
    x, y, width, height = place
    across, down = width * scale[0], height * scale[1]
    size, turned = fitting(text, across, down), fitting(text, down, across)
    if size or turned:
        middle = {"ha": "center", "va": "center", "color": readable_on(ground), "fontsize": size or turned}
        ax.text(x + width / 2, y + height / 2, text, rotation=0 if size else 90, **(middle | options))


def rectangle(ax: Axes, place: Rectangle, **options: Any) -> None:
    """Draw a rectangle."""
    from matplotlib.patches import Rectangle as Patch

    ax.add_patch(Patch(place[:2], *place[2:], **options))


def line_width(place: Rectangle, scale: tuple[float, float], most: float = 0.8) -> float:
    """The width of a rectangle's border, thinner round a small one."""
    return min(most, 0.1 * min(place[2] * scale[0], place[3] * scale[1]))


def spread(marks: Sequence[tuple[float, int]], least: float) -> list[tuple[float, int]]:
    """Of marks on an axis those at least so far from each other, the last among them."""
    found: list[tuple[float, int]] = []
    for mark in sorted(set(marks)):
        if not found or mark[0] - found[-1][0] >= least:
            found.append(mark)
    last = max(marks, default=None)
    if last is not None and last not in found:
        found[-1:] = [last] if len(found) > 1 else [*found, last]
    return found


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
            line.starts[position(layout, d, index)] + times * (line.size + apart)
            for line, d, times in zip(lines, dims, moved, strict=True)
        )
    times = (math.ceil(count / columns), columns) if len(dims) == 2 else (1, 1, count)
    sizes = tuple(n * (line.size + apart) - apart for n, line in zip(times, lines, strict=True))
    return Places(dims, starts, tuple(lines), sizes, thickness)


def position(layout: Layout, d: int | None, index: Sequence[int]) -> int:
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
