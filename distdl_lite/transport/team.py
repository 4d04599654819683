"""Teams: sets of ranks that make calls together."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distdl_lite.transport import Transport


class Team(Sequence[int]):
    """The ranks of a world that make calls together, in rising order.

    `Transport.team` makes one object for each set of ranks, so that teams are compared and looked up by identity: no call
    takes longer for a larger team. What belongs to a team alone is kept in it, such as its communicator and what its ranks
    have counted together.

    Attributes
    ----------
    world : Transport
        The world whose numbers the ranks are, as this rank sees it.
    ranks : sequence of int
        A range where they are consecutive, else a tuple.
    size : int
    made : Counter
        How many things of a kind the ranks have made together, such as layers: the same on all of them.
    calls : int
        How many calls this rank has begun with the others.
    comm, vote, lanes
        The transport's own: what it sends on, agrees by, and sums beside the computation with.
    """

    def __init__(self, world: Transport, ranks: Sequence[int]) -> None:
        self.world, self.ranks, self.size = world, ranks, len(ranks)
        self.made: Counter[str] = Counter()
        self.calls = 0
        self.comm: Any = None
        self.vote: Any = None
        self.lanes: dict[str, Any] = {}
        self._inside: dict[Team, bool] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        return self.ranks[place]

    def index(self, rank: Any, *limits: int) -> int:
        """The place of a rank, which must be one of the team's."""
        place = bisect_left(self.ranks, rank)
        if place == self.size or self.ranks[place] != rank:
            raise ValueError(f"rank {rank} is not in {self!r}")
        return place

    def __contains__(self, rank: object) -> bool:
        place = bisect_left(self.ranks, rank)  # type: ignore[type-var]
        return place < self.size and self.ranks[place] == rank

    def is_inside(self, other: Team) -> bool:
        """Whether all ranks of this team are in another one; looked up after the first time."""
        found = self._inside.get(other)
        if found is None:
            found = self._inside[other] = set(self.ranks) <= set(other.ranks)
        return found

    def __lt__(self, other: Team) -> bool:
        """The order in which ranks of several teams make the calls of all of them: that of the first ranks that differ."""
        differ = next(((a, b) for a, b in zip(self.ranks, other.ranks, strict=False) if a != b), None)
        return self.size < other.size if differ is None else differ[0] < differ[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Team:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_current, (self.ranks,)

    def __repr__(self) -> str:
        return f"Team({list(self.ranks)})"


def _of_current(ranks: Sequence[int]) -> Team:
    from distdl_lite.transport import current

    return current().team(ranks)
