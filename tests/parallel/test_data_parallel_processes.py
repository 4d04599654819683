"""`DataParallel` on MPI processes, with every engine, at any pace."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from copies import assert_gradients, assert_parameters, draw, mean_square, mlp, train, twins
from ranks import on_ranks
from torch import nn

import distdl_lite as dl
from distdl_lite.transport.sums import ENGINES


@pytest.mark.check("A3")
@pytest.mark.parametrize(("ranks", "engines"), [(2, ENGINES), (3, ["thread"]), (4, ["auto", "poll"])])
@pytest.mark.mpi(min_size=4)
def test_replicas_stay_the_same_bit_by_bit(ranks: int, engines: Sequence[str]) -> None:
    P = dl.Partition().create_partition_inclusive(range(ranks))
    if not P.active:
        return
    for engine in engines:
        torch.manual_seed(P.rank)
        model = nn.Sequential(nn.Linear(3, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 2))
        dp = dl.DataParallel(model, P, engine=engine, bucket_mb=5e-4)
        data = [draw(2 + P.rank, 3, seed=10 * s + P.rank, dtype=torch.float32) for s in range(50)]
        train(dp, torch.optim.SGD(dp.parameters(), 0.1, momentum=0.9), data)
        dp.check_replicas()
        assert len(dp._sync.buckets) > 1


@pytest.mark.check("A2")
@on_ranks(3, mpi=True)
def test_steps_with_every_engine(world: dl.Partition) -> None:
    sizes = [3, 0, 2]
    for engine in (*ENGINES, "auto"):
        dp, single = twins(mlp(3, 40, 30, 2), world, engine=engine, bucket_mb=2e-3)
        whole = [draw(5, 3, seed=step) for step in range(20)]
        train(dp, torch.optim.AdamW(dp.parameters(), 1e-3), [x.split(sizes)[world.rank] for x in whole])
        train(single, torch.optim.AdamW(single.parameters(), 1e-3), whole)
        assert_parameters(dp, single)


@pytest.mark.check("A6")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.mpi(min_size=3)
def test_an_empty_batch(ranks: int) -> None:
    P = dl.Partition().create_partition_inclusive(range(ranks))
    if not P.active:
        return
    began = time.monotonic()
    for engine in ENGINES:
        for empty in range(ranks):
            dp, single = twins(mlp(3, 5, 2), P, engine=engine)
            x = draw(3 * (ranks - 1), 3)
            sizes = [0 if rank == empty else 3 for rank in range(ranks)]
            mean_square(dp(x.split(sizes)[P.rank])).backward()
            mean_square(single(x)).backward()
            assert_gradients(dp, single)
    assert time.monotonic() - began < 30  # on a busy machine; alone, below 1


@pytest.mark.check("A19")
@on_ranks(2, mpi=True)
def test_large_gradients_go_to_the_thread(world: dl.Partition) -> None:
    """Of several MiB, in buckets of which some are larger than the limit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 900), nn.Linear(900, 400))
    dp, single = twins(model, world, engine="auto", bucket_mb=1)
    for step in range(3):
        x = draw(4, 700, seed=step, dtype=torch.float32)
        dp.zero_grad()
        single.zero_grad()
        mean_square(dp(x[2 * world.rank :][:2])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)
    assert dp._sync.engine == "auto"
    assert len(dp._sync.buckets) >= 3


@on_ranks(2, mpi=True)
def test_small_gradients_travel_together_when_backward_ends(world: dl.Partition) -> None:
    """Of 1.4 MiB: what the hooks of others make of them is summed, too."""
    dp, single = twins(nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 200)), world)
    dp(draw(2, 500, dtype=torch.float32))  # whose own hooks come first
    for model in (dp, single):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 3 * p.grad))
    for step in range(2):
        x = draw(4, 500, seed=step, dtype=torch.float32)
        dp.zero_grad()
        single.zero_grad()
        with dl.testing.count() as counted:
            mean_square(dp(x[2 * world.rank :][:2])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)
        assert counted.by_label["sums"].messages == 1
    assert dp._sync.engine == "inline"


class Sleeps(torch.autograd.Function):
    """The identity; backward rests there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rng: random.Random) -> torch.Tensor:
        ctx.rng = rng
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.rng.random() ** 8 / 100)
        return gradient, None


class Crooked(nn.Module):
    """Layers in an order that differs from rank to rank and from step to step, some left out, with rests between."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.rng = nn.ModuleList(nn.Linear(3, 3) for _ in range(8)), rng

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.rng.sample(list(self.layers), self.rng.randint(1, 8)):
            x = Sleeps.apply(layer(x).tanh(), self.rng)
        return x


@pytest.mark.check("A46")
@on_ranks(4, mpi=True)
def test_any_pace_and_any_order(world: dl.Partition) -> None:
    rng = random.Random(world.rank)
    in_threads = world.comm is None  # which rest one after another
    for engine in ("auto",) if in_threads else (*ENGINES, "auto"):
        dp = dl.DataParallel(Crooked(rng), engine=engine, bucket_mb=5e-5)
        optimizer = torch.optim.SGD(dp.parameters(), 0.1, momentum=0.5)
        for step in range(50):  # 200 in all
            time.sleep(rng.random() ** 8 / 100)
            with dp.no_sync() if step % 5 == 1 else torch.enable_grad():
                mean_square(dp(draw(rng.randint(0, 3), 3, dtype=torch.float32))).backward()
            if step % 5 != 1:
                torch.nn.utils.clip_grad_norm_(dp.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=step % 2 == 0)
        dp.check_replicas()
