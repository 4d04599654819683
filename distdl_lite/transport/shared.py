"""Sums through memory that the ranks of a host share.

MPI's sum of large messages between processes of one host copies them through buffers, twice. Where each rank's numbers lie
in memory that all see, each adds up its part of them in place: 1.9 MB of two ranks take 0.13 ms in place of 0.5.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

from distdl_lite.transport import Transport
from distdl_lite.transport.counts import record

_FOLDER = "/dev/shm"  # files here are memory
_DTYPES = torch.float32, torch.float64  # halves are added up in float32, elsewhere


class SharedSums:
    """Flat tensors, one of each rank of a team, whose sum all ranks get in place.

    Attributes
    ----------
    mine : torch.Tensor
        This rank's.
    """

    def __init__(self, transport: Transport, team: tuple[int, ...], rows: Sequence[torch.Tensor]) -> None:
        self._transport, self._team = transport, team
        place, size = team.index(transport.rank), rows[0].numel()
        self.mine = rows[place]
        part = slice(size * place // len(team), size * (place + 1) // len(team))
        self._first, *self._others = [row[part] for row in rows]

    def add_up(self) -> None:
        """Put the sum in place of all ranks' numbers; the caller sees to it that all have written theirs.

        It waits for all ranks. Each number is added up by one rank, so all have the same.
        """
        for other in self._others:
            self._first.add_(other)
        for other in self._others:
            other.copy_(self._first)
        if self._transport.local["tallies"]:
            record(self._transport.local, 1, self.mine.nbytes, 0.0, 1, "sums")
        self._transport.agree(self._team, 0)


def shared_sums(
    transport: Transport, team: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device
) -> SharedSums | None:
    """Zeros in shared memory, so many on each rank of the team, all of which call with the same; None where there is none.

    That is on ranks of several hosts, on other systems than Linux, and where the memory for it is used up.
    """
    if len(team) < 2 or not size or device.type != "cpu" or dtype not in _DTYPES:
        return None
    stride = -(-size // 16) * 16  # rows begin with cache lines
    nbytes = len(team) * stride * dtype.itemsize
    made = _made(nbytes) if transport.rank == team[0] else None
    try:
        path = transport.gather_objects(team, made)[0]
        memory = _opened(path, nbytes)
        are_there = transport.gather_objects(team, memory is not None)
    finally:
        if made is not None:
            os.unlink(made)  # the memory stays while a rank has it
    if memory is None or not all(are_there):
        return None
    rows = torch.frombuffer(memory, dtype=dtype).view(len(team), stride)
    return SharedSums(transport, team, [row[:size] for row in rows])


def _made(nbytes: int) -> str | None:
    """The path of a new file of zeros, which has its memory already: a lack of it later would end the process."""
    try:
        handle, path = tempfile.mkstemp(dir=_FOLDER, prefix="distdl_lite-")
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)
    return path


def _opened(path: str | None, nbytes: int) -> mmap.mmap | None:
    if path is None:
        return None
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), nbytes)
    except (OSError, ValueError):  # another host's, or another file of the name
        return None
