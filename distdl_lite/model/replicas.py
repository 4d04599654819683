"""Weights that several ranks hold: whether they are equal, and one rank's values for all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from distdl_lite.agreement import check_alike
from distdl_lite.model.weights import check_cut_weights, entries_of, team_of
from distdl_lite.transport import Team


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 1, 2)), 1, 1, 1, bias=False)
    ...     torch.nn.init.constant_(net.weight, 5.0 + world.rank)
    ...     dl.synchronise_replicas(net)
    ...     return net.weight.item()
    >>> dl.testing.spmd(2, body)
    [5.0, 5.0]
    """
    tensors, error = _compared(module, "kinds of tensors", lambda tensor: (tensor.dtype, tuple(tensor.shape)))
    if error:
        raise ValueError(error)
    for tensor, team in tensors:
        if team.size > 1:
            values = tensor.detach().contiguous()
            team.world.broadcast(team, values, team[0])
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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 1, 2)), 1, 1, 3)
    ...     dl.check_replicas(net)
    ...     torch.nn.init.constant_(net.weight, world.rank)
    ...     dl.check_replicas(net)
    >>> dl.testing.spmd(2, body)
    Traceback (most recent call last):
        ...
    RuntimeError: weight: ranks [1] hold other values than the first rank
    """
    _, error = _compared(module, "values", checksum)
    if error:
        raise RuntimeError(error)


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor's bits."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return zlib.crc32(values.reshape(-1).view(torch.uint8).numpy())


def _compared(
    module: torch.nn.Module, what: str, tell: Callable[[torch.Tensor], Any]
) -> tuple[list[tuple[torch.Tensor, Team]], str]:
    """The module's tensors on this rank, with the ranks that hold the same, and an error text: empty if they tell the same.

    It raises ValueError on all ranks if names differ. A rank outside the module has no tensors.
    """
    team = team_of(module)
    if team.world.rank not in team:
        return [], ""
    check_cut_weights(module, team)
    held = {name: (t, place.replicas.team if place else team) for name, t, place in entries_of(module)}
    # The first rank that holds the same, -1 if this rank's block is empty.
    mine = {name: (next(iter(ranks), -1), tell(tensor)) for name, (tensor, ranks) in held.items()}
    told = dict(zip(team, team.world.gather_objects(team, mine), strict=True))
    check_alike("weights and buffers", {rank: list(names) for rank, names in told.items()})
    texts = []
    for name in held:
        holders = {rank: first for rank, one in told.items() if (first := one[name][0]) >= 0}
        odd = [rank for rank, first in holders.items() if told[rank][name][1] != told[first][name][1]]
        texts += [f"{name}: ranks {odd} hold other {what} than the first rank"] if odd else []
    return list(held.values()), "; ".join(texts)
