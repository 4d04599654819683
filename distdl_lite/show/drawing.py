"""What the pictures share: matplotlib, colours, and where the boxes of layouts stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from distdl_lite import layout as lay
from distdl_lite.factors import blocks
from distdl_lite.grid import Grid
from distdl_lite.layout import Box, Layout, Range
from distdl_lite.partition import Partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[float, float, float]
Dims = tuple[int | None, ...]  # that are drawn, the last to the right and the one before down; None is across a strip
Place = tuple[tuple[float, float], ...]  # from where to where a box is drawn in each of them
Moves = list[dict[Range, float]]  # how far the ranges of each of them are moved
# Those of Okabe and Ito, which also people who see few colours tell apart; then darker and lighter ones.
_HUES = ["56b4e9", "e69f00", "009e73", "cc79a7", "f0e442", "0072b2", "d55e00", "888888"]
_SHADES = ((1, 0.0), (0, 0.3), (1, 0.5), (0, 0.6))  # how much white or black is added


def pyplot() -> Any:
    """matplotlib.pyplot. Raises ImportError if there is no matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "distdl_lite[pictures]"') from error
    return plt


def colour(rank: int) -> Colour:
    """The colour of a rank in all pictures, as red, green and blue from 0 to 1.

    The first eight are those of Okabe and Ito (2008), which colour-blind people tell apart too; then come darker and lighter
    ones, and from rank 32 on they begin again.

    Parameters
    ----------
    rank : int

    Examples
    --------
    >>> import distdl_lite as dl
    >>> [round(part, 2) for part in dl.show.colour(1)]
    [0.9, 0.62, 0.0]
    """
    turn, hue = divmod(rank, len(_HUES))
    other, share = _SHADES[turn % len(_SHADES)]
    red, green, blue = (part / 255 * (1 - share) + other * share for part in bytes.fromhex(_HUES[hue]))
    return red, green, blue


def layout_of(P: Any, shape: Sequence[int] | None = None, axes: Sequence[int | None] | None = None) -> Layout:
    """A layout, or that of the balanced blocks of a tensor over a grid or a grid of this shape."""
    P = P.grid_of_ranks if isinstance(P, Partition) else P
    if not isinstance(P, Layout | Grid):
        if not isinstance(P, Sequence) or not all(isinstance(n, int) and n > 0 for n in P):
            raise TypeError(f"a Partition, a Layout or the shape of a grid is needed, not {P!r}")
        P = Grid(tuple(P), range(math.prod(P)))
    if isinstance(P, Layout):
        return P
    if shape is None:
        raise ValueError(f"a grid of shape {P.shape} needs the shape of a tensor to cut")
    if axes is None:
        return lay.balanced_blocks(P, shape)
    if len(axes) != len(shape) or not {*axes} <= {None, *range(-P.dim, P.dim)}:
        raise ValueError(f"axes {axes} do not fit a tensor of shape {tuple(shape)} and a grid of shape {P.shape}")
    return Layout(P, tuple(dim for (dim,) in blocks(tuple(shape), axes, P)))


def drawn_dims(layouts: Sequence[Layout], dims: Sequence[int] | None, most: int, down: bool = False) -> Dims:
    """The dims to draw: those given, else the last that are cut, and two if fewer are. One alone goes `down` or right."""
    count = len(layouts[0].dims)
    cut = [d for d in range(count) if any(len(set(layout.dims[d].ranges)) > 1 for layout in layouts)]
    if dims is None:
        dims = sorted([*(d for d in range(count) if d not in cut), *cut][-min(max(len(cut), 2), most) :])
    if not 1 <= len(dims) <= most or not {*dims} <= {*range(count)}:
        raise ValueError(f"dims={tuple(dims)} are not 1 to {most} of the {count} dims of the tensor")
    return tuple(dims) if len(dims) > 1 else (dims[0], None) if down else (None, dims[0])


def picked(box: Box, dims: Dims) -> Box:
    """The sides of a box in the drawn dims."""
    return tuple((0, 1) if d is None else box[d] for d in dims)


