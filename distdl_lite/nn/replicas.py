"""Weights that several ranks hold: whether they are equal, and one rank's values for all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distdl_lite.agreement import check_alike, raise_together
from distdl_lite.nn.parameter import _entries, team_of
from distdl_lite.nn.replaced import replaced_cut_weight
from distdl_lite.transport import Transport

Held = dict[str, tuple[torch.Tensor, tuple[int, ...]]]  # by name, with the ranks that hold the same
Told = Mapping[
    int, Mapping[str, tuple[tuple[int, ...], Any]]
]  # by rank and name: these ranks, and what they are to share


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
    transport, team, held = _held(module)
    error = _error("kinds of tensors", _told(transport, team, held, lambda tensor: (tensor.dtype, tuple(tensor.shape))))
    if error:
        raise ValueError(error)
    for tensor, ranks in held.values():
        if len(ranks) > 1:
            values = tensor.detach().contiguous()
            transport.broadcast(ranks, values, ranks[0])
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
    transport, team, held = _held(module)
    error = _error("values", _told(transport, team, held, checksum))
    if error:
        raise RuntimeError(error)


def checksum(tensor: torch.Tensor) -> int:
    """Of a tensor's bits."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _held(module: torch.nn.Module) -> tuple[Transport, tuple[int, ...], Held]:
    """What this rank holds of a module; nothing on a rank outside."""
    transport, team = team_of(module)
    if transport.rank not in team:
        return transport, team, {}
    raise_together(transport, team, replaced_cut_weight(module))
    return transport, team, {name: (t, place.replicas.team if place else team) for name, t, place in _entries(module)}


def _told(transport: Transport, team: tuple[int, ...], held: Held, tell: Callable[[torch.Tensor], Any]) -> Told:
    """What each rank tells of each tensor, with the ranks that hold the same. Raises ValueError if names differ."""
    if transport.rank not in team:
        return {}
    mine = {name: (ranks, tell(tensor)) for name, (tensor, ranks) in held.items()}
    told = dict(zip(team, transport.gather_objects(team, mine), strict=True))
    check_alike("weights and buffers", {rank: list(names) for rank, names in told.items()})
    return told


def _error(what: str, told: Told) -> str:
    """The names of which some ranks tell something else than the first rank that holds the same; empty if there are none."""
    texts = []
    for name in next(iter(told.values()), ()):
        holders = {rank: ranks[0] for rank, one in told.items() if (ranks := one[name][0])}
        odd = [rank for rank, first in holders.items() if told[rank][name][1] != told[first][name][1]]
        texts += [f"{name}: ranks {odd} hold other {what} than the first rank"] if odd else []
    return "; ".join(texts)
