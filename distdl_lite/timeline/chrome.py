"""The file of a trace: the events that Perfetto and chrome://tracing show. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distdl_lite.timeline.notes import Notes, Span, Wait
from distdl_lite.timeline.times import given

_ROWS = {"modules": 0, "calls": 1, "threads": 2}  # of a rank
_MICRO = 1e6


def events(notes: Sequence[Notes], origin: float) -> Iterator[dict[str, Any]]:
    """A row of modules, one of calls and one of sums in threads for each rank, and an arrow for each message.

    Of a collective the last part that came has an arrow. `origin` is the time from which is counted, by the clock of all.
    """
    posted, sizes = given(notes), {key: size for one in notes for key, size in one.sizes.items()}
    number = 0
    for one in notes:
        yield _named("process_name", one.rank, 0, f"rank {one.rank}")
        yield {"name": "process_sort_index", "ph": "M", "pid": one.rank, "args": {"sort_index": one.rank}}
        yield from (_named("thread_name", one.rank, row, name) for name, row in _ROWS.items())
        for span in one.spans:
            row = "modules" if span.kind in ("forward", "backward") else "calls"
            yield _slice(one.rank, row, span, origin)
        yield from (_slice(one.rank, "threads", span, origin) for span in one.in_threads)
        for wait in one.waits:
            for key in wait.keys:
                others = [part for part in posted[key] if part[1] != one.rank]
                if others:
                    number += 1
                    yield from _arrow(number, max(others), one, wait, origin, sizes.get(key))


def _named(kind: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}


def _slice(rank: int, row: str, span: Span, origin: float) -> dict[str, Any]:
    began, lasted = (span.began - origin) * _MICRO, (span.ended - span.began) * _MICRO
    words = {"layer": span.layer} if span.kind not in ("forward", "backward") else {}
    shown = {"name": span.name, "cat": span.kind, "args": words, "ts": began, "dur": lasted}
    return {"ph": "X", "pid": rank, "tid": _ROWS[row], **shown}


def _arrow(
    number: int, sent: tuple[float, int], one: Notes, wait: Wait, origin: float, size: int | None
) -> Iterator[dict[str, Any]]:
    """From where a part was given to where it was waited for."""
    when, rank = sent
    shared = {"name": "message", "cat": "message", "id": number, "tid": _ROWS["calls"], "args": {"bytes": size}}
    ended = one.spans[wait.span].ended
    yield {"ph": "s", "pid": rank, "ts": (when - origin) * _MICRO, **shared}
    yield {"ph": "f", "bp": "e", "pid": one.rank, "ts": (max(ended, when) - origin) * _MICRO, **shared}
