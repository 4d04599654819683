"""Pictures of what moves between two layouts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distdl_lite import layout as lay
from distdl_lite.grid import Grid
from distdl_lite.layout import Box, Layout, Shape
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import Edge, Pattern, Plan, classify, plan
from distdl_lite.show.drawing import (
    DARK,
    axes_of,
    colour,
    deep,
    fitting,
    frame,
    line_width,
    pale,
    points,
    readable_on,
    rectangle,
)
from distdl_lite.show.places import (
    GAP,
    DrawnDims,
    Rectangle,
    check_size,
    drawn_dims,
    full_boxes,
    layout_of,
    placed,
    ranks_text,
    whole_of,
)
from distdl_lite.show.text import MPI_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ARROWS = 2048
Place = tuple[float, float]


def messages(
    X: Layout | Partition | Grid | Sequence[int] | Plan | Operator,
    Y: Layout | Partition | Grid | Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    itemsize: int = 4,
    dims: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what an operator moves, as arrows from boxes of the input, on the left, to boxes of the output.

    The boxes of a tensor stand apart, so that those that overlap do not hide each other; copies have a picture of the tensor
    each. A part of the output has the colour of the rank that it comes from; where several are added, its own rank's; where none
    gives anything it is white. The width of an arrow is as its bytes; what a rank keeps has a thin grey line.

    Parameters
    ----------
    X, Y : Layout, Partition, Grid or sequence of int
        Of input and output; those that are no layouts cut a tensor of shape `shape` in balanced blocks. Of a `Movement` they are
        what its ``layouts(shapes)`` returns. A single Plan or Operator is drawn as its rank sees it: its blocks, and of the
        other ranks what they send or get.
    shape : sequence of int, optional
        Of the whole tensor, where a grid is given.
    ranks : sequence of int, optional
        Draw only messages from or to these; by default all.
    itemsize : int
        Bytes of an element.
    dims : sequence of int, optional
        One or two dims to draw; by default those that are cut.
    ax : matplotlib.axes.Axes, optional

    Raises
    ------
    ValueError
        If the layouts do not fit each other, or there are more than 1024 ranks or 2048 messages.
    TypeError
        If `X` or `Y` is none of the above, or only one is given that is no Plan or Operator.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> ax = dl.show.messages((2, 1), (1, 2), shape=(7, 5))
    >>> ax.get_title()
    '2 messages, 68 bytes'
    """
    if isinstance(X, Operator):
        X = X.plan
    if isinstance(X, Plan):
        if Y is not None:
            raise TypeError("a Plan has its input and its output: no Y can be given with it")
        scene = _own_scene(X, dims)
    elif Y is None:
        raise TypeError("messages go from X to Y: two layouts are needed, or a Plan or an Operator")
    else:
        scene = _scene(layout_of(X, shape), layout_of(Y, shape), ranks, dims)
    return _draw_scene(scene, itemsize, ax)


@dataclass(frozen=True)
class _Arrow:
    source: int
    target: int
    start: Rectangle  # in the picture of the input
    end: Rectangle  # in that of the output
    size: int


@dataclass(frozen=True)
class _Scene:
    """The boxes of input and output in pictures of their own, the sizes of these down and to the right, and the arrows."""

    left: list[tuple[int, Rectangle]]
    right: list[tuple[int, Rectangle]]
    left_size: tuple[float, ...]
    right_size: tuple[float, ...]
    arrows: list[_Arrow]
    pattern: Pattern
    adds: bool
    told: Collection[int]  # the ranks all of whose messages are there
    nothing: str = ""  # who holds nothing


def _down_and_right(layouts: Sequence[Layout], dims: Sequence[int] | None) -> DrawnDims:
    """The two dims drawn; a single one goes down, so that arrows go across it."""
    drawn = drawn_dims(layouts, dims, 2)
    return (*drawn, None) if len(drawn) == 1 else drawn


def _scene(X: Layout, Y: Layout, ranks: Sequence[int] | None, dims: Sequence[int] | None) -> _Scene:
    if len(X.dims) != len(Y.dims):
        raise ValueError(f"an operator cannot go from {len(X.dims)} dims to {len(Y.dims)}")
    for layout in (X, Y):
        check_size(layout.grid)
    drawn = _down_and_right([X, Y], dims)
    left, right = placed(X, drawn, GAP), placed(Y, drawn, GAP)
    boxes_in, boxes_out = full_boxes(X), full_boxes(Y)
    arrows = [
        _Arrow(source, target, left.rectangle(source, sent.box), right.rectangle(target, received.box), sent.size)
        for source, target, sent, received in _moves(X, Y, ranks)
    ]
    idle = sorted({*X.grid.ranks, *Y.grid.ranks} - boxes_in.keys() - boxes_out.keys())
    return _Scene(
        [(rank, left.rectangle(rank, whole_of(box))) for rank, box in boxes_in.items()],
        [(rank, right.rectangle(rank, whole_of(box))) for rank, box in boxes_out.items()],
        left.sizes,
        right.sizes,
        arrows,
        classify(X, Y),
        X.overlaps,
        Y.grid.ranks if ranks is None else ranks,
        f"{ranks_text(idle)}: nothing" if idle else "",
    )


