"""States of averaging optimizers that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl


@on_ranks(2)
def test_states_of_different_steps_are_refused_on_all_ranks(world: dl.Partition) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = dl.LocalSGD(torch.optim.SGD([parameter], lr=1.0), 4)
    states = []
    for _ in range(2):
        parameter.grad = torch.ones(2)
        optimizer.step()
        optimizer.next_epoch(float("nan"))  # which is not equal to itself
        states.append(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match="the ranks disagree: the state's steps is 2 on rank 1, 1 on rank 0"):
        optimizer.load_state_dict(states[world.rank])
    optimizer.load_state_dict(states[1])
    alone = {name: value for name, value in states[1].items() if name != "local_sgd"}
    for rank in (0, 1):
        with pytest.raises(ValueError, match="the ranks disagree: the state's points"):
            optimizer.load_state_dict(alone if world.rank == rank else states[1])
    optimizer.load_state_dict(alone)
