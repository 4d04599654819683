"""Reports say, without ranks, what ranks then send, compute and hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import distdl_lite as dl
from distdl_lite.model.compile import default_axes
from distdl_lite.testing import count, spmd


class Shapes(nn.Module):
    """Joins, shifts, slices, sums and views across cuts."""

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.cat([x.roll((3, 1), (2, 3)), x[..., 2:-3, 1:].flip(1).mean((2, 3), keepdim=True).expand_as(x)], 1)
        with torch.no_grad():
            scale = y.var((0, 2, 3), keepdim=True)
        return (y * y / (1 + scale)).flatten(2).sum(1), y.std((1, 2))


class Unread(nn.Module):
    """A movement that backward does not reach, and one that it does not need."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.detach().roll(1, 2) + x.roll(2, 2).round().detach() * 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.second(self.frozen(self.first(x))) @ y.transpose(0, 1)


# A model, its grid, and its arguments as shapes; with a "g" before it a shape's tensor requires a gradient.
MODELS: list[tuple[Callable[[], Any], tuple[int, ...], list[Any]]] = [
    (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2)), (1, 1, 2, 2), [("g", 2, 3, 37, 29)]),
    (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Linear(15, 4), nn.GELU()), (1, 1, 3, 2), [("g", 2, 3, 37, 29)]),
    (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((4, 3)), nn.Flatten(), nn.Linear(36, 5)), (2, 1, 2, 1), [(3, 3, 13, 9)]),
    (lambda: nn.Sequential(nn.Linear(9, 4), nn.AdaptiveMaxPool1d(3), nn.Upsample(scale_factor=3)), (1, 1, 4), [("g", 2, 4, 9)]),
    (Shapes, (1, 1, 2, 3), [("g", 2, 3, 17, 11)]),
    (Shapes, (2, 1, 2, 1), [(2, 3, 17, 11)]),
    (Unread, (1, 1, 3), [("g", 1, 2, 11)]),
    (Tied, (2, 1), [("g", 5, 6), ("g", 3, 6)]),
    (Tied, (1, 3), [(5, 6), ("g", 3, 6)]),
    (nn.Softmax(2).requires_grad_, (1, 2, 2), [("g", 3, 4, 5)]),
    (lambda: (lambda x, y: torch.nn.functional.mse_loss(x, y)), (2, 2), [("g", 5, 6), (5, 6)]),
]


def tensors_of(inputs: list[Any], device: str = "meta") -> list[torch.Tensor]:
    found = []
    for shape in inputs:
        wanted = shape[0] == "g"
        found.append(torch.zeros(shape[1:] if wanted else shape, device=device).requires_grad_(wanted))
    return found


def measured(make: Callable[[], Any], shape: tuple[int, ...], inputs: list[Any], steps: int = 1) -> list[Any]:
    """What each rank counts in the forward and the backward of a step, and what it reports itself."""

    def body(world: dl.Partition) -> Any:
        P = world.grid(shape)
        net = dl.distribute(make(), P)
        for _ in range(steps):
            blocks = []
            for x in tensors_of(inputs, "cpu"):
                block = x[P.block(x.shape, default_axes(x.dim(), x.dtype, P.grid_of_ranks))]
                blocks.append(block.detach().clone().requires_grad_(x.requires_grad))
            with count() as forward:
                outputs = [y for y in pytree.tree_leaves(net(*blocks)) if y.requires_grad]
            with count() as backward:
                if outputs:
                    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return (forward.messages, forward.bytes, backward.messages, backward.bytes), net.report()

    return spmd(math.prod(shape), body)


@pytest.mark.parametrize(("make", "shape", "inputs"), MODELS)
def test_messages_and_bytes_are_those_counted(make: Any, shape: Any, inputs: Any) -> None:
    ranks = measured(make, shape, inputs)
    found = dl.report(make(), shape, *tensors_of(inputs))
    for made in (found, ranks[0][1], ranks[-1][1]):
        told = made.forward.messages, made.forward.bytes, made.backward.messages, made.backward.bytes
        assert told == tuple(max(column) for column in zip(*(numbers for numbers, _ in ranks), strict=True))
        assert made.to_dict() == found.to_dict()
