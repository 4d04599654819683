"""Sums of replica gradients that start before backward ends: exact, in one order, and whole again after a failure."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from cases import integers
from ranks import on_ranks
from test_reducer import Shared

from distdl_lite import reducer as red
from distdl_lite.partition import Partition
from distdl_lite.reducer import reducer_of
from distdl_lite.testing import count
from distdl_lite.transport import current

N = 64  # numbers in a parameter, 512 bytes


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(red, "EARLY_BYTES", 3 * N * 8)


class Chain(torch.autograd.Function):
    """The identity, which tells in backward that it was reached."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, reached: object) -> torch.Tensor:
        ctx.reached = reached
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.reached()
        return gradient, None


def models_of(world: Partition, count: int = 10, teams: object = None) -> list[Shared]:
    teams = [range(world.size)] if teams is None else teams
    made = []
    for order in range(count):
        P = world.create_partition_inclusive(list(teams[order % len(teams)]))
        made.append(Shared(P, integers((N,), seed=order), order))
    return made


def x_of(rank: int) -> torch.Tensor:
    return integers((N,), seed=100 + rank)


def loss_of(models: list[Shared], x: torch.Tensor, reached: object = lambda: None) -> torch.Tensor:
    """Backward reaches the last model first."""
    total = x.new_zeros((), requires_grad=True)
    for model in models:
        total = Chain.apply(total, reached) + model(x)
    return total


def check(models: list[Shared], times: int = 1) -> None:
    for model in models:
        assert torch.equal(model.weight.grad, times * sum(x_of(rank) for rank in model.P.ranks))
        model.weight.grad = None


def engines() -> Iterator[str]:
    """Every engine that does not wait for other ranks where a sum starts; the threads of spmd have none."""
    reducer = reducer_of(current())
    for engine in ("auto", "thread", "poll"):
        reducer.engine = engine
        yield engine
    reducer.engine = "auto"


@on_ranks(4, mpi=True)
def test_sums_start_while_backward_runs(world: Partition) -> None:
    reducer, seen = reducer_of(current()), []
    for _ in engines():
        models, x = models_of(world), x_of(world.rank)
        for _ in range(3):
            seen.clear()
            loss_of(models, x, lambda: seen.append(len(reducer.under_way))).backward()
            check(models)
            assert not reducer.under_way
        assert seen == [0, 0, 1, 1, 1, 2, 2, 2, 3, 4]  # 10 parameters in sums of 3
        for model in models:  # gradients add up
            model.weight.grad = torch.zeros(N, dtype=torch.float64)
        loss_of(models, x).backward()
        loss_of(models, x).backward()
        check(models, times=2)


@on_ranks(4)
def test_messages(world: Partition) -> None:
    models, x = models_of(world), x_of(world.rank)
    for planned in (False, True, True):
        with count() as counted:
            loss_of(models, x).backward()
        assert counted.by_label["sums"].bytes == 10 * N * 8
        assert counted.by_label["sums"].messages == (4 if planned else 1)


@on_ranks(4, mpi=True)
def test_graphs_that_change(world: Partition) -> None:
    """Other parameters each time, the same ones twice, new ones, copies of the same order, another dtype."""
    models, x = models_of(world), x_of(world.rank)
    for part in (
        slice(0, 7),
        slice(7, 10),
        slice(None),
        slice(4, None),
        slice(0, 5),
        slice(3, 8),
        slice(None),
        slice(2, 3),
        slice(None),
    ):
        loss_of(models[part], x).backward()
        check(models[part])
    for _ in range(3):
        loss_of(models + models[::-1], x).backward()
        check(models, times=2)
    twins = models_of(world)
    for _ in range(2):
        loss_of(models + twins, x).backward()
        check(models)
        check(twins)
    for model in twins:
        model.weight.data = model.weight.data.float()
    for _ in range(2):
        loss_of(twins, x.float()).backward()
        for model in twins:
            assert torch.equal(model.weight.grad, sum(x_of(rank).float() for rank in range(4)))
            model.weight.grad = None


@on_ranks(4, mpi=True)
def test_a_second_gradient_after_the_sum_has_started_on_some_ranks(world: Partition) -> None:
    models, x = models_of(world, 6), x_of(world.rank)
    loss_of(models, x).backward()
    check(models)
    # Rank 1 reaches the last three twice before any other; elsewhere their sum has started when they come again.
    again = models + models[3:] if world.rank == 1 else models[3:] + models
    for _ in range(3):
        loss_of(again, x).backward()
        check(models[:3])
        check(models[3:], times=2)


