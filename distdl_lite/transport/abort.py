"""Ending the whole job when one rank raises: plain Python would leave the others waiting for it."""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def abort_on_exception(on: bool = True) -> None:
    """Let an exception that nobody catches, in any thread, end all ranks with exit code 1.

    The traceback is printed as before. On one rank, or where no ranks are in use, nothing else changes. `SystemExit` is
    not an exception in this sense.

    Parameters
    ----------
    on : bool
        False takes it back.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> dl.abort_on_exception()  # the first line of a program
    >>> dl.abort_on_exception(False)
    """
    _Hook.is_on = on
    hooked: tuple[Any, ...] = sys, threading
    for module in hooked:
        hook = module.excepthook
        if on and not isinstance(hook, _Hook):
            module.excepthook = _Hook(hook)
        elif not on and isinstance(hook, _Hook):
            module.excepthook = hook.before


class _Hook:
    """Does what the hook before it does, then ends the job.

    Another may be put before it, as torch's `init_process_group` does, which keeps back what the hooks behind it print. Where
    ours is then put before that, each has its own hook to go back to, and none calls itself.
    """

    is_on = True  # for all of them: those behind others cannot be taken out

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before

    def __call__(self, *what: Any) -> None:
        try:
            self.before(*what)
        finally:
            kind = what[0].exc_type if isinstance(what[0], threading.ExceptHookArgs) else what[0]
            if self.is_on and kind is not SystemExit:
                abort()


def fail_at_exit(why: str) -> None:
    """Let this process end the job with exit code 1 when it ends, also if what happened is caught and passed over."""
    atexit.register(_fail, why)


def _fail(why: str) -> None:
    print(why, file=sys.stderr)
    abort()


def place_in_job() -> tuple[str, int]:
    """By what the job's processes communicate, and this one's rank; nothing is imported for that.

    What is not in use, or has one rank, is "nothing".
    """
    MPI, dist = getattr(sys.modules.get("mpi4py"), "MPI", None), sys.modules.get("torch.distributed")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
        return "MPI", MPI.COMM_WORLD.rank
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "torch", dist.get_rank()
    return "nothing", 0


def abort() -> None:
    """End the job if processes communicate."""
    by = place_in_job()[0]
    if by == "nothing":
        return
    if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:  # somebody keeps it until we come back
        sys.__stderr__.write(sys.stderr.getvalue())
    for stream in (sys.stdout, sys.stderr, sys.__stderr__):
        if stream is not None:
            stream.flush()
    time.sleep(0.2)  # the launcher forwards what was printed, and may be ended before it has
    if by == "MPI":
        sys.modules["mpi4py"].MPI.COMM_WORLD.Abort(1)
    os._exit(1)  # whereupon torchrun ends the others