def _moves(X: Layout, Y: Layout, ranks: Sequence[int] | None) -> Iterator[tuple[int, int, Edge, Edge]]:
    """Source, target and both ends of what moves, of all ranks or from and to some of them."""
    everyone = sorted({*X.grid.ranks, *Y.grid.ranks})
    wanted = set(everyone if ranks is None else ranks)
    if not wanted <= set(everyone):
        raise ValueError(f"ranks {sorted(wanted - set(everyone))} are in neither layout")
    plans = {rank: plan(X, Y, rank) for rank in everyone}
    pairs = {(rank, edge.peer) for rank in wanted for leg in plans[rank].legs for edge in leg.sends}
    pairs |= {(edge.peer, rank) for rank in wanted for leg in plans[rank].legs for edge in leg.receives}
    if len(pairs) > _MOST_ARROWS:
        raise ValueError(f"a picture has room for {_MOST_ARROWS} messages, not for {len(pairs)}: choose some by ranks=")
    for source, target in sorted(pairs):
        sent = [edge for leg in plans[source].legs for edge in leg.sends if edge.peer == target]
        received = [edge for leg in plans[target].legs for edge in leg.receives if edge.peer == source]
        for one, other in zip(sent, received, strict=True):
            yield source, target, one, other


def _own_scene(mine: Plan, dims: Sequence[int] | None) -> _Scene:
    """One rank's blocks, and below them of the other ranks what it gets from them or gives them."""
    rank, alone = mine.rank, Grid((1,), (mine.rank,))
    shapes = [shape for shape in (mine.shape_in, mine.shape_out) if shape is not None and 0 not in shape]
    if not shapes:
        return _Scene([], [], (0.2, 1.0), (0.2, 1.0), [], mine.pattern, False, (), f"rank {rank}: nothing")
    down, right = _down_and_right([lay.whole(alone, shape) for shape in shapes], dims)
    thickness = 0.2 * max(n for shape in shapes for d, n in enumerate(shape) if d in (down, right))

    def drawn(box: Box) -> Rectangle:
        (top, bottom), (left, stop) = ((0, thickness) if d is None else box[d] for d in (down, right))
        return left, top, stop - left, bottom - top

    def beside(shape: Shape | None, edges: Sequence[Edge]) -> list[tuple[int, Rectangle]]:
        """The rank's own block, and what each edge to another is, below it."""
        own = [(rank, drawn(tuple((0, n) for n in shape)))] if shape is not None and 0 not in shape else []
        size = own[0][1][2:] if own else (0.0, 0.0)
        stubs = _in_rows([drawn(edge.box) for edge in edges], *size)
        return own + list(zip((edge.peer for edge in edges), stubs, strict=True))

    sends = [edge for leg in mine.legs for edge in leg.sends]
    receives = [edge for leg in mine.legs for edge in leg.receives]
    kept = zip([e for e in sends if e.peer == rank], [e for e in receives if e.peer == rank], strict=True)
    sent, received = ([edge for edge in edges if edge.peer != rank] for edges in (sends, receives))
    left, right_side = beside(mine.shape_in, received), beside(mine.shape_out, sent)
    givers, takers = left[len(left) - len(received) :], right_side[len(right_side) - len(sent) :]
    arrows = [_Arrow(rank, rank, drawn(one.box), drawn(other.box), one.size) for one, other in kept]
    arrows += [_Arrow(rank, peer, drawn(e.box), stub, e.size) for e, (peer, stub) in zip(sent, takers, strict=True)]
    arrows += [_Arrow(peer, rank, stub, drawn(e.box), e.size) for e, (peer, stub) in zip(received, givers, strict=True)]
    sizes = _size_of(left), _size_of(right_side)
    return _Scene(left, right_side, *sizes, arrows, mine.pattern, mine.adds_out, (rank,))


def _in_rows(boxes: Sequence[Rectangle], width: float, height: float) -> list[Rectangle]:
    """The boxes in rows below one of this size, about as wide."""
    area = sum(w * h for _, _, w, h in boxes)
    widest = max([width, *(w for _, _, w, _ in boxes)], default=0.0)
    limit, gap = max(widest, math.sqrt(area)), 0.12 * max(widest, height)
    found: list[Rectangle] = []
    x, y, tallest = 0.0, height + gap if height else 0.0, 0.0
    for _, _, w, h in boxes:
        if x and x + w > limit:
            x, y, tallest = 0.0, y + tallest + gap, 0.0
        found.append((x, y, w, h))
        x, tallest = x + w + gap, max(tallest, h)
    return found


def _size_of(boxes: Sequence[tuple[int, Rectangle]]) -> tuple[float, float]:
    """How far boxes reach down and to the right."""
    bottoms, rights = [y + h for _, (_, y, _, h) in boxes], [x + w for _, (x, _, w, _) in boxes]
    return max(bottoms, default=1.0), max(rights, default=1.0)


