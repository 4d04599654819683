"""An average that is under way while ranks go on, and how it is merged with what they have learned since."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from distdl_lite.buckets import Flat
from distdl_lite.transport import Team
from distdl_lite.transport.sums import Pending

LANE = "averages by {}"  # Averages of several optimizers that different threads carry out must not meet.

# From the numbers now and when the average began, the target, the steps since, and the number of members.
MERGES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]] = {
    "daso": lambda now, old, target, waited, count: (2 * waited * now + count * target) / (count + 2 * waited),
    "delta": lambda now, old, target, waited, count: now + (target - old),
    "replace": lambda now, old, target, waited, count: target,
}


class Flight:
    """An average under way over a team: the vectors as they were, and those that become sums.

    It is shared if the team is a rank of each node, which takes part for the others. It begins with step `began`, and is
    merged before step `due`.
    """

    def __init__(self, team: Team, is_shared: bool, began: int, due: int) -> None:
        self.team, self.is_shared, self.began, self.due = team, is_shared, began, due
        self.old: list[torch.Tensor] = []
        self.sums: list[torch.Tensor] = []
        self._pending: list[Pending] = []

    def add(self, flat: Flat, weight: float, engine: str, wire: torch.dtype | None, chunk: int | None) -> None:
        """Begin the sum of a vector, in parts of `chunk` elements."""
        old = flat.read()
        sent = flat.contribution(old)
        self.old.append(old.clone() if sent is old and self.due > self.began else old)
        self.sums.append(sent)
        if self.team.world.rank not in self.team:
            return
        if weight != 1:
            sent *= weight
        world, lane, size = self.team.world, LANE.format(engine), chunk or max(sent.numel(), 1)
        if flat.residual is None or wire is None:
            self._pending += [world.start_sum(self.team, part, engine, lane) for part in sent.split(size)]
        else:
            pairs = zip(sent.split(size), flat.residual.split(size), strict=True)
            self._pending += [world.start_rounded_sum(self.team, *pair, wire, engine, lane) for pair in pairs]

    def wait(self, timeout: float | None) -> None:
        """Wait for the sums; TimeoutError if one of them takes longer."""
        for pending in self._pending:
            if not pending.wait(timeout):
                raise TimeoutError(
                    f"rank {self.team.world.rank}: the average of ranks {list(self.team)} that began with step {self.began} "
                    f"was not there after {timeout} s: some rank did not take part"
                )

    def means(self, node: Sequence[int]) -> list[torch.Tensor]:
        """The means, which all ranks of a node get from the one that took part."""
        if self.is_shared and node.size > 1:
            talker = next(rank for rank in node if rank in self.team)
            for total in self.sums:
                self.team.world.broadcast(node, total, talker)
        return [total.div_(self.team.size) for total in self.sums]