def places(layout: Layout, dims: Dims, gap: float = 0) -> tuple[dict[int, Place], Moves]:
    """Where boxes stand, apart by a share of the longest dim or as they overlap, and the moves that bring them there."""
    full = [sorted({r for r in layout.dims[d].ranges if r[0] < r[1]} if d is not None else {(0, 1)}) for d in dims]
    longest, moves = max((ranges[-1][1] for ranges in full if ranges), default=1), Moves()
    for ranges in full:
        overlap = max([0, *(a[1] - b[0] for a, b in pairwise(ranges))])
        step = overlap + longest * (gap or 0.1 * (overlap > 0))
        moves.append({r: number * step for number, r in enumerate(ranges)})
    found = {}
    for rank in layout.grid.ranks:
        if 0 not in lay.shape_of(box := layout.box(rank) or ()):
            sides = zip(picked(box, dims), moves, strict=True)
            found[rank] = tuple((r[0] + move[r], r[1] + move[r]) for r, move in sides)
    return found, moves


def reach(of: Iterable[Place]) -> Place:
    """From where to where places reach in each dim."""
    return tuple((min(a for a, _ in d), max(b for _, b in d)) for d in zip(*of, strict=True)) or ((0, 1),) * 3


def axes_of(ax: Axes | None, window: Place, flattest: float = 0.2) -> Axes:
    """The Axes given, or those of a new figure, for a window, to scale unless it is flatter or steeper; y goes down."""
    (top, bottom), (left, right) = window[:2]
    ratio = (bottom - top) / (right - left)
    fitting = min(max(ratio, flattest), 1 / flattest)
    if ax is None:
        size = max(5.5 * min(1, 1 / fitting), 1.5) + 0.8, 5.5 * min(1, fitting) + 0.9
        ax = pyplot().figure(figsize=size, layout="constrained").subplots()
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal" if fitting == ratio else "auto", frame_on=False)
    ax.tick_params(length=0)
    ax.apply_aspect()
    return ax


def rectangle(ax: Axes, place: Place, **style: Any) -> None:
    """Draw a box."""
    (top, bottom), (left, right) = place
    ax.add_patch(pyplot().Rectangle((left, top), right - left, bottom - top, **style))


def label(ax: Axes, text: str, place: Place, ground: Colour = (1, 1, 1), **style: Any) -> None:
    """Write in the middle of a box, if the text fits there."""
    (top, bottom), (left, right) = place
    width, height = abs(ax.transData.transform((right, bottom)) - ax.transData.transform((left, top)))
    size = min(0.8 * height, width / (0.7 * len(text))) * 72 / ax.figure.dpi
    if size >= 3.5:
        middle = {"x": (left + right) / 2, "y": (top + bottom) / 2, "ha": "center", "va": "center"}
        ax.text(**{"s": text, "fontsize": min(size, 10), "color": ink_on(ground), **middle, **style})


def ink_on(ground: Colour) -> str:
    """Black or white, whichever can be read."""
    return "black" if 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 0.5 else "white"


def mark(ax: Any, dims: Dims, moves: Moves, names: Sequence[str] | None = None) -> None:
    """Ticks where the ranges of the dims begin and end, some sixteen at most; and the dims' names, or else numbers."""
    axes = (ax.yaxis, ax.xaxis) if len(dims) == 2 else (ax.yaxis, ax.zaxis, ax.xaxis)
    for axis, d, of_dim in zip(axes, dims, moves, strict=True):
        low, high = sorted(axis.get_view_interval())
        ends = {end: end + move for r, move in of_dim.items() for end in reversed(r)}
        seen = sorted((place, str(end)) for end, place in ends.items() if d is not None and low <= place <= high)
        chosen = seen[:: -max(math.ceil((len(seen) - 1) / 16), 1)]
        axis.set_ticks([place for place, _ in chosen], [end for _, end in chosen])
        axis.set_label_text("" if d is None else f"dim {d}" if names is None else names[d])


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks, those that follow each other as first and last."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])]
    return ", ".join("\N{EN DASH}".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)
