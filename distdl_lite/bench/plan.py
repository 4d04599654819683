"""How long plans, set-up and unchanged forwards take a rank of a large grid."""

from __future__ import annotations

import tracemalloc
from functools import partial
from time import perf_counter

import torch

from distdl_lite import layout as lay
from distdl_lite import nn as dnn
from distdl_lite.bench.stub import world_of
from distdl_lite.bench.table import Call, Row, interleaved
from distdl_lite.grid import Grid
from distdl_lite.partition import Partition
from distdl_lite.plan import plan

RANKS = None  # any number


def rows(P: Partition, seconds: float) -> list[Row]:
    """Plans on 65,536 ranks, then what a rank of as many does by itself."""
    n, cut = 256, lay.balanced_blocks
    grid, wide = Grid((n, n), range(n * n)), Grid((n // 2, 2 * n), range(n * n))
    back, shape = Grid((n, n), range(n * n)[::-1]), (40 * n, 40 * n + 7)
    cases: dict[str, Call] = {
        "plan: blocks to the reverse order": lambda: plan(cut(grid, shape), cut(back, shape), n // 2),
        "plan: 256x256 to 128x512 blocks": lambda: plan(cut(grid, shape), cut(wide, shape), n // 2),
        "plan: halo": lambda: plan(cut(grid, shape), lay.haloed(cut(grid, shape), [(1, 1)] * 2), n // 2),
    }
    rows = [row for what, build in cases.items() for row in _cost_of_plan(what, build)]
    return [*rows, *_scaling_rows(P)]


def _scaling_rows(P: Partition) -> list[Row]:
    """What a rank of many does by itself: an unchanged forward, and set-up with the cut points."""
    alone, x, found = P.create_partition_inclusive([P.rank]), torch.rand(6, 7), []
    grids = [world_of(side * side).grid((side, side)) for side in (2, 32, 256)]
    for what, make in (
        ("halo", lambda P: dnn.HaloExchange(P, (1, 1))),
        ("20 layers", lambda P: _Network(*(dnn.HaloExchange(P, (1, 1)) for _ in range(20)))),
    ):
        few, *times = interleaved(alone, [partial(make(P), x) for P in grids], 1.0)
        for P, taken in zip(grids[1:], times, strict=True):
            found.append(Row(f"{what}: unchanged forward", f"{P.size} : 4 ranks", "time", taken, few, times=1.2))
    P = world_of(256 * 256).grid((256, 256))
    for what, layer in (("halo", dnn.HaloExchange(P, (1, 1))), ("repartition", dnn.Repartition(P, P.grid((128, 512))))):
        before, began = P.world_transport.received, perf_counter()
        layer(x)
        taken, received = 1e3 * (perf_counter() - began), P.world_transport.received - before
        found.append(Row(f"{what}: set-up", "65536 ranks", "time", taken, unit="ms", most=40))
        found.append(Row(f"{what}: set-up", "65536 ranks", "numbers received", received, unit=""))
    return found


class _Network(dnn.Module):
    def __init__(self, *layers: dnn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[:6, :7]
        return x


def _cost_of_plan(what: str, build: Call) -> list[Row]:
    times = []
    for _ in range(5):
        began = perf_counter()
        build()
        times.append(perf_counter() - began)
    tracemalloc.start()
    build()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return [
        Row(what, "65536 ranks", "time", max(times), unit="s", most=0.1),
        Row(what, "65536 ranks", "memory", peak, unit="MB", most=10),
    ]
