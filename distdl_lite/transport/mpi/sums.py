"""Sums on a communicator: those that a worker makes, those that MPI makes when it can, and the sums of votes."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any

import torch

from distdl_lite.transport import wire
from distdl_lite.transport.mpi.buffers import MPI, as_bytes, as_numbers, at_host, on_wire
from distdl_lite.transport.waiting import BEGUN


def threads_may_call() -> bool:
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def summed(
    comm: MPI.Comm,
    tensor: torch.Tensor,
    before: Callable[[], Any] | None = None,
    then: Callable[[], Any] | None = None,
) -> torch.Tensor:
    """The sum in host memory, the tensor itself where it can be: `then` is called there, and nothing is left to take home."""
    if before is not None:
        before()
    sent = on_wire(tensor)
    comm.Allreduce(MPI.IN_PLACE, as_numbers(sent), MPI.SUM)
    if sent is tensor and then is not None:
        then()
    return sent


def rounded_sum(
    comm: MPI.Comm,
    tensor: torch.Tensor,
    left: torch.Tensor,
    dtype: torch.dtype,
    is_ready: Callable[[], Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and what rounding left of this rank's numbers and of the piece that it adds up, in host memory.

    They are the tensors themselves where they can be: each further vector costs as much as it takes to send one.
    """
    if is_ready is not None:
        is_ready()
    total, size = at_host(tensor), tensor.numel()
    kept = left if left.is_cpu else torch.empty_like(total)
    sent = wire.rounded(total, dtype, 1 if comm.size == 2 else comm.size)
    torch.sub(total, sent.view(-1)[:size], out=kept)
    if comm.size == 2:  # each adds up everything, in no more bytes
        return _added_up(_gathered(comm, sent), total), kept
    parts, nbytes = torch.empty_like(sent), sent[0].nbytes
    comm.Alltoall([as_bytes(sent)[0], nbytes, MPI.BYTE], [as_bytes(parts)[0], nbytes, MPI.BYTE])
    exact = _added_up(parts, torch.empty_like(parts[0], dtype=total.dtype))
    piece = wire.rounded(exact, dtype, 1)
    total.copy_(_gathered(comm, piece).view(-1)[:size])
    mine = kept[comm.rank * exact.numel() :][: exact.numel()]
    mine += (exact - piece[0])[: mine.numel()]
    return total, kept


def _added_up(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """The sum of the rows, one after another: for long ones five times as fast as torch's sum over the first dim."""
    into.copy_(rows[0])
    for row in rows[1:]:
        into += row
    return into


def _gathered(comm: MPI.Comm, piece: torch.Tensor) -> torch.Tensor:
    """The ranks' pieces as rows."""
    rows = piece.new_empty(comm.size, piece.numel())
    comm.Allgather(as_bytes(piece), [as_bytes(rows)[0], piece.nbytes, MPI.BYTE])
    return rows


def take_home(tensor: torch.Tensor, total: torch.Tensor, then: Callable[[], Any] | None = None) -> None:
    if total is not tensor:
        tensor.copy_(total)
    if then is not None:
        then()


def take_both_home(tensor: torch.Tensor, left: torch.Tensor, both: tuple[torch.Tensor, torch.Tensor]) -> None:
    take_home(tensor, both[0])
    take_home(left, both[1])


def event_of(tensor: torch.Tensor) -> Callable[[], Any] | None:
    """A function that waits for all that this thread has asked of the tensor's device so far; None for the host."""
    return None if tensor.is_cpu else torch.accelerator.current_stream(tensor.device).record_event().synchronize


class Posted:
    """A non-blocking sum, which the first `wait` takes home."""

    def __init__(self, request: MPI.Request, home: Callable[[], Any]) -> None:
        self._request, self._home, self._is_home = request, home, False

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            self._request.Wait()
        end = perf_counter() + (timeout or 0)
        while not self._request.Test():
            if perf_counter() > end:
                return False
            sleep(0)
        if not self._is_home:
            self._is_home = True
            self._home()
        return True


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
        BEGUN[0] += 1
        self._mine[0] = value
        self._is_open = True
        self._request.Start()

    def finish(self) -> int:
        self._is_open = False
        self._request.Wait()
        return self._sum[0]
