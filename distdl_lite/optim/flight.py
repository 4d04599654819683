"""An average that is under way while ranks go on, and how it is merged with what they have learned since."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distdl_lite.buckets import Flat
from distdl_lite.transport import Team, Transport
from distdl_lite.transport.sums import Pending

LANE = "averages by {}"  # Averages of several optimizers that different threads carry out must not meet.


def _daso(now: torch.Tensor, old: torch.Tensor, target: torch.Tensor, waited: int, count: int) -> torch.Tensor:
    return (2 * waited * now + count * target) / (count + 2 * waited)


def _delta(now: torch.Tensor, old: torch.Tensor, target: torch.Tensor, waited: int, count: int) -> torch.Tensor:
    return now + (target - old)


def _replace(now: torch.Tensor, old: torch.Tensor, target: torch.Tensor, waited: int, count: int) -> torch.Tensor:
    return target


MERGES = {"daso": _daso, "delta": _delta, "replace": _replace}


class Flight:
    """An average under way: the vectors as they were, those that become sums, and who adds them up.

    Parameters
    ----------
    transport : Transport
    team : tuple of int
        The ranks whose vectors are added up.
    is_shared : bool
        Whether they are a rank of each node, which takes part for the others.
    began, due : int
        The steps with which it began, and before which it is merged.
    """

    def __init__(self, transport: Transport, team: Team, is_shared: bool, began: int, due: int) -> None:
        self._transport, self.team, self.is_shared, self.began, self.due = transport, team, is_shared, began, due
        self.old: list[torch.Tensor] = []
        self.sums: list[torch.Tensor] = []
        self._pending: list[Pending] = []

    def add(self, flat: Flat, weight: float, engine: str, wire: torch.dtype | None, chunk: int | None) -> None:
        """Begin the sum of a vector, in parts of `chunk` elements."""
        old = flat.read()
        sent = flat.contribution(old)
        self.old.append(old.clone() if sent is old and self.due > self.began else old)
        self.sums.append(sent)
        if self._transport.rank not in self.team:
            return
        if weight != 1:
            sent *= weight
        lane, size = LANE.format(engine), chunk or sent.numel()
        for start in range(0, sent.numel(), max(size, 1)):
            part = sent[start : start + size]
            if flat.left is None or wire is None:
                self._pending.append(self._transport.start_sum(self.team, part, engine, lane))
            else:
                left = flat.left[start : start + size]
                self._pending.append(self._transport.start_rounded_sum(self.team, part, left, wire, engine, lane))

    def wait(self, timeout: float | None) -> None:
        """Wait for the sums.

        Raises
        ------
        TimeoutError
            If one of them takes longer.
        """
        for pending in self._pending:
            if not pending.wait(timeout):
                raise TimeoutError(
                    f"rank {self._transport.rank}: the average of ranks {list(self.team)} that began with step {self.began} "
                    f"was not there after {timeout} s: some rank did not take part"
                )

    def means(self, node: Sequence[int]) -> list[torch.Tensor]:
        """The means, which all ranks of a node get from the one that took part."""
        if self.is_shared and node.size > 1:
            talker = next(rank for rank in node if rank in self.team)
            for total in self.sums:
                self._transport.broadcast(node, total, talker)
        return [total.div_(self.team.size) for total in self.sums]
