"""One rank of a large world whose others answer at once, and alike: what a rank does by itself, without them."""

from __future__ import annotations

from collections.abc import Sequence

from distdl_lite.agreement import UNSET
from distdl_lite.grid import Grid
from distdl_lite.model.dry import DryTransport
from distdl_lite.partition import Partition
from distdl_lite.transport import Team


class StubTransport(DryTransport):
    """Rank 0 of so many. Votes are unanimous, and along each axis all ranks have a block of this one's length."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.received = 0  # numbers, by set-ups

    def start_agreeing(self, team: Team, value: int) -> None:
        team.vote = value * team.size % 2**64

    def agreed(self, team: Team) -> int:
        vote: int = team.vote
        return vote

    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        # A length is set at the first index of its axis, unset at the others, which follow; an argument that is not there
        # follows the first argument's number, and is told from an index by its place.
        found, half, arguments = list(numbers), (len(numbers) - 5) // 2, 4
        self.received += len(found)
        for start in (5, 5 + half):
            for place in range(start + arguments, start + half):
                if found[place] == UNSET and found[place - 1] != UNSET:
                    found[place] = found[place - 1]
        return found


def world_of(size: int) -> Partition:
    """A world of so many ranks, as its first one sees it."""
    made = object.__new__(Partition)
    made._set(StubTransport(size), Grid((size,), range(size)), None)
    return made
