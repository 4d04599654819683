"""pytest under mpirun and torchrun: all ranks agree on each test's outcome, and each test has a time limit.

Active only under ``--with-mpi`` and on more than one rank; under torchrun it does pytest-mpi's part too, without MPI:
``torchrun --nproc-per-node 4 -m pytest --with-mpi``. Ranks then collect the same tests in the same order; a test that
fails on one rank fails on all of them and names the ranks, so that they never go different ways; and a test that runs past
its limit, as one whose rank 0 has failed while rank 1 waits for it in a collective, is named, the stacks of all threads are
printed, and the job ends with an error. The limit is 120 seconds, or the ini option ``mpi_timeout``, or ``--mpi-timeout``, or
the test's ``@pytest.mark.mpi_timeout(seconds)``; 0 is none.

mpi4py or torch.distributed is imported only once the plugin is active.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

EXIT_STATUS = 124  # that of timeout(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "seconds that a test may take on several ranks before the job ends with an error; 0 is no limit"
    parser.addini("mpi_timeout", text, default="120")
    parser.addoption("--mpi-timeout", type=float, default=None, metavar="SECONDS", help=text)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mpi_timeout(seconds): the test's time limit on several ranks; 0 is none")
    if not config.getoption("--with-mpi", default=False):
        return
    line: Any = TorchLine() if "TORCHELASTIC_RUN_ID" in os.environ else MPILine()
    if line.size > 1:
        config.pluginmanager.register(Ranks(config, line), "distdl_lite_ranks")
    if isinstance(line, TorchLine):
        for plugin in config.pluginmanager.get_plugins():
            if type(plugin).__name__ == "MPIPlugin":
                config.pluginmanager.unregister(plugin)
        config.pluginmanager.register(LeastRanks(line.size), "distdl_lite_least_ranks")


class MPILine:
    """How the ranks talk under mpirun."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm, self.end = MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Abort
        self.rank, self.size = self.comm.rank, self.comm.size

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value. Waits asleep, as a rank that still works may need this one's core."""
        request, pause = self.comm.Ibarrier(), 1e-5
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return self.comm.allgather(value)


class TorchLine:
    """How they talk under torchrun: through the store by which they find each other."""

    end = staticmethod(os._exit)  # torchrun ends the others

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        store, self.rank, self.size = next(rendezvous("env://"))
        store.set_timeout(timedelta(days=1))  # tests have limits of their own
        self.store, self.number = PrefixStore("distdl_lite tests", store), 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        self.number += 1
        self.store.set(f"{self.number} {self.rank}", pickle.dumps(value))
        told = [pickle.loads(self.store.get(f"{self.number} {rank}")) for rank in range(self.size)]
        self.store.delete_key(f"{self.number - 1} {self.rank}")  # which all have read by now
        return told


