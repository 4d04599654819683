"""What ranks note while a trace is on. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[str | int, ...]


class Span(NamedTuple):
    """A module's forward or backward, or a call inside it.

    Attributes
    ----------
    name, layer : str
        What it is, and the path of the module that it is of.
    kind : str
        "forward", "backward", "pack", "wait" or "thread".
    began, ended : float
        Seconds, by this rank's clock.
    own : float
        Of a module: the seconds in which it computed, without modules and calls inside.
    """

    name: str
    layer: str
    kind: str
    began: float
    ended: float
    own: float = 0.0


class Wait(NamedTuple):
    """What a span waits for.

    Attributes
    ----------
    span : int
        Its number among the spans.
    posted : float
        When this rank had given its own part.
    keys : tuple
        Of parts that other ranks post: a sender, a receiver and a number, or a kind of call, a team and a number.
    """

    span: int
    posted: float
    keys: tuple[Key, ...]


@dataclass
class Notes:
    """What a rank has noted.

    Attributes
    ----------
    rank : int
    began, ended : float
    spans, in_threads : list of Span
    waits : list of Wait
    posted : dict from key to float
        When it gave its parts.
    sizes : dict from key to int
        Bytes of the messages that it sent.
    """

    rank: int
    began: float = 0.0
    ended: float = 0.0
    spans: list[Span] = field(default_factory=list)
    in_threads: list[Span] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    posted: dict[Key, float] = field(default_factory=dict)
    sizes: dict[Key, int] = field(default_factory=dict)
