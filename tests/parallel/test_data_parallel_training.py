"""Training with `DataParallel` is training in one process, with all that a training loop uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from copies import assert_gradients, assert_parameters, draw, mean_square, mlp, train, twins
from ranks import on_ranks
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import distdl_lite as dl
from distdl_lite.testing import spmd

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
}
SIZES = [3, 1, 2]


def mine(world: dl.Partition, x: torch.Tensor) -> torch.Tensor:
    return x.split(SIZES[: world.size])[world.rank]


def batches(world: dl.Partition, steps: int) -> list[torch.Tensor]:
    return [draw(sum(SIZES[: world.size]), 3, seed=step) for step in range(steps)]


@pytest.mark.check("A2")
@pytest.mark.parametrize("ranks", [2, 3])
def test_twenty_steps(ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        for make in OPTIMIZERS.values():
            for options in ({}, {"bucket_mb": 1e-4}, {"overlap": False}):
                dp, single = twins(mlp(3, 6, 2), **options)
                whole = batches(world, 20)
                train(dp, make(dp.parameters()), [mine(world, x) for x in whole])
                train(single, make(single.parameters()), whole)
                assert_parameters(dp, single)

    spmd(ranks, body)


@pytest.mark.check("A3")
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_replicas_stay_the_same_bit_by_bit(ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        torch.manual_seed(world.rank)
        model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
        dp = dl.DataParallel(model, engine="thread", bucket_mb=1e-4)
        data = [draw(2 + world.rank, 3, seed=10 * s + world.rank, dtype=torch.float32) for s in range(50)]
        train(dp, torch.optim.SGD(dp.parameters(), 0.1, momentum=0.9), data)
        dp.check_replicas()
        told = world.allgather_data([t.tolist() for t in dp.state_dict().values()])
        assert all(other == told[0] for other in told)

    spmd(ranks, body)


class Branches(nn.Module):
    """Goes one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.ways, self.last = nn.ModuleList([mlp(3, 4), mlp(3, 5, 4)]), mlp(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.ways[int(x[0, 0] > 0)](x))


@pytest.mark.check("A12")
@on_ranks(2, mpi=True)
def test_branches_that_depend_on_data(world: dl.Partition) -> None:
    for options in ({}, {"bucket_mb": 1e-4}, {"engine": "thread"}, {"engine": "poll"}):
        dp, single = twins(Branches(), world, **options)
        optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.5) for model in (dp, single)]
        for step in range(30):
            x = draw(4, 3, seed=step)
            x[0, 0], x[2, 0] = (-1.0) ** step, (-1.0) ** (step // 2)
            optimizers[0].zero_grad()
            optimizers[1].zero_grad()
            mean_square(dp(x[2 * world.rank :][:2])).backward()
            (sum(mean_square(single(x[2 * r :][:2])) for r in range(2)) / 2).backward()
            assert_gradients(dp, single)
            for optimizer in optimizers:
                optimizer.step()
        dp.check_replicas()


@pytest.mark.check("A13")
@on_ranks(2, mpi=True)
def test_freezing_at_any_time(world: dl.Partition) -> None:
    """By step, what is frozen; at the first, before the container is made."""
    plan = ["0", "0", "", "2", "02", "0", "024", "2", "", "4"]
    for options in ({}, {"bucket_mb": 1e-4}, {"overlap": False}, {"average": "ranks"}):
        model = mlp(3, 5, 4, 2)
        model[0].requires_grad_(False)
        dp, single = twins(model, world, **options)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (dp, single)]
        for step, frozen in enumerate(plan):
            for m in (dp.module, single):
                for name, layer in m.named_children():
                    layer.requires_grad_(name not in frozen)
                m.zero_grad(set_to_none=step % 3 != 0)
            x = draw(4, 3, seed=step).requires_grad_()
            mean_square(dp(x[2 * world.rank :][:2])).backward()
            mean_square(single(x)).backward()
            assert_gradients(dp, single)
            for optimizer in optimizers:
                optimizer.step()
        assert_parameters(dp, single)


@pytest.mark.check("A13")
@on_ranks(2)
def test_one_rank_alone_trains_a_layer(world: dl.Partition) -> None:
    """All ranks still get its gradient."""
    dp, single = twins(mlp(3, 4, 2))
    if world.rank == 0:
        dp.module[0].requires_grad_(False)
    x = draw(4, 3)
    mean_square(dp(x[2 * world.rank :][:2])).backward()
    detached = torch.func.functional_call(single, {k: p.detach() for k, p in single[0].named_parameters("0")}, x[:2])
    (mean_square(detached) / 2 + mean_square(single(x[2:])) / 2).backward()
    assert_gradients(dp, single)


