"""Periodic averages equal those made by hand, whatever the merge, the wire, the nodes and what is frozen."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from optim.replicas import Replicas, adam, assert_near, give_gradients, momentum_sgd, start_of
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count, spmd

STEPS = 13


def train(world: dl.Partition, optimizer: dl.LocalSGD, steps: range = range(STEPS)) -> list[torch.Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    for step in steps:
        give_gradients(parameters, world.rank, step)
        optimizer.step()
    return parameters


def plain(lr: float = 1.0, *tensors: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=lr)


# ---- synchronous averages ----------------------------------------------------------------------------------------------


def check_against_hand(world: dl.Partition) -> None:
    """Every merge is the mean where nothing happens in between."""
    for make, period, merge in (
        (momentum_sgd, 1, "replace"),
        (adam, 1, "daso"),
        (momentum_sgd, 2, "delta"),
        (adam, 5, "replace"),
        (adam, 4, "daso"),
    ):
        optimizer = dl.LocalSGD(make(start_of(world.rank)), period, P=world, merge=merge)
        by_hand = Replicas(world.size, make)
        for step in range(STEPS):
            train(world, optimizer, range(step, step + 1))
            by_hand.step(step)
            if (step + 1) % period == 0:
                by_hand.put(by_hand.mean())
            assert_near(optimizer.param_groups[0]["params"], by_hand.parameters[world.rank])


@pytest.mark.check("A30")
@on_ranks(2, mpi=True)
def test_periods_on_two_ranks(world: dl.Partition) -> None:
    check_against_hand(world)


@pytest.mark.check("A30")
@on_ranks(4, mpi=True)
def test_periods_on_four_ranks(world: dl.Partition) -> None:
    check_against_hand(world)


@on_ranks(3, mpi=True)
def test_ranks_are_equal_after_an_average_bit_for_bit(world: dl.Partition) -> None:
    for options in ({}, {"wire": torch.bfloat16}, {"groups": [[0, 2], [1]]}, {"delay": 3, "merge": "replace"}):
        schedule = dl.Periodic(4, 2) if "groups" in options else 4
        optimizer = dl.LocalSGD(adam(start_of(world.rank)), schedule, P=world, **options)
        mine = train(world, optimizer, range(8 if "delay" not in options else 7))
        optimizer.drain()
        told = world.allgather_data([p.tolist() for p in mine])
        assert told[0] == told[1] == told[2] or "delay" in options
        optimizer.synchronise()
        told = world.allgather_data([p.tolist() for p in mine])
        assert told[0] == told[1] == told[2]


@on_ranks(2)
def test_post_local(world: dl.Partition) -> None:
    optimizer = dl.LocalSGD(adam(start_of(world.rank)), dl.PostLocal(3, dl.Periodic(4)))
    by_hand = Replicas(2, adam)
    for step in range(12):
        train(world, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step in (0, 1, 2, 6, 10):
            by_hand.put(by_hand.mean())
        assert_near(optimizer.param_groups[0]["params"], by_hand.parameters[world.rank])


@on_ranks(2, mpi=True)
def test_bytes_are_a_period_th(world: dl.Partition) -> None:
    moved = {}
    for period in (1, 8):
        optimizer = dl.LocalSGD(momentum_sgd(start_of(world.rank)), period, P=world)
        with count() as counted:
            train(world, optimizer, range(32))
        moved[period] = counted.bytes, counted.messages
    size = 8 * sum(p.numel() for p in start_of(0))
    assert moved == {1: (32 * size, 32), 8: (4 * size, 4)}


# ---- asynchronous averages -----------------------------------------------------------------------------------------------


def merged(merge: str, now: torch.Tensor, old: torch.Tensor, mean: torch.Tensor, b: int, P: int) -> torch.Tensor:
    if merge == "daso":
        return (2 * b * now + P * mean) / (P + 2 * b)
    return now + mean - old if merge == "delta" else mean


def check_merges(world: dl.Partition) -> None:
    engines, chunks = cycle(("auto", "thread", "poll", "inline")), cycle((None, 4, 1000))
    for merge in ("daso", "delta", "replace"):
        for every, delay, waited in ((4, 1, 1), (4, 3, 3), (2, 5, 2)):
            options = {"merge": merge, "delay": delay, "engine": next(engines), "chunk": next(chunks), "P": world}
            optimizer = dl.LocalSGD(momentum_sgd(start_of(world.rank)), every, **options)
            by_hand, begun, old, mean = Replicas(world.size, momentum_sgd), -1, [], []
            for step in range(STEPS):
                train(world, optimizer, range(step, step + 1))
                by_hand.step(step)
                if old and step == begun + waited:
                    for rank, now in enumerate(by_hand.values()):
                        tensors = zip(now, old[rank], mean, strict=True)
                        by_hand.set(rank, [merged(merge, *each, waited, world.size) for each in tensors])
                    old = []
                if (step + 1) % every == 0:
                    begun, old, mean = step, by_hand.values(), by_hand.mean()
                assert_near(optimizer.param_groups[0]["params"], by_hand.parameters[world.rank])
            optimizer.drain()


@pytest.mark.check("A32")
@on_ranks(2, mpi=True)
def test_merges_on_two_ranks(world: dl.Partition) -> None:
    check_merges(world)


@on_ranks(4, mpi=True)
def test_merges_on_four_ranks(world: dl.Partition) -> None:
    check_merges(world)


@pytest.mark.check("A32")
@on_ranks(2, mpi=True)
def test_delta_keeps_local_progress(world: dl.Partition) -> None:
    """What a rank has added since the snapshot is there after the merge, to the last digit of small integers."""
    w = torch.nn.Parameter(torch.tensor([8.0 * world.rank], dtype=torch.float64))
    optimizer = dl.LocalSGD(plain(1.0, w), 3, delay=2, merge="delta", P=world)
    for step in range(5):
        w.grad = torch.tensor([-1.0 - world.rank if step > 2 else 0.0], dtype=torch.float64)
        optimizer.step()
    assert w.item() == 4.0 + 2 * (1 + world.rank)


@on_ranks(2)
def test_an_average_is_merged_before_the_next_and_by_synchronise(world: dl.Partition) -> None:
    w = torch.nn.Parameter(torch.tensor([float(world.rank)]))
    optimizer = dl.LocalSGD(plain(1.0, w), 2, delay=9, merge="replace")
    for wanted in (float(world.rank), float(world.rank), float(world.rank), 0.5):
        w.grad = torch.zeros(1)
        optimizer.step()
        assert w.item() == wanted
    with torch.no_grad():
        w += world.rank
    optimizer.synchronise()
    assert w.item() == 0.5  # that of the average under way comes first


@on_ranks(2, mpi=True)
def test_averages_of_two_optimizers_do_not_meet(world: dl.Partition) -> None:
    """One's is under way, in whatever thread, when the other makes its own."""
    for engine in ("auto", "thread", "poll", "inline"):
        for wire in (None, torch.bfloat16):
            slow = torch.nn.Parameter(torch.full((100_000,), 2.0 * world.rank))
            fast = torch.nn.Parameter(torch.full((3,), 4.0 * world.rank))
            options = {"P": world, "engine": engine, "wire": wire}
            late = dl.LocalSGD(plain(1.0, slow), 2, delay=1, merge="replace", **options)
            now = dl.LocalSGD(plain(1.0, fast), 1, **options)
            for _ in range(3):
                late.step()
                with torch.no_grad():
                    fast.copy_(torch.full((3,), 4.0 * world.rank))
                now.step()
                assert fast.tolist() == [2.0] * 3
            assert torch.equal(slow, torch.ones(100_000))


