"""Transports carry out plans: `mpi` over MPI, `threads` with ranks as threads of one process.

A transport is the world as one rank sees it. Only `Channel` objects move tensors for operators; the other calls are for
agreements, set-up data and sums that no operator describes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from distdl_lite.grid import compact
from distdl_lite.plan import Plan
from distdl_lite.transport.calls import begin
from distdl_lite.transport.counts import Listener, of_process, record
from distdl_lite.transport.sums import Done, Pending, Timed
from distdl_lite.transport.team import Team


class RowsByRank(NamedTuple):
    """A contiguous tensor, and how many of its rows go to, or come from, each of several ranks."""

    tensor: torch.Tensor
    counts: Sequence[int]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class Channel(Protocol):
    """A plan bound to a transport for one dtype and device, with its buffers and requests."""

    def start(self, x: torch.Tensor) -> Any:
        """Begin to move `x`, which the caller leaves unchanged until `finish`; returns what `finish` takes."""

    def finish(self, pending: Any, into: torch.Tensor | None = None) -> torch.Tensor:
        """Wait, and return the output as a fresh tensor; of an exchange, or add it to the tensor given."""


class RowsMoving(Protocol):
    """Rows under way between ranks."""

    def test(self) -> bool:
        """Whether all have arrived that this rank receives; moves on what has not."""

    def finish(self) -> torch.Tensor:
        """Wait, and return the tensor that the rows received are in. Called once."""


class Transport(Protocol):
    """The world as one rank sees it; all ranks of a team make the same calls."""

    name: str  # of what moves tensors
    launcher: str  # the beginning of a command that starts {} ranks
    rank: int
    size: int
    proc_null: int
    local: dict[str, Any]  # this rank's registries, such as its reducer; under "tallies" those that are open

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> Channel:
        """Make the plan runnable; every rank of its legs' teams calls it."""

    def team(self, ranks: Iterable[int]) -> Team:
        """The one team of these ranks; this communicates nothing."""
        known = compact(ranks if isinstance(ranks, range) else sorted(ranks))
        teams: dict[Sequence[int], Team] = self.local.setdefault("teams", {})
        return teams.get(known) or teams.setdefault(known, Team(self, known))

    def agree(self, team: Team, value: int) -> int:
        """The sum of the ranks' values modulo 2^64."""
        if team.size == 1:
            return value
        self.start_agreeing(team, value)
        return self.agreed(team)

    def start_agreeing(self, team: Team, value: int) -> None:
        """Give this rank's value without waiting for the others'."""

    def agreed(self, team: Team) -> int:
        """The sum that `start_agreeing` began."""

    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        """Every rank's host object, in the order of the ranks."""

    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        """The greatest of the ranks' numbers at each place, of 64 bits; not counted."""

    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Sum, maximum ("max") or minimum ("min") over the team, into the contiguous tensor itself."""

    def open_sums(self, team: Team, lane: str = "") -> None:
        """Prepare for `start_sum`; all of the team call it, where none waits for another of them."""

    def start_sum(
        self,
        team: Team,
        tensor: torch.Tensor,
        engine: str = "auto",
        lane: str = "",
        fill: Callable[[], Any] | None = None,
        then: Callable[[], Any] | None = None,
    ) -> Pending:
        """Begin a sum over the team into the contiguous tensor itself, which `fill` fills before, where the sum is made.

        `then` is called once when the sum is there, in whichever thread, before `wait` has returned true.
        The team's ranks start those of one lane in the same order, wherever each of them stands, and with the same engine,
        one of `ENGINES` or "auto".
        """
        if team.size == 1 or not tensor.numel():
            for call in (fill, then):
                if call is not None:
                    call()
            return Done()
        begin("sum", self, team)
        return self._told(team, tensor.nbytes, lambda: self._sum(team, tensor, engine, lane, fill, then))

    def start_rounded_sum(
        self,
        team: Team,
        tensor: torch.Tensor,
        left: torch.Tensor,
        dtype: torch.dtype,
        engine: str = "auto",
        lane: str = "",
    ) -> Pending:
        """Begin a sum, as `start_sum`, of real numbers that travel as the half precision `dtype`, in half the bytes of float32.

        Each is rounded on its way to where it is added up, and with more than two ranks the sum on its way back; what is out
        of float16's range is cut to it.
        `left` gets what this rank kept: the sums, and what is left on all ranks, add up to the exact sums.
        """
        if team.size == 1 or not tensor.numel():
            left.zero_()
            return Done()
        begin("sum", self, team)
        size = tensor.numel() * dtype.itemsize
        return self._told(team, size, lambda: self._rounded_sum(team, tensor, left, dtype, engine, lane))

    def _told(self, team: Team, size: int, start: Callable[[], Pending]) -> Pending:
        """Start a sum, and tell who listens of it and of the wait for it."""
        if not self.local["tallies"]:
            return start()
        posted = perf_counter()
        record(self, "start sum", team, posted, "sums", (1, size, 1))
        pending = start()
        if isinstance(pending, Done):  # it has waited already
            record(self, "sum", team, posted, posted=posted)
            return pending
        return Timed(pending, lambda began: record(self, "sum", team, began, posted=posted))

    def _sum(self, team: Team, tensor: torch.Tensor, engine: str, lane: str, fill: Any, then: Any) -> Pending:
        """Carry out `start_sum` of elements over several ranks."""

    def _rounded_sum(
        self, team: Team, tensor: torch.Tensor, left: torch.Tensor, dtype: torch.dtype, engine: str, lane: str
    ) -> Pending:
        """Carry out `start_rounded_sum` of elements over several ranks."""

    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        """Fill the contiguous tensor with world rank `root`'s."""

    def exchange_rows(self, ranks: Sequence[int], sends: RowsByRank, receives: RowsByRank) -> RowsMoving:
        """Begin to send the rows of a tensor and to receive into another, which waits for no other rank.

        Both are in the order of the ranks that the rows go to and come from: that of `ranks`, which need not be sorted. The
        caller leaves both alone until all have arrived. Other calls of these ranks may come between.
        """

    def user_communicator(self, ranks: Sequence[int]) -> Any:
        """A communicator for the user's own traffic, None where ranks are threads."""


