"""Checks that ranks agree, and errors that all of them raise."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distdl_lite.partition import Partition
from distdl_lite.transport import Team

_CALL = "call of layer"


def check_met(team: Team, name: str, place: str, told: str | None = None) -> None:
    """Raise an error on all ranks of a team unless all of them are at the same place in the program.

    It is called wherever a vote was not unanimous: the ranks may then be in different calls, and would wait for each other.
    A place is a text such as "call of layer Conv number 3"; `told`, if given, says more of it in the error.

    Raises
    ------
    ValueError
        If the ranks are at different layers.
    RuntimeError
        If one of them is elsewhere, such as at the end of a backward.
    """
    mine = zlib.crc32(place.encode())
    if team.world.agree(team, mine) == mine * team.size:
        return
    names, texts = zip(*team.world.gather_objects(team, (name, told or place)), strict=True)
    name, places = names[0], dict(zip(team, texts, strict=True))
    if all(other.startswith(_CALL) for other in places.values()):
        try:
            check_alike(_CALL, {rank: other.removeprefix(f"{_CALL} ") for rank, other in places.items()})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    lines = "; ".join(f"rank {rank} is at {other}" for rank, other in places.items())
    raise RuntimeError(f"{name}: the ranks meet in different calls: {lines}")


def call_of(label: str, number: int) -> str:
    """The place of a rank that calls a layer."""
    return f"{_CALL} {label} number {number}"


def check_alike(what: str, values: Mapping[int, Any]) -> None:
    """Raise ValueError unless all ranks have the same value; the minority is named."""
    found = list(values.values())
    if found.count(found[0]) == len(found):
        return
    usual = max(found, key=found.count)
    odd = [f"rank {rank}: {what} {value}" for rank, value in values.items() if value != usual]
    raise ValueError(f"the ranks disagree: {', '.join(odd)}, others {usual}")


_PLAIN_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError, KeyError, AttributeError)


def raise_together(team: Team, error: Exception | None, name: str = "") -> None:
    """Raise on all ranks of the team if any of them has an error, with the same text, which begins with a name.

    The lowest rank's error goes first. One that is more than a text becomes a RuntimeError.
    """
    if not team.world.agree(team, int(error is not None)):
        return
    kind, text = next(found for found in team.world.gather_objects(team, as_raised(error, name)) if found is not None)
    # A refusal says all there is to say; the traceback of anything else may be of use.
    raise kind(text) from (None if isinstance(error, (TypeError, ValueError)) else error)


@contextmanager
def refused_together(P: Partition, name: str) -> Iterator[None]:
    """Raise an error of the block on all ranks of `P`, with the same text, which begins with a name.

    They come to it together, and in it communicate before anything may raise, or not at all. A rank outside is alone.
    """
    error = None
    try:
        yield
    except Exception as raised:
        if not P.active:
            raise
        error = raised
    if P.active:
        raise_together(P.team, error, name)


def as_raised(error: BaseException | None, name: str) -> tuple[type[Exception], str] | None:
    """The kind and the text with which all ranks raise an error of one of them; the text begins with a name."""
    if error is None:
        return None
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    kind = next((kind for kind in _PLAIN_ERRORS if kind is type(error)), RuntimeError)
    if kind is not type(error):
        text = f"{type(error).__name__}: {text}"
    return kind, text if text.startswith(name) else f"{name}: {text}"