# ---- nodes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(
    ("size", "options", "nodes"),
    [
        (4, {"ranks_per_node": 2}, [[0, 1], [2, 3]]),
        (4, {"ranks_per_node": 1}, [[0], [1], [2], [3]]),
        (3, {"ranks_per_node": 2}, [[0, 1], [2]]),
        (4, {"groups": [[3, 0], [2, 1]]}, [[0, 3], [1, 2]]),
        (3, {"groups": "node"}, [[0, 1, 2]]),
    ],
)
def test_nodes(size: int, options: dict[str, Any], nodes: list[list[int]], delay: int) -> None:
    spmd(size, lambda world: check_nodes(world, options, nodes, delay))


@on_ranks(4, mpi=True)
def test_nodes_on_four_ranks(world: dl.Partition) -> None:
    for delay in (0, 1, 2):
        check_nodes(world, {"ranks_per_node": 2}, [[0, 1], [2, 3]], delay)
        check_nodes(world, {"ranks_per_node": 3}, [[0, 1, 2], [3]], delay)


def check_nodes(world: dl.Partition, options: dict[str, Any], nodes: list[list[int]], delay: int) -> None:
    """Averages within a node every 2 steps, over all every 4."""
    optimizer = dl.LocalSGD(adam(start_of(world.rank)), dl.Periodic(4, 2, delay), P=world, **options)
    by_hand, begun, mean = Replicas(world.size, adam), -1, None
    for step in range(STEPS):
        train(world, optimizer, range(step, step + 1))
        by_hand.step(step)
        if mean is not None and step == begun + delay:
            for rank, now in enumerate(by_hand.values()):
                pairs = zip(now, mean, strict=True)
                by_hand.set(rank, [merged("daso", n, n, m, delay, len(nodes)) for n, m in pairs])
            mean = None
        if step % 2:
            for node in nodes:
                by_hand.put(by_hand.mean(node), node)
        if step % 4 == 3:
            begun, mean = step, by_hand.mean()
            if not delay:
                by_hand.put(mean)
                mean = None
        assert_near(optimizer.param_groups[0]["params"], by_hand.parameters[world.rank])
    optimizer.drain()


