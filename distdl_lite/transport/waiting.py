"""Ending the whole job when one rank waits too long: MPI would let it wait for ever, and tell nobody where."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from distdl_lite.transport.abort import abort, place_in_job

# Calls of transports that this process has begun. Each of them counts, so that a new wait is told from one that goes on.
BEGUN = [0]

_WAITS = {
    str(path) for path in Path(__file__).parent.rglob("*.py") if path.name != "waiting.py"
}  # who waits does so in one
_LIBRARY = str(Path(__file__).parents[1]) + os.sep
_TORCH = f"{os.sep}torch{os.sep}"
_IDLE = "distdl_lite sums"  # the thread that waits for something to do


def abort_on_timeout(seconds: float | None = 600.0) -> None:
    """Let a rank that waits for others in one call for longer than this end all ranks with exit code 1.

    It prints where it waits: the layer, if it is in one, the line of the program, and the stack. Where ranks wait for each other,
    each of them does so. A thread looks once a second, or more often; calls take no longer for it.

    Parameters
    ----------
    seconds : float or None
        More than any rank may have to wait for another that is busy, as with reading data. None takes the limit back.

    Raises
    ------
    ValueError
        If it is not above 0.

    Notes
    -----
    It is for the calls of layers, primitives and containers. `MPIProcessGroup` has a time limit of its own; the program's own
    calls of mpi4py and torch.distributed have none.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"abort_on_timeout: seconds must be above 0, not {seconds}")
    _Watch.stop()
    if seconds is not None:
        _Watch.now = _Watch(seconds)
        _Watch.now.start()


class _Watch(threading.Thread):
    """Looks where the other threads are."""

    now: _Watch | None = None

    def __init__(self, seconds: float) -> None:
        super().__init__(name="distdl_lite time limit", daemon=True)
        self.seconds, self._is_over = seconds, threading.Event()

    @classmethod
    def stop(cls) -> None:
        if cls.now is not None:
            cls.now._is_over.set()
            cls.now.join()
            cls.now = None

    def run(self) -> None:
        seen, since = BEGUN[0], time.monotonic()
        while not self._is_over.wait(min(1.0, self.seconds / 4)):
            if _waiting() is None or seen != BEGUN[0]:
                seen, since = BEGUN[0], time.monotonic()
            elif time.monotonic() - since > self.seconds:
                self._end()

    def _end(self) -> None:
        frame = _waiting()
        if frame is None:
            return
        stack = "".join(traceback.format_stack(frame))
        print(
            f"{stack}rank {place_in_job()[1]} has waited for others for more than {self.seconds:g} s {_place(frame)}",
            file=sys.stderr,
            flush=True,
        )
        threading.Timer(10, os._exit, (1,)).start()  # the call that waits may keep the job from its end
        time.sleep(2)  # the first to end the job takes the others' words
        abort()


def _waiting() -> FrameType | None:
    """The frame in which a thread of this process is in a transport's call, None if none is."""
    idle = {thread.ident for thread in threading.enumerate() if thread.name == _IDLE}
    frames = [_caller(frame) for ident, frame in sys._current_frames().items() if ident not in idle]
    return next((frame for frame in frames if frame is not None and frame.f_code.co_filename in _WAITS), None)


def _caller(frame: FrameType | None) -> FrameType | None:
    """The frame that calls what of the standard library waits."""
    while frame is not None and frame.f_code.co_filename in (socket.__file__, threading.__file__):
        frame = frame.f_back
    return frame


def _place(frame: FrameType) -> str:
    """The layer whose call waits, if it is in one, and the line of the program from which it was called."""
    frames = list(frames_of_library(frame))
    owners = (inner.f_locals.get("self") for inner in frames)
    named = (f"in {o._distdl_label} number {o._distdl_number}, " for o in owners if hasattr(o, "_distdl_label"))
    caller = frames[-1].f_back or frames[-1]
    return f"{next(named, '')}called at {caller.f_code.co_filename}:{caller.f_lineno}"


def frames_of_library(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from one of the library's outwards up to the program's, whose locals would live on if they were read."""
    while frame is not None and (frame.f_code.co_filename.startswith(_LIBRARY) or _TORCH in frame.f_code.co_filename):
        yield frame
        frame = frame.f_back
