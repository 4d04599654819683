"""Loops that end earlier on some ranks than on others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from distdl_lite.buckets import broadcast, broadcast_structure
from distdl_lite.optim.checks import check_same
from distdl_lite.parallel.replicas.alike import DIFFERENT, order
from distdl_lite.parallel.replicas.options import listed
from distdl_lite.parallel.replicas.synchroniser import Synchroniser

if TYPE_CHECKING:
    from distdl_lite.parallel.replicas.data_parallel import DataParallel


@contextlib.contextmanager
def joined(container: DataParallel, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """See `DataParallel.join`."""
    if container.P.active:
        container._refresh()  # where it is a copy or has been loaded, as ranks that make no step must know
    if container._couples:
        raise RuntimeError("DataParallel: SyncBatchNorm needs all ranks in every step; join is not for it")
    given, sync = optimizers or listed(container.optimizer), container._sync
    if sync is None or sync.team.size == 1:
        yield
        return
    told = sync.team.world.gather_objects(sync.team, order(given, container.module.named_parameters()))
    check_same(sync.team, told, DIFFERENT)
    teams = sync.team.world.local.setdefault("teams in join", [])
    if sync.team in teams:
        raise RuntimeError(
            "DataParallel: ranks that have ended would wait in one join while others are in that of another container; "
            "put both modules into one container"
        )
    teams.append(sync.team)
    try:
        yield
    except Exception as error:
        _leave(container, error)
        raise
    finally:
        teams.remove(sync.team)
    container.synchronize()
    _catch_up(container._sync, given)  # another where parameters were replaced


def _catch_up(sync: Synchroniser, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Take part in the others' steps; then all take what a rank knows that made the last one."""
    transport, steps_behind, takes_part = sync.team.world, -1, True
    while takes_part:
        sync.begin(None, takes_part=False)
        takes_part = sync.finish()
        steps_behind += 1
    place = sync.team.index(transport.rank)
    nearest = torch.tensor([steps_behind * sync.team.size + place])
    transport.all_reduce(sync.team, nearest, "min")
    root = sync.team[int(nearest) % sync.team.size]
    broadcast(sync.team, [*sync.parameters, *sync.buffers], root)
    for optimizer in optimizers:
        state = broadcast_structure(sync.team, optimizer.state_dict(), root)
        if transport.rank != root:
            optimizer.load_state_dict(state)


def _leave(container: DataParallel, error: Exception) -> None:
    """Let the other ranks, who are in a step or have ended, raise this rank's error, unless all have failed together."""
    sync, deferral = container._sync, container._deferral
    if sync is None or sync.is_broken or sync.has_failed:
        return
    with contextlib.suppress(Exception):
        if deferral is not None and not deferral.is_interrupted:
            deferral.flush()
        sync.abandon(error)
