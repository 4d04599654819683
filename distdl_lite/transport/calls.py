"""The last calls that this process's transports have begun, for whoever asks what it waits for. A call takes 0.2 us for it."""

from __future__ import annotations

from collections import Counter, deque
from time import perf_counter
from typing import Any, NamedTuple

from distdl_lite.transport.team import Team


class Call(NamedTuple):
    """A call of a transport.

    Attributes
    ----------
    began : float
        By `time.perf_counter`.
    what : str
        An operator's label, or the kind of call.
    world : Transport
    whom : Team, sequence of int or Plan
        The ranks that make the call together, or what is moved.
    itemsize : int
        Of what is moved.
    number : int
        How many calls this rank had begun with a team.
    """

    began: float
    what: str
    world: Any
    whom: Any
    itemsize: int = 1
    number: int = 0


CALLS: deque[tuple[Any, ...]] = deque(maxlen=32)  # fields of `Call`, which itself takes twice as long to make


def move(what: str, world: Any, plan: Any, itemsize: int) -> None:
    """Note that an operator starts."""
    CALLS.append((perf_counter(), what, world, plan, itemsize))
    moved = world.local.get("moved")
    if moved is None:
        moved = world.local["moved"] = Counter[str]()
    moved[what] += 1


def begin(what: str, world: Any, ranks: Any) -> None:
    """Note a call that ranks make together."""
    number = 0
    if type(ranks) is Team:
        ranks.calls = number = ranks.calls + 1
    CALLS.append((perf_counter(), what, world, ranks, 1, number))