@on_ranks(4)
def test_groups_along_an_axis(world: dl.Partition) -> None:
    grid = world.grid((2, 2))
    optimizer = dl.LocalSGD(adam(start_of(0)), 1, groups=grid.create_cartesian_subtopology_partition([True, False]))
    assert optimizer.levels.nodes == ((0, 2), (1, 3))
    assert optimizer.levels.crossings == ((0, 1), (2, 3))


@on_ranks(4, mpi=True)
def test_part_of_the_world(world: dl.Partition) -> None:
    """Ranks outside are alone, and two teams train beside each other."""
    pair = world.create_partition_inclusive([2, 0])
    w = torch.nn.Parameter(torch.tensor([float(world.rank)]))
    optimizer = dl.LocalSGD(plain(1.0, w), 1, P=pair, wire=torch.bfloat16)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == (1.0 if pair.active else world.rank)
    lines = world.grid((2, 2)).create_cartesian_subtopology_partition([False, True])
    optimizer = dl.LocalSGD(plain(1.0, w), 1, P=lines, delay=1)
    train(world, optimizer, range(5))
    optimizer.synchronise()
    assert w.item() == lines.broadcast_data(w.item())


# ---- what is averaged ----------------------------------------------------------------------------------------------------


@pytest.mark.check("A33")
@on_ranks(2, mpi=True)
def test_frozen_and_unused_parameters(world: dl.Partition) -> None:
    """Averages follow the plan: a frozen parameter between others, and one without a gradient on some rank."""
    for options in ({}, {"wire": torch.float16}, {"chunk": 1}, {"ranks_per_node": 1, "delay": 1, "merge": "replace"}):
        schedule = dl.Periodic(1, 1) if "delay" in options else 1
        tensors = [torch.nn.Parameter(torch.full((3,), n + 2.0 * world.rank)) for n in range(4)]
        tensors[1].requires_grad_(False)
        optimizer = dl.LocalSGD(plain(1.0, *tensors), schedule, P=world, **options)
        if world.rank:
            tensors[0].grad = torch.ones(3)
        tensors[2].grad = torch.ones(3)
        optimizer.step()
        optimizer.drain()
        wanted = [0.5, 1.0 + 2 * world.rank, 2.0, 4.0]
        assert [p.tolist() for p in tensors] == [[value] * 3 for value in wanted], options
        tensors[2].requires_grad_(False)  # later
        with torch.no_grad():
            tensors[2].fill_(world.rank)
            tensors[3].fill_(world.rank)
        optimizer.zero_grad()
        optimizer.synchronise()
        assert tensors[2].tolist() == [world.rank] * 3
        assert tensors[3].tolist() == [0.5] * 3
        tensors[1].requires_grad_(True)
        with pytest.raises(
            RuntimeError, match=r"parameters \[1\] of those that require grad did not before: call replan"
        ):
            optimizer.step()
        optimizer.replan()
        optimizer.synchronise()
        assert tensors[1].tolist() == [2.0] * 3
        extra = torch.nn.Parameter(torch.full((2,), 4.0 * world.rank))
        optimizer.add_param_group({"params": [extra], "lr": 0.5})
        optimizer.synchronise()
        assert extra.tolist() == [2.0] * 2


