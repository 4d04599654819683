"""Counts of what a rank's transport moved, for `distdl_lite.testing.count`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from time import perf_counter
from typing import Any

from distdl_lite.transport.calls import begin


@dataclass(eq=False)
class Tally:
    """Messages sent (a collective counts one), bytes of payload handed to the transport, and seconds inside it."""

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    collectives: int = 0
    by_label: dict[str, Tally] = field(default_factory=dict)

    def add(self, messages: int, size: int, seconds: float, collectives: int, label: str | None) -> None:
        self.messages += messages
        self.bytes += size
        self.seconds += seconds
        self.collectives += collectives
        if label is not None:
            self.by_label.setdefault(label, Tally()).add(messages, size, seconds, collectives, None)


of_process: list[Tally] = []  # open on this process; over MPI it is one rank, whose transports share the list


def record(
    local: dict[str, Any], messages: int, size: int, seconds: float, collectives: int, label: str | None
) -> None:
    """Add to every tally that is open on this rank."""
    for tally in local["tallies"]:
        tally.add(messages, size, seconds, collectives, label)


def counted(label: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a transport's collective be counted: its seconds, and with a label, as a message with the tensor's bytes."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, team: Sequence[int], value: Any, *args: Any) -> Any:
            if len(team) == 1:
                return method(self, team, value, *args)
            begin(method.__name__.replace("_", " "), self, team)
            if not self.local["tallies"]:
                return method(self, team, value, *args)
            began = perf_counter()
            result = method(self, team, value, *args)
            messages, size = (0, 0) if label is None else (1, value.nbytes)
            record(self.local, messages, size, perf_counter() - began, messages, label)
            return result

        return call

    return decorate
