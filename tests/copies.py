"""A module in a data-parallel container beside the same module in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import distdl_lite as dl

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random numbers, the same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def mlp(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear layers with tanh between, the same on all ranks."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def twins(module: nn.Module, P: Any = None, **options: Any) -> tuple[dl.DataParallel, nn.Module]:
    """The module in a container, and a copy of it. Where buckets are small, their sums start while backward runs."""
    single = copy.deepcopy(module)
    if "bucket_mb" in options:
        options.setdefault("engine", "thread")
    return dl.DataParallel(module, P, **options), single


def mean_square(y: torch.Tensor) -> torch.Tensor:
    """A mean over rows; not a number for none."""
    return y.square().mean()


def assert_gradients(dp: nn.Module, single: nn.Module, tolerance: float | None = None) -> None:
    """Check that all have the same gradients, or the same have none."""
    pairs = zip(dp.named_parameters(), single.named_parameters(), strict=True)
    for (name, actual), (_, expected) in pairs:
        assert (actual.grad is None) == (expected.grad is None), name
        if actual.grad is not None:
            assert actual.grad.dtype is actual.dtype
            assert actual.grad.shape == actual.shape
            _assert_close(name, actual.grad, expected.grad, tolerance)


def assert_parameters(dp: nn.Module, single: nn.Module, tolerance: float = 1e-10) -> None:
    """Check that all parameters and buffers are the same."""
    for (name, actual), expected in zip(dp.state_dict().items(), single.state_dict().values(), strict=True):
        _assert_close(name, actual, expected, tolerance)


def _assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None) -> None:
    within = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    difference = (actual.detach() - expected.detach()).abs()
    assert not difference.numel() or float(difference.max()) <= within, f"{name}: {actual} is not {expected}"


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor], torch.Tensor] = mean_square,
) -> None:
    """One step for each batch."""
    for batch in batches:
        optimizer.zero_grad()
        loss(model(batch)).backward()
        optimizer.step()
