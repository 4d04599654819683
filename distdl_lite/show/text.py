"""Layouts and plans as text. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from distdl_lite.layout import Box, Layout
from distdl_lite.plan import Pattern, Plan
from distdl_lite.text import columns

MPI_NAMES = {
    Pattern.BROADCAST: "Bcast",
    Pattern.REDUCE: "Reduce",
    Pattern.ALL_REDUCE: "Allreduce",
    Pattern.ALL_GATHER: "Allgather",
    Pattern.REDUCE_SCATTER: "Reduce_scatter",
    Pattern.EXCHANGE: "packed messages",
}


def box_text(box: Box) -> str:
    """A box as Python writes an index: ``[0:4, 2:5]``."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def layout_text(layout: Layout, ranks: Iterable[int]) -> str:
    """Which boxes some ranks hold, one line per rank that the grid has."""
    lines = []
    for rank in (rank for rank in ranks if layout.grid.index(rank) is not None):
        index, box = layout.grid.index(rank) or (), layout.box(rank) or ()
        lines.append((f"rank {rank}", "at " + ",".join(map(str, index)), "holds " + box_text(box)))
    return columns(lines)


def plan_text(plan: Plan, X: Layout, Y: Layout, itemsize: int) -> str:
    """Who gets what from one rank and who gives it what: peer, bytes and box in global coordinates."""
    lines: list[tuple[str, ...]] = []
    for leg in plan.legs:
        team = f"{len(leg.team)} ranks" if len(leg.team) > 8 else "ranks " + ",".join(map(str, leg.team))
        place = f"by {MPI_NAMES[leg.pattern]} of {team}" if leg.team else ""
        for verb, edges, layout in (("sends to", leg.sends, X), ("receives from", leg.receives, Y)):
            for edge in edges:
                sides = zip(edge.box, layout.box(plan.rank) or (), strict=True)
                box = tuple((a + first, b + first) for (a, b), (first, _) in sides)
                peer = "itself" if edge.peer == plan.rank else f"rank {edge.peer}"
                lines.append((f"rank {plan.rank}", verb, peer, f"{edge.size * itemsize} bytes", box_text(box), place))
    return columns(lines) if lines else f"rank {plan.rank}  takes no part"
