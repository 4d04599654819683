"""Process groups for tests: over MPI, and over gloo beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

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
    """Run ``test(group, gloo)`` on two ranks; gloo's processes find each other by a file."""

    @pytest.mark.mpi(min_size=2)
    def test() -> None:
        P = dl.Partition().create_partition_inclusive([0, 1])
        if not P.active:
            return
        folder = P.broadcast_data(tempfile.mkdtemp() if P.rank == 0 else None)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            with group_over(P, store=dist.FileStore(f"{folder}/store", 2)) as group:
                body(group, dist.new_group(backend="gloo"))
        finally:
            if P.rank == 0:
                shutil.rmtree(folder)

    test.__doc__, test.__name__ = body.__doc__, body.__name__
    return test
