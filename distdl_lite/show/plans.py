"""Pictures of what moves between two layouts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distdl_lite.grid import Grid
from distdl_lite.layout import Box, Layout
from distdl_lite.partition import Partition
from distdl_lite.plan import Edge, Pattern, classify, plan
from distdl_lite.show import drawing
from distdl_lite.show.drawing import Dims, Place, colour, label, rectangle
from distdl_lite.show.text import MPI_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ARROWS = 2048
_GAP = 0.1


def messages(
    X: Layout | Partition | Grid | Sequence[int],
    Y: Layout | Partition | Grid | Sequence[int],
    shape: Sequence[int] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    itemsize: int = 4,
    dims: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what an operator moves, as arrows from boxes of the input, on the left, to boxes of the output.

    The boxes of a tensor stand apart, copies of it below each other. A part of the output has the colour of the rank that it
    comes from; where several are added, its own rank's; where none gives anything it is white. The width of an arrow is as its
    bytes; what a rank keeps has a thin grey line.

    Parameters
    ----------
    X, Y : Layout, Partition, Grid or sequence of int
        Of input and output, as of `partition`; those of a `Movement` are what its ``layouts(shapes)`` returns.
    shape : sequence of int, optional
        The global shape of the tensor, where a grid is given.
    ranks : sequence of int, optional
        Draw only messages from or to these; by default all.
    itemsize : int
        Bytes of an element.
    dims, ax
        As of `halos`.

    Raises
    ------
    TypeError, ValueError
        If `X` or `Y` is none of the above, they do not fit each other, or there are more than 2048 messages.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> ax = dl.show.messages((2, 1), (1, 2), shape=(7, 5))
    >>> ax.get_title()
    '2 messages, 68 bytes'
    """
    X, Y = drawing.layout_of(X, shape), drawing.layout_of(Y, shape)
    pairs = _pairs(X, Y, ranks)
    moving = [pair for pair in pairs if pair[0] != pair[1]]
    most = max((sent.size for _, _, sent, _ in moving), default=1)
    drawn = drawing.drawn_dims([X, Y], dims, 2, down=True)
    inputs = _standing(X, drawn)
    _, (left, right), *_ = drawing.reach(inputs.values())
    outputs = _standing(Y, drawn, left + 1.7 * (right - left))
    ax = drawing.axes_of(ax, drawing.reach([*inputs.values(), *outputs.values()]), flattest=0.6)
    ax.set_axis_off()
    _draw_boxes(ax, "input", inputs)
    _draw_boxes(ax, "output", outputs, None if X.overlaps else "white")
    for source, target, sent, received in sorted(pairs, key=lambda pair: (pair[0] != pair[1], -pair[2].size)):
        start, end = _part(inputs[source], sent.box, drawn), _part(outputs[target], received.box, drawn)
        if not X.overlaps:
            rectangle(ax, end, facecolor=(colour(source), 0.5), edgecolor="0.2", linewidth=0.3, gid="part", zorder=0.9)
        share = sent.size / most * min(1, (30 / len(pairs)) ** 0.5)
        _draw_arrow(ax, start, end, source, share if source != target else 0, f"message-{source}-{target}")
    count, size = len({pair[:2] for pair in moving}), sum(sent.size for _, _, sent, _ in moving) * itemsize
    pattern, idle = classify(X, Y), {*X.grid.ranks, *Y.grid.ranks} - inputs.keys() - outputs.keys()
    what = f"{count} message{'s' * (count != 1)}" if pattern is Pattern.EXCHANGE else MPI_NAMES[pattern]
    nothing = f"; hold nothing: {drawing.ranks_text(idle)}" if idle else ""
    ax.set_title(f"{what}, {size} byte{'s' * (size != 1)}{nothing}", fontsize=10, pad=20)
    return ax


def _pairs(X: Layout, Y: Layout, ranks: Sequence[int] | None) -> list[tuple[int, int, Edge, Edge]]:
    """Source, target and both ends of what moves, of all ranks or from and to some of them."""
    everyone, sent, received = {*X.grid.ranks, *Y.grid.ranks}, defaultdict(list), defaultdict(list)
    chosen = everyone if ranks is None else {*ranks}
    for rank in sorted(everyone):
        for leg in plan(X, Y, rank).legs:
            for edge in leg.sends:
                if chosen & {rank, edge.peer}:
                    sent[rank, edge.peer].append(edge)
            for edge in leg.receives:
                received[edge.peer, rank].append(edge)
        if len(sent) > _MOST_ARROWS:
            raise ValueError(f"a picture has room for {_MOST_ARROWS} messages: choose those of fewer ranks by ranks=")
    return [(*pair, one, other) for pair in sent for one, other in zip(sent[pair], received[pair], strict=True)]


def _standing(layout: Layout, dims: Dims, right: float = 0) -> dict[int, Place]:
    """Where the boxes of a layout stand, copies below each other, all of them half above and half below 0."""
    found, before = drawing.places(layout, dims, _GAP)[0], Counter[Place]()
    (top, bottom), *_ = drawing.reach(found.values())
    pitch, copies = (bottom - top) * (1 + 2 * _GAP), max(Counter(found.values()).values(), default=1)
    for rank, (down, across) in found.items():
        by = before[down, across] * pitch - (top + bottom + (copies - 1) * pitch) / 2
        before[down, across] += 1
        found[rank] = (down[0] + by, down[1] + by), (across[0] + right, across[1] + right)
    return found


def _part(place: Place, local: Box, dims: Dims) -> Place:
    """Where a part of a box is drawn."""
    sides = zip(place, drawing.picked(local, dims), strict=True)
    return tuple((start + a, start + b) for (start, _), (a, b) in sides)


def _draw_boxes(ax: Axes, side: str, boxes: dict[int, Place], face: str | None = None) -> None:
    """Boxes with their ranks in a corner, in their colours or all in one."""
    for rank, place in boxes.items():
        style = {"edgecolor": "0.2", "linewidth": 0.6, "clip_on": False, "gid": f"{side}-{rank}", "zorder": 0.8}
        rectangle(ax, place, facecolor=face or (colour(rank), 0.5), **style)
        corner = {"x": place[1][0], "y": place[0][0], "ha": "left", "va": "top"}
        label(ax, str(rank), place, colour(rank), **corner, bbox={"color": colour(rank), "boxstyle": "square,pad=0.15"})
    (top, _), (left, _), *_ = drawing.reach(boxes.values())
    ax.annotate(side, (left, top), (0, 4), textcoords="offset points", fontsize=9)


def _draw_arrow(ax: Axes, start: Place, end: Place, source: int, share: float, gid: str) -> None:
    """From middle to middle, as wide as its share; without one a thin dotted line."""
    style: dict[str, Any] = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.8, "linestyle": (0, (2, 2))}
    if share:
        line, width = [0.7 * part for part in colour(source)], max(4 * share, 0.4)
        style = {"arrowstyle": "-|>", "color": line, "linewidth": width, "mutation_scale": 7 + 2 * width}
    ends = [[(a + b) / 2 for a, b in reversed(place)] for place in (end, start)]
    ax.annotate("", *ends, arrowprops={"shrinkA": 0, "shrinkB": 0, "joinstyle": "miter", "gid": gid, **style}, zorder=1)
