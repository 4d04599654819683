"""Drawings of grids, layouts and plans, as text and SVG. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from distdl_lite.grid import Grid, indices
from distdl_lite.layout import Box, Layout, global_shape_of
from distdl_lite.plan import Edge, Leg, Pattern, Plan

MPI_NAMES = {
    Pattern.BROADCAST: "Bcast",
    Pattern.REDUCE: "Reduce",
    Pattern.ALL_REDUCE: "Allreduce",
    Pattern.ALL_GATHER: "Allgather",
    Pattern.REDUCE_SCATTER: "Reduce_scatter",
    Pattern.EXCHANGE: "packed messages",
}

_MOST_DRAWN = 1024


def grid_text(grid: Grid) -> str:
    """The ranks of a grid, the last axis along the lines.

    >>> print(grid_text(Grid((2, 3), range(6))))
    0 1 2
    3 4 5
    """
    width = max(len(str(rank)) for rank in grid.ranks)
    lines: list[str] = []
    for index in indices(grid.shape[:-1]):
        if lines and index[-1] == 0:
            lines.append("")
        row = [grid.rank((*index, i)) for i in range(grid.shape[-1])]
        lines.append(" ".join(f"{rank:{width}}" for rank in row))
    return "\n".join(lines)


def box_text(box: Box) -> str:
    """A box as Python writes an index.

    >>> box_text(((0, 4), (2, 5)))
    '[0:4, 2:5]'
    """
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def layout_text(layout: Layout, ranks: Iterable[int] | None = None) -> str:
    """Which box each rank holds, one line per rank; `ranks` chooses among them."""
    chosen = layout.grid.ranks if ranks is None else [rank for rank in ranks if layout.grid.index(rank) is not None]
    lines = []
    for rank in chosen:
        index, box = layout.grid.index(rank), layout.box(rank)
        assert index is not None
        assert box is not None
        lines.append((f"rank {rank}", "at " + ",".join(map(str, index)), "holds " + box_text(box)))
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of words in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def plan_text(plan: Plan, X: Layout, Y: Layout, itemsize: int) -> str:
    """Who gets what from one rank and who gives it what: peer, bytes and box in global coordinates."""
    lines: list[tuple[str, ...]] = []
    for leg in plan.legs:
        lines += _edge_lines(plan.rank, leg, "sends to", leg.sends, X.box(plan.rank), itemsize)
        lines += _edge_lines(plan.rank, leg, "receives from", leg.receives, Y.box(plan.rank), itemsize)
    return columns(lines) if lines else f"rank {plan.rank}  takes no part"


def _edge_lines(
    rank: int, leg: Leg, verb: str, edges: Sequence[Edge], origin: Box | None, itemsize: int
) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for edge in edges:
        assert origin is not None
        box = tuple((a + first, b + first) for (a, b), (first, _) in zip(edge.box, origin, strict=True))
        peer = "itself" if edge.peer == rank else f"rank {edge.peer}"
        place = f"by {MPI_NAMES[leg.pattern]} of {_team_text(leg.team)}" if leg.team else ""
        lines.append((f"rank {rank}", verb, peer, f"{edge.size * itemsize} bytes", box_text(box), place))
    return lines


def _team_text(team: Sequence[int]) -> str:
    if len(team) > 8:
        return f"{len(team)} ranks"
    return "ranks " + ",".join(map(str, team))


def traffic(plan: Plan, itemsize: int) -> tuple[int, int]:
    """How many messages to others a rank has in an exchange or how many collectives, and the bytes it gives there."""
    _, messages, elements = plan.traffic
    return messages, elements * itemsize


def svg(layouts: Sequence[tuple[str, Layout]], side: int = 320) -> str:
    """The boxes of layouts, each under its title, beside each other.

    Two dims are drawn, downwards and to the right: those that are cut, else the last; of the others the first position.

    Raises
    ------
    ValueError
        If a layout has no dims or more than 1024 ranks.
    """
    for title, layout in layouts:
        if not layout.dims or layout.grid.size > _MOST_DRAWN:
            raise ValueError(f"{title}: a picture needs a dim and at most {_MOST_DRAWN} ranks, not {layout.grid.size}")
    dims = _drawn_dims([layout for _, layout in layouts])
    panels = [
        f'<g transform="translate({i * (side + 40) + 20}, 40)">\n<text x="0" y="-12">{escape(title, quote=False)}</text>\n'
        f"{_panel(layout, dims, side)}</g>"
        for i, (title, layout) in enumerate(layouts)
    ]
    width, height = len(layouts) * (side + 40), side + 80
    style = "text{font:13px sans-serif}rect{stroke:#333}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<style>{style}</style>", *panels, "</svg>\n"])


def _drawn_dims(layouts: Sequence[Layout]) -> tuple[int | None, int]:
    """The dims drawn downwards (None: the tensor has only one) and to the right."""
    count = len(layouts[0].dims)
    if count == 1:
        return None, 0
    cut = [d for d in range(count) if any(len(set(layout.dims[d].ranges)) > 1 for layout in layouts)]
    others = [d for d in reversed(range(count)) if d not in cut]
    down, right = sorted((cut + others)[:2])
    return down, right


def _panel(layout: Layout, dims: tuple[int | None, int], side: int) -> str:
    down, right = dims
    spans = [((0, 1) if d is None else _span(layout, d)) for d in (down, right)]
    scale = side / max(stop - start for start, stop in spans)
    labels: dict[tuple[float, float, float, float], list[int]] = {}
    for rank in layout.grid.ranks:
        box = layout.box(rank)
        assert box is not None
        sides = [((0, 1) if d is None else box[d]) for d in (down, right)]
        (y, height), (x, width) = [
            ((a - start) * scale, (b - a) * scale) for (a, b), (start, _) in zip(sides, spans, strict=True)
        ]
        labels.setdefault((x, y, width, height), []).append(rank)
    return "".join(_rect(*place, ranks, layout.grid.size) for place, ranks in labels.items())


def _span(layout: Layout, dim: int) -> tuple[int, int]:
    ranges = layout.dims[dim].ranges
    low = min(start for start, _ in ranges)
    return low, max(low + 1, global_shape_of(layout)[dim])


def _rect(x: float, y: float, width: float, height: float, ranks: Sequence[int], count: int) -> str:
    """A box and its holders; overlapping boxes shine through."""
    if width <= 0 or height <= 0:
        return ""
    hue = 360 * ranks[0] // max(count, 1)
    label = ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}..{ranks[-1]}"
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="hsl({hue},70%,70%)" '
        f'fill-opacity="0.5"/>\n<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle">{label}</text>\n'
    )
