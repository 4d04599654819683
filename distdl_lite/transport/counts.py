"""What a rank's transports do, for `distdl_lite.testing.count` and `distdl_lite.trace`; nothing is told while nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from distdl_lite.transport.calls import begin

Traffic = tuple[int, int, int]  # messages, bytes and collectives
_NOTHING = 0, 0, 0


class Event(NamedTuple):
    """Something that a transport has done.

    Attributes
    ----------
    kind : str
        "start" and "finish" of an operator, "agreement", "sum", which is waited for, "thread", in which a sum is made, or the
        name of a collective.
    label : str or None
        Under which it is counted.
    world : Transport
    whom : Plan, Team, sequence of int or None
        What was moved, or the ranks that did it together.
    posted : float
        When this rank gave its part, by `time.perf_counter`.
    began, ended : float
        The time that the call took.
    traffic : tuple of int
        Messages, bytes and collectives.
    """

    kind: str
    label: str | None
    world: Any
    whom: Any
    posted: float
    began: float
    ended: float
    traffic: Traffic


class Listener(Protocol):
    """Somebody who is told what happens."""

    def add(self, event: Event) -> None:
        """Take note of an event."""


@dataclass(eq=False)
class Tally:
    """Messages sent (a collective counts one), bytes of payload handed to the transport, and seconds inside it."""

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    collectives: int = 0
    by_label: dict[str, Tally] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if event.kind in ("sum", "thread"):  # beside what the calls count
            return
        self._add(event)
        if event.label is not None:
            self.by_label.setdefault(event.label, Tally())._add(event)

    def _add(self, event: Event) -> None:
        messages, size, collectives = event.traffic
        self.messages += messages
        self.bytes += size
        self.seconds += event.ended - event.began
        self.collectives += collectives


of_process: list[Listener] = []  # open on this process; over MPI it is one rank, whose transports share the list


def record(
    world: Any,
    kind: str,
    whom: Any,
    began: float,
    label: str | None = None,
    traffic: Traffic = _NOTHING,
    posted: float | None = None,
) -> None:
    """Tell everybody who listens on this rank of a call that began at a time and ends now."""
    event = Event(kind, label, world, whom, began if posted is None else posted, began, perf_counter(), traffic)
    for listener in world.local["tallies"]:
        listener.add(event)


def counted(label: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a transport's collective be counted: its seconds, and with a label, as a message with the tensor's bytes."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        name = method.__name__.replace("_", " ")

        @wraps(method)
        def call(self: Any, team: Sequence[int], value: Any, *args: Any) -> Any:
            if len(team) == 1:
                return method(self, team, value, *args)
            begin(name, self, team)
            if not self.local["tallies"]:
                return method(self, team, value, *args)
            began = perf_counter()
            result = method(self, team, value, *args)
            record(self, name, team, began, label, _NOTHING if label is None else (1, value.nbytes, 1))
            return result

        return call

    return decorate
