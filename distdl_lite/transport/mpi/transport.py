"""The ranks of a communicator, and the one transport over each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite.transport import RowsByRank, Team, Transport, wire
from distdl_lite.transport.counts import counted
from distdl_lite.transport.devices import HOST, mpi_takes
from distdl_lite.transport.mpi.buffers import MPI
from distdl_lite.transport.mpi.group import MPIGroup, PersistentMessages
from distdl_lite.transport.mpi.rows import RowsMoving
from distdl_lite.transport.mpi.vote import Vote
from distdl_lite.transport.processes import ProcessTransport
from distdl_lite.transport.reports import take_part

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


class MPITransport(ProcessTransport):
    """The ranks of one communicator."""

    name = "MPI"
    launcher = "mpirun -n {}"

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm.Dup()
        self._begin(self.comm.rank, self.comm.size, MPI.PROC_NULL)
        self.team(range(self.size)).comm = MPIGroup(self.comm)
        take_part(self)

    @property
    def threads_may_call(self) -> bool:
        return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)

    @property
    def engine(self) -> str:
        return "thread" if self.threads_may_call else "poll"

    def make_group(self, ranks: Sequence[int]) -> MPIGroup:
        return MPIGroup(self.user_communicator(ranks))

    def user_communicator(self, ranks: Sequence[int]) -> MPI.Comm:
        group = self.comm.Get_group()
        subgroup = group.Incl(list(ranks))
        made = self.comm.Create_group(subgroup, tag=hash(tuple(ranks)) % 32749)
        subgroup.Free()
        group.Free()
        return made

    def home(self, device: torch.device) -> torch.device:
        return device if mpi_takes(device) else HOST

    def requests(self, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> PersistentMessages:
        return PersistentMessages(self.comm, sends, receives)

    def make_vote(self, team: Team) -> Vote:
        return Vote(self.group(team).comm)

    @counted()
    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        values: list[Any] = self.group(team).comm.allgather(value)
        return values

    @counted()
    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        found = array("q", numbers)
        if team.size > 1:
            self.group(team).comm.Allreduce(MPI.IN_PLACE, [MPI.memory.frombuffer(found), MPI.INT64_T], op=MPI.MAX)
        return found.tolist()

    @counted("rows")
    def exchange_rows(self, ranks: Sequence[int], sends: RowsByRank, receives: RowsByRank) -> RowsMoving:
        ranks = tuple(ranks)
        if ranks not in self._row_groups:
            # Of its own: an exchange is under way while the ranks' other calls come and go.
            self._row_groups[ranks] = self.user_communicator(ranks)
        return RowsMoving(self._row_groups[ranks], sends, receives)