@on_ranks(2, mpi=True)
def test_dtypes_and_memory(world: dl.Partition) -> None:
    """Halves are averaged in float32; complex, transposed, 0-dim and empty parameters, and several dtypes in one."""
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128
    for wire in (None, torch.bfloat16):
        given = [torch.arange(6).reshape(2, 3).t().to(dtype) + 2 * world.rank for dtype in dtypes]
        given += [torch.tensor(1.0 + 2 * world.rank), torch.empty(0, 3), torch.empty(0, dtype=torch.float64)]
        tensors = [torch.nn.Parameter(x.clone()) for x in given]
        strides = [p.stride() for p in tensors]
        optimizer = dl.LocalSGD(plain(1.0, *tensors), 1, P=world, wire=wire)
        with count() as counted:
            optimizer.step()
        assert counted.messages == 2
        numbers = 6 * 3 + 6 * 2 + 1, 6 + 6 * 2
        assert counted.bytes == (4 * numbers[0] + 8 * numbers[1] if wire is None else 2 * sum(numbers))
        for p, x, stride in zip(tensors, given, strides, strict=True):
            assert torch.equal(p, x - 2 * world.rank + 1)
            assert p.stride() == stride


@on_ranks(2, mpi=True)
def test_buffers_and_momentum(world: dl.Partition) -> None:
    for delay in (0, 1):
        w = torch.nn.Parameter(torch.zeros(2))
        running, frozen = torch.full((3,), 2.0 * world.rank), torch.full((1,), float(world.rank), dtype=torch.bfloat16)
        inner = torch.optim.SGD([w], lr=0.5, momentum=0.5)
        options = {"delay": delay, "buffers": [running, frozen], "average_state": True, "P": world}
        optimizer = dl.LocalSGD(inner, 2, **options)
        for _ in range(2 + delay):
            w.grad = torch.full((2,), 4.0 * world.rank)
            optimizer.step()
        assert running.tolist() == [1.0] * 3
        assert frozen.tolist() == [0.5]
        mean = (4.0 * 0.5 + 4.0) / 2
        assert inner.state[w]["momentum_buffer"].tolist() == [mean if not delay else mean / 2 + 4.0 * world.rank] * 2
    lacking = torch.nn.Parameter(torch.zeros(1))
    optimizer = dl.LocalSGD(torch.optim.SGD([lacking], lr=0.5, momentum=0.5), 1, P=world, average_state=True)
    lacking.grad = torch.ones(1) if world.rank else None
    optimizer.step()
    assert ("momentum_buffer" in optimizer.state.get(lacking, {})) == bool(world.rank)
    assert lacking.item() == -0.25


# ---- wire and outer optimizer --------------------------------------------------------------------------------------------


