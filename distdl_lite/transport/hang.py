"""Why a job waits: what each rank tells of itself, and the sentence that names who keeps the others waiting.

Standard library only; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_MOST_NAMED = 4  # late ranks in the sentence


@dataclass(frozen=True)
class Told:
    """What a rank tells of itself.

    Attributes
    ----------
    rank : int
    waits : bool
        Whether it is in a call that waits for others.
    call : str
        The layer that it is in, by its path in the model where that is known, or else the kind of call.
    place : str
        The line of the program where it is.
    text : str
        What stands there.
    awaited : dict
        Bytes that are to come from each rank, where it waits for messages.
    team : tuple of int
        The ranks of the call, where it waits for what they do together.
    meeting : str
        Under which of `counts` the call is.
    counts : dict
        Of each team, and of each kind of messages, how many calls this rank has begun.
    seconds : float
        Since the last call began.
    calls : tuple of str
        The last calls of transports, the latest first.
    stack : str
    silent : str
        If it tells nothing: what is known of its process.
    """

    rank: int
    waits: bool = False
    call: str = ""
    place: str = ""
    text: str = ""
    awaited: Mapping[int, int] = field(default_factory=dict)
    team: tuple[int, ...] = ()
    meeting: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    calls: tuple[str, ...] = ()
    stack: str = ""
    silent: str = ""


def team_text(ranks: Sequence[int]) -> str:
    """The name of a team, the same on all its ranks.

    >>> team_text(range(4)), team_text([0, 2])
    ('ranks 0 to 3', 'ranks 0, 2')
    """
    if len(ranks) > 2 and ranks[-1] - ranks[0] + 1 == len(ranks):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return named(ranks)


def named(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}"


def sentence(told: Sequence[Told]) -> str:
    """Who waits in what for whom, and where those are.

    >>> first, last = (Told(rank, True, "net.conv", "train.py:41", team=(0, 1, 2), seconds=17.0) for rank in (0, 2))
    >>> for part in sentence([first, Told(1, place="train.py:57", text="sleep(60)"), last]).split("; "):
    ...     print(part)
    ranks 0, 2 wait in net.conv (train.py:41) for rank 1
    rank 1 is at train.py:57, `sleep(60)`: it has not called net.conv, which the others called 17 s ago
    """
    by_rank = {one.rank: one for one in told}
    blamed = {one.rank: _blamed(one, by_rank) for one in told if one.waits}
    if not blamed:
        return "no rank waits for another"
    absent = {rank for late in blamed.values() for rank in late if not by_rank[rank].waits}
    waiting = [by_rank[rank] for rank, late in blamed.items() if (late & absent if absent else late)]
    if not waiting:
        calls = ", ".join(dict.fromkeys(by_rank[rank].call for rank in blamed))
        return f"{named(blamed)} wait, and none of them has left a call out, in {calls}"
    groups: dict[tuple[str, str, tuple[int, ...]], list[Told]] = {}
    for one in waiting:
        groups.setdefault((one.call, one.place, one.team), []).append(one)
    head = max(groups.values(), key=lambda group: (len(group), max(one.seconds for one in group)))
    late = set.union(*(blamed[one.rank] for one in head)) & (absent or by_rank.keys())
    parts, order = [_waits(head, late)], sorted(late)
    for rank in order:  # which grows by those that these wait for
        order += sorted(blamed.get(rank, set()) - {*order, *(one.rank for one in head)})
    parts += [_described(by_rank[rank], blamed.get(rank, set()), head[0]) for rank in order[:_MOST_NAMED]]
    in_head = {one.rank for one in head}
    behind = [by_rank[rank] for rank, those in blamed.items() if those & in_head and rank not in {*in_head, *order}]
    if absent and behind:  # who waits for those that wait
        parts.append(_waits(behind, set.union(*(blamed[one.rank] for one in behind)) & in_head))
    return "; ".join(parts) + (f"; and {len(order) - _MOST_NAMED} more" if len(order) > _MOST_NAMED else "")


def _blamed(one: Told, by_rank: Mapping[int, Told]) -> set[int]:
    """The ranks that have not come to the call in which one waits, or have come to another in its place."""
    late, mine = set(), one.counts.get(one.meeting, 0)
    for other in (by_rank[rank] for rank in (one.awaited or one.team) if rank != one.rank and rank in by_rank):
        theirs = other.counts.get(one.meeting, 0)
        is_beside = other.waits and other.meeting == one.meeting and (theirs == mine or not mine)
        if not (other.call == one.call if is_beside else 0 < mine <= theirs):
            late.add(other.rank)
    return late


def _waits(group: Sequence[Told], late: set[int]) -> str:
    one = group[0]
    verb = "wait" if len(group) > 1 else "waits"
    whom = f" for {'messages of ' if one.awaited else ''}{named(late)}" if late else ""
    return f"{named(other.rank for other in group)} {verb} in {one.call} ({one.place}){whom}"


def _described(one: Told, its_late: set[int], first: Told) -> str:
    """Where a rank is that others wait for."""
    if one.silent:
        return f"rank {one.rank} {one.silent}"
    if one.waits:
        return _waits([one], its_late)
    where = f"{one.place}, `{one.text}`" if one.text else one.place
    inside = f", in {one.call}" if one.call else ""
    return (
        f"rank {one.rank} is at {where}{inside}: it has not called {first.call}, "
        f"which the others called {first.seconds:.0f} s ago"
    )


def table(told: Sequence[Told]) -> list[tuple[str, ...]]:
    """A line a rank, under a head."""
    lines: list[tuple[str, ...]] = [("rank", "state", "in", "line", "since", "awaits", "last calls")]
    for one in told:
        state = one.silent or ("waits" if one.waits else "works")
        awaited = [f"{size} bytes of rank {rank}" for rank, size in one.awaited.items()]
        awaits = ", ".join(awaited) or (team_text(one.team) if one.waits and one.team else "")
        since = "" if one.silent else f"{one.seconds:.1f} s"
        lines.append((str(one.rank), state, one.call, one.place, since, awaits, "; ".join(one.calls[:2])))
    return lines
