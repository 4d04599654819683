"""Pictures of how a tensor is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distdl_lite.grid import Grid
from distdl_lite.layout import Box, Dim, Layout
from distdl_lite.partition import Partition
from distdl_lite.show.drawing import (
    BLACK,
    DARK,
    WHITE,
    Colour,
    axes_of,
    colour,
    deep,
    frame,
    label,
    line_width,
    mixed,
    points,
    pyplot,
    readable_on,
    rectangle,
    spread,
)
from distdl_lite.show.places import (
    GAP,
    DrawnDims,
    Line,
    Places,
    check_size,
    drawn_dims,
    full_boxes,
    layout_of,
    placed,
    ranks_text,
    whole_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    hold copies have a picture of the tensor each. Blocks that overlap are drawn apart, hatched where others hold the same points.
    Ranks without a point are named above.

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
    return draw_plane(layout, (None, *drawn) if len(drawn) == 1 else drawn, ax)


def draw_plane(layout: Layout, dims: DrawnDims, ax: Axes | None) -> Axes:
    overlaps = any(layout.dims[d].overlaps for d in dims if d is not None)
    places, boxes = placed(layout, dims, 2 * GAP if overlaps else 0), full_boxes(layout)
    (top, left), (height, width) = places.low, places.sizes
    ax = axes_of(ax, height / width)
    frame(ax, left, left + width, top, top + height)
    scale = points(ax)
    for rank, box in boxes.items():
        place = places.rectangle(rank, whole_of(box))
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
        ax.set_title(f"{ranks_text(empty)}: nothing", fontsize=9, color=DARK, loc="left")


def _solid(layout: Layout, dims: tuple[int, ...], ax: Any) -> Any:
    """Boxes in space: the first dim goes to the back, the second down, the third to the right."""
    if ax is None:
        ax = pyplot().figure(figsize=(6, 5.2), layout="constrained").add_subplot(projection="3d")
    elif getattr(ax, "name", "") != "3d":
        raise ValueError('a tensor of three dims needs an ax of projection="3d"')
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    places, boxes = placed(layout, dims, GAP), full_boxes(layout)
    sides = {rank: places.part(rank, whole_of(box)) for rank, box in boxes.items()}
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
