"""Pictures of how a tensor is cut, and of what a rank needs of its neighbours."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Box, Dim, Layout, ranges_of, shape_of
from distdl_lite.nn.conv.geometry import ConvGeometry
from distdl_lite.nn.options import listed, options_of
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.show import drawing
from distdl_lite.show.drawing import Dims, Place, colour, label, picked, rectangle

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
    """Draw which block of a tensor each rank holds, to scale: a plane, or boxes a little apart where three dims or more are cut.

    A block of several ranks, which hold copies, names them all and has the colour of the first. Blocks that overlap are drawn
    apart. Ranks without a point are named above.

    Parameters
    ----------
    P : Partition, Grid, Layout or sequence of int
        The grid, or its shape, that cuts the tensor in balanced blocks; or a layout.
    shape : sequence of int
        The global shape of the tensor; not with a layout.
    axes : sequence of int or None, optional
        The axis of the grid that cuts each dim, None for a whole one; by default dim d is cut along axis d.
    dims : sequence of int, optional
        The dims to draw, at most three; by default those that are cut.
    ax : matplotlib.axes.Axes, optional
        Where to draw; for three dims one of ``projection="3d"``.

    Raises
    ------
    TypeError, ValueError
        If `P` is none of the above, the shape does not fit the grid, or `dims` the shape.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> ax = dl.show.partition((2, 1), (7, 5))
    >>> [(patch.get_y(), patch.get_height()) for patch in ax.patches]
    [(0.0, 4.0), (4.0, 3.0)]
    """
    layout = drawing.layout_of(P, shape, axes)
    drawn = drawing.drawn_dims([layout], dims, 3)
    standing, moves = drawing.places(layout, drawn, 0.06 if len(drawn) == 3 else 0)
    holders = defaultdict[Place, list[int]](list)
    for rank, place in standing.items():
        holders[place].append(rank)
    ax = (_draw_space if len(drawn) == 3 else _draw_plane)(holders, ax)
    drawing.mark(ax, drawn, moves, getattr(P, "names", None) if axes is None else None)
    if idle := [rank for rank in layout.grid.ranks if rank not in standing]:
        ax.set_title(f"hold nothing: {drawing.ranks_text(idle)}", fontsize=9, loc="left")
    return ax


def _draw_plane(holders: Mapping[Place, list[int]], ax: Axes | None) -> Axes:
    ax = drawing.axes_of(ax, drawing.reach(holders))
    border = {"edgecolor": "white", "linewidth": min(1, 30 / max(len(holders), 1))}
    for place, ranks in holders.items():
        rectangle(ax, place, facecolor=colour(ranks[0]), gid=f"rank-{ranks[0]}", **border)
        label(ax, drawing.ranks_text(ranks), place, colour(ranks[0]))
    return ax


def _draw_space(holders: Mapping[Place, list[int]], ax: Any) -> Any:
    """The first dim goes to the back, the second down, the third to the right."""
    ax = ax or drawing.pyplot().figure(figsize=(6, 5.2), layout="constrained").add_subplot(projection="3d")
    from matplotlib.colors import LightSource

    y, z, x = drawing.reach(holders)
    ax.set(ylim=y, zlim=z[::-1], xlim=x)
    ax.set_box_aspect([end - start for start, end in (x, y, z)], zoom=0.85)
    ax.view_init(elev=24, azim=-60)
    ax.computed_zorder = False  # the eye is in front, above and to the right: what is nearer to it is drawn later
    order = sorted(holders.items(), key=lambda item: (-item[0][0][0], -item[0][1][0], item[0][2][0]))
    for number, (((front, back), (top, bottom), (left, right)), ranks) in enumerate(order):
        corner, sizes, ground = (left, front, top), (right - left, back - front, bottom - top), colour(ranks[0])
        style = {"edgecolor": "white", "linewidth": 0.6, "zorder": number, "gid": f"rank-{ranks[0]}"}
        ax.bar3d(*corner, *sizes, color=ground, lightsource=LightSource(200, -45), **style)
        middle = [(left + right) / 2, (front + back) / 2, (top + bottom) / 2]
        # The rank stands on the first face that no other box hides, of the front, the top and the right one.
        for d, face, outermost in ((1, front, y[0]), (2, top, z[0]), (0, right, x[1])):
            if face == outermost:
                middle[d] = face
                words = {"ha": "center", "va": "center", "color": drawing.ink_on(ground), "zorder": len(order)}
                ax.text(*middle, drawing.ranks_text(ranks), **words)
                break
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_visible(False)
        axis.line.set_visible(False)
    ax.grid(False)
    return ax


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
    P, shape, ax
        As of `partition`, with one axis per dim or a layout of blocks.
    rank : int
    widths : sequence of int or (int, int)
        Per dim the points to the left and right, as of `HaloExchange`; or else
    kernel_size : sequence of int
        Of a convolution or pool over the last dims, with torch's `stride`, `padding` and `dilation`; its outputs are in balanced
        blocks.
    boundary : {"none", "zeros", "circular", "reflect", "replicate"}, optional
        What lies beyond the tensor, as of `HaloExchange`; by default nothing for widths and zeros for a kernel.
    dims : sequence of int, optional
        One or two dims to draw; by default those that are cut.

    Raises
    ------
    TypeError, ValueError
        If not exactly one of `widths` and `kernel_size` is given, they do not fit the tensor, or the grid does not hold the rank.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> ax = dl.show.halos((3,), (12,), rank=1, widths=(2,))
    >>> [(part.get_gid(), part.get_x(), part.get_width()) for part in ax.patches if part.get_gid().startswith("from")]
    [('from-0', 2, 2), ('from-1', 4, 4), ('from-2', 8, 2)]
    """
    X = drawing.layout_of(P, shape)
    if X.box(rank) is None:
        raise ValueError(f"rank {rank} is not on the grid of shape {X.grid.shape}")
    if isinstance(kernel_size, int):
        raise TypeError(f"kernel_size has a number for each spatial dim, such as ({kernel_size}, {kernel_size})")
    if (widths is None) == (kernel_size is None) or len(widths or X.dims) != len(X.dims):
        raise ValueError(f"either kernel_size or widths must be given, these for each of {len(X.dims)} dims")
    boundary = boundary or ("zeros" if widths is None else "none")
    if boundary not in lay.BOUNDARIES:
        raise ValueError(f"boundary {boundary!r} is none of {', '.join(lay.BOUNDARIES)}")
    if kernel_size is None:
        Y = lay.haloed(X, [listed(width, 2) for width in widths or ()], boundary)
    else:
        Y = _read_by_kernel(X, kernel_size, *options_of(len(kernel_size), stride, padding, dilation), boundary)
    return _draw_halos(X, Y, rank, drawing.drawn_dims([X], dims, 2), ax)


