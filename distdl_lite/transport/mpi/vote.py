"""Votes on a communicator."""

from __future__ import annotations

from array import array

from distdl_lite.transport.mpi.buffers import MPI


class Vote:
    """A team's agreements: a persistent sum, which the ranks need not wait for when they give their numbers."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._mine, self._sum = array("Q", [0]), array("Q", [0])
        specs = [[MPI.memory.frombuffer(buffer), 1, MPI.UINT64_T] for buffer in (self._mine, self._sum)]
        self._request = comm.Allreduce_init(*specs, MPI.SUM)
        self._is_open = False

    def start(self, value: int) -> None:
        if self._is_open:  # an error kept this rank from asking for the result
            self.finish()
        self._mine[0] = value
        self._is_open = True
        self._request.Start()

    def finish(self) -> int:
        self._is_open = False
        self._request.Wait()
        return self._sum[0]
