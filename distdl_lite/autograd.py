"""What communicates in torch's autograd.

`Node` is the base of Functions that communicate. `reduce_from_team` and `copy_to_team` are adjoint to each other: the sum of
the ranks' parts, which every rank gets, and the use of such a number in each rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch.autograd import forward_ad

from distdl_lite.private import is_legacy_batchedtensor, top_saved_tensors_hooks, transforms_are_active
from distdl_lite.transport import Team

NOTHING = torch.empty(0)  # to be saved by a Function that communicates
ANCHOR = torch.empty(0, requires_grad=True)  # gives a graph node to a rank whose input needs none
TRANSFORMS = (
    "torch.func's transforms (grad, vmap, jvp, ...) see the graph of one rank alone and cannot be applied to a layer over "
    "several ranks; backward() and torch.autograd.grad can, torch.func.functional_call too"
)
BATCHED = (
    "torch.autograd.grad(..., is_grads_batched=True), which vectorized Jacobians use, cannot go back through a layer over "
    "several ranks; call it for one gradient after the other"
)


class Node(torch.autograd.Function):
    """A Function whose call spares what torch's does for functorch, 40 us of 75 where the caches are cold."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transforms_are_active():
            raise RuntimeError(TRANSFORMS)
        return super(torch.autograd.Function, cls).apply(*args)


def check_unbatched(gradient: torch.Tensor) -> None:
    """Raise RuntimeError if backward got many gradients as one: a rank that has nothing to send would wait for one that fails."""
    if is_legacy_batchedtensor(gradient):
        raise RuntimeError(BATCHED)


def is_recording(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is computed from the tensors; in forward mode it records everything, and refuses it."""
    wanted = is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted or forward_ad._current_level >= 0


def may_recompute() -> bool:
    """Whether a checkpoint, or another user of saved tensors, is around the code that runs."""
    return is_grad_enabled() and top_saved_tensors_hooks(False) is not None


def saved_here(x: torch.Tensor) -> torch.Tensor:
    """The identity, which saves a tensor; its output may be overwritten like its input."""
    return _Saved.apply(x, None if x.requires_grad else ANCHOR)


class _Saved(Node):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(NOTHING)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        _ = ctx.saved_tensors
        return gradient if ctx.needs_input_grad[0] else None, None


def reduce_from_team(part: torch.Tensor, team: Team) -> torch.Tensor:
    """The sum of the ranks' parts, one number that every rank of the team is shown; differentiable, to any order.

    A rank's gradient of a shown number is the whole gradient, not its share of it, and goes to its part as it is: so a
    loss that is the same on P ranks has the serial gradient, not P times it. The adjoint therefore does not communicate.
    """
    return _ReduceFromTeam.apply(part, team)


def copy_to_team(number: torch.Tensor, team: Team) -> torch.Tensor:
    """A shown number, or a replicated weight, for use in each rank's part: the identity, whose adjoint is `reduce_from_team`."""
    return _CopyToTeam.apply(number, team)


class _ReduceFromTeam(Node):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, team: Team) -> torch.Tensor:
        check_unbatched(part)
        ctx.team = team
        ctx.save_for_backward(NOTHING)
        return team.world.all_reduce(team, part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        _ = ctx.saved_tensors
        return _CopyToTeam.apply(gradient, ctx.team), None


class _CopyToTeam(Node):
    @staticmethod
    def forward(ctx: Any, number: torch.Tensor, team: Team) -> torch.Tensor:
        ctx.team = team
        ctx.save_for_backward(NOTHING)
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        _ = ctx.saved_tensors
        return _ReduceFromTeam.apply(gradient, ctx.team), None
