"""Ranks as threads that take turns: deadlocks are errors, random states belong to ranks, the lowest failure is raised."""

from __future__ import annotations

import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import distdl_lite.nn as dnn
from distdl_lite import layout as lay
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.testing import spmd


def test_results_are_in_rank_order() -> None:
    assert spmd(3, lambda world: (world.rank, world.size)) == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(ValueError, match="spmd needs at least one rank, not 0"):
        spmd(0, lambda world: None)


def test_one_rank_runs_at_a_time() -> None:
    running: list[int] = []

    def body(world: Partition) -> None:
        for _ in range(5):
            running.append(world.rank)
            time.sleep(0.001)
            assert running == [world.rank]
            running.clear()
            world.allgather_data(None)

    spmd(4, body)


def test_a_deadlock_names_what_each_rank_waits_for() -> None:
    def body(world: Partition) -> None:
        if world.rank == 0:
            return
        if world.rank == 1:
            world.create_partition_inclusive([1, 2]).allgather_data(None)
        else:
            dnn.AllSumReduce(world.create_partition_inclusive([0, 2]).grid((2,)), [0])(torch.ones(3))

    began = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        spmd(3, body)
    assert time.monotonic() - began < 5
    assert str(raised.value) == (
        "deadlock: rank 1 waits for gather of objects number 0 of ranks [1, 2]; "
        "rank 2 waits for agreement number 0 of ranks [0, 2] in AllSumReduce; rank 0 has ended"
    )


def test_a_rank_that_waits_keeps_nothing_of_the_program_alive() -> None:
    """Where it waits is told by the library's frames alone: on Python 3.11 locals that are read live on."""

    def body(world: Partition) -> None:
        held = torch.ones(3)
        gone = weakref.ref(held)
        world.allgather_data(None)
        dnn.AllSumReduce(world.grid((2,)), [0])(held)
        del held
        assert gone() is None

    spmd(2, body)


def test_a_deadlock_in_an_operator_names_the_message() -> None:
    def body(world: Partition) -> None:
        layer, x = dnn.Repartition(world.grid((2,)), world.grid((2,), [1, 0])), torch.ones(3)
        layer(x)
        operator, _ = layer._operator(x)
        operator.apply(x)
        if world.rank:
            operator.apply(x)

    with pytest.raises(RuntimeError, match=r"rank 1 waits for a message of a exchange to shape \[3\] from rank 0"):
        spmd(2, body)


def test_the_lowest_failing_rank_is_heard() -> None:
    def body(world: Partition) -> None:
        if world.rank in (1, 3):
            raise KeyError(f"rank {world.rank}")
        world.allgather_data(None)

    with pytest.raises(KeyError, match="rank 1"):
        spmd(4, body)


def test_a_rank_that_catches_its_deadlock_goes_on() -> None:
    """And the ranks that are left meet each other."""

    def body(world: Partition) -> str:
        pair = world.create_partition_inclusive([0, 1])
        if world.rank == 0:
            return "left"
        with pytest.raises(RuntimeError, match="deadlock"):
            pair.allgather_data(None)
        return "went on"

    assert spmd(2, body) == ["left", "went on"]


def test_mismatched_calls_are_named() -> None:
    def body(world: Partition) -> None:
        transport, team = world.world_transport, world.team
        if world.rank:
            transport.agree(team, 1)
        else:
            transport.all_reduce(team, torch.ones(3))

    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] meet in different calls: .*all-reduce .*1: 'agreement'"):
        spmd(2, body)


def test_mismatched_messages_are_named() -> None:
    def body(world: Partition) -> None:
        halves, turned = (
            lay.balanced_blocks(world.grid((2,), ranks).grid_of_ranks, (6,)) for ranks in ([0, 1], [1, 0])
        )
        copies = lay.whole(halves.grid, (3,))
        X, Y = (copies, copies) if world.rank else (halves, turned)
        Operator(plan(X, Y, world.rank), world.world_transport)(torch.ones(3))

    with pytest.raises(RuntimeError, match=r"expects a message of a|deadlock"):
        spmd(2, body)


def test_layers_called_in_another_order_are_named() -> None:
    """Also two alike ones, whose plans would fit each other."""
    makes: list[Callable[[Partition], Any]] = [
        lambda P: dnn.DistributedConv1d(P, 2, 2, 3, padding=1),
        lambda P: dnn.DistributedConv1d(P, 2, 2, 5, padding=2),
        lambda P: dnn.HaloExchange(P, (0, 0, 1)),
        lambda P: dnn.AllSumReduce(P, [2]),
        lambda P: dnn.DistributedBatchNorm(P, 2),
    ]
    for first, second in [(makes[0], makes[0]), *itertools.combinations(makes, 2)]:
        for warm in (False, True):

            def body(world: Partition, first: Any = first, second: Any = second, warm: bool = warm) -> None:
                P = world.grid((1, 1, 3))
                layers = [first(P), second(P)]
                x = torch.ones(1, 2, 4)
                for layer in layers if warm else ():
                    layer(x)
                for layer in layers[::-1] if world.rank == 1 else layers:
                    layer(x)

            # Layers that run ahead of the votes may wait for each other's messages first; then it is a deadlock, and named.
            named = r"rank 1: call of layer \w+ number 2, others \w+ number 1"
            with pytest.raises(
                (ValueError, RuntimeError), match=named + r"|deadlock: .* in \w+; rank 1 .* in \w+" * warm
            ):
                spmd(3, body)


def drawn() -> tuple[float, ...]:
    """One number of each kind; of normal ones NumPy draws two and keeps the other."""
    return torch.rand(()).item(), float(numpy.random.rand()), float(numpy.random.randn()), random.random()


def seed(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


def test_random_states_belong_to_ranks() -> None:
    """Seeded code draws what it would in a process of its own, whatever the others draw between its calls."""

    def body(world: Partition) -> list[Any]:
        seed(world.rank // 2)
        numbers = []
        for _ in range(3):
            numbers.append(drawn())
            world.allgather_data(None)
            numbers.append(float(numpy.random.randn()) if world.rank % 2 else None)
            world.allgather_data(None)
        return numbers

    def alone(number: int, is_odd: bool) -> list[Any]:
        seed(number)
        return [x for _ in range(3) for x in (drawn(), float(numpy.random.randn()) if is_odd else None)]

    seed(5)
    numbers = spmd(4, body)
    after = drawn()
    seed(5)
    assert after == drawn()
    assert numbers == [alone(rank // 2, bool(rank % 2)) for rank in range(4)]
    assert len(set(spmd(3, lambda world: drawn()))) == 1  # each starts from the caller's state


def test_worlds_end_with_their_threads() -> None:
    threads = threading.active_count()
    spmd(4, lambda world: world.allgather_data(world.rank))
    assert threading.active_count() == threads


def test_worlds_in_worlds() -> None:
    assert spmd(2, lambda world: spmd(2, lambda inner: (world.rank, inner.rank))) == [
        [(0, 0), (0, 1)],
        [(1, 0), (1, 1)],
    ]
