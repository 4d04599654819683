"""A module in a `RootDataParallel` container beside the same module in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import distdl_lite as dl

F64 = torch.float64


def mlp(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 2))


class Where(nn.Module):
    """Adds the rank that computes to every row, or fails there."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: torch.Tensor, fails: Any = ()) -> torch.Tensor:
        if self.rank in fails:
            raise fails[self.rank]
        return x + self.rank


class Odd(Exception):
    """An exception of a user's own."""


def real(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, requires_grad=grad)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """What a function makes in float64, the same on all ranks."""
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def call(dp: dl.RootDataParallel, world: dl.Partition, *args: Any, **kwargs: Any) -> Any:
    """The forward, which takes arguments on the root alone."""
    return dp(*args, **kwargs) if world.rank == dp.output_device else dp()


def told(world: dl.Partition, body: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type, str]:
    """What is raised, checked to be the same on all ranks."""
    try:
        body(*args, **kwargs)
    except Exception as error:
        found = type(error), str(error)
    else:
        found = type(None), ""
    everywhere = world.allgather_data(found)
    assert set(everywhere) == {found}
    return found


def tensors_in(nested: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(nested) if isinstance(value, torch.Tensor)]


def loss_of(result: Any) -> torch.Tensor:
    """A number that depends on every element in its own way."""
    total = torch.zeros((), dtype=F64)
    for y in tensors_in(result):
        if y.requires_grad:
            total = total + (y.abs() * torch.linspace(-1, 2, y.numel(), dtype=F64).reshape(y.shape)).sum()
    return total


def gradients(of: Any) -> list[Any]:
    """Of a module's parameters, or of the tensors in a nesting."""
    return [t.grad for t in (of.parameters() if isinstance(of, nn.Module) else tensors_in(of))]


def assert_same(left: Any, right: Any) -> None:
    """Check that two nestings are alike, and their tensors equal up to the rounding of sums in another order."""
    (a, nesting), (b, other) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert nesting == other
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            within = 1e-5 if x.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(x, y, rtol=within, atol=within)
        else:
            assert x == y
