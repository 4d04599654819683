"""Pictures of layouts and of what moves between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distdl_lite import layout as lay
from distdl_lite.factors import blocks
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Box, Dim, Layout, ranges_of, shape_of
from distdl_lite.nn.conv.geometry import ConvGeometry
from distdl_lite.nn.options import listed
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import Edge, Pattern, Plan, classify, plan
from distdl_lite.show.drawing import (
    BLACK,
    DARK,
    WHITE,
    Colour,
    DrawnDims,
    Line,
    Places,
    Rectangle,
    axes_of,
    check_size,
    colour,
    deep,
    drawn_dims,
    fitting,
    frame,
    label,
    line_width,
    mixed,
    pale,
    placed,
    points,
    pyplot,
    readable_on,
    rectangle,
    span,
    spread,
)
from distdl_lite.show.text import MPI_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 0.06  # between boxes of a tensor, of its longest dim
_MOST_ARROWS = 2048


def partition(
    P: Partition | Grid | Layout | Sequence[int],
    shape: Sequence[int] | None = None,
    axes: Sequence[int | None] | None = None,
    *,
    dims: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which block of a tensor each rank holds, to scale.

    Of one dim a strip, of two a plane, of three boxes that are drawn a little apart; of more dims those that are cut. Ranks that
    hold copies have a picture of the tensor each; blocks that overlap shine through. Ranks without a point are named below.

    Parameters
    ----------
    P : Partition, Grid, Layout or sequence of int
        The grid, or its shape, that cuts the tensor in balanced blocks; or a layout.
    shape : sequence of int
        The global shape of the tensor; not with a layout.
    axes : sequence of int or None, optional
        The axis of the grid that cuts each dim, None for a whole one; by default dim d is cut along axis d.
    dims : sequence of int, optional
        The dims to draw, at most three.
    ax : matplotlib.axes.Axes, optional
        Where to draw; for three dims one of ``projection="3d"``.

    Raises
    ------
    ValueError
        If the shape does not fit the grid, `dims` the shape, or `ax` the number of dims; if there are more than 1024 ranks.
    TypeError
        If `P` is none of the above.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> ax = dl.show.partition((2, 1), (7, 5))
    >>> [(patch.get_y(), patch.get_height()) for patch in ax.patches]
    [(0.0, 4), (4.0, 3)]
    """
    layout = layout_of(P, shape, axes)
    check_size(layout.grid)
    drawn = drawn_dims([layout], dims, 3)
    if len(drawn) == 3:
        return _solid(layout, drawn, ax)
    return _plane(layout, (None, *drawn) if len(drawn) == 1 else drawn, ax)


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


def _whole(box: Box) -> Box:
    """A box in its own coordinates."""
    return tuple((0, n) for n in shape_of(box))


def _boxes(layout: Layout) -> dict[int, Box]:
    """The boxes of the ranks that hold something."""
    found = {rank: layout.box(rank) for rank in layout.grid.ranks}
    return {rank: box for rank, box in found.items() if box is not None and 0 not in shape_of(box)}


def _plane(layout: Layout, dims: DrawnDims, ax: Axes | None) -> Axes:
    overlaps = any(layout.dims[d].overlaps for d in dims if d is not None)
    places, boxes = placed(layout, dims, _GAP if overlaps else 0), _boxes(layout)
    (top, left), (height, width) = places.low, places.sizes
    ax = axes_of(ax, height / width)
    frame(ax, left, left + width, top, top + height)
    scale = points(ax)
    for rank, box in boxes.items():
        place = places.rectangle(rank, _whole(box))
        border = line_width(place, scale, 1.2)
        rectangle(ax, place, facecolor=colour(rank), edgecolor="white", linewidth=border, gid=f"rank-{rank}")
        for part in _shared(layout, rank, box) if overlaps else ():
            hatched = {"fill": False, "edgecolor": deep(rank), "linewidth": 0, "hatch": "///", "gid": f"shared-{rank}"}
            rectangle(ax, places.rectangle(rank, part), **hatched)
        ground = {"facecolor": colour(rank), "edgecolor": "none", "boxstyle": "square,pad=0.2"} if overlaps else None
        label(ax, str(rank), place, colour(rank), scale, bbox=ground)
    _mark_cuts(ax, layout, places, scale)
    _tell_of_empty(ax, layout, boxes)
    return ax


