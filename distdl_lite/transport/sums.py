"""Sums that run beside the computation: what the caller holds of one, and the thread that carries them out.

MPI makes no progress by itself: sums that are posted and waited for at the end take longer than blocking ones. A thread that
makes blocking calls on a communicator of its own hides them where a core is idle, as with an accelerator, and costs
nothing where none is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol

ENGINES = "inline", "thread", "poll"  # who carries a sum out: its start, which waits for it; a thread; MPI, when it can


class Pending(Protocol):
    """A sum that was started, into a tensor that the caller leaves alone until it is there."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the tensor holds the sum; False if so many seconds were not enough."""


class Done:
    """A sum that needs no waiting."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


class Job:
    """A call that the worker makes; then, by the first `wait`, the caller takes what it returned home."""

    def __init__(self, call: Callable[[], Any], home: Callable[[Any], None]) -> None:
        self.call, self._home, self._is_home = call, home, False
        self._open = threading.Lock()
        self._open.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self.call()
        except BaseException as error:
            self._error = error
        self._open.release()

    def wait(self, timeout: float | None = None) -> bool:
        if not self._open.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._open.release()
        if self._error is not None:
            raise self._error
        if not self._is_home:
            self._is_home = True
            self._home(self._result)
        return True


class Worker:
    """A thread that makes calls one after another, in the order in which they were submitted."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any], home: Callable[[Any], None]) -> Job:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="distdl_lite sums", daemon=True)
            self._thread.start()
        job = Job(call, home)
        self._jobs.put(job)
        return job

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()

    def stop(self, timeout: float) -> bool:
        """Finish what was submitted; False if that took longer."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._jobs.put(None)
        thread.join(max(timeout, 0))
        return not thread.is_alive()
