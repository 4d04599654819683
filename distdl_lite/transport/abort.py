"""Ending the whole MPI job when one rank raises: plain Python would leave the others waiting for it."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from types import TracebackType
from typing import Any


def abort_on_exception(on: bool = True) -> None:
    """Let an exception that nobody catches, in any thread, end all ranks with exit code 1.

    The traceback is printed as before. On one rank, or where MPI is not in use, nothing else changes. `SystemExit` is
    not an exception in this sense.

    Parameters
    ----------
    on : bool
        False takes it back.
    """
    if on and sys.excepthook is not _raised:
        _before.update(main=sys.excepthook, thread=threading.excepthook)
        sys.excepthook, threading.excepthook = _raised, _raised_in_thread
    elif not on and sys.excepthook is _raised:
        sys.excepthook, threading.excepthook = _before["main"], _before["thread"]


_before: dict[str, Any] = {}


def _raised(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _before["main"](kind, error, traceback)
    _abort()


def _raised_in_thread(raised: threading.ExceptHookArgs) -> None:
    _before["thread"](raised)
    if raised.exc_type is not SystemExit:
        _abort()


def fail_at_exit(why: str) -> None:
    """Let this process end the job with exit code 1 when it ends, also if what happened is caught and passed over."""
    atexit.register(_fail, why)


def _fail(why: str) -> None:
    print(why, file=sys.stderr)
    _abort()


def _abort() -> None:
    """End the job if MPI is in use; it is not imported for that."""
    MPI = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized() or MPI.COMM_WORLD.size == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.2)  # mpirun forwards what was printed, and may be ended before it has
    MPI.COMM_WORLD.Abort(1)