def _shared(layout: Layout, rank: int, box: Box) -> Iterator[Box]:
    """The parts of a box that another rank holds too, in the box's own coordinates."""
    key = layout.key(rank)
    assert key is not None
    for other, part, _ in layout.meeting(box, key, [dim.period for dim in layout.dims]):
        if other != rank and layout.box(other) != box:
            yield tuple((a - start, b - start) for (a, b), (start, _) in zip(part, box, strict=True))


def _mark_cuts(ax: Axes, layout: Layout, places: Places, scale: tuple[float, float]) -> None:
    """Ticks at the ends of the blocks, where there is room."""
    down, right = places.dims
    for d, line, axis, least in (
        (right, places.lines[1], ax.xaxis, 18 / scale[0]),
        (down, places.lines[0], ax.yaxis, 11 / scale[1]),
    ):
        marks = [] if d is None else _ends(layout.dims[d], line)
        kept = spread(marks, least)
        axis.set_ticks([place for place, _ in kept], [str(point) for _, point in kept])
        if d is not None:
            axis.set_label_text(f"dim {d}")


def _ends(dim: Dim, line: Line) -> list[tuple[float, int]]:
    """Where the ranges of a dim begin and end in a picture, with the points that these are."""
    full = [(place, r) for place, r in zip(line.starts, dim.ranges, strict=True) if r[0] < r[1]]
    return [mark for place, (start, stop) in full for mark in ((place, start), (place + stop - start, stop))]


def _tell_of_empty(ax: Any, layout: Layout, boxes: dict[int, Box]) -> None:
    """Name the ranks that hold nothing, above the picture."""
    empty = [rank for rank in layout.grid.ranks if rank not in boxes]
    if empty:
        ax.set_title(f"{_ranks_text(empty)}: nothing", fontsize=9, color=DARK, loc="left")


def _ranks_text(ranks: Sequence[int]) -> str:
    """Ranks, those that follow each other as first and last."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("\N{EN DASH}".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _solid(layout: Layout, dims: tuple[int, ...], ax: Any) -> Any:
    """Boxes in space: the first dim goes to the back, the second down, the third to the right."""
    if ax is None:
        ax = pyplot().figure(figsize=(6, 5.2), layout="constrained").add_subplot(projection="3d")
    elif getattr(ax, "name", "") != "3d":
        raise ValueError('a tensor of three dims needs an ax of projection="3d"')
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    places, boxes = placed(layout, dims, _GAP), _boxes(layout)
    sides = {rank: places.part(rank, _whole(box)) for rank, box in boxes.items()}
    ax.computed_zorder = False
    # The eye is in front, above and to the right: what is nearer to it is drawn later.
    order = sorted(sides, key=lambda rank: (-sides[rank][0][0], -sides[rank][1][0], sides[rank][2][0]))
    for number, rank in enumerate(order):
        faces = _faces(*((start, start + length) for start, length in sides[rank]))
        colours = [shade for shade in _shades(rank) for _ in range(2)]
        solid = Poly3DCollection(
            faces, facecolors=colours, edgecolors="white", linewidths=0.6, zorder=number, gid=f"rank-{rank}"
        )
        ax.add_collection3d(solid)
    _frame_solid(ax, layout, places)
    for rank in order:
        d = _seen_face(sides[rank], sides.values())
        if d is not None:
            y, z, x = (
                _outward(sides[rank], e) if e == d else start + length / 2
                for e, (start, length) in enumerate(sides[rank])
            )
            words = {"ha": "center", "va": "center", "fontsize": 9, "color": readable_on(_shades(rank)[d])}
            ax.text(x, y, z, str(rank), zorder=len(order), **words)
    _tell_of_empty(ax, layout, boxes)
    return ax


Sides = tuple[tuple[float, float], ...]  # start and length of a box in each dim


def _shades(rank: int) -> tuple[Colour, Colour, Colour]:
    """The colours of a box's front, top and right face."""
    plain = colour(rank)
    return plain, mixed(plain, WHITE, 0.3), mixed(plain, BLACK, 0.2)


def _faces(y: Sequence[float], z: Sequence[float], x: Sequence[float]) -> list[list[tuple[float, float, float]]]:
    """The corners of the faces of a box, two across each dim, x to the right, y to the back, z down."""
    around = ((0, 0), (0, 1), (1, 1), (1, 0))
    return [
        *([(x[i], end, z[j]) for i, j in around] for end in y),
        *([(x[i], y[j], end) for i, j in around] for end in z),
        *([(end, y[i], z[j]) for i, j in around] for end in x),
    ]


