"""The doors to torch's autograd that the library uses, the private ones too; tests/test_autograd.py says which is missing.

`Node` is the base of Functions that communicate. `reduce_from_team` and `copy_to_team` are adjoint to each other: the sum of
the ranks' parts, which every rank gets, and the use of such a number in each rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import is_grad_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks  # type: ignore[attr-defined]
from torch._C._dynamo import eval_frame
from torch._C._functorch import is_legacy_batchedtensor  # type: ignore[import-not-found]
from torch.autograd import forward_ad

from distdl_lite.transport import Team

any_autocast_is_enabled = torch._C._is_any_autocast_enabled
transforms_are_active = torch._C._are_functorch_transforms_active

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
    return is_grad_enabled() and _top_saved_tensors_default_hooks(False) is not None


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


def engine_will_run(node: Any) -> bool:
    """Whether the backward that runs will come to a node."""
    return torch._C._will_engine_execute_node(node)


def running_backward() -> int:
    """The number of the backward that runs, -1 outside one."""
    return torch._C._current_graph_task_id()


def running_backward_accumulates(leaves: Sequence[torch.Tensor]) -> bool:
    """Inside a hook: whether the backward that runs adds to ``.grad`` of any of the leaves, unlike `torch.autograd.grad`.

    Where the hook's node leads to none of them, what becomes of another leaf below it tells.
    """
    nodes = (torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves if leaf.requires_grad)
    try:
        return any(map(engine_will_run, nodes)) or _runs_into_others(torch._C._current_autograd_node(), leaves)
    except RuntimeError:  # a leaf's gradient is returned
        return False


def _runs_into_others(node: Any, leaves: Sequence[torch.Tensor]) -> bool:
    ids, seen, left, other = {id(leaf) for leaf in leaves}, set(), [node], None
    while left:
        node = left.pop()
        if id(getattr(node, "variable", None)) in ids:
            return False
        if hasattr(node, "variable"):
            other = node
        below = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= below
        left += below
    return other is not None and engine_will_run(other)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call something when the backward that runs has ended; the engine alone keeps it until then, or until an error."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One flat tensor of their elements."""
    return torch._C._nn.flatten_dense_tensors(tensors)  # type: ignore[attr-defined]


def unflattened(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Views of a flat tensor of the shapes of these."""
    return torch._C._nn.unflatten_dense_tensors(flat, tensors)  # type: ignore[attr-defined]


Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Let torch.compile call a function, and all that this calls, as it is: what communicates is not for it to trace.

    It does as torch.compiler.disable, without its import of Dynamo, of seconds, and its 1 us a call.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    if hasattr(eval_frame, "_FrameExecStrategy"):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
