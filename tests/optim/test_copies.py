"""Averaging optimizers, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl

COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))]


def steps(optimizer: torch.optim.Optimizer, rank: int, number: int = 3) -> list[float]:
    """The first parameter after so many steps."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for _ in range(number):
        parameter.grad = 0.5 * parameter.detach() + rank + 1
        optimizer.step()
    return parameter.tolist()


@on_ranks(2)
def test_copies_of_an_optimizer_that_has_a_scheduler(world: dl.Partition) -> None:
    """A scheduler puts a step in the optimizer that is of this one alone."""
    for make in COPIES:
        optimizer = dl.LocalSGD(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), 2)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        twin = make(optimizer)
        assert steps(twin, world.rank) != [1.0, 1.0]
        assert optimizer.param_groups[0]["params"][0].tolist() == [1.0, 1.0]
        assert steps(optimizer, world.rank) == steps(make(twin), world.rank, 0)


def nesterov(tensors: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.7, momentum=0.9, nesterov=True)


@on_ranks(2)
def test_copies_of_an_optimizer_with_an_outer_one(world: dl.Partition) -> None:
    """The outer one goes on to move the point that the ranks have in common, also with a wire."""
    for make in COPIES:
        for wire in (None, torch.bfloat16):
            inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            optimizer = dl.LocalSGD(inner, 2, outer=nesterov, wire=wire)
            steps(optimizer, world.rank, 4)
            twin = make(optimizer)
            assert steps(twin, world.rank, 4) == steps(optimizer, world.rank, 4)


@on_ranks(2)
def test_what_is_the_optimizers_is_not_assigned(world: dl.Partition) -> None:
    """It would count for nothing: the optimizer inside steps."""
    optimizer = dl.LocalSGD(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1), 2)
    for name in ("param_groups", "state", "defaults"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, {})
