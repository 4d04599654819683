"""A communicator's collectives, and persistent messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite.transport.devices import settle
from distdl_lite.transport.mpi.buffers import MPI, TAG, as_bytes, as_numbers
from distdl_lite.transport.wire import Message

_OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}


class MPIGroup:
    """A communicator's collectives on tensors."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        settle(tensor)
        self.comm.Bcast(as_bytes(tensor), root)

    def reduce(self, sent: torch.Tensor, total: torch.Tensor | None, root: int) -> None:
        settle(sent)
        given = MPI.IN_PLACE if sent is total else as_numbers(sent)
        self.comm.Reduce(given, None if total is None else as_numbers(total), MPI.SUM, root)

    def all_reduce(self, sent: torch.Tensor, total: torch.Tensor, op: str = "sum") -> None:
        settle(sent)
        self.comm.Allreduce(MPI.IN_PLACE if sent is total else as_numbers(sent), as_numbers(total), _OPS[op])

    def post_all_reduce(self, tensor: torch.Tensor) -> MPI.Request:
        settle(tensor)
        return self.comm.Iallreduce(MPI.IN_PLACE, as_numbers(tensor), MPI.SUM)

    def all_gather(self, mine: torch.Tensor, flat: torch.Tensor, counts: Sequence[int]) -> None:
        settle(mine)
        sizes = [count * flat.itemsize for count in counts]
        if len(set(sizes)) == 1:
            self.comm.Allgather(as_bytes(mine), [as_bytes(flat)[0], sizes[0], MPI.BYTE])
        else:
            self.comm.Allgatherv(as_bytes(mine), [as_bytes(flat)[0], sizes, MPI.BYTE])

    def reduce_scatter(self, flat: torch.Tensor, mine: torch.Tensor, counts: Sequence[int]) -> None:
        settle(flat)
        if len(set(counts)) == 1:
            memory, _, kind = as_numbers(flat)
            self.comm.Reduce_scatter_block([memory, counts[0], kind], as_numbers(mine), MPI.SUM)
        else:
            self.comm.Reduce_scatter(as_numbers(flat), as_numbers(mine), counts, MPI.SUM)

    def all_to_all(self, rows: torch.Tensor, received: torch.Tensor) -> None:
        settle(rows)
        size = rows[0].nbytes
        self.comm.Alltoall([as_bytes(rows)[0], size, MPI.BYTE], [as_bytes(received)[0], size, MPI.BYTE])


class PersistentMessages:
    """The messages of an exchange, as persistent requests."""

    def __init__(self, comm: MPI.Comm, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        _free_what_left()
        self._receiving = [comm.Recv_init(as_bytes(m.buffer), m.peer, TAG) for m in receives]
        self._sending = [comm.Send_init(as_bytes(m.buffer), m.peer, TAG) for m in sends]
        self._receives = receives
        self._starts = list(zip(sends, self._sending, strict=True))
        self._is_sending = False

    def start(self, source: Any) -> None:
        if self._is_sending:
            MPI.Request.Waitall(self._sending)
        for message in self._receives[:1]:
            settle(message.buffer)  # what was unpacked before
        for request in self._receiving:
            request.Start()
        for message, request in self._starts:
            message.pack(source)
            settle(message.buffer)
            request.Start()

    def receive(self) -> None:
        """What goes may go on: it lies in our buffers, and a large message leaves when it is fetched."""
        if self._receiving:
            MPI.Request.Waitall(self._receiving)
        if self._sending:
            self._is_sending = not MPI.Request.Testall(self._sending)

    def __del__(self) -> None:
        # Another thread may collect garbage while this one is inside MPI, and the last messages may still be under way.
        if _leaving is not None:  # as it is when Python ends
            _leaving.append(([*getattr(self, "_receiving", ()), *getattr(self, "_sending", ())], self.__dict__))


_leaving: list[tuple[list[MPI.Prequest], Any]] = []  # requests and buffers of operators that are no more


def _free_what_left() -> None:
    for entry in _leaving[:]:
        if MPI.Request.Testall(entry[0]):
            _leaving.remove(entry)
            for request in entry[0]:
                request.Free()
