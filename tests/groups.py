"""Process groups for tests: over MPI, and over gloo beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from ranks import over_mpi

import distdl_lite as dl
from distdl_lite.parallel.process_group import MPIProcessGroup


@contextmanager
def group_over(P: dl.Partition, **options: Any) -> Iterator[MPIProcessGroup]:
    group = MPIProcessGroup.init(P, **options)
    assert group is not None
    try:
        yield group
    finally:
        dist.destroy_process_group()


def on_group(size: int, ranks: Callable[[int], list[int]] = lambda size: list(range(size)), **options: Any) -> Any:
    """Run the decorated ``test(group)`` under mpirun with the default group over `size` ranks."""

    def decorate(body: Callable[[MPIProcessGroup], None]) -> Callable[[], None]:
        @over_mpi
        @pytest.mark.mpi(min_size=size)
        def test() -> None:
            P = dl.Partition().create_partition_inclusive(ranks(size))
            if P.active:
                with group_over(P, **options) as group:
                    body(group)
            else:
                assert MPIProcessGroup.init(P, **options) is None
                assert not dist.is_initialized()

        test.__doc__, test.__name__ = body.__doc__, body.__name__
        return test

    return decorate


def beside_gloo(body: Callable[[Any, Any], None]) -> Callable[[], None]:
    """Run ``test(group, gloo)`` on two ranks; gloo's processes find each other by rank 0's store."""

    @over_mpi
    @pytest.mark.mpi(min_size=2)
    def test() -> None:
        P = dl.Partition().create_partition_inclusive([0, 1])
        if not P.active:
            return
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        # Not a FileStore: the last rank to leave would wait, holding the GIL, for a file that the first has removed.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if P.rank == 0 else None
        port = P.broadcast_data(store and store.port)
        with group_over(P, store=store or dist.TCPStore("localhost", port)) as group:
            body(group, dist.new_group(backend="gloo"))

    test.__doc__, test.__name__ = body.__doc__, body.__name__
    return test
