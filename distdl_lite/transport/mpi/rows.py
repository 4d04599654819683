"""Rows of a table that change ranks while other calls come and go."""

from __future__ import annotations

import atexit
import ctypes
import math
from collections.abc import Sequence
from itertools import accumulate
from time import perf_counter, sleep

import torch

from distdl_lite.transport import RowsByRank
from distdl_lite.transport.mpi.buffers import MPI, TAG, as_bytes, at_host


class RowsMoving:
    """Rows under way. What nobody waits for is kept until it has gone, for MPI reads and writes the buffers."""

    def __init__(self, comm: MPI.Comm, sends: RowsByRank, receives: RowsByRank) -> None:
        _moving[:] = [other for other in _moving if not other.test()]
        (rows, given), (into, taken) = sends, receives
        self._into, self._sent = into, at_host(rows)
        self._received = into if into.is_cpu else torch.empty_like(into, device="cpu")
        row = math.prod(rows.shape[1:]) * rows.element_size()
        starts, ends = (_cuts(counts, row) for counts in (given, taken))
        source, target = as_bytes(self._sent)[0], as_bytes(self._received)[0]
        self._requests = []
        for peer in range(comm.size):
            piece, place = source[slice(*starts[peer])], target[slice(*ends[peer])]
            if peer == comm.rank:
                place[:] = piece
                continue
            if len(place):
                self._requests.append(comm.Irecv([place, len(place), MPI.BYTE], peer, TAG))
            if len(piece):
                self._requests.append(comm.Isend([piece, len(piece), MPI.BYTE], peer, TAG))
        _moving.append(self)

    def test(self) -> bool:
        if self in _moving and MPI.Request.Testall(self._requests):
            _moving.remove(self)
        return self not in _moving

    def finish(self) -> torch.Tensor:
        MPI.Request.Waitall(self._requests)
        self.test()
        return self._into if self._received is self._into else self._into.copy_(self._received)


def _cuts(counts: Sequence[int], row: int) -> list[tuple[int, int]]:
    """The begin and end of each rank's rows, in bytes."""
    ends = [row * end for end in accumulate(counts)]
    return list(zip([0, *ends], ends, strict=False))


_moving: list[RowsMoving] = []


@atexit.register
def _let_rows_arrive() -> None:
    """Python frees tensors before MPI ends: wait for the last rows that nobody waited for, or never free them."""
    deadline = perf_counter() + 10
    while not (MPI.Is_finalized() or all(moving.test() for moving in _moving[:])) and perf_counter() < deadline:
        sleep(0.001)
    for moving in _moving:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(moving))
