"""Weights that several ranks hold: whether they are equal, and one rank's values for all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distdl_lite.agreement import check_alike, raise_together
from distdl_lite.model.reparametrised import reparametrised_cut_weight
from distdl_lite.model.weights import entries_of, team_of
from distdl_lite.transport import Team

Held = dict[str, tuple[torch.Tensor, Team]]  # by name, with the ranks that hold the same
Told = Mapping[
    int, Mapping[str, tuple[int, Any]]
]  # by rank and name: the first of these ranks, and what they are to share


def synchronise_replicas(module: torch.nn.Module) -> None:
    """Give every rank the values of the first one that holds the same block of a weight or buffer.

    Call it after a program has set weights on some ranks alone, or from random numbers that differ. Where weights are cut,
    each block is that of the first rank that holds it. A parameter or buffer of a plain torch layer, which all ranks hold,
    becomes that of the first of them.

    Parameters
    ----------
    module : torch.nn.Module
        A distributed model; the ranks of its layers call this together.

    Raises
    ------
    ValueError
        On all ranks, if names, shapes or dtypes differ between ranks that hold the same, or a parametrization has replaced a
        cut weight.
    """
    team, held = _held(module)
    error = _error("kinds of tensors", _told(team, held, lambda tensor: (tensor.dtype, tuple(tensor.shape))))
    if error:
        raise ValueError(error)
    for tensor, ranks in held.values():
        if ranks.size > 1:
            values = tensor.detach().contiguous()
            team.world.broadcast(ranks, values, ranks[0])
            with torch.no_grad():
                tensor.copy_(values)


def check_replicas(module: torch.nn.Module) -> None:
    """Raise unless all ranks that hold the same block of a weight or buffer have the same values of it, bit by bit.

    They tell each other a checksum of each. Parameters and buffers of plain torch layers are compared over all ranks.

    Parameters
    ----------
    module : torch.nn.Module
        A distributed model; the ranks of its layers call this together.

    Raises
    ------
    RuntimeError
        On all ranks, with the names, and the ranks whose values are not those of the first rank.
    ValueError
        On all ranks, if the names differ, or a parametrization has replaced a cut weight.
    """
    error = _error("values", _told(*_held(module), checksum))
    if error:
        raise RuntimeError(error)


def checksum(tensor: torch.Tensor) -> int:
    """Of a tensor's bits."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return zlib.crc32(values.reshape(-1).view(torch.uint8).numpy())


def _held(module: torch.nn.Module) -> tuple[Team, Held]:
    """The module's ranks, and its tensors on this one; nothing on a rank outside."""
    team = team_of(module)
    if team.world.rank not in team:
        return team, {}
    raise_together(team, reparametrised_cut_weight(module))
    return team, {name: (t, place.replicas.team if place else team) for name, t, place in entries_of(module)}


def _told(team: Team, held: Held, tell: Callable[[torch.Tensor], Any]) -> Told:
    """The words of each rank on each tensor, with the first rank that holds the same, -1 if none holds any of it.

    Raises ValueError if names differ.
    """
    if team.world.rank not in team:
        return {}
    mine = {name: (next(iter(ranks), -1), tell(tensor)) for name, (tensor, ranks) in held.items()}
    told = dict(zip(team, team.world.gather_objects(team, mine), strict=True))
    check_alike("weights and buffers", {rank: list(names) for rank, names in told.items()})
    return told


def _error(what: str, told: Told) -> str:
    """The names of which some ranks tell something else than the first rank that holds the same; empty if there are none."""
    texts = []
    for name in next(iter(told.values()), ()):
        holders = {rank: first for rank, one in told.items() if (first := one[name][0]) >= 0}
        odd = [rank for rank, first in holders.items() if told[rank][name][1] != told[first][name][1]]
        texts += [f"{name}: ranks {odd} hold other {what} than the first rank"] if odd else []
    return "; ".join(texts)
