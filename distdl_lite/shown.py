"""Numbers shown on many ranks: what a loss returns."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.operator import Node, check_unbatched
from distdl_lite.transport import Transport


def shown(part: torch.Tensor, team: tuple[int, ...], transport: Transport) -> torch.Tensor:
    """The sum of the ranks' parts, one number that every rank of the team is shown; differentiable, to any order.

    A rank's gradient of a shown number is the whole gradient, not its share of it, and goes to its part as it is: so a
    loss that is the same on P ranks has the serial gradient, not P times it. The adjoint therefore does not communicate.
    """
    return _Shown.apply(part, team, transport)


def used(number: torch.Tensor, team: tuple[int, ...], transport: Transport) -> torch.Tensor:
    """A shown number, or a replicated weight, for use in each rank's part: the identity, whose adjoint is `shown`."""
    return _Used.apply(number, team, transport)


class _Shown(Node):
    """From parts to the number: a sum over the ranks forward, `_Used` backward."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, team: tuple[int, ...], transport: Transport) -> torch.Tensor:
        check_unbatched(part)
        ctx.team, ctx.transport = team, transport
        ctx.save_for_backward(part.new_empty(0))
        return transport.all_reduce(team, part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        _ = ctx.saved_tensors
        return _Used.apply(gradient, ctx.team, ctx.transport), None, None


class _Used(Node):
    """From the number to its use on each rank: the identity forward, `_Shown` backward."""

    @staticmethod
    def forward(ctx: Any, shown: torch.Tensor, team: tuple[int, ...], transport: Transport) -> torch.Tensor:
        ctx.team, ctx.transport = team, transport
        ctx.save_for_backward(shown.new_empty(0))
        return shown.view_as(shown)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        _ = ctx.saved_tensors
        return _Shown.apply(gradient, ctx.team, ctx.transport), None, None
