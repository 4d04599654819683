"""Drawings of grids, layouts and plans as text. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distdl_lite.grid import Grid, indices
from distdl_lite.layout import Box, Layout
from distdl_lite.plan import Edge, Leg, Pattern, Plan
from distdl_lite.text import columns

MPI_NAMES = {
    Pattern.BROADCAST: "Bcast",
    Pattern.REDUCE: "Reduce",
    Pattern.ALL_REDUCE: "Allreduce",
    Pattern.ALL_GATHER: "Allgather",
    Pattern.REDUCE_SCATTER: "Reduce_scatter",
    Pattern.EXCHANGE: "packed messages",
}


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
