"""Which sums of replica gradients start before backward ends.

They follow a plan, which the ranks of a team make alike when a backward has reached many parameters: those, in the reverse order
of their construction, in buckets, whose sums start in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

Bucket = list[Any]  # of the reducer's entries


@dataclass(frozen=True)
class Planned:
    """Parameters of one team, by their falling order, whose sum starts once all their gradients are there."""

    orders: tuple[int, ...]
    size: int  # in bytes
    dtype: torch.dtype


def replanned(plan: Sequence[Planned], buckets: Sequence[Bucket]) -> list[Planned] | None:
    """The plan that begins with the buckets of a backward; None if it begins with just their parameters as it is."""
    reached = {entry.order for bucket in buckets for entry in bucket}
    if reached == {order for p in takewhile(lambda p: reached.issuperset(p.orders), plan) for order in p.orders}:
        return None
    made = [Planned(tuple(e.order for e in b), sum(e.nbytes for e in b), b[0].dtype) for b in buckets]
    return [*made, *(planned for planned in plan if reached.isdisjoint(planned.orders))]


class Arriving:
    """The progress of a team's plan in one backward."""

    def __init__(self, plan: Sequence[Planned]) -> None:
        self.plan, self.next = plan, 0
        self._places = {order: place for place, planned in enumerate(plan) for order in planned.orders}
        self._arrived: list[dict[int, Any]] = [{} for _ in plan]

    def add(self, entry: Any) -> None:
        """Note that a parameter's gradient is there."""
        place = self._places.get(entry.order, -1)
        if place >= self.next:
            self._arrived[place].setdefault(entry.order, entry)

    def complete(self, skips: bool = False) -> Iterator[Bucket]:
        """The buckets that are complete by now, one after another; up to the first that is not unless `skips`."""
        while self.next < len(self.plan):
            planned, arrived = self.plan[self.next], self._arrived[self.next]
            is_complete = len(arrived) == len(planned.orders)
            if not (is_complete or skips):
                return
            self.next += 1
            bucket = [arrived[order] for order in planned.orders] if is_complete else []
            if sum(e.nbytes for e in bucket) == planned.size and {e.dtype for e in bucket} == {planned.dtype}:
                yield bucket
