"""The private calls of torch's engine."""

from __future__ import annotations

import torch

from distdl_lite.autograd import at_end_of_backward, engine_will_run, running_backward


def test_private_calls_of_autograd_are_there() -> None:
    """What sums need of torch's engine, seen from inside a backward."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append((running_backward(), engine_will_run(node)))
            at_end_of_backward(lambda: seen.append("end"))
            return gradient

    x, y = (torch.ones(1, requires_grad=True) for _ in range(2))
    node = x.view_as(x).grad_fn.next_functions[0][0]
    (Look.apply(y) + x).sum().backward()
    first = seen[0][0]
    assert seen == [(first, True), "end"]
    seen.clear()
    torch.autograd.grad((Look.apply(y) + x).sum(), y)
    assert seen == [(first + 1, False), "end"]