def _outward(sides: Sides, d: int) -> float:
    """Where a box ends towards the eye."""
    return sum(sides[d]) if d == 2 else sides[d][0]


def _seen_face(sides: Sides, others: Iterable[Sides]) -> int | None:
    """The dim of a box's front, top or right face, the first that no other box stands before, None without one."""

    def is_hidden(d: int) -> bool:
        toward = 1 if d == 2 else -1
        return any(
            all(other[e] == sides[e] for e in range(3) if e != d)
            and toward * (_outward(other, d) - _outward(sides, d)) > 0
            for other in others
        )

    return next((d for d in range(3) if not is_hidden(d)), None)


def _frame_solid(ax: Any, layout: Layout, places: Places) -> None:
    ends = [(low, low + size) for low, size in zip(places.low, places.sizes, strict=True)]
    ax.set_ylim(*ends[0])
    ax.set_zlim(*ends[1][::-1])
    ax.set_xlim(*ends[2])
    longest = max(places.sizes)
    ax.set_box_aspect([max(places.sizes[d] / longest, 0.15) for d in (2, 0, 1)], zoom=0.9)
    ax.view_init(elev=24, azim=-60)
    ax.grid(False)
    for d, line, axis in zip(places.dims, places.lines, (ax.yaxis, ax.zaxis, ax.xaxis), strict=True):
        assert d is not None
        axis.pane.set_visible(False)
        axis.line.set_visible(False)
        axis.set_label_text(f"dim {d}")
        kept = spread(_ends(layout.dims[d], line), 0.1 * longest)
        axis.set_ticks([place for place, _ in kept], [str(point) for _, point in kept])


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

    The boxes of a tensor stand apart, so that those that overlap do not hide each other; copies have a picture of the tensor each.
    A part of the output has the colour of the rank that it comes from, or its own where several are added, or is white where
    it comes from none. The wider an arrow, the more bytes; what a rank keeps has a thin grey one.

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
    nothing: str


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
    left, right = placed(X, drawn, _GAP), placed(Y, drawn, _GAP)
    boxes_in, boxes_out = _boxes(X), _boxes(Y)
    arrows = [
        _Arrow(source, target, left.rectangle(source, sent.box), right.rectangle(target, received.box), sent.size)
        for source, target, sent, received in _moves(X, Y, ranks)
    ]
    idle = sorted({*X.grid.ranks, *Y.grid.ranks} - boxes_in.keys() - boxes_out.keys())
    return _Scene(
        [(rank, left.rectangle(rank, _whole(box))) for rank, box in boxes_in.items()],
        [(rank, right.rectangle(rank, _whole(box))) for rank, box in boxes_out.items()],
        left.sizes,
        right.sizes,
        arrows,
        classify(X, Y),
        X.overlaps,
        Y.grid.ranks if ranks is None else ranks,
        f"{_ranks_text(idle)}: nothing" if idle else "",
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
        return _Scene([], [], (1.0, 1.0), (1.0, 1.0), [], mine.pattern, False, (), f"rank {rank}: nothing")
    down, right = _down_and_right([lay.whole(alone, shape) for shape in shapes], dims)
    thickness = 0.2 * max(n for shape in shapes for d, n in enumerate(shape) if d in (down, right))

    def drawn(box: Box) -> Rectangle:
        (top, bottom), (left, stop) = ((0, thickness) if d is None else box[d] for d in (down, right))
        return left, top, stop - left, bottom - top

    sends = [edge for leg in mine.legs for edge in leg.sends]
    receives = [edge for leg in mine.legs for edge in leg.receives]
    sides = []
    for shape, others in ((mine.shape_in, receives), (mine.shape_out, sends)):
        own = [(rank, drawn(tuple((0, n) for n in shape)))] if shape is not None and 0 not in shape else []
        stubs = _in_rows(
            [drawn(edge.box) for edge in others if edge.peer != rank], *own[0][1][2:] if own else (0.0, 0.0)
        )
        sides.append((own, list(zip((edge.peer for edge in others if edge.peer != rank), stubs, strict=True))))
    (own_in, givers), (own_out, takers) = sides
    kept = zip([e for e in sends if e.peer == rank], [e for e in receives if e.peer == rank], strict=True)
    sent, received = ([e for e in edges if e.peer != rank] for edges in (sends, receives))
    arrows = [_Arrow(rank, rank, drawn(one.box), drawn(other.box), one.size) for one, other in kept]
    arrows += [_Arrow(rank, peer, drawn(e.box), stub, e.size) for e, (peer, stub) in zip(sent, takers, strict=True)]
    arrows += [_Arrow(peer, rank, stub, drawn(e.box), e.size) for e, (peer, stub) in zip(received, givers, strict=True)]
    left, right_side = own_in + givers, own_out + takers
    return _Scene(
        left, right_side, _size_of(left), _size_of(right_side), arrows, mine.pattern, mine.adds_out, (rank,), ""
    )


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
    widths = scene.left_size[1], scene.right_size[1]
    between = max(0.6 * max(widths), 0.35 * height)
    width = sum(widths) + between
    at_left = (0.0, (height - scene.left_size[0]) / 2)
    at_right = (widths[0] + between, (height - scene.right_size[0]) / 2)
    margin = 0.02 * max(width, height)
    ax = axes_of(ax, height / width, 6.5)
    frame(ax, -margin, width + margin, -margin, height + margin)
    ax.set_axis_off()
    if not scene.left and not scene.right:
        ax.set_title(scene.nothing, fontsize=10)
        return ax
    scale = points(ax)
    for rank, box in scene.left:
        border = {"edgecolor": DARK, "linewidth": line_width(box, scale)}
        rectangle(ax, _moved(box, at_left), facecolor=pale(rank), gid=f"input-{rank}", **border)
    for rank, box in scene.right:
        face = pale(rank) if scene.adds else "white" if rank in scene.told else (0.93, 0.93, 0.93)
        border = {"edgecolor": DARK, "linewidth": line_width(box, scale)}
        rectangle(ax, _moved(box, at_right), facecolor=face, gid=f"output-{rank}", **border)
    for arrow in () if scene.adds else scene.arrows:
        border = {"edgecolor": DARK, "linewidth": line_width(arrow.end, scale, 0.3)}
        rectangle(ax, _moved(arrow.end, at_right), facecolor=pale(arrow.source), gid="part", **border)
    _draw_arrows(ax, scene.arrows, at_left, at_right)
    for boxes, by in ((scene.left, at_left), (scene.right, at_right)):
        for rank, box in boxes:
            _badge(ax, rank, _moved(box, by), scale)
    sent = [arrow for arrow in scene.arrows if arrow.source != arrow.target]
    count = len({(arrow.source, arrow.target) for arrow in sent})
    what = f"{count} message{'s' * (count != 1)}" if scene.pattern is Pattern.EXCHANGE else MPI_NAMES[scene.pattern]
    ax.set_title(f"{what}, {sum(arrow.size for arrow in sent) * itemsize} bytes", fontsize=10, pad=20)
    for (x, y), text, boxes in ((at_left, "input", scene.left), (at_right, "output", scene.right)):
        if boxes:
            ax.annotate(text, (x, y), (0, 4), textcoords="offset points", fontsize=9, color=DARK, va="bottom")
    if scene.nothing:
        ax.annotate(scene.nothing, (0, height), (0, -6), textcoords="offset points", fontsize=9, color=DARK, va="top")
    return ax


def _draw_arrows(
    ax: Axes, arrows: Sequence[_Arrow], at_left: tuple[float, float], at_right: tuple[float, float]
) -> None:
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


def _moved(box: Rectangle, by: tuple[float, float]) -> Rectangle:
    x, y, width, height = box
    return x + by[0], y + by[1], width, height


def halos(
    P: Partition | Grid | Layout | Sequence[int],
    shape: Sequence[int] | None = None,
    rank: int = 0,
    *,
    widths: Sequence[int | tuple[int, int]] | None = None,
    kernel_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    boundary: str | None = None,
    dims: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what a rank needs of a tensor, each part in the colour of the rank that it comes from.

    The rank's own block has a thick border, what it needs a dashed one; what lies beyond the tensor and is zero is hatched. What
    the others keep for themselves is pale. Of the dims that are not drawn it is the slice through the first point that the rank needs.

    Parameters
    ----------
    P : Partition, Grid, Layout or sequence of int
        The grid, or its shape, that cuts the tensor in balanced blocks, one axis per dim; or a layout of blocks.
    shape : sequence of int
        The global shape of the tensor; not with a layout.
    rank : int
    widths : sequence of int or (int, int)
        Per dim the points to the left and right, as of `HaloExchange`; or else
    kernel_size : sequence of int
        Of a convolution or pool over so many last dims, with torch's `stride`, `padding` and `dilation`, one number or one for
        each of these dims. Its outputs are in balanced blocks.
    boundary : {"none", "zeros", "circular", "reflect", "replicate"}, optional
        What lies beyond the tensor, as of `HaloExchange`; by default nothing for widths and zeros for a kernel.
    dims : sequence of int, optional
        One or two dims to draw; by default those that are cut.
    ax : matplotlib.axes.Axes, optional

    Raises
    ------
    ValueError
        If not exactly one of `widths` and `kernel_size` is given, they do not fit the tensor, or the grid does not hold the rank.
    TypeError
        If `P` is none of the above.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> ax = dl.show.halos((3,), (12,), rank=1, widths=(2,))
    >>> [(part.get_gid(), part.get_x(), part.get_width()) for part in ax.patches if part.get_gid().startswith("from")]
    [('from-0', 2.0, 2), ('from-1', 4.0, 4), ('from-2', 8.0, 2)]
    """
    X = layout_of(P, shape)
    if X.box(rank) is None:
        raise ValueError(f"rank {rank} is not on the grid of shape {X.grid.shape}")
    if (widths is None) == (kernel_size is None):
        raise ValueError("exactly one of widths and kernel_size must be given")
    if kernel_size is None:
        Y = _grown(X, widths or (), boundary or "none")
    else:
        Y = _read_by_kernel(X, kernel_size, stride, padding, dilation, boundary or "zeros")
    drawn = drawn_dims([X], dims, 2)
    return _draw_halos(X, Y, rank, (None, *drawn) if len(drawn) == 1 else drawn, ax)


def _grown(X: Layout, widths: Sequence[int | tuple[int, int]], boundary: str) -> Layout:
    pairs = [listed(width, 2) for width in widths]
    if len(pairs) != len(X.dims) or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(
            f"widths {tuple(widths)} are not a number from 0 on, or a pair, for each of {len(X.dims)} dims"
        )
    _check_boundary(boundary)
    return lay.haloed(X, pairs, boundary)


def _check_boundary(boundary: str) -> None:
    if boundary not in lay.BOUNDARIES:
        raise ValueError(f"boundary {boundary!r} is none of {', '.join(lay.BOUNDARIES)}")


def _read_by_kernel(
    X: Layout, kernel_size: Sequence[int], stride: Any, padding: Any, dilation: Any, boundary: str
) -> Layout:
    """What the balanced blocks of a convolution's outputs read."""
    _check_boundary(boundary)
    count, shape = len(kernel_size), lay.global_shape_of(X)
    options = [listed(option, count) for option in (stride, padding, dilation)]
    if count > len(shape) or any(len(option) != count for option in options):
        raise ValueError(
            f"a kernel of {count} dims needs as many options {options}, and a tensor of as many dims, not {shape}"
        )
    strides, pads, dilations = options
    geometry = ConvGeometry(tuple(kernel_size), strides, dilations, tuple((p, p) for p in pads), mode=boundary)
    before = len(shape) - count
    try:
        outputs = geometry.outputs(shape[before:])
        cut = (
            Dim(ranges_of(balanced(n, len(dim.ranges))), dim.axes)
            for n, dim in zip(outputs, X.dims[before:], strict=True)
        )
        reads = tuple(geometry.reads(d, shape[before + d], dim) for d, dim in enumerate(cut))
    except ValueError as error:
        raise ValueError(f"a tensor of shape {shape}, whose kernel begins at dim 2: {error}") from error
    return replace(X, dims=X.dims[:before] + reads)


def _draw_halos(X: Layout, Y: Layout, rank: int, dims: DrawnDims, ax: Axes | None) -> Axes:
    own, needed = X.box(rank), Y.box(rank)
    assert own is not None
    assert needed is not None
    if 0 in shape_of(needed):
        ax = _plane(X, dims, ax)
        ax.set_title(f"rank {rank}: needs nothing", fontsize=9, color=DARK, loc="left")
        return ax
    at = tuple(None if d in dims else start for d, (start, _) in enumerate(needed))

    def seen(box: Box) -> Rectangle | None:
        """Where a box is drawn, None if the slice does not meet it."""
        if 0 in shape_of(box) or any(p is not None and not a <= p < b for p, (a, b) in zip(at, box, strict=True)):
            return None
        (top, bottom), (left, right) = ((0, thickness) if d is None else box[d] for d in dims)
        return left, top, right - left, bottom - top

    window = _window(X, [box for box in (own, needed) if 0 not in shape_of(box)], dims)
    thickness = max(0.2 * max(b - a for d, (a, b) in enumerate(window) if d in dims), 1)
    everything = tuple(r if d in dims else (p, p + 1) for d, (r, p) in enumerate(zip(window, at, strict=True)))
    x, y, width, height = seen(everything) or (0, 0, 1, 1)
    ax = axes_of(ax, height / width)
    frame(ax, x, x + width, y, y + height)
    scale, mine = points(ax), plan(X, Y, rank)
    for other, box in _boxes(X).items():
        _draw_neighbour(ax, other, box, needed, everything, seen, scale)
    globally = [(edge.peer, _in_global(edge.box, needed)) for leg in mine.legs for edge in leg.receives]
    for peer, box in globally:
        place = seen(box)
        if place is not None:
            border = {"edgecolor": "white", "linewidth": 0.6}
            rectangle(ax, place, facecolor=colour(peer), gid=f"from-{peer}", **border)
            label(ax, str(peer), place, colour(peer), scale, fontweight="bold")
    for slices in mine.gaps:
        place = seen(_in_global(tuple((part.start, part.stop) for part in slices), needed))
        if place is not None:
            rectangle(ax, place, facecolor="white", edgecolor=(0.6, 0.6, 0.6), linewidth=0, hatch="////", gid="zeros")
    for box, gid, style in (
        (own, "own", {"linewidth": 2.4}),
        (needed, "needed", {"linewidth": 1.4, "linestyle": (0, (4, 2))}),
    ):
        place = seen(box)
        if place is not None:
            rectangle(ax, place, fill=False, edgecolor="black", clip_on=False, gid=gid, **style)
    _mark_ends(ax, X, dims, window, scale)
    return ax


def _in_global(local: Box, origin: Box) -> Box:
    """A box in the coordinates of the tensor, of one in those of the box `origin`."""
    return tuple((a + start, b + start) for (a, b), (start, _) in zip(local, origin, strict=True))


def _window(X: Layout, boxes: Sequence[Box], dims: DrawnDims) -> Box:
    """The part of the tensor round some boxes that lets their neighbours be seen; beyond the tensor no more than the boxes."""
    found = []
    for d, dim in enumerate(X.dims):
        start, stop = min(box[d][0] for box in boxes), max(box[d][1] for box in boxes)
        low, high = span(dim)
        more = max((stop - start) // 3, 1)
        found.append((min(max(start - more, low), start), max(min(stop + more, high), stop)))
    return tuple(found)


def _draw_neighbour(
    ax: Axes,
    rank: int,
    box: Box,
    needed: Box,
    window: Box,
    seen: Callable[[Box], Rectangle | None],
    scale: tuple[float, float],
) -> None:
    """A block of the tensor, pale, with its rank where most of it is seen beside what is needed."""
    place, ground = seen(box), mixed(colour(rank), WHITE, 0.75)
    if place is None:
        return
    rectangle(ax, place, facecolor=ground, edgecolor="white", linewidth=1.2, gid=f"rank-{rank}")
    inside = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, window, strict=True))
    parts = [place for part in lay.uncovered(inside, [needed]) if (place := seen(part))]
    if parts:
        label(ax, str(rank), max(parts, key=lambda part: part[2] * part[3]), ground, scale, color=DARK)


def _mark_ends(ax: Axes, X: Layout, dims: DrawnDims, window: Box, scale: tuple[float, float]) -> None:
    """Ticks at the ends of the blocks that are seen."""
    down, right = dims
    for d, axis, least in ((right, ax.xaxis, 18 / scale[0]), (down, ax.yaxis, 11 / scale[1])):
        ends = () if d is None else {end for r in X.dims[d].ranges for end in r if window[d][0] <= end <= window[d][1]}
        axis.set_ticks([place for place, _ in spread([(float(end), end) for end in ends], least)])
        if d is not None:
            axis.set_label_text(f"dim {d}")
