"""Ending the whole job when one rank waits too long: MPI would let it wait for ever, and tell nobody where."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial

from distdl_lite.transport.abort import abort, place_in_job
from distdl_lite.transport.calls import CALLS
from distdl_lite.transport.frames import OWN_THREADS, outward, place_of, waiting
from distdl_lite.transport.reports import end_with_report


def abort_on_timeout(seconds: float | None = 600.0) -> None:
    """Let a rank that waits for others in one call for longer than this end all ranks with exit code 1.

    It asks all ranks where they are, and prints who waits in which module for whom, and on which line of the program those are.
    A thread looks once a second, or more often; calls take no longer for it.

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

    Examples
    --------
    >>> import distdl_lite as dl
    >>> dl.abort_on_timeout(600)  # in a program's first lines
    >>> dl.abort_on_timeout(None)
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
        super().__init__(name=f"{OWN_THREADS} time limit", daemon=True)
        self.seconds, self._is_over = seconds, threading.Event()

    @classmethod
    def stop(cls) -> None:
        if cls.now is not None:
            cls.now._is_over.set()
            cls.now.join()
            cls.now = None

    def run(self) -> None:
        seen, since = None, time.monotonic()
        while not self._is_over.wait(min(1.0, self.seconds / 4)):
            last = CALLS[-1] if CALLS else None
            frame = waiting()
            if frame is None or last is not seen or (last and "addresses" not in last[2].local):  # ranks as threads
                seen, since = last, time.monotonic()
            elif time.monotonic() - since > self.seconds:
                place, _ = place_of(list(outward(frame)))
                why = f"rank {place_in_job()[1]} has waited for others for more than {self.seconds:g} s at {place}"
                end_with_report([last[2]] if last else [], why, partial(print, file=sys.stderr, flush=True), abort)