def _draw_scene(scene: _Scene, itemsize: int, ax: Axes | None) -> Axes:
    height = max(scene.left_size[0], scene.right_size[0])
    between = max(0.6 * max(scene.left_size[1], scene.right_size[1]), 0.35 * height)
    width = scene.left_size[1] + between + scene.right_size[1]
    at_left = (0.0, (height - scene.left_size[0]) / 2)
    at_right = (scene.left_size[1] + between, (height - scene.right_size[0]) / 2)
    ax, margin = axes_of(ax, height / width, 6.5), 0.02 * max(width, height)
    frame(ax, -margin, width + margin, -margin, height + margin)
    ax.set_axis_off()
    _draw_boxes(ax, scene, at_left, at_right)
    _draw_arrows(ax, scene.arrows, at_left, at_right)
    _write_words(ax, scene, at_left, at_right, itemsize)
    if scene.nothing:
        ax.annotate(scene.nothing, (0, height), (0, -6), textcoords="offset points", fontsize=9, color=DARK, va="top")
    return ax


def _draw_boxes(ax: Axes, scene: _Scene, at_left: Place, at_right: Place) -> None:
    """Those of the input in their ranks' colours, those of the output in parts of their senders'."""
    scale = points(ax)

    def bordered(box: Rectangle, by: Place, most: float, **style: Any) -> None:
        rectangle(ax, _moved(box, by), edgecolor=DARK, linewidth=line_width(box, scale, most), **style)

    for rank, box in scene.left:
        bordered(box, at_left, 0.8, facecolor=pale(rank), gid=f"input-{rank}")
    for rank, box in scene.right:
        face = pale(rank) if scene.adds else "white" if rank in scene.told else (0.93, 0.93, 0.93)
        bordered(box, at_right, 0.8, facecolor=face, gid=f"output-{rank}")
    for arrow in () if scene.adds else scene.arrows:
        bordered(arrow.end, at_right, 0.3, facecolor=pale(arrow.source), gid="part")


def _write_words(ax: Axes, scene: _Scene, at_left: Place, at_right: Place, itemsize: int) -> None:
    """The ranks in their boxes, and above them what is what and how much moves."""
    scale = points(ax)
    for boxes, by, text in ((scene.left, at_left, "input"), (scene.right, at_right, "output")):
        for rank, box in boxes:
            _badge(ax, rank, _moved(box, by), scale)
        if boxes:
            ax.annotate(text, by, (0, 4), textcoords="offset points", fontsize=9, color=DARK, va="bottom")
    sent = [arrow for arrow in scene.arrows if arrow.source != arrow.target]
    count = len({(arrow.source, arrow.target) for arrow in sent})
    what = f"{count} message{'s' * (count != 1)}" if scene.pattern is Pattern.EXCHANGE else MPI_NAMES[scene.pattern]
    size = sum(arrow.size for arrow in sent) * itemsize
    ax.set_title(f"{what}, {size} byte{'s' * (size != 1)}", fontsize=10, pad=20)


def _draw_arrows(ax: Axes, arrows: Sequence[_Arrow], at_left: Place, at_right: Place) -> None:
    """Those of a rank to itself thin, below the others, whose width is as their bytes."""
    from matplotlib.patches import FancyArrowPatch

    moving = [arrow.size for arrow in arrows if arrow.source != arrow.target]
    widest, most = max(moving, default=1), 4 * min(1.0, (30 / max(len(moving), 1)) ** 0.5)
    for arrow in sorted(arrows, key=lambda a: (a.source != a.target, -a.size)):
        ends = _middle(_moved(arrow.start, at_left)), _middle(_moved(arrow.end, at_right))
        moves = arrow.source != arrow.target
        width = max(most * arrow.size / widest, 0.4) if moves else 0.8
        line = deep(arrow.source) if moves else (0.5, 0.5, 0.5)
        style = {"color": line, "linewidth": width, "linestyle": "-" if moves else (0, (2, 2))}
        ax.add_patch(
            FancyArrowPatch(
                *ends,
                arrowstyle="-|>" if moves else "-",
                mutation_scale=7 + 2 * width,
                shrinkA=0,
                shrinkB=0,
                joinstyle="miter",
                gid=f"message-{arrow.source}-{arrow.target}",
                **style,
            )
        )


def _middle(box: Rectangle) -> tuple[float, float]:
    x, y, width, height = box
    return x + width / 2, y + height / 2


def _badge(ax: Axes, rank: int, box: Rectangle, scale: tuple[float, float]) -> None:
    """The rank in its colour, in the upper left corner of its box, if there is room."""
    x, y, width, height = box
    size = min(9.0, fitting("000", width * scale[0], height * scale[1]) or 0)
    if size:
        ax.annotate(
            str(rank),
            (x, y),
            (1, -1),
            textcoords="offset points",
            fontsize=size,
            ha="left",
            va="top",
            color=readable_on(colour(rank)),
            bbox={"facecolor": colour(rank), "edgecolor": "none", "boxstyle": "square,pad=0.15"},
        )


def _moved(box: Rectangle, by: Place) -> Rectangle:
    x, y, width, height = box
    return x + by[0], y + by[1], width, height
