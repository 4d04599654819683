"""Pictures of what a rank needs of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Box, Dim, Layout, ranges_of, shape_of
from distdl_lite.nn.conv.geometry import ConvGeometry
from distdl_lite.nn.options import listed
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.show.blocks import draw_plane
from distdl_lite.show.drawing import (
    DARK,
    WHITE,
    axes_of,
    colour,
    frame,
    label,
    mixed,
    points,
    rectangle,
    spread,
)
from distdl_lite.show.places import (
    DrawnDims,
    Rectangle,
    drawn_dims,
    full_boxes,
    layout_of,
    span,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = (0.6, 0.6, 0.6)


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

    The rank's own block has a thick border, what it needs a dashed one; what lies beyond the tensor and is zero is hatched. The
    rest of the others' blocks is pale. Of a tensor of more dims it is a slice, at the first point that the rank needs.

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
    [('from-0', 2, 2), ('from-1', 4, 4), ('from-2', 8, 2)]
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
        ax = draw_plane(X, dims, ax)
        ax.set_title(f"rank {rank}: needs nothing", fontsize=9, color=DARK, loc="left")
        return ax
    view = _view(X, [box for box in (own, needed) if 0 not in shape_of(box)], needed, dims)
    x, y, width, height = view.shown(view.window) or (0, 0, 1, 1)
    ax = axes_of(ax, height / width)
    frame(ax, x, x + width, y, y + height)
    scale, mine = points(ax), plan(X, Y, rank)
    for other, box in full_boxes(X).items():
        _draw_neighbour(ax, other, box, needed, view, scale)
    for peer, local in ((edge.peer, edge.box) for leg in mine.legs for edge in leg.receives):
        place = view.shown(_in_global(local, needed))
        if place:
            rectangle(ax, place, facecolor=colour(peer), edgecolor="white", linewidth=0.6, gid=f"from-{peer}")
            label(ax, str(peer), place, colour(peer), scale, fontweight="bold")
    for slices in mine.gaps:
        place = view.shown(_in_global(tuple((part.start, part.stop) for part in slices), needed))
        if place:
            rectangle(ax, place, facecolor="white", edgecolor=_GREY, linewidth=0, hatch="////", gid="zeros")
    for box, gid, thick, line in ((own, "own", 2.4, "-"), (needed, "needed", 1.4, (0, (4, 2)))):
        place = view.shown(box)
        if place:
            style = {"linewidth": thick, "linestyle": line, "gid": gid}
            rectangle(ax, place, fill=False, edgecolor="black", clip_on=False, **style)
    _mark_ends(ax, X, dims, view.window, scale)
    return ax


@dataclass(frozen=True)
class _View:
    """What is seen of a tensor: a window, which is a slice one point thick in the dims that are not drawn."""

    dims: DrawnDims
    window: Box
    thickness: float

    def shown(self, box: Box) -> Rectangle | None:
        """Where a box is drawn, None if it is empty or does not meet the slice."""
        sliced = [d for d in range(len(box)) if d not in self.dims]
        if 0 in shape_of(box) or any(not box[d][0] <= self.window[d][0] < box[d][1] for d in sliced):
            return None
        (top, bottom), (left, right) = ((0, self.thickness) if d is None else box[d] for d in self.dims)
        return left, top, right - left, bottom - top


def _view(X: Layout, boxes: Sequence[Box], needed: Box, dims: DrawnDims) -> _View:
    """A view of some boxes that lets their neighbours be seen; beyond the tensor it reaches no farther than the boxes."""
    window = []
    for d, dim in enumerate(X.dims):
        start, stop = min(box[d][0] for box in boxes), max(box[d][1] for box in boxes)
        low, high = span(dim)
        more = max((stop - start) // 3, 1)
        seen = min(max(start - more, low), start), max(min(stop + more, high), stop)
        window.append(seen if d in dims else (needed[d][0], needed[d][0] + 1))
    longest = max(stop - start for d, (start, stop) in enumerate(window) if d in dims)
    return _View(dims, tuple(window), max(0.2 * longest, 1))


def _in_global(local: Box, origin: Box) -> Box:
    """A box in the coordinates of the tensor, of one in those of the box `origin`."""
    return tuple((a + start, b + start) for (a, b), (start, _) in zip(local, origin, strict=True))


def _draw_neighbour(ax: Axes, rank: int, box: Box, needed: Box, view: _View, scale: tuple[float, float]) -> None:
    """A block of the tensor, pale, with its rank where most of it is seen beside what is needed."""
    place, ground = view.shown(box), mixed(colour(rank), WHITE, 0.75)
    if place is None:
        return
    rectangle(ax, place, facecolor=ground, edgecolor="white", linewidth=1.2, gid=f"rank-{rank}")
    inside = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, view.window, strict=True))
    parts = [place for part in lay.uncovered(inside, [needed]) if (place := view.shown(part))]
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
