"""Calls that take turns within one run, and the table of what they took."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from distdl_lite.partition import Partition
from distdl_lite.text import columns

Call = Callable[[], Any]

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Row:
    """One line of a table. Ours may be `times` the other, or `more` than it, or `most`, whichever is the most."""

    what: str
    size: str
    mode: str
    ours: float
    other: float | None = None
    unit: str = "us"
    times: float | None = None
    more: float | None = None
    most: float | None = None

    def bars(self) -> dict[str, float]:
        """What ours may be, by its name in the table."""
        other, unit = self.other or 0.0, self.unit
        bars = {f"{self.times} x": self.times and self.times * other}
        bars[f"+{self.more} {unit}"] = None if self.more is None else other + self.more
        bars[f"{self.most} {unit}".rstrip()] = self.most
        return {name: bar for name, bar in bars.items() if bar is not None}

    def holds(self) -> bool | None:
        """Whether ours keeps its bar; None if there is none."""
        return self.ours <= max(self.bars().values()) if self.bars() else None

    def cells(self) -> tuple[str, ...]:
        ours, other, unit = self.ours, self.other, self.unit
        compared = ("", "") if other is None else (f"{other:.4g} {unit}", f"{ours - other:+.1f}")
        return (
            self.what,
            self.size,
            self.mode,
            f"{ours:.4g} {unit}",
            *compared,
            f"{ours / other:.2f}" if other else "",
            " or ".join(self.bars()),
            {None: "", True: "holds", False: "FAILS"}[self.holds()],
        )


_HEADS = ("what", "size", "mode", "ours", "other", "difference", "ratio", "bar", "")


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    return columns([_HEADS, *(row.cells() for row in rows)])


def write_json(rows: Sequence[Row], path: str) -> None:
    """Write the rows as a list of objects."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump([{**asdict(row), "holds": row.holds()} for row in rows], file, indent=1)


def is_over_torch(P: Partition) -> bool:
    """Whether torch.distributed moves what ours moves, which has bars of its own."""
    return bool(P.world_transport.name == "torch.distributed")


def interleaved(P: Partition, calls: Sequence[Call], seconds: float) -> list[float]:
    """Median microseconds of each call, the calls taking turns for about `seconds`; the slower rank counts.

    Every other turn goes in the reverse order, as the first call of a turn finds other caches than the last.
    """
    began = perf_counter()
    for _ in range(3):
        for call in calls:
            call()
    once = P.broadcast_data((perf_counter() - began) / 3 / len(calls))
    batch = max(1, min(20, int(1e-3 / once)))
    repetitions = max(15, int(seconds / len(calls) / batch / once))
    times: list[list[float]] = [[] for _ in calls]
    turn = list(zip(calls, times, strict=True))
    for _ in range(repetitions):
        turn.reverse()
        for call, seen in turn:
            P.world_transport.agree(P.team, 0)
            began = perf_counter()
            for _ in range(batch):
                call()
            seen.append((perf_counter() - began) / batch)
    by_call = zip(*(P.allgather_data(times) or ()), strict=True)
    return [1e6 * median(map(max, zip(*ranks, strict=True))) for ranks in by_call]


def calls_of(function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int], mode: str) -> Call:
    """A call of `function` on a tensor of a shape, without grad or with a backward."""
    x = torch.rand(tuple(shape), requires_grad=mode == BOTH)
    if mode == FORWARD:
        return torch.no_grad()(lambda: function(x))
    gradient = torch.ones_like(function(x))

    def both() -> None:
        x.grad = None
        function(x).backward(gradient)

    return both
