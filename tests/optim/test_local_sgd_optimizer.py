"""It is an optimizer: saved, copied and taken up in the middle of an average, with torch's tools around it, for a long run."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from optim.replicas import STEPS, adam, assert_near, diloco, plain, start_of, train
from ranks import on_ranks

import distdl_lite as dl


def variants() -> list[dict[str, Any]]:
    return [
        {"schedule": dl.Periodic(3, 0, 2)},
        {"schedule": dl.Periodic(4, 2, 1), "ranks_per_node": 1, "wire": torch.bfloat16, "merge": "delta"},
        {"schedule": 3, "outer": diloco, "delay": 1},
        {"schedule": 2, "outer": diloco, "wire": torch.float16},
    ]


@on_ranks(2, mpi=True)
def test_state_dict_round_trip(world: dl.Partition) -> None:
    """A run that is saved in the middle of an average and taken up elsewhere goes on as it would have."""
    for options in variants():
        parameters = start_of(world.rank)
        optimizer = dl.LocalSGD(adam(parameters), P=world, **options)
        train(world, optimizer, range(6))
        optimizer.next_epoch(2.0 + world.rank)
        saved = copy.deepcopy(optimizer.state_dict())
        values = [p.detach().clone() for p in parameters]
        train(world, optimizer, range(6, STEPS))
        resumed = [torch.nn.Parameter(value) for value in values]
        other = dl.LocalSGD(adam(resumed), P=world, **options)
        other.load_state_dict(pickle.loads(pickle.dumps(saved)))
        assert (other.steps, other.epoch, other.batch, other.losses) == (6, 1, 0, (2.5,))
        train(world, other, range(6, STEPS))
        assert_near(resumed, parameters, atol=0)


@on_ranks(2)
def test_states_that_do_not_fit(world: dl.Partition) -> None:
    one = dl.LocalSGD(adam(start_of(0)), 2, wire=torch.bfloat16)
    other = dl.LocalSGD(adam(start_of(0)), 2)
    with pytest.raises(ValueError, match=r"the state's points is \[\(16,\)\], here it is \[None\]"):
        other.load_state_dict(one.state_dict())
    train(world, one)
    other.load_state_dict({k: v for k, v in one.state_dict().items() if k != "local_sgd"})  # the optimizer's own
    assert other.steps == 0
    assert len(other.state) == 4
    adam(start_of(0)).load_state_dict(one.state_dict())  # an optimizer takes its part


@on_ranks(2)
def test_copies(world: dl.Partition) -> None:
    """A copy of the optimizer copies parameters, common points and what is under way, which it merges first."""
    for options in variants():
        optimizer = dl.LocalSGD(adam(start_of(world.rank)), P=world, **options)
        train(world, optimizer, range(6))
        twins = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
        mine = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in mine]
        for twin in twins:
            train(world, twin, range(6, STEPS))
            assert_near(mine, before, atol=0)
        assert_near(
            train(world, copy.deepcopy(optimizer), range(6, STEPS)), train(world, optimizer, range(6, STEPS)), 0
        )


@on_ranks(2)
def test_closures_schedulers_and_hooks(world: dl.Partition) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0 + world.rank]))
    inner = plain(1.0, w)
    optimizer = dl.LocalSGD(inner, 2)
    of_inner = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    of_outer = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    hooked: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    assert optimizer.step(closure).item() == (1.0 + world.rank) ** 2
    of_inner.step()
    of_outer.step()
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert len(hooked) == 1
    assert w.item() == -1.0 - world.rank
    optimizer.step(closure)
    assert w.item() == -0.75  # -0.5 and -1.0
    optimizer.zero_grad(set_to_none=False)
    assert w.grad.item() == 0
    assert "SGD" in repr(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)


@on_ranks(2)
def test_grad_scaler(world: dl.Partition) -> None:
    """An overflow on one rank skips its step alone, and never an average, whoever calls the scaler."""
    results = []
    for how in ("added", "outside", "unscaled outside", "none"):
        w = torch.nn.Parameter(torch.tensor([4.0]))
        optimizer = dl.LocalSGD(torch.optim.SGD([w], lr=0.5, momentum=0.5), 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=how != "none")
        if how == "added":
            optimizer.add_scaler(scaler)
        for step in range(6):
            optimizer.zero_grad()
            overflows = step == 2 and world.rank == 1
            if overflows and how == "none":
                optimizer.optimizer, kept = plain(0.0, w), optimizer.optimizer
            scaler.scale(w.sum() * (float("inf") if overflows and how != "none" else 1.0 + world.rank)).backward()
            if how == "unscaled outside":
                scaler.unscale_(optimizer)
                assert overflows or w.grad.item() == 1.0 + world.rank
            if how == "added" or how == "none":
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            if overflows and how == "none":
                optimizer.optimizer = kept
        assert how == "none" or scaler.get_scale() == (32.0 if world.rank else 64.0)
        results.append(w.item())
    assert results == results[:1] * 4
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler, not 3"):
        optimizer.add_scaler(3)
    optimizer.add_scaler(torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match=r"a closure cannot be used with a GradScaler"):
        optimizer.step(lambda: None)


@on_ranks(2)
def test_epochs(world: dl.Partition) -> None:
    seen = []

    def schedule(epoch: int, batch: int, losses: tuple[float, ...]) -> tuple[int, int, int]:
        seen.append((epoch, batch, losses))
        return 1, 0, 0

    optimizer = dl.LocalSGD(plain(0.1, *start_of(0)), schedule)
    for _ in range(2):
        train(world, optimizer, range(2))
        optimizer.next_epoch(torch.tensor(1.0 + world.rank))
    optimizer.next_epoch()
    assert seen == [(0, 0, ()), (0, 1, ()), (1, 0, (1.5,)), (1, 1, (1.5,))]
    assert (optimizer.epoch, optimizer.batch, optimizer.steps, optimizer.losses) == (3, 0, 4, (1.5, 1.5))


@on_ranks(2, mpi=True)
def test_many_optimizers_leave_nothing(world: dl.Partition) -> None:
    """They share a team's thread and communicator."""

    def threads() -> int:
        return sum(thread.name == "distdl_lite sums" for thread in threading.enumerate())

    assert world.team.size == 2
    registries, before = [*world.world_transport.local], threads()
    for _ in range(100):
        train(world, dl.LocalSGD(plain(0.1, *start_of(0)), 2, delay=1, P=world), range(3))
    assert [*world.world_transport.local] == registries
    assert threads() <= before + 1


@on_ranks(2, mpi=True)
def test_a_long_run_does_not_grow(world: dl.Partition) -> None:
    """Of the objects that a step makes, none is left; some are kept for a while by torch."""
    for options in ({}, {"delay": 1, "wire": torch.bfloat16}):
        model = torch.nn.Linear(3, 2)
        optimizer = dl.LocalSGD(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 2, P=world, **options)
        held = []
        for step in range(500):
            if step in (200, 499):
                gc.collect()
                held.append(sys.getallocatedblocks())
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
        assert held[1] - held[0] < 150  # one a step would be 300
