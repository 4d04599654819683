"""Which containers a rank has: no two of them may sum the same parameter, and few communicators are shared among them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distdl_lite.transport import Team, Transport

if TYPE_CHECKING:
    from distdl_lite.parallel.replicas.synchroniser import Synchroniser

LANES = 8  # containers whose sums may be under way at once; communicators are few


def synchronisers(transport: Transport) -> weakref.WeakSet[Synchroniser]:
    """Those of this rank that are alive."""
    return transport.local.setdefault("synchronisers", weakref.WeakSet())


def in_others(transport: Transport, named: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
    """The names of parameters that another container of this rank has."""

    def found() -> list[str]:
        held = {id(p) for other in synchronisers(transport) for p in other.parameters}
        return [name for name, p in named if id(p) in held]

    if found():
        gc.collect()  # it may be one that nobody uses any more
    return found()


def lanes_in_use(team: Team) -> list[int]:
    """The numbers of the lanes that a new container of the team should leave to others, as far as this rank knows."""
    alive = [(other.team, other.lane) for other in synchronisers(team.world)]
    used = [*alive, *team.world.local.get("spoilt lanes", [])]
    return [int(lane.split()[-1]) for others, lane in used if others == team]