class LeastRanks:
    """Tests marked ``mpi(min_size=n)`` are skipped on fewer ranks, as pytest-mpi does it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        least = max((mark.kwargs.get("min_size", 1) for mark in item.iter_markers("mpi")), default=1)
        if self.size < least:
            pytest.skip(f"the test needs {least} ranks, there are {self.size}")


class Watchdog:
    """Ends the job from a thread of its own when what it watches takes too long."""

    def __init__(self, rank: int, abort: Any) -> None:
        self.rank, self.abort = rank, abort
        # pytest captures the descriptor 2 while tests run.
        self.stderr = os.dup(2)
        self.doing = ""
        self._changed = threading.Condition()
        self._what, self._limit, self._deadline = "", 0.0, float("inf")
        threading.Thread(target=self._watch, name="distdl_lite time limit of tests", daemon=True).start()

    def watch(self, what: str, limit: float) -> None:
        """Give `what` so many seconds from now, 0 for no limit."""
        with self._changed:
            self._what, self._limit = what, limit
            self._deadline = time.monotonic() + limit if limit > 0 else float("inf")
            self._changed.notify()

    def rest(self) -> None:
        self.watch("", 0.0)

    def _watch(self) -> None:
        with self._changed:
            while (left := self._deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            what, limit = self._what, self._limit
        self._end_job(f"rank {self.rank}: {what} took more than {limit:g} s {self.doing}")

    def _end_job(self, message: str) -> None:
        channel, reports = (sys.modules.get(f"distdl_lite.transport.{name}") for name in ("sidechannel", "reports"))
        if channel is not None and reports is not None:
            reports.end_with_report(channel.worlds(), message, self._write, lambda: self.abort(EXIT_STATUS))
        self._write(message)
        # The first abort takes the other ranks' words, and may itself wait for a call that holds MPI's lock.
        threading.Timer(10, os._exit, (EXIT_STATUS,)).start()
        time.sleep(1)
        self.abort(EXIT_STATUS)

    def _write(self, text: str) -> None:
        """Write a text and the stacks of all threads."""
        with tempfile.TemporaryFile() as file:
            file.write(f"\n{text}\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            with suppress(OSError):
                os.write(self.stderr, file.read())


class Ranks:
    """The hooks that keep the ranks together. They talk on a line of their own."""

    def __init__(self, config: pytest.Config, line: MPILine | TorchLine) -> None:
        self.rank, self.size, self.gather = line.rank, line.size, line.gather
        given = config.getoption("--mpi-timeout")
        self.limit = float(config.getini("mpi_timeout")) if given is None else given
        self.watchdog = Watchdog(self.rank, line.end)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Raise on all ranks unless they run the same tests in the same order."""
        names = [item.nodeid for item in session.items]
        self.watchdog.watch("collecting the tests", self.limit)
        outcomes = self.gather((session.testsfailed, names))
        self.watchdog.rest()
        broken = [rank for rank, (failed, _) in enumerate(outcomes) if failed]
        if broken:
            session.testsfailed = session.testsfailed or 1
            if self.rank not in broken:
                raise pytest.UsageError(f"collecting the tests failed on ranks {broken} of {self.size}")
        elif text := difference([names for _, names in outcomes]):
            raise pytest.UsageError(text)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        mark = item.get_closest_marker("mpi_timeout")
        self.watchdog.watch(item.nodeid, float(mark.args[0]) if mark else self.limit)
        try:
            return (yield)
        finally:
            self.watchdog.rest()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        own = f"where it had failed:\n{report.longreprtext}" if report.failed else f"where it had {report.outcome}"
        self.watchdog.doing = f"in waiting for the others at the end of its {report.when}, {own}\n"
        outcomes = self.gather((report.outcome, summary(report)))
        self.watchdog.doing = ""
        agree(report, outcomes, self.rank)
        return report


def difference(names: Sequence[Sequence[str]]) -> str:
    """What the ranks collected differently, empty if nothing."""
    for rank, mine in enumerate(names[1:], 1):
        if list(mine) == list(names[0]):
            continue
        at = next((i for i, (a, b) in enumerate(zip(names[0], mine, strict=False)) if a != b), None)
        at = min(len(names[0]), len(mine)) if at is None else at
        here, there = (known[at] if at < len(known) else "nothing" for known in (names[0], mine))
        return (
            f"the ranks collected different tests: {len(names[0])} on rank 0 and {len(mine)} on rank {rank}; "
            f"number {at} is {here} on rank 0 and {there} on rank {rank}"
        )
    return ""


def summary(report: pytest.TestReport) -> str:
    """What the other ranks are told: where a test failed and its error's first lines, or why it was skipped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return f"{crash.path}:{crash.lineno}: {crash.message}"
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return report.longreprtext


def agree(report: pytest.TestReport, outcomes: Sequence[tuple[str, str]], rank: int) -> None:
    """Make a report on this rank say what the ranks say together."""
    kinds = {outcome for outcome, _ in outcomes}
    if kinds in ({"passed"}, {"skipped"}):
        return
    size = len(outcomes)
    texts = [f"rank {r}: {outcome}{': ' + text if text else ''}" for r, (outcome, text) in enumerate(outcomes)]
    failed = [r for r, (outcome, _) in enumerate(outcomes) if outcome == "failed"]
    if failed:
        head = f"the {report.when} of {report.nodeid} failed on ranks {failed} of {size}"
        told = [texts[r] for r in failed]
    else:
        head = f"the {report.when} of {report.nodeid} ended differently on the {size} ranks"
        told = texts
    if rank in failed:
        report.sections.append(("Ranks", head))
    else:
        report.outcome = "failed"
        report.longrepr = "\n".join([head, *told])
        report.__dict__.pop("wasxfail", None)