def loop(world: dl.Partition, make: Callable[[nn.Module], Callable[[torch.Tensor], Any]], steps: int = 12, **options):
    """Steps that `make` builds for a model, for the container on its rows and for one process on all."""
    dp, single = twins(mlp(3, 6, 2), world, **options)
    ours, theirs = make(dp), make(single)
    for x in batches(world, steps):
        ours(mine(world, x))
        theirs(x)
    assert_parameters(dp, single)
    dp.check_replicas()


@pytest.mark.check("A15")
@on_ranks(2, mpi=True)
def test_optimizers_of_any_parameters(world: dl.Partition) -> None:
    def make(which: str) -> Callable[[nn.Module], Callable[[torch.Tensor], None]]:
        def maker(model: nn.Module) -> Callable[[torch.Tensor], None]:
            params = list(model.parameters())
            optimizers = {
                "two": lambda: [OPTIMIZERS["SGD"](params[:2]), OPTIMIZERS["AdamW"](params[2:])],
                "subset": lambda: [OPTIMIZERS["SGD"](params[1:3])],
                "reversed": lambda: [OPTIMIZERS["AdamW"](params[::-1])],
                "groups": lambda: [OPTIMIZERS["SGD"]([{"params": params[::2], "lr": 0.2}, {"params": params[1::2]}])],
            }[which]()

            def step(x: torch.Tensor) -> None:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                mean_square(model(x)).backward()
                for optimizer in optimizers:
                    optimizer.step()

            return step

        return maker

    for which in ("two", "subset", "reversed", "groups"):
        loop(world, make(which))


@pytest.mark.check("A15")
@on_ranks(2, mpi=True)
def test_a_closure(world: dl.Partition) -> None:
    """LBFGS makes several backwards a step, as many on all ranks."""

    def maker(model: nn.Module) -> Callable[[torch.Tensor], None]:
        optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=3)

        def step(x: torch.Tensor) -> None:
            def closure() -> float:
                optimizer.zero_grad()
                mean_square(model(x)).backward()
                return 1.0  # the loss of a rank's rows would not be that of all

            optimizer.step(closure)

        return step

    loop(world, maker, steps=4)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
@pytest.mark.check("A23")
@on_ranks(2, mpi=True)
def test_schedules_clipping_and_scaling(world: dl.Partition) -> None:
    schedules: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
        "step": lambda o: StepLR(o, 3, 0.5),
        "cycle": lambda o: OneCycleLR(o, 0.2, total_steps=12),
        "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
    }

    def make(name: str, norm: float, scaled: bool) -> Callable[[nn.Module], Callable[[torch.Tensor], None]]:
        def maker(model: nn.Module) -> Callable[[torch.Tensor], None]:
            optimizer = OPTIMIZERS["SGD"](model.parameters())
            schedule = schedules[name](optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4, enabled=scaled)
            number = 0

            def step(x: torch.Tensor) -> None:
                nonlocal number
                number += 1
                optimizer.zero_grad()
                loss = mean_square(model(x))
                if number == 5 and scaled:  # on one rank alone, or in some rows
                    loss = loss + (0 if x.shape[0] == 1 else 1) * torch.inf * model(x[:1]).sum()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
                scaler.step(optimizer)
                scaler.update()
                schedule.step(*([1.0 / (number % 3 + 1)] if name == "plateau" else []))

            return step

        return maker

    for name in schedules:
        for norm, scaled in ((0.05, False), (1e9, True), (0.05, True)):
            loop(world, make(name, norm, scaled))


@pytest.mark.check("A23")
@on_ranks(2, mpi=True)
def test_averaged_weights(world: dl.Partition) -> None:
    """Stochastic weight averaging and a moving average, of the container and of the module inside."""
    for inside, average in ((False, None), (True, None), (False, get_ema_multi_avg_fn(0.9))):
        dp, single = twins(mlp(3, 6, 2))
        found = []
        for model, rows in ((dp, lambda x: mine(world, x)), (single, lambda x: x)):
            inner = dp.module if inside and model is dp else model
            averaged = AveragedModel(inner, multi_avg_fn=average)
            optimizer = OPTIMIZERS["SGD"](model.parameters())
            schedule = SWALR(optimizer, 0.05, anneal_epochs=3)
            for x in batches(world, 10):
                train(model, optimizer, [rows(x)])
                averaged.update_parameters(inner)
                schedule.step()
            x = draw(2, 3)
            with torch.no_grad():
                found.append(averaged(x))
            if inner is not dp:
                continue
            mean_square(averaged(x)).backward()
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
        assert_parameters(dp, single)
