"""Why a job waits: what each rank tells of itself, and the sentence that names who keeps the others waiting.

Standard library only; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Told:
    """What a rank tells of itself.

    Attributes
    ----------
    rank : int
    waits : bool
        Whether it is in a call that waits for others.
    call : str
        That call, or the last one: the layer, by its path in the model where that is known, and what is awaited.
    place : str
        The line of the program where its main thread is.
    doing : str
        The function that it is in there, where it does not wait.
    team : tuple of int
        The ranks of the call.
    counts : dict
        Of each team, as text, the calls that this rank has made with it.
    awaited : dict
        Bytes that are to come from each rank, where the call is an exchange of messages.
    seconds : float
        Since the call began.
    silent : str
        If it tells nothing: what is known of its process.
    """

    rank: int
    waits: bool = False
    call: str = ""
    place: str = ""
    doing: str = ""
    team: tuple[int, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    awaited: Mapping[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    silent: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Told:
        """As JSON gives it back."""
        awaited = {int(rank): size for rank, size in told["awaited"].items()}
        return Told(**{**told, "team": tuple(told["team"]), "awaited": awaited})


def sentence(told: Sequence[Told]) -> str:
    """Who waits in what for whom, and what those do instead.

    >>> first, last = (Told(rank, True, "net.conv", "train.py:41", team=(0, 1, 2), seconds=17.0) for rank in (0, 2))
    >>> for part in sentence([first, Told(1, place="train.py:57", doing="sleep"), last]).split("; "):
    ...     print(part)
    ranks 0, 2 wait in net.conv (train.py:41) for rank 1
    rank 1 is in sleep (train.py:57): it has not called net.conv, which the others called 17 s ago
    """
    waiting = [one for one in told if one.waits]
    if not waiting:
        return "no rank waits for another"
    late = _late(told, waiting)
    first = _first_to_wait(waiting, late)
    there = [one for one in waiting if (one.call, one.place) == (first.call, first.place) and one.rank not in late]
    head = f"{_ranks(one.rank for one in there)} in {first.call} ({first.place}) for {_ranks(late, '')}"
    return "; ".join([head, *_described([one for one in told if one.rank in late], first)])


def _late(told: Sequence[Told], waiting: Sequence[Told]) -> list[int]:
    """The ranks that others wait for: those that do not wait; else those that have made fewer calls with a team than others."""
    by_rank = {one.rank: one for one in told}
    awaited = {rank for one in waiting for rank in (one.awaited or one.team)}
    idle = [rank for rank in sorted(awaited) if rank in by_rank and not by_rank[rank].waits]
    if idle:
        return idle
    behind = set()
    for one in waiting:
        team, key = one.awaited or one.team, str(list(one.team))
        counts = {rank: by_rank[rank].counts.get(key, 0) for rank in one.team if rank in by_rank}
        most = max(counts.values(), default=0)
        behind |= {rank for rank, count in counts.items() if count < most and rank in team}
    others = {one.rank for one in waiting} - behind
    return sorted(behind) if behind and others else _minority(waiting)


def _minority(waiting: Sequence[Told]) -> list[int]:
    """The ranks that wait elsewhere than most."""
    places = [(one.call, one.place) for one in waiting]
    usual = max(places, key=places.count)
    return [one.rank for one, place in zip(waiting, places, strict=True) if place != usual]


def _first_to_wait(waiting: Sequence[Told], late: Sequence[int]) -> Told:
    """Of the ranks that are not late the one that waits longest for one that is."""
    others = [one for one in waiting if one.rank not in late] or list(waiting)
    theirs = [one for one in others if set(late) & {*one.awaited, *one.team}] or others
    return max(theirs, key=lambda one: one.seconds)


def _described(late: Sequence[Told], first: Told) -> Iterator[str]:
    for one in late:
        if one.silent:
            yield f"rank {one.rank} {one.silent}"
        elif one.waits:
            yield f"rank {one.rank} waits in {one.call} ({one.place})"
        else:
            where = f"in {one.doing} ({one.place})" if one.doing else f"at {one.place}"
            yield (
                f"rank {one.rank} is {where}: it has not called {first.call}, which the others called {first.seconds:.0f} s ago"
            )


def _ranks(ranks: Any, verb: str = "wait") -> str:
    ranks = sorted(ranks)
    one = len(ranks) == 1
    return f"rank{'' if one else 's'} {', '.join(map(str, ranks))} {verb and verb + 's' * one}".rstrip()


def table(told: Sequence[Told]) -> list[tuple[str, ...]]:
    """A line a rank, under a head."""
    lines: list[tuple[str, ...]] = [("rank", "state", "call", "line", "since", "awaits")]
    for one in told:
        state = one.silent or ("waits" if one.waits else one.doing or "works")
        awaited = ", ".join(f"{size} bytes of {rank}" for rank, size in one.awaited.items())
        lines.append((str(one.rank), state, one.call, one.place, f"{one.seconds:.1f} s", awaited))
    return lines
