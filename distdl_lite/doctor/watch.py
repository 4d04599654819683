"""A child process that makes checks and says what it finds, and its end, whatever that is."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

GRACE = 10  # seconds in which a child should end itself
_FRAMES = 6


class Failure(NamedTuple):
    """How a child ended that did not come to its end: in which step, and where it was."""

    step: str
    risky: bool
    what: str
    stack: str

    def __str__(self) -> str:
        return f"{self.step}: {self.what}"


class Voice:
    """The child's side: tells the parent what it finds, and ends the process if a step takes too long."""

    def __init__(self, pipe: int, stack: int, limit: float) -> None:
        self._pipe, self._stack, self._limit = pipe, stack, limit
        os.set_inheritable(pipe, False)
        faulthandler.enable(stack)

    def begin(self, step: str, risky: bool = False) -> None:
        self.say(begin=step, risky=risky)
        faulthandler.dump_traceback_later(self._limit, file=self._stack, exit=True)

    def say(self, **what: Any) -> None:
        with open(self._pipe, "w", encoding="utf-8", closefd=False) as pipe:
            pipe.write(json.dumps(what) + "\n")


def watch(module: str, limit: float, tell: Callable[[dict[str, Any]], None]) -> Failure | None:
    """Run ``python -m module PIPE STACK LIMIT``, whose `Voice` is heard by `tell`; None if it came to its end.

    The child inherits what the launcher left open for the rank, such as MPICH's socket to mpirun.
    """
    reader, writer = os.pipe()
    said: SimpleQueue[Any] = SimpleQueue()
    begun: dict[str, Any] = {"begin": "start", "risky": False}
    late = False
    with tempfile.TemporaryFile() as stack:
        for descriptor in (writer, stack.fileno()):
            os.set_inheritable(descriptor, True)
        words = [sys.executable, "-m", module, str(writer), str(stack.fileno()), str(limit)]
        child = subprocess.Popen(words, stdout=2, close_fds=False)  # what libraries print is no answer
        os.close(writer)
        threading.Thread(target=_hear, args=(reader, said), daemon=True).start()
        try:
            while (line := said.get(timeout=limit + GRACE)) is not None:
                begun = line if "begin" in line else begun
                tell(line)
            child.wait(limit + GRACE)
        except (Empty, subprocess.TimeoutExpired):
            late = True
            child.kill()
            child.wait()
        stack.seek(0)
        lines = stack.read().decode(errors="replace").splitlines()
    if child.returncode == 0:
        return None
    late = late or any(line.startswith("Timeout (") for line in lines)
    # faulthandler writes the main thread last, and the frame where it is first.
    main = len(lines) - next((i for i, line in enumerate(lines[::-1]) if "hread 0x" in line), len(lines))
    frames = [line for line in lines[main:] if line.startswith("  File") and "<frozen" not in line]
    what = f"no answer in {limit:g} s" if late else _end(child.returncode)
    return Failure(begun["begin"], begun["risky"], what, "\n".join(frames[:_FRAMES]))


def _hear(reader: int, said: SimpleQueue[Any]) -> None:
    with open(reader, encoding="utf-8", errors="replace") as pipe:
        for line in pipe:
            if line.endswith("\n"):  # else it died while it spoke
                said.put(json.loads(line))
    said.put(None)


def _end(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
