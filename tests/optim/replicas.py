"""Ranks trained by hand, one after the other in one process, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from cases import integers

import distdl_lite as dl

SHAPES = (3, 2), (5,), (), (1, 4)
STEPS = 13


def start_of(rank: int, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    """A rank's parameters, which differ from other ranks'."""
    return [torch.nn.Parameter(integers(shape, seed=10 * rank + n).to(dtype)) for n, shape in enumerate(SHAPES)]


def give_gradients(parameters: Sequence[torch.Tensor], rank: int, step: int) -> None:
    """What backward on this rank's data would leave: it depends on the parameters, the rank and the step."""
    for n, p in enumerate(parameters):
        pull = integers(p.shape, seed=1000 + 100 * rank + 10 * step + n).to(p.dtype)
        p.grad = 0.3 * p.detach() + pull


def train(world: dl.Partition, optimizer: dl.LocalSGD, steps: Iterable[int] = range(STEPS)) -> list[torch.Tensor]:
    """Step on the gradients of each of these steps; the parameters."""
    parameters = optimizer.param_groups[0]["params"]
    for step in steps:
        give_gradients(parameters, world.rank, step)
        optimizer.step()
    return parameters


def plain(lr: float, *tensors: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=lr)


def momentum_sgd(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def diloco(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer of Douillard et al. 2023."""
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


class Replicas:
    """All ranks' parameters and optimizers."""

    def __init__(self, size: int, make: Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]) -> None:
        self.size = size
        self.parameters = [start_of(rank) for rank in range(size)]
        self.optimizers = [make(parameters) for parameters in self.parameters]

    def step(self, step: int) -> None:
        for rank, (parameters, optimizer) in enumerate(zip(self.parameters, self.optimizers, strict=True)):
            give_gradients(parameters, rank, step)
            optimizer.step()

    def beside(self, world: dl.Partition, optimizer: dl.LocalSGD, steps: Iterable[int] = range(STEPS)) -> Iterator[int]:
        """Step the optimizer and all replicas; after what the caller does to these, check that its parameters are theirs."""
        for step in steps:
            found = train(world, optimizer, [step])
            self.step(step)
            yield step
            assert_near(found, self.parameters[world.rank])

    def values(self) -> list[list[torch.Tensor]]:
        return [[p.detach().clone() for p in parameters] for parameters in self.parameters]

    def mean(self, ranks: Sequence[int] | None = None) -> list[torch.Tensor]:
        chosen = [self.parameters[rank] for rank in (range(self.size) if ranks is None else ranks)]
        return [torch.stack([p.detach() for p in tensors]).mean(0) for tensors in zip(*chosen, strict=True)]

    def merge(self, how: str, old: list[list[torch.Tensor]], mean: list[torch.Tensor], steps: int, nodes: int) -> None:
        """Take in a mean over nodes that began some steps ago, when the values were `old`."""
        for parameters, values in zip(self.parameters, old, strict=True):
            for p, before, m in zip(parameters, values, mean, strict=True):
                now = p.detach()
                merged = {
                    "daso": (2 * steps * now + nodes * m) / (nodes + 2 * steps),
                    "delta": now + m - before,
                    "replace": m,
                }
                p.data.copy_(merged[how])

    def put(self, tensors: Sequence[torch.Tensor], ranks: Sequence[int] | None = None) -> None:
        for rank in range(self.size) if ranks is None else ranks:
            for p, value in zip(self.parameters[rank], tensors, strict=True):
                p.data.copy_(value)


def assert_near(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], atol: float = 1e-12) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=atol)