def _read_by_kernel(X: Layout, size: Sequence[int], strides: Any, pads: Any, dilations: Any, boundary: str) -> Layout:
    """What the balanced blocks of a convolution's outputs read."""
    before, shape = len(X.dims) - len(size), lay.global_shape_of(X)
    geometry = ConvGeometry(tuple(size), strides, dilations, tuple((p, p) for p in pads), mode=boundary)
    outputs = zip(geometry.outputs(shape[before:]), X.dims[before:], strict=True)
    cut = [Dim(ranges_of(balanced(n, len(dim.ranges))), dim.axes) for n, dim in outputs]
    reads = [geometry.reads(d, shape[before + d], dim) for d, dim in enumerate(cut)]
    return replace(X, dims=(*X.dims[:before], *reads))


def _draw_halos(X: Layout, Y: Layout, rank: int, dims: Dims, ax: Axes | None) -> Axes:
    own, needed, entire = X.box(rank) or (), Y.box(rank) or (), tuple((0, n) for n in lay.global_shape_of(X))
    window = []  # the neighbours are seen as well; beyond the tensor it reaches no farther than the boxes
    for (a, b), (c, d), (low, high) in zip(*(picked(box, dims) for box in (own, needed, entire)), strict=True):
        start, stop = min(a, c), max(b, d)
        more = max((stop - start) // 3, 1)
        window.append((min(start, max(start - more, low)), max(stop, min(stop + more, high), start + 1)))
    ax = drawing.axes_of(ax, window)

    def drawn(box: Box, **style: Any) -> bool:
        """Draw a box of the tensor, if it meets the slice."""
        meets = all(box[d][0] <= needed[d][0] < box[d][1] for d in range(len(box)) if d not in dims)
        if meets and 0 not in shape_of(box):
            rectangle(ax, picked(box, dims), **style)
        return meets

    for other in X.grid.ranks:
        box = X.box(other) or ()
        if drawn(box, facecolor=(colour(other), 0.25), edgecolor="white", linewidth=1.2, gid=f"rank-{other}"):
            inside = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(picked(box, dims), window, strict=True))
            if beside := lay.uncovered(inside, [picked(needed, dims)]):
                label(ax, str(other), max(beside, key=lambda part: math.prod(shape_of(part))))
    mine = plan(X, Y, rank)
    parts = [(edge.peer, edge.box) for leg in mine.legs for edge in leg.receives]
    parts += [(None, tuple((part.start, part.stop) for part in gap)) for gap in mine.gaps]
    for peer, local in parts:
        box = tuple((a + start, b + start) for (a, b), (start, _) in zip(local, needed, strict=True))
        if peer is None:
            drawn(box, facecolor="white", edgecolor="0.6", linewidth=0, hatch="////", gid="zeros")
        elif drawn(box, facecolor=colour(peer), edgecolor="white", linewidth=0.6, gid=f"from-{peer}"):
            label(ax, str(peer), picked(box, dims), colour(peer), fontweight="bold")
    drawn(own, fill=False, linewidth=2.4, clip_on=False, gid="own")
    drawn(needed, fill=False, linewidth=1.4, linestyle=(0, (4, 2)), clip_on=False, gid="needed")
    drawing.mark(ax, dims, drawing.places(X, dims)[1])
    if 0 in shape_of(needed):
        ax.set_title(f"rank {rank} needs nothing", fontsize=9, loc="left")
    return ax
