"""Wrong arguments, ranks that disagree and ranks that are late are errors that say so on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.replicas import plain, start_of, train
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import spmd


def sgd(**options: Any) -> dl.LocalSGD:
    return dl.LocalSGD(plain(0.1, *start_of(0)), options.pop("schedule", 2), **options)


ARGUMENTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
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
    (lambda: sgd(P=3), TypeError, "a Partition or a communicator is needed, not 3"),
    (lambda: sgd(groups="host"), TypeError, "groups must be \"node\", a Partition or lists of ranks, not 'host'"),
    (lambda: sgd(groups=[[0], [0, 1]]), ValueError, r"groups .* do not hold each of the ranks \[0, 1\] once"),
    (lambda: sgd(groups=[[0]]), ValueError, r"groups \[\(0,\)\] do not hold each of the ranks \[0, 1\] once"),
    (lambda: sgd(groups=[[0, 2]]), TypeError, "groups must be"),
    (lambda: sgd(ranks_per_node=0), ValueError, "ranks_per_node must be at least 1, not 0"),
    (lambda: sgd(ranks_per_node=2.0), TypeError, "ranks_per_node must be an int, not 2.0"),
    (lambda: sgd(buffers=[3]), TypeError, "buffers must be floating-point tensors, not 3"),
    (lambda: sgd(buffers=[torch.ones(2).long()]), TypeError, "buffers must be floating-point tensors, not tensor"),
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
]


@pytest.mark.parametrize(("make", "kind", "text"), ARGUMENTS)
def test_refusals(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    def body(world: dl.Partition) -> None:
        with pytest.raises(kind, match=text):
            make()

    spmd(2, body)


@on_ranks(2, mpi=True)
def test_arguments_of_one_rank_are_refused_together(world: dl.Partition) -> None:
    for make, kind, text in ARGUMENTS:
        if (
            "Partition or a communicator" in text or "the schedule's" in text
        ):  # who takes part must be known; steps agree on nothing
            continue
        good = {"outer": lambda tensors: torch.optim.SGD(tensors, lr=1.0)} if "outer" in text else {}
        with pytest.raises(kind, match=text) as raised:
            make() if world.rank else sgd(**good)
        message = str(raised.value)
        assert set(world.allgather_data(message)) == {message}
    optimizer = sgd(P=world)
    with pytest.raises(TypeError, match="LocalSGD: float"):
        optimizer.next_epoch([1.0] if world.rank else 1.0)
    assert (optimizer.epoch, optimizer.losses) == (0, ())
    optimizer.next_epoch(1.0)
    assert (optimizer.epoch, optimizer.losses) == (1, (1.0,))


@on_ranks(2)
def test_names_in_another_order_are_refused(world: dl.Partition) -> None:
    """Of tensors of one shape nothing else tells."""
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    named = [("first", first), ("second", second)]
    with pytest.raises(ValueError, match="the name of tensor 0 is second on rank 1, first on rank 0"):
        dl.LocalSGD(torch.optim.SGD(named[::-1] if world.rank else named, lr=0.1), 2)
    dl.LocalSGD(torch.optim.SGD(named, lr=0.1), 2)


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
