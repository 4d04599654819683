"""Test bodies that run on several ranks: as threads in the serial session, as MPI processes under mpirun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import distdl_lite as dl
from distdl_lite.testing import spmd


def on_ranks(size: int, mpi: bool = False) -> Callable[[Callable[[dl.Partition], Any]], Callable[..., None]]:
    """Run the decorated ``test(world)`` on `size` ranks, every one of which asserts; with `mpi` also under mpirun."""

    def decorate(body: Callable[[dl.Partition], Any]) -> Callable[..., None]:
        def test(transport: str) -> None:
            if transport == "threads":
                spmd(size, body)
                return
            world = dl.Partition().create_partition_inclusive(range(size))
            if world.active:
                body(world)

        test.__doc__, test.__name__ = body.__doc__, body.__name__
        kinds = ["threads"]
        if mpi:
            kinds.append(pytest.param("mpi", marks=pytest.mark.mpi(min_size=size)))
        return pytest.mark.parametrize("transport", kinds)(test)

    return decorate
