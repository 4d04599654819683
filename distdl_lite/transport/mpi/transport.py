"""The ranks of a communicator, and the one transport over each."""

from __future__ import annotations

import atexit
import sys
from array import array
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from distdl_lite.plan import Plan
from distdl_lite.transport import RowsByRank, Team, Transport, wire
from distdl_lite.transport.counts import counted, of_process, record
from distdl_lite.transport.mpi.buffers import MPI, as_bytes, as_numbers, on_wire
from distdl_lite.transport.mpi.channel import MPIChannel
from distdl_lite.transport.mpi.rows import RowsMoving
from distdl_lite.transport.mpi.sums import (
    Posted,
    Vote,
    event_of,
    rounded_sum,
    summed,
    take_both_home,
    take_home,
    threads_may_call,
)
from distdl_lite.transport.sums import Done, Pending, Worker

_OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
_SECONDS_AT_END = 5.0  # for sums that were started and never waited for

_transports: list[tuple[MPI.Comm, MPITransport]] = []


def transport_over(comm: MPI.Comm | None) -> Transport:
    """The one transport over a communicator; the first call duplicates it, together on all of its ranks."""
    comm = MPI.COMM_WORLD if comm is None else comm
    if comm == MPI.COMM_NULL or comm.Is_inter():
        raise ValueError("a partition needs an intracommunicator that this rank belongs to")
    for known, transport in _transports:
        if comm == known or comm == transport.comm:
            return transport
    _transports.append((comm, MPITransport(comm)))
    return _transports[-1][1]


class MPITransport(Transport):
    """The ranks of one communicator."""

    def __init__(self, comm: MPI.Comm) -> None:
        wire.keep_freed_memory()
        self.comm = comm.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.proc_null: int = MPI.PROC_NULL
        self.local: dict[str, Any] = {"tallies": of_process}
        self.team(range(self.size)).comm = self.comm
        self._workers: list[Worker] = []
        atexit.register(self._end)  # before MPI's own end, which was registered earlier
        self._row_teams: dict[tuple[int, ...], MPI.Comm] = {}

    def communicator(self, team: Team) -> MPI.Comm:
        """The team's communicator; the team makes it together at first use."""
        if team.comm is None:
            team.comm = self.user_communicator(team.ranks)
        return team.comm

    def user_communicator(self, ranks: Sequence[int]) -> MPI.Comm:
        group = self.comm.Get_group()
        subgroup = group.Incl(list(ranks))
        made = self.comm.Create_group(subgroup, tag=hash(tuple(ranks)) % 32749)
        subgroup.Free()
        group.Free()
        return made

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> MPIChannel:
        return MPIChannel(self.comm, lambda ranks: self.communicator(self.team(ranks)), plan, dtype, device)

    def start_agreeing(self, team: Team, value: int) -> None:
        if team.vote is None:
            team.vote = Vote(self.communicator(team))
        team.vote.start(value)

    def agreed(self, team: Team) -> int:
        began = perf_counter()
        value: int = team.vote.finish()
        record(self.local, 0, 0, perf_counter() - began, 0, None)
        return value

    @counted()
    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        values: list[Any] = self.communicator(team).allgather(value)
        return values

    @counted()
    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        found = array("q", numbers)
        if team.size > 1:
            self.communicator(team).Allreduce(MPI.IN_PLACE, [MPI.memory.frombuffer(found), MPI.INT64_T], op=MPI.MAX)
        return found.tolist()

    @counted("sums")
    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if team.size > 1 and tensor.numel():
            sent = on_wire(tensor)
            self.communicator(team).Allreduce(MPI.IN_PLACE, as_numbers(sent), op=_OPS[op])
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor

    def open_sums(self, team: Team, lane: str = "") -> None:
        if lane not in team.lanes:
            team.lanes[lane] = self.communicator(team).Dup(), Worker()
            self._workers.append(team.lanes[lane][1])

    def _sum(self, team: Team, tensor: torch.Tensor, engine: str, lane: str, fill: Any, then: Any) -> Pending:
        if engine in ("auto", "thread"):
            engine = "thread" if threads_may_call() else "poll"
        if fill is not None and (engine != "thread" or not tensor.is_cpu):
            fill()
            fill = None
        comm, worker = team.lanes[lane]
        if engine == "poll":
            sent = on_wire(tensor)
            request = comm.Iallreduce(MPI.IN_PLACE, as_numbers(sent), MPI.SUM)
            return Posted(request, lambda: take_home(tensor, sent, then))
        if engine == "inline":
            take_home(tensor, summed(comm, tensor), then)
            return Done()
        before = event_of(tensor) if fill is None else fill
        return worker.submit(
            lambda: summed(comm, tensor, before, then),
            lambda total: None if total is tensor else take_home(tensor, total, then),
        )

    def _rounded_sum(
        self, team: Team, tensor: torch.Tensor, left: torch.Tensor, dtype: torch.dtype, engine: str, lane: str
    ) -> Pending:
        comm, worker = team.lanes[lane]
        # Never "poll": of two collectives MPI would not begin the second by itself.
        if engine in ("auto", "thread") and threads_may_call():
            is_ready = event_of(tensor)
            return worker.submit(
                lambda: rounded_sum(comm, tensor, left, dtype, is_ready),
                lambda both: take_both_home(tensor, left, both),
            )
        take_both_home(tensor, left, rounded_sum(comm, tensor, left, dtype))
        return Done()

    def _end(self) -> None:
        """Let MPI end although some rank took no part in a sum: the job would wait for it for ever."""
        end = perf_counter() + _SECONDS_AT_END
        stopped = [worker.stop(end - perf_counter()) for worker in self._workers]
        if not all(stopped):
            print(
                f"rank {self.rank} ends while a sum that it started waits for other ranks", file=sys.stderr, flush=True
            )
            self.comm.Abort(1)

    @counted("copies")
    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        if team.size > 1:
            sent = tensor.to("cpu").contiguous()
            self.communicator(team).Bcast(as_bytes(sent), team.index(root))
            if sent is not tensor:
                tensor.copy_(sent)

    @counted("rows")
    def exchange_rows(self, ranks: Sequence[int], sends: RowsByRank, receives: RowsByRank) -> RowsMoving:
        ranks = tuple(ranks)
        if ranks not in self._row_teams:
            # Of its own: an exchange is under way while the ranks' other calls come and go.
            self._row_teams[ranks] = self.user_communicator(ranks)
        return RowsMoving(self._row_teams[ranks], sends, receives)
