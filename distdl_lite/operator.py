"""Operators: a plan bound to a transport, and the one autograd Function that runs it.

The backward of an operator is the operator of the swapped plan, so double backward and every higher one come for free.
"""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from typing import Any

import torch

from distdl_lite.autograd import ANCHOR, NOTHING, Node, check_unbatched, is_recording
from distdl_lite.plan import Plan
from distdl_lite.transport import Channel, Transport
from distdl_lite.transport.calls import move
from distdl_lite.transport.counts import record
from distdl_lite.transport.wire import wire_dtype


class Operator:
    """A linear movement of tensors between two layouts.

    Parameters
    ----------
    plan : Plan
        This rank's plan. All ranks of the two layouts make an operator from theirs and call it together.
    transport : Transport
        The world the plan's ranks are numbered in, such as ``P.world_transport``.
    label : str
        A name for counts and errors.
    graph : bool
        Whether every rank gets a graph node, also one whose own input requires no gradient. Set it where any rank's
        input requires grad: a rank without a node would stay out of the others' backward.

    Notes
    -----
    Communicators, buffers and requests are made at the first call for a dtype and device, together by all ranks of the
    plan, and belong to the operator. `start` and `finish` move data without autograd; a call is differentiable, though not
    in forward mode, which is refused.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> from distdl_lite.layout import balanced_blocks
    >>> def body(world):
    ...     rows, columns = (balanced_blocks(world.grid(shape).grid_of_ranks, (2, 2)) for shape in ((2, 1), (1, 2)))
    ...     move = dl.Operator(dl.plan(rows, columns, world.rank), world.world_transport)
    ...     return move(torch.tensor([[1.0, 2.0], [3.0, 4.0]])[[world.rank]]).tolist()
    >>> dl.testing.spmd(2, body)
    [[[1.0], [3.0]], [[2.0], [4.0]]]
    """

    def __init__(self, plan: Plan, transport: Transport, label: str = "operator", graph: bool = False) -> None:
        self.plan, self.transport, self.label, self.graph = plan, transport, label, graph
        self._channels: dict[tuple[torch.dtype, torch.device], Channel] = {}
        self._adjoint: Operator | None = None
        self._moving: Channel | None = None
        self._name = label  # in reports

    @property
    def channels(self) -> Collection[Channel]:
        """Those that are bound so far."""
        return self._channels.values()

    @property
    def adjoint(self) -> Operator:
        """The operator of the swapped plan; its own adjoint is this operator."""
        if self._adjoint is None:
            self._adjoint = Operator(self.plan.adjoint(), self.transport, self.label, self.graph)
            self._adjoint._adjoint, self._adjoint._name = self, f"backward of {self.label}"
        return self._adjoint

    def start(self, x: torch.Tensor) -> Any:
        """Begin to move the local block `x`, which must stay unchanged until `finish` is called with the result.

        Raises
        ------
        RuntimeError
            If an earlier start of this operator has not been finished.
        TypeError
            If the operator adds and the dtype is bool.
        """
        if self._moving is not None:
            raise RuntimeError(f"{self.label}: started again before it was finished")
        channel = self._channels.get((x.dtype, x.device)) or self._bind(x)
        move(self._name, self.transport, self.plan, x.itemsize)
        pending = self._counted_start(channel, x) if self.transport.local["tallies"] else channel.start(x)
        self._moving = channel
        return pending

    def finish(self, pending: Any, into: torch.Tensor | None = None) -> torch.Tensor:
        """Wait for what `start` began; returns the local output as a fresh tensor, ``(0,)`` where there is none.

        A tensor `into` which an exchange shall add is changed and returned.
        """
        channel, self._moving = self._moving, None
        if channel is None:
            raise RuntimeError(f"{self.label}: finished before it was started")
        began = perf_counter() if self.transport.local["tallies"] else 0.0
        y = channel.finish(pending, into)
        if began:
            record(self.transport, "finish", self.plan, began, self.label)
        return y

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Move `x` without autograd."""
        return self.finish(self.start(x))

    def release(self) -> None:
        """Give back buffers and requests, which the next call makes anew: where many operators take turns."""
        self._channels.clear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Move `x`; differentiable."""
        anchor = ANCHOR if self.graph and not x.requires_grad else None
        return _Move.apply(x, anchor, self) if is_recording(x, anchor) else self.apply(x)

    def _bind(self, x: torch.Tensor) -> Channel:
        if x.dtype is torch.bool and (self.plan.adds_out or self.plan.pattern.sums):
            raise TypeError(f"{self.label}: bool tensors can be moved but not added")
        with torch.inference_mode(False):  # the buffers are used outside it too
            channel = self.transport.bind(self.plan, x.dtype, x.device)
        self._channels[x.dtype, x.device] = channel
        return channel

    def _counted_start(self, channel: Channel, x: torch.Tensor) -> Any:
        collectives, messages, elements = self.plan.traffic
        began = perf_counter()
        pending = channel.start(x)
        size = elements * wire_itemsize(self.plan, x.dtype)
        record(self.transport, "start", self.plan, began, self.label, (messages, size, collectives))
        return pending

    def __deepcopy__(self, memo: dict[int, Any]) -> Operator:
        return Operator(self.plan, self.transport, self.label, self.graph)

    def __repr__(self) -> str:
        plan = self.plan
        return f"Operator({self.label}: {plan.pattern.value}, {plan.shape_in} -> {plan.shape_out} on rank {plan.rank})"


def wire_itemsize(plan: Plan, dtype: torch.dtype) -> int:
    """The bytes that an element takes on its way."""
    return (wire_dtype(dtype) if plan.pattern.sums else dtype).itemsize


class _Move(Node):
    """Applies an operator forward and its adjoint backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, operator: Operator) -> torch.Tensor:
        ctx.operator = operator
        if operator.plan.shape_in is None:
            ctx.shape = x.shape
        # Reading a saved tensor before communicating makes non-reentrant checkpointing recompute at the same place on
        # all ranks.
        ctx.save_for_backward(NOTHING)
        return operator.apply(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        _ = ctx.saved_tensors
        check_unbatched(gradient)
        operator = ctx.operator
        moved = operator.adjoint(gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (moved.view(ctx.shape) if operator.plan.shape_in is None else moved), None, None