@pytest.mark.check("A34")
@on_ranks(2, mpi=True)
def test_rounding_on_the_wire(world: dl.Partition) -> None:
    """A step's error is a rounding of the difference; what it keeps comes later, so that small updates add up."""
    for wire, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        for dtype, delay in ((torch.float64, 0), (torch.float32, 0), (torch.float32, 1)):
            start = torch.linspace(0.5, 2.0, 1001, dtype=dtype)
            w = torch.nn.Parameter(start.clone())
            optimizer = dl.LocalSGD(plain(1.0, w), 1, P=world, wire=wire, delay=delay, merge="delta")
            total = torch.zeros(1001, dtype=torch.float64)
            for step in range(100):
                before = w.detach().clone()
                w.grad = -1e-4 * start * (1 + 0.3 * world.rank)  # always rounded to the same side
                both = world.world_transport.all_reduce((0, 1), -w.grad.double()) / 2
                total += both
                optimizer.step()
                if step == 0 and dtype is torch.float64:
                    error = (w.detach() - before - both).abs() / both
                    assert 2.0 ** -(digits + 4) < error.max() <= 2.0**-digits
            optimizer.synchronise()
            drift = (w.detach().double() - start.double() - total).abs() / total
            assert drift.max() < (1e-4 if dtype is torch.float64 else 1e-3)
            told = world.allgather_data(w.tolist())
            assert told[0] == told[1]


@on_ranks(4)
def test_rounding_between_nodes(world: dl.Partition) -> None:
    """The ranks that talk for their nodes change; what each keeps comes with its next turn."""
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = dl.LocalSGD(plain(1.0, w), dl.Periodic(1, 1), ranks_per_node=2, wire=torch.bfloat16)
    for _ in range(100):
        w.grad = torch.full((5,), -1e-4 * (1 + world.rank / 7))
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((5,), 1 + 0.01 * (1 + 1.5 / 7)), rtol=1e-5, atol=0)


def outers() -> dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]:
    return {
        "mean": lambda tensors: torch.optim.SGD(tensors, lr=1.0),
        "DiLoCo": lambda tensors: torch.optim.SGD(tensors, lr=0.7, momentum=0.9, nesterov=True),
        "Adam": lambda tensors: torch.optim.Adam(tensors, lr=0.1),
    }


@on_ranks(2, mpi=True)
def test_outer_optimizer(world: dl.Partition) -> None:
    for make_outer in outers().values():
        for takes_over in (False, True):
            parameters = start_of(world.rank)
            outer = make_outer(parameters) if takes_over else make_outer
            optimizer = dl.LocalSGD(adam(parameters), 3, outer=outer, P=world)
            by_hand = Replicas(2, adam)
            point = [p.detach().clone().requires_grad_() for p in by_hand.parameters[0]]
            outer_by_hand = make_outer(point)
            for step in range(STEPS):
                train(world, optimizer, range(step, step + 1))
                by_hand.step(step)
                if step % 3 == 2:
                    for p, mean in zip(point, by_hand.mean(), strict=True):
                        p.grad = p.detach() - mean
                    outer_by_hand.step()
                    by_hand.put([p.detach() for p in point])
                assert_near(parameters, by_hand.parameters[world.rank])


@on_ranks(2)
def test_outer_optimizer_after_replanning(world: dl.Partition) -> None:
    """States of the outer optimizer and the common point survive."""
    for takes_over in (False, True):
        results = []
        for replans in (False, True):
            tensors = start_of(0)
            tensors[3].requires_grad_(False)
            make = outers()["DiLoCo"]
            outer = make(tensors) if takes_over else make
            optimizer = dl.LocalSGD(plain(0.1, *tensors), 2, outer=outer, wire=torch.float16)
            train(world, optimizer, range(5))
            if replans:
                tensors[3].requires_grad_(True)
                optimizer.replan()
                tensors[3].grad = None
            train(world, optimizer, range(5, 8))
            results.append([p.detach() for p in tensors])
        assert_near(results[0][:3], results[1][:3], atol=0)


