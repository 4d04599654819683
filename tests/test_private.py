"""The private calls of torch."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import torch

import distdl_lite
from distdl_lite.private import at_end_of_backward, engine_will_run, running_backward


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


def test_they_are_there_and_in_one_file() -> None:
    root = Path(distdl_lite.__file__).parent
    called = {path: set(re.findall(r"\btorch\._C[.\w]*", path.read_text())) for path in root.rglob("*.py")}
    names = called.pop(root / "private.py")
    missing = {
        name for name in names if reduce(lambda part, key: getattr(part, key, None), name.split(".")[1:], torch) is None
    }
    assert len(names) > 8
    assert not missing
    elsewhere = {name: path.name for path, found in called.items() for name in found}
    assert elsewhere == {"torch._C._distributed_c10d": "process_group.py"}
