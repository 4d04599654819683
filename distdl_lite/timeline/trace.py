"""`distdl_lite.trace`: what all ranks do, in one file with one clock."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from distdl_lite.agreement import raised_together
from distdl_lite.partition import Partition
from distdl_lite.timeline.chrome import events
from distdl_lite.timeline.notes import Notes, Span
from distdl_lite.timeline.recorder import Recorder
from distdl_lite.timeline.times import Times, times
from distdl_lite.transport import RowsByRank, tallies
from distdl_lite.transport.sidechannel import clock_ahead

_FIRST_ROW = 10  # of the threads that torch's profiler has seen


class trace:
    """Note what each rank does while the block runs: ``with dl.trace("trace.json") as t:``.

    The file shows in https://ui.perfetto.dev and chrome://tracing a process for each rank, with a row for modules, forward and
    backward, one for calls that pack, move and wait, and one for sums in threads, and an arrow for each message. Where the time
    went stands in `times`; ``print(t.times)`` is a table.

    Parameters
    ----------
    path : str or path or None
        Of the file, which the first rank of `P` writes into a folder that exists; None for none.
    P : Partition or None
        Whose ranks enter and leave the block together; the ambient world by default. A rank outside does nothing.
    profile : bool
        Whether torch's profiler runs beside, whose spans of operations are put into the same file, in rows of their own.

    Attributes
    ----------
    times : Times
        After the block, unless an error has ended it; the same on all ranks.

    Raises
    ------
    RuntimeError
        On all ranks, if a trace is on or the file cannot be written, or where `profile` is asked for and ranks are threads.

    Notes
    -----
    Clocks of one host are one; that of another host is compared by messages there and back, whose shortest counts. A module's
    backward begins where the gradient of its output is there, and ends where another's begins.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> from distdl_lite.testing import spmd
    >>> def body(world):
    ...     layer = dl.nn.DistributedConv2d(world.grid((1, 1, 1, 2)), 1, 1, 3, padding=1)
    ...     with dl.trace() as t:
    ...         layer(torch.ones(1, 1, 4, 2)).sum().backward()
    ...     return [row.layer for row in t.times.layers]
    >>> spmd(2, body)[0]
    ['DistributedConv2d', 'gradients']
    """

    times: Times

    def __init__(
        self, path: str | os.PathLike[str] | None = None, P: Partition | None = None, profile: bool = False
    ) -> None:
        self.path, self.P, self._is_profiled = path, P, profile

    def __enter__(self) -> trace:
        self.P = self.P or Partition.world()
        if not self.P.active:
            return self
        world = self._world = self.P.world_transport
        with raised_together(self.P.team, "trace"):
            if world.local.get("trace"):
                raise RuntimeError("a trace is on already")
            if self.path is not None and not Path(self.path).absolute().parent.is_dir():
                raise FileNotFoundError(f"there is no folder {Path(self.path).absolute().parent}")
            if self._is_profiled and threading.current_thread() is not threading.main_thread():
                raise RuntimeError("profile=True needs ranks that are processes, each in its main thread")
        self._profiler, self._recorder = torch.profiler.profile() if self._is_profiled else None, Recorder(world)
        if self._profiler is not None:
            self._profiler.start()
        world.local["trace"] = self._recorder
        self._hooks = [
            register_module_forward_pre_hook(lambda module, args: self._recorder.enter(module)),
            register_module_forward_hook(
                lambda module, args, output: self._recorder.leave(module, output), always_call=True
            ),
        ]
        self._listening = tallies()
        self._listening.append(self._recorder)
        self._recorder.notes.began = time.perf_counter()
        return self

    def __exit__(self, kind: Any, error: Any, where: Any) -> None:
        if self.P is None or not self.P.active:
            return
        notes = self._recorder.notes
        notes.ended, self._recorder.is_on = time.perf_counter(), False
        self._listening.remove(self._recorder)
        del self._world.local["trace"]
        for hook in self._hooks:
            hook.remove()
        if self._profiler is not None:
            self._profiler.stop()
        if kind is None:
            self._merge(self.P, notes, [] if self._profiler is None else _profiled(self._profiler, notes.rank))

    def _merge(self, P: Partition, notes: Notes, profiled: list[dict[str, Any]]) -> None:
        """Bring all notes to the first rank, which writes them, and tells all where the time went."""
        everything, found = _gathered(P, (notes, profiled)), None
        if everything is not None:
            ahead = [clock_ahead(self._world, one.rank) for one, _ in everything]
            by_one_clock = [_shifted(one, seconds) for (one, _), seconds in zip(everything, ahead, strict=True)]
            found = times(by_one_clock)
        self.times = self._world.gather_objects(P.team, found)[0]
        with raised_together(P.team, "trace"):
            if everything is not None and self.path is not None:
                origin = min(one.began for one in by_one_clock)
                shown = list(events(by_one_clock, origin))
                for (_, more), seconds in zip(everything, ahead, strict=True):
                    shown += [event | {"ts": event["ts"] - 1e6 * (seconds + origin)} for event in more]
                Path(self.path).write_text(json.dumps({"traceEvents": shown}), encoding="utf-8")


def _gathered(P: Partition, mine: Any) -> list[Any] | None:
    """What the ranks of P have, on the first of them."""
    team, world = P.team, P.world_transport
    data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    place = team.index(world.rank)
    sizes = world.maxima(team, [len(data) if i == place else 0 for i in range(team.size)])
    if team.size == 1:
        return [mine]
    is_first = place == 0
    sent, taken = [len(data), *[0] * (team.size - 1)], sizes if is_first else [0] * team.size
    received = torch.empty(sum(taken), dtype=torch.uint8)
    world.exchange_rows(tuple(team), RowsByRank(data, sent), RowsByRank(received, taken)).finish()
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(sizes)] if is_first else None


def _shifted(notes: Notes, ahead: float) -> Notes:
    """The notes of a rank whose clock is so many seconds ahead."""

    def moved(spans: list[Span]) -> list[Span]:
        return [span._replace(began=span.began - ahead, ended=span.ended - ahead) for span in spans]

    return replace(
        notes,
        began=notes.began - ahead,
        ended=notes.ended - ahead,
        spans=moved(notes.spans),
        in_threads=moved(notes.in_threads),
        waits=[wait._replace(posted=wait.posted - ahead) for wait in notes.waits],
        posted={key: when - ahead for key, when in notes.posted.items()},
    )


def _profiled(profiler: torch.profiler.profile, rank: int) -> list[dict[str, Any]]:
    """The spans of torch's profiler as events of a rank, in microseconds by its `time.perf_counter`."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        made = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))
    since = made.get("baseTimeNanoseconds", 0) / 1e3 - 1e6 * (time.time() - time.perf_counter())
    spans = [event for event in made["traceEvents"] if event.get("ph") == "X" and isinstance(event.get("tid"), int)]
    rows = {thread: _FIRST_ROW + number for number, thread in enumerate(dict.fromkeys(one["tid"] for one in spans))}
    return [
        {key: one[key] for key in ("name", "cat", "ph", "dur") if key in one}
        | {"pid": rank, "tid": rows[one["tid"]], "ts": one["ts"] + since}
        for one in spans
    ]
