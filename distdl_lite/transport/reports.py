"""Reports of why a job waits: printed, written, and read again."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distdl_lite.text import columns
from distdl_lite.transport.hang import Told, sentence, table
from distdl_lite.transport.sidechannel import join, start_thread, told_by_all, worlds

FOLDER = "DISTDL_LITE_REPORTS"  # the variable that names where reports are written
_FILE = "ranks.json"
_GRACE = 4.0  # seconds for another rank to ask all and print


def report(world: Any) -> str | None:
    """Ask all ranks of a world where they are, write that, and put it in words; None if another rank does."""
    told = told_by_all(world)
    if told is None:
        return None
    base = Path(os.environ.get(FOLDER) or tempfile.gettempdir())
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"distdl_lite-{time.strftime('%Y%m%d-%H%M%S')}-", dir=base))
        (folder / _FILE).write_text(json.dumps([asdict(one) for one in told]), encoding="utf-8")
        again = f"python -m distdl_lite report {folder} prints this again, --stacks with the stacks of all ranks"
    except OSError as error:
        again = f"it cannot be written: {error}"
    return f"{in_words(told)}\n{again}\n"


def read(folder: str | os.PathLike[str]) -> list[Told]:
    """What the ranks told in a report that was written.

    Raises
    ------
    OSError, ValueError
        If there is none in the folder.
    """
    told = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
    numbers = {
        "awaited": lambda found: {int(rank): size for rank, size in found.items()},
        "team": tuple,
        "calls": tuple,
    }
    return [Told(**{name: numbers.get(name, lambda v: v)(value) for name, value in one.items()}) for one in told]


def in_words(told: Sequence[Told], stacks: bool = False) -> str:
    """The sentence, the table, and the stacks if they are wanted."""
    parts = [f"{sentence(told)}\n", columns(table(told))]
    parts += [f"\nrank {one.rank}:\n{one.stack.rstrip()}" for one in told if stacks and one.stack]
    return "\n".join(parts)


def take_part(world: Any) -> None:
    """Let a world's ranks report, also on SIGUSR1 if the program has no use for it; all of them call it at its beginning."""
    join(world)
    is_main = threading.current_thread() is threading.main_thread()
    if world.size > 1 and is_main and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # A handler of Python's runs when the main thread is back from its call; what it writes comes at once.
        others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if others >= 0:  # asyncio's
            signal.set_wakeup_fd(others)
            return
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.siginterrupt(signal.SIGUSR1, False)
        start_thread("signals", _report_on_signal, reader)


def _report_on_signal(reader: int) -> None:
    while numbers := os.read(reader, 1):
        for text in filter(None, map(report, worlds() if numbers[0] == signal.SIGUSR1 else ())):
            print(text, file=sys.stderr, flush=True)


def end_with_report(of: Sequence[Any], why: str, write: Callable[[str], Any], end: Callable[[], Any]) -> None:
    """Write the reports of worlds and why, and end the job; first one rank writes, then the others, and then the job ends."""
    threading.Timer(25, os._exit, (1,)).start()  # the call that waits may keep the job from its end
    texts = [report(world) for world in of]
    time.sleep(_GRACE if None in texts else 0)
    write("\n".join([*filter(None, texts), why]))
    time.sleep(_GRACE + 2)
    end()