_ambient = threading.local()


def current() -> Transport:
    """The ambient world: the threads of `spmd` inside one, else all processes."""
    transport = getattr(_ambient, "transport", None)
    return transport if transport is not None else of_communicator(None)


def tallies() -> list[Listener]:
    """The tallies open on this rank, which all of its transports add to. The call makes no transport."""
    transport = getattr(_ambient, "transport", None)
    return of_process if transport is None else transport.local["tallies"]


def enter(transport: Transport | None) -> None:
    """Make `transport` this thread's ambient world; None goes back to all processes."""
    _ambient.transport = transport


def of_communicator(comm: Any) -> Transport:
    """The transport over a communicator (None: all processes), the same object for the same communicator."""
    if not is_communicator(comm):
        raise TypeError(f"an mpi4py communicator, a process group or a device mesh is needed, not {comm!r}")
    if uses_torch() if comm is None else not hasattr(comm, "Is_inter"):
        from distdl_lite.transport import torch_dist

        return torch_dist.transport_over(comm)
    try:
        from distdl_lite.transport import mpi
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            "there are no ranks: torchrun has not started this process, and MPI cannot be loaded "
            f"({type(error).__name__}: {error}). Start it with `torchrun --nproc-per-node N program.py`; or get an MPI, such as "
            "by `pip install mpi4py mpich`, and start it with `mpirun -n N python program.py`. Without either, "
            "distdl_lite.testing.spmd runs ranks as threads"
        ) from error
    return mpi.transport_over(comm)


def is_communicator(comm: Any) -> bool:
    """Whether something says which processes take part: a communicator of mpi4py, a process group, a device mesh, or None."""
    if comm is None or hasattr(comm, "Is_inter"):
        return True
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available():
        return False
    is_outside = comm is dist.GroupMember.NON_GROUP_MEMBER
    return is_outside or isinstance(comm, dist.ProcessGroup) or type(comm).__name__ == "DeviceMesh"


@cache
def uses_torch() -> bool:
    """Whether the processes move tensors by torch.distributed, not by MPI.

    ``DISTDL_LITE_TRANSPORT`` (``mpi`` or ``torch``) says so; else they do under torchrun and where a process group exists,
    unless that is one over MPI.

    Raises
    ------
    ValueError
        If the variable is something else, or both MPI's launcher and torch's have started several processes.
    """
    named = os.environ.get("DISTDL_LITE_TRANSPORT", "")
    if named not in ("", "mpi", "torch"):
        raise ValueError(f"DISTDL_LITE_TRANSPORT={named!r} is neither mpi nor torch")
    if named:
        return named == "torch"
    by_mpi = next((f"{name}={n}" for name in _RANKS_OF_MPI if (n := os.environ.get(name, "1")) != "1"), "")
    if by_mpi and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            f"both MPI's launcher ({by_mpi}) and torchrun (WORLD_SIZE={os.environ.get('WORLD_SIZE')}) have started this "
            "process: DISTDL_LITE_TRANSPORT=mpi or torch says whose ranks are meant"
        )
    return _group_exists() or (not by_mpi and all(name in os.environ for name in _RANKS_OF_TORCH))


_RANKS_OF_MPI = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"
_RANKS_OF_TORCH = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def _group_exists() -> bool:
    """Whether torch's default process group exists, but not over MPI. The call loads nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_backend() != "distdl"
