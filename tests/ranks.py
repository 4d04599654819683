"""Test bodies that run on several ranks: as threads in the serial session, as processes under mpirun and torchrun."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import distdl_lite as dl
from distdl_lite.testing import spmd
from distdl_lite.transport import Transport, enter, of_communicator, uses_torch

over_mpi = pytest.mark.skipif(uses_torch(), reason="of MPI itself")


def on_ranks(
    size: int, mpi: bool = False, threads: bool = True
) -> Callable[[Callable[[dl.Partition], Any]], Callable[..., None]]:
    """Run the decorated ``test(world)`` on `size` ranks, every one of which asserts: as `threads`, with `mpi` as processes."""

    def decorate(body: Callable[[dl.Partition], Any]) -> Callable[..., None]:
        def test(transport: str) -> None:
            if transport == "threads":
                spmd(size, body)
                return
            first = _first(size)
            if first is None:
                return
            enter(first)
            try:
                body(dl.Partition.world())
            finally:
                enter(None)

        test.__doc__, test.__name__ = body.__doc__, body.__name__
        kinds: list[Any] = ["threads"] if threads else []
        if mpi:
            kinds.append(pytest.param("mpi", marks=pytest.mark.mpi(min_size=size)))
        return pytest.mark.parametrize("transport", kinds)(test)

    return decorate


@cache
def _first(size: int) -> Transport | None:
    """The transport of a world of so many processes, None on the others; all make it together."""
    ranks = dl.Partition().create_partition_inclusive(range(size))
    return of_communicator(ranks.comm) if ranks.active else None


@contextmanager
def shared_folder(world: dl.Partition) -> Iterator[Path]:
    """A folder that all ranks see, and that is gone when all are done."""
    folder = Path(world.broadcast_data(tempfile.mkdtemp() if world.rank == 0 else None))
    yield folder
    world.allgather_data(None)
    if world.rank == 0:
        shutil.rmtree(folder)
