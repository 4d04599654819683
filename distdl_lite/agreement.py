"""What must be the same on all ranks, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distdl_lite.partition import Partition
from distdl_lite.transport import Transport

CALL = "call of layer"


def check_present(passed: Mapping[int, Any], name: str) -> None:
    """Raise RuntimeError unless all ranks are at a layer: at the end of a backward none takes part in what follows."""
    for rank, told in passed.items():
        if not isinstance(told, dict):
            raise RuntimeError(f"{name}: ranks {list(passed)} meet in a layer, but rank {rank} is at {told}")


def check_alike(what: str, values: Mapping[int, Any]) -> None:
    """Raise ValueError unless all ranks have the same value; the minority is named."""
    found = list(values.values())
    if found.count(found[0]) == len(found):
        return
    usual = max(found, key=found.count)
    odd = [f"rank {rank}: {what} {value}" for rank, value in values.items() if value != usual]
    raise ValueError(f"the ranks disagree: {', '.join(odd)}, others {usual}")


_PLAIN_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError, KeyError, AttributeError)


def raise_together(transport: Transport, team: Sequence[int], error: Exception | None, name: str = "") -> None:
    """Raise on all ranks of the team if any of them has an error, with the same text, which begins with a name.

    The lowest rank's error goes first. One that is more than a text becomes a RuntimeError.
    """
    failures = [found for found in transport.gather_objects(team, as_raised(error, name)) if found is not None]
    if failures:
        kind, text = failures[0]
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
        raise_together(P.world_transport, sorted(P.ranks), error, name)


def as_raised(error: BaseException | None, name: str) -> tuple[type[Exception], str] | None:
    """The kind and the text with which all ranks raise an error of one of them; the text begins with a name."""
    if error is None:
        return None
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    kind = next((kind for kind in _PLAIN_ERRORS if kind is type(error)), RuntimeError)
    if kind is not type(error):
        text = f"{type(error).__name__}: {text}"
    return kind, text if text.startswith(name) else f"{name}: {text}"