# ---- as an optimizer -----------------------------------------------------------------------------------------------------


def variants() -> list[dict[str, Any]]:
    diloco = outers()["DiLoCo"]
    return [
        {"schedule": dl.Periodic(3, 0, 2)},
        {"schedule": dl.Periodic(4, 2, 1), "ranks_per_node": 1, "wire": torch.bfloat16, "merge": "delta"},
        {"schedule": 3, "outer": diloco, "delay": 1, "average_state": True},
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
        for twin in (
            copy.deepcopy(optimizer),
            pickle.loads(pickle.dumps(optimizer)) if "outer" not in options else None,
        ):
            if twin is not None:
                before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
                train(world, twin, range(6, STEPS))
                assert_near(optimizer.param_groups[0]["params"], before, atol=0)
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

    registries, before = len(world.world_transport.local), threads()
    for _ in range(100):
        train(world, dl.LocalSGD(plain(0.1, *start_of(0)), 2, delay=1, P=world), range(3))
    assert len(world.world_transport.local) == registries
    assert threads() <= before + 1


# ---- refusals ------------------------------------------------------------------------------------------------------------


class Metric:
    pass


def sgd(**options: Any) -> dl.LocalSGD:
    return dl.LocalSGD(plain(0.1, *start_of(0)), options.pop("schedule", 2), **options)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: dl.LocalSGD([1], 2), TypeError, r"optimizer must be a torch.optim.Optimizer, not \[1\]"),
        (lambda: sgd(schedule=0), ValueError, "global_every must be at least 1, not 0"),
        (lambda: sgd(schedule="2"), TypeError, "schedule must be a number of steps or a function, not '2'"),
        (lambda: sgd(delay=-1), ValueError, "delay must be at least 0, not -1"),
        (lambda: sgd(delay=1.0), TypeError, "delay must be an int, not 1.0"),
        (lambda: sgd(merge="mean"), ValueError, r"merge must be one of \('daso', 'delta', 'replace'\), not 'mean'"),
        (lambda: sgd(wire=torch.float64), ValueError, "wire must be one of .*bfloat16.*, not torch.float64"),
        (lambda: sgd(engine="gloo"), ValueError, "engine must be one of .*'poll'.*, not 'gloo'"),
        (lambda: sgd(chunk=0), ValueError, "chunk must be at least 1, not 0"),
        (lambda: sgd(timeout="1"), TypeError, "timeout must be a number of seconds, not '1'"),
        (lambda: sgd(outer=1.0), TypeError, "outer must be an optimizer or a function that makes one, not 1.0"),
        (lambda: sgd(outer=lambda tensors: 3), TypeError, "outer must make a torch.optim.Optimizer, not 3"),
        (
            lambda: sgd(outer=plain(0.1, *start_of(0))),
            ValueError,
            "outer must hold the parameters that the optimizer holds",
        ),
        (lambda: sgd(P=3), TypeError, "a Partition or an MPI communicator is needed, not 3"),
        (lambda: sgd(groups="host"), TypeError, "groups must be \"node\", a Partition or lists of ranks, not 'host'"),
        (lambda: sgd(groups=[[0], [0, 1]]), ValueError, r"groups .* do not hold each of the ranks \[0, 1\] once"),
        (lambda: sgd(groups=[[0]]), ValueError, r"groups \[\(0,\)\] do not hold each of the ranks \[0, 1\] once"),
        (lambda: sgd(groups=[[0, 2]]), TypeError, "groups must be"),
        (lambda: sgd(ranks_per_node=0), ValueError, "ranks_per_node must be at least 1, not 0"),
        (lambda: sgd(ranks_per_node=2.0), TypeError, "ranks_per_node must be an int, not 2.0"),
        (lambda: sgd(buffers=[3]), TypeError, "buffers must be floating-point tensors, not 3"),
        (lambda: sgd(buffers=[torch.ones(2).long()]), TypeError, "buffers must be floating-point tensors, not tensor"),
        (lambda: sgd(average_state=1), TypeError, "average_state must be a bool, not 1"),
        (
            lambda: sgd(schedule=lambda *_: (2, 0.5, 0)).step(),
            TypeError,
            "the schedule's local_every must be an int, not 0.5",
        ),
        (
            lambda: sgd(schedule=lambda *_: (-1, 0, 0)).step(),
            ValueError,
            "the schedule's global_every must be at least 0",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    def body(world: dl.Partition) -> None:
        with pytest.raises(kind, match=text):
            make()

    spmd(2, body)


@on_ranks(3, mpi=True)
def test_ranks_that_disagree_are_refused_together(world: dl.Partition) -> None:
    team = world.create_partition_inclusive(range(3))
    last = world.rank == 2
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: dl.LocalSGD(plain(0.1, *start_of(0)[: 3 if last else 4]), 2, P=team),
            "LocalSGD: the ranks disagree: number of tensors is 3 on rank 2, 4 on rank 0",
        ),
        (
            lambda: dl.LocalSGD(plain(0.1, torch.nn.Parameter(torch.ones(2 + last))), 2, P=team),
            r"tensor 0 is \(\(3,\), torch.float32\) on rank 2, \(\(2,\), torch.float32\) on rank 0",
        ),
        (
            lambda: dl.LocalSGD(plain(0.1, *start_of(0)), 2, P=team, chunk=2 + last),
            "chunk is 3 on rank 2, 2 on rank 0",
        ),
        (
            lambda: dl.LocalSGD(plain(0.1, *start_of(0)), 2, P=team, groups=[[0, 1], [2]] if last else "node"),
            r"nodes is \(\(0, 1\), \(2,\)\) on rank 2, \(\(0, 1, 2\),\) on rank 0",
        ),
        (
            lambda: dl.LocalSGD(plain(0.1, *start_of(0)), 2, P=team, outer=torch.optim.SGD if last else None),
            "outer is True on rank 2, False on rank 0",
        ),
        (
            lambda: dl.LocalSGD(plain(0.1, *start_of(0)), 2 + last, P=team),
            r"schedule is Periodic\(global_every=3, .*\) on rank 2, Periodic\(global_every=2, .*\) on rank 0",
        ),
    ]
    for make, text in cases:
        with pytest.raises(ValueError, match=text):
            make()


