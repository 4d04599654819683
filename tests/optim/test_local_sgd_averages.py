"""Periodic averages, at once or under way, in whatever merge and with an outer optimizer, equal those made by hand."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from optim.replicas import Replicas, adam, assert_near, diloco, momentum_sgd, plain, start_of, train
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count


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
        for step in by_hand.beside(world, optimizer):
            if (step + 1) % period == 0:
                by_hand.put(by_hand.mean())


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
    for step in by_hand.beside(world, optimizer, range(12)):
        if step in (0, 1, 2, 6, 10):
            by_hand.put(by_hand.mean())


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


def check_merges(world: dl.Partition) -> None:
    engines, chunks = cycle(("auto", "thread", "poll", "inline")), cycle((None, 4, 1000))
    for merge in ("daso", "delta", "replace"):
        for every, delay, waited in ((4, 1, 1), (4, 3, 3), (2, 5, 2)):
            options = {"merge": merge, "delay": delay, "engine": next(engines), "chunk": next(chunks), "P": world}
            optimizer = dl.LocalSGD(momentum_sgd(start_of(world.rank)), every, **options)
            by_hand, begun, old, mean = Replicas(world.size, momentum_sgd), -1, [], []
            for step in by_hand.beside(world, optimizer):
                if old and step == begun + waited:
                    by_hand.merge(merge, old, mean, waited, world.size)
                    old = []
                if (step + 1) % every == 0:
                    begun, old, mean = step, by_hand.values(), by_hand.mean()
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


@on_ranks(2, mpi=True)
def test_outer_optimizer(world: dl.Partition) -> None:
    for make_outer in (lambda tensors: plain(1.0, *tensors), diloco, lambda tensors: torch.optim.Adam(tensors, lr=0.1)):
        for takes_over in (False, True):
            parameters = start_of(world.rank)
            outer = make_outer(parameters) if takes_over else make_outer
            optimizer = dl.LocalSGD(adam(parameters), 3, outer=outer, P=world)
            by_hand = Replicas(2, adam)
            point = [p.detach().clone().requires_grad_() for p in by_hand.parameters[0]]
            outer_by_hand = make_outer(point)
            for step in by_hand.beside(world, optimizer):
                if step % 3 == 2:
                    for p, mean in zip(point, by_hand.mean(), strict=True):
                        p.grad = p.detach() - mean
                    outer_by_hand.step()
                    by_hand.put([p.detach() for p in point])


@on_ranks(2)
def test_outer_optimizer_after_replanning(world: dl.Partition) -> None:
    """States of the outer optimizer and the common point survive."""
    for takes_over in (False, True):
        results = []
        for replans in (False, True):
            tensors = start_of(0)
            tensors[3].requires_grad_(False)
            outer = diloco(tensors) if takes_over else diloco
            optimizer = dl.LocalSGD(plain(0.1, *tensors), 2, outer=outer, wire=torch.float16)
            train(world, optimizer, range(5))
            if replans:
                tensors[3].requires_grad_(True)
                optimizer.replan()
                tensors[3].grad = None
            train(world, optimizer, range(5, 8))
            results.append([p.detach() for p in tensors])
        assert_near(results[0][:3], results[1][:3], atol=0)