@on_ranks(4, mpi=True)
def test_overlapping_teams_start_in_one_order(world: Partition) -> None:
    """Each rank is in four teams, and reaches their parameters in an order of its own, at its own pace."""
    teams = [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1, 2, 3], [0, 2], [1, 3]]
    draw = random.Random(world.rank)
    for engine in engines():
        mine = [model for model in models_of(world, 42, teams) if model.P.active]
        for _ in range(4 if engine == "auto" else 2):
            draw.shuffle(mine)
            loss_of(mine, x_of(world.rank), lambda: time.sleep(draw.random() * 1e-3)).backward()
            check(mine)


@on_ranks(4, mpi=True)
def test_failed_backwards(world: Partition) -> None:
    """Every rank fails after as many sums as its number; the next backward completes them, and is right."""
    reducer = reducer_of(current())

    def fail() -> None:
        if len(reducer.under_way) == min(world.rank, 3):
            raise ArithmeticError("broke in backward")

    for _ in engines():
        models, x = models_of(world), x_of(world.rank)
        loss_of(models, x).backward()
        check(models)
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="broke in backward"):
                loss_of([*models, Shared(world, integers((N,)), 99)], x, fail).backward()
            assert len(reducer.under_way) == min(world.rank, 3)
            for _ in range(2):
                loss_of(models, x).backward()
                check(models)


@on_ranks(4, mpi=True)
def test_a_failure_in_one_team_leaves_the_others_right(world: Partition) -> None:
    everywhere, here = models_of(world), models_of(world, 10, [[0, 1]] if world.rank < 2 else [[2, 3]])
    x = x_of(world.rank)
    for models in (everywhere, here):
        loss_of(models, x).backward()
        check(models)

    def fail() -> None:
        raise ArithmeticError("broke in backward")

    for _ in range(2):
        if world.rank < 2:
            with pytest.raises(ArithmeticError):
                loss_of(here, x, fail).backward()
        for models in (everywhere, here, everywhere):
            loss_of(models, x).backward()
            check(models)


@on_ranks(4, mpi=True)
def test_ranks_that_reach_other_parameters_raise_on_all(world: Partition) -> None:
    for _ in engines():
        models, x = models_of(world), x_of(world.rank)
        loss_of(models, x).backward()
        check(models)
        for lacks in (0, 9):
            part = models[:lacks] + models[lacks + 1 :] if world.rank == 2 else models
            with pytest.raises(RuntimeError, match=r"backward reached different parameters .* rank 2: "):
                loss_of(part, x).backward()
            for _ in range(2):
                for model in models:
                    model.weight.grad = None
                loss_of(models, x).backward()
                check(models)


@on_ranks(4)
def test_a_backward_inside_a_backward(world: Partition) -> None:
    models, x = models_of(world), x_of(world.rank)
    inner = models_of(world, 12)[10:]
    loss_of(models, x).backward()
    check(models)

    def inside(at: int) -> object:
        left = [at]

        def reached() -> None:
            left[0] -= 1
            if not left[0]:
                with torch.enable_grad():
                    loss_of(inner, x).backward()

        return reached

    for at in (1, 5, 9):
        loss_of(models, x, inside(at)).backward()
        check(models)
        check(inner)


@on_ranks(2, mpi=True)
def test_a_frame_of_an_ended_backward_that_somebody_keeps(world: Partition) -> None:
    """Monitors that look at stacks keep frames, and with them what these refer to: the backward has ended all the same."""
    models, x, kept = models_of(world, 8), x_of(world.rank), []
    transport = world.world_transport
    asked = transport.agreed

    def agreed(team: object) -> int:
        if world.rank == 0:
            kept.append(sys._getframe(1))
        return asked(team)

    transport.agreed = agreed
    try:
        for _ in range(4):
            loss_of(models, x).backward()
            assert not reducer_of(transport).running()
            for model in models:
                assert torch.equal(model.weight.grad, sum(x_of(rank) for rank in range(2)))
                model.weight.grad = None
    finally:
        del transport.agreed
    assert reducer_of(transport).planned