def test_a_rank_that_takes_no_part_is_a_deadlock_under_threads() -> None:
    def body(world: dl.Partition) -> None:
        optimizer = dl.LocalSGD(plain(0.1, *start_of(0)), 1)
        if world.rank:
            train(world, optimizer, range(1))

    with pytest.raises(RuntimeError, match=r"deadlock: rank 1 waits for .*sum.* of 16 torch\.float64"):
        spmd(2, body)


@on_ranks(2, mpi=True)
def test_timeout(world: dl.Partition) -> None:
    """A late rank is named, and its average still comes."""
    if type(world.world_transport).__name__ == "ThreadTransport":
        return  # where nobody can be late
    for delay in (0, 1):
        optimizer = dl.LocalSGD(plain(0.1, *start_of(0)), 1 + delay, P=world, timeout=0.2, delay=delay)
        steps = range(1 + 2 * delay)
        if world.rank == 0:
            text = rf"rank 0: the average of ranks \[0, 1\] that began with step {delay} was not there after 0.2 s"
            with pytest.raises(TimeoutError, match=text):
                train(world, optimizer, steps)
        world.allgather_data(None)
        optimizer.timeout = 30.0
        if world.rank == 1:
            train(world, optimizer, steps)
        optimizer.drain()


@on_ranks(2, mpi=True)
def test_a_long_run_does_not_grow(world: dl.Partition) -> None:
    """Of the objects that a step makes, none is left; some are kept for a while by torch."""
    for options in ({}, {"delay": 1}, {"delay": 1, "wire": torch.bfloat16}, {"average_state": True}):
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
