"""Gradients of `DataParallel` are those of one process on the whole batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from copies import assert_gradients, draw, mean_square, mlp, twins
from ranks import on_ranks
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import spmd
from distdl_lite.transport.sums import ENGINES

BUCKETS = None, 1e-4  # MiB; the second has a parameter or two in each


def compare(world: dl.Partition, sizes: Sequence[int], steps: int = 2, dtype: torch.dtype = torch.float64, **options):
    """Some backwards on batches of which each rank has so many rows."""
    dp, single = twins(mlp(3, 7, 5, 2, dtype=dtype), world, **options)
    for step in range(steps):
        x = draw(sum(sizes), 3, seed=step, dtype=dtype)
        dp.zero_grad()
        single.zero_grad()
        mean_square(dp(x.split(list(sizes))[world.rank])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A1")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_even_batches(ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        for dtype, bucket, overlap, average in itertools.product(
            (torch.float64, torch.float32), BUCKETS, (True, False), ("samples", "ranks")
        ):
            compare(world, [3] * ranks, dtype=dtype, bucket_mb=bucket, overlap=overlap, average=average)

    spmd(ranks, body)


@pytest.mark.check("A1")
@on_ranks(4, mpi=True)
def test_every_engine(world: dl.Partition) -> None:
    for engine, bucket in itertools.product((*ENGINES, "auto"), BUCKETS):
        compare(world, [2] * 4, 4, engine=engine, bucket_mb=bucket)
        compare(world, [3, 0, 5, 1], 4, engine=engine, bucket_mb=bucket)


@pytest.mark.check("A5")
@on_ranks(3, mpi=True)
def test_uneven_batches(world: dl.Partition) -> None:
    compare(world, (5, 2, 1))
    rng = random.Random(0)
    for _ in range(20):
        sizes = [rng.randint(0, 4) for _ in range(2)]
        compare(world, [*sizes, rng.randint(1, 4)], bucket_mb=rng.choice(BUCKETS), dtype=torch.float32)


@pytest.mark.check("A6")
@pytest.mark.parametrize("ranks", [2, 3])
def test_an_empty_batch(ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        for empty, overlap in itertools.product(range(ranks), (True, False)):
            compare(world, [0 if rank == empty else 3 for rank in range(ranks)], overlap=overlap)
        for alone in range(ranks):
            compare(world, [4 * (rank == alone) for rank in range(ranks)])

    spmd(ranks, body)


@pytest.mark.check("A8")
@on_ranks(2)
def test_token_weights(world: dl.Partition) -> None:
    """Each rank's loss is a mean over its tokens, of which rows have different numbers."""
    for overlap, bucket in itertools.product((True, False), BUCKETS):
        dp, single = twins(mlp(3, 5, 2), overlap=overlap, bucket_mb=bucket)
        for step in range(3):
            x = draw(8, 6, 3, seed=step)
            mask = torch.arange(6) < torch.tensor([6, 1, 2, 0, 5, 5, 3, 4])[:, None]
            mine = slice(0, 3) if world.rank == 0 else slice(3, 8)
            dp.zero_grad()
            single.zero_grad()
            setattr(dp, ("loss_weight", "weight")[step % 2], int(mask[mine].sum()))
            mean_square(dp(x[mine])[mask[mine]]).backward()
            assert dp.loss_weight is None  # for one backward
            mean_square(single(x)[mask]).backward()
            assert_gradients(dp, single)


@pytest.mark.check("A8")
@on_ranks(2)
def test_averages(world: dl.Partition) -> None:
    """What each means, for 3 and 5 rows."""
    x = draw(8, 3)
    parts = x.split([3, 5])
    wanted = {
        "samples": lambda f: mean_square(f(x)),
        "ranks": lambda f: sum(mean_square(f(part)) for part in parts) / 2,
        "none": lambda f: sum(mean_square(f(part)) for part in parts),
        "sum": lambda f: sum(mean_square(f(part)) for part in parts) / 8,
    }
    for average, loss in wanted.items():
        dp, single = twins(mlp(3, 4, 2), average=average)
        for step in range(2):
            if step == 0:
                mean_square(dp(parts[world.rank])).backward()
            loss(single).backward()
        mean_square(dp(parts[world.rank])).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A8")
def test_on_one_rank() -> None:
    """Nothing is averaged, but for a sum over rows; then weights count as with others."""

    def body(world: dl.Partition) -> None:
        for average, factor in (("samples", 1), ("ranks", 1), ("none", 1), ("sum", 1 / 4)):
            dp, single = twins(mlp(3, 4, 2), average=average)
            x = draw(4, 3)
            mean_square(dp(x)).backward()
            (factor * mean_square(single(x))).backward()
            assert_gradients(dp, single)

    spmd(1, body)


class Branches(nn.Module):
    """Two layers, of which forward uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.never = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor, uses: str) -> torch.Tensor:
        for name in uses:
            x = torch.tanh({"f": self.first, "s": self.second}[name](x))
        return x


@pytest.mark.check("A11")
@pytest.mark.parametrize("ranks", [2, 3])
def test_parameters_that_some_ranks_leave_out(ranks: int) -> None:
    cases = [["f", "s", "s"], ["fs", "f", "sf"], ["s", "s", "s"], ["f", "fs", "ff"], ["s", "f", "f"]]

    def body(world: dl.Partition) -> None:
        for bucket, overlap in itertools.product(BUCKETS, (True, False)):
            dp, single = twins(Branches(), bucket_mb=bucket, overlap=overlap)
            for step, uses in enumerate(cases):
                dp.zero_grad()
                single.zero_grad()
                x = draw(2 * ranks, 3, seed=step)
                mean_square(dp(x[2 * world.rank :][:2], uses[world.rank])).backward()
                sum(mean_square(single(x[2 * r :][:2], uses[r])) / ranks for r in range(ranks)).backward()
                assert_gradients(dp, single)
                assert dp.never.weight.grad is None
                gradients = [p.grad for p in dp.parameters() if p.grad is not None]
                told = world.allgather_data([g.tolist() for g in gradients])
                assert all(other == told[0] for other in told)

    spmd(ranks, body)


@pytest.mark.check("A11")
@on_ranks(2, mpi=True)
def test_a_rank_whose_backward_reaches_no_parameter(world: dl.Partition) -> None:
    """Its output needs the gradient of the input alone."""
    for bucket in BUCKETS:
        dp, single = twins(Branches(), bucket_mb=bucket)
        for step in range(2):
            x = draw(4, 3, seed=step).requires_grad_()
            uses = ["", "fs"] if step else ["fs", ""]
            mean_square(dp(x[2 * world.rank :][:2], uses[world.rank])).backward()
            (sum(mean_square(single(x[2 * r :][:2], uses[r])) for r in range(2)) / 2).backward()
            assert_gradients(dp, single)


@pytest.mark.check("A40")
@on_ranks(2, mpi=True)
def test_what_is_not_a_number_passes(world: dl.Partition) -> None:
    for engine, value in itertools.product(ENGINES, (float("nan"), float("inf"), -float("inf"))):
        dp, single = twins(nn.Linear(4, 4, dtype=torch.float64), engine=engine)
        scale = torch.ones(2, 4, dtype=torch.float64)
        scale[0, 0] = scale[1, 1] = scale[0, 2] = value
        scale[1, 2] = -value
        x = draw(2, 4).abs()
        (dp(x[world.rank :][:1]) * scale[world.rank]).sum().backward()
        ((single(x) * scale).sum() / 2).backward()
        for actual, expected in zip(dp.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, equal_nan=True)
            assert actual.grad[:3].isfinite().sum() == 0
            assert actual.grad[3].isfinite().all()


class Backwards(nn.Module):
    """Layers that are called in the order of their construction, or in the reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor, reverses: bool) -> torch.Tensor:
        for layer in reversed(self.layers) if reverses else self.layers:
            x = layer(x).tanh()
        return x


@on_ranks(2, mpi=True)
def test_buckets_follow_the_order_of_the_first_rank(world: dl.Partition) -> None:
    for engine in ("thread", "poll"):
        dp, single = twins(Backwards(), world, engine=engine, bucket_mb=1e-4)
        assert dp._sync.buckets[0].numbers[0] == 5
        for step in range(2):
            x = draw(4, 4, seed=step)
            reverses = world.rank == 0
            dp.zero_grad()
            single.zero_grad()
            mean_square(dp(x.view(2, 2, 4)[world.rank], reverses)).backward()
            ((mean_square(single(x[:2], True)) + mean_square(single(x[2:], False))) / 2).backward()
            assert_gradients(dp, single)
            order = [n for bucket in dp._sync.buckets for n in bucket.numbers]
            assert [n // 2 for n in order[:2]] == [0, 0]
            assert order[-1] // 2 == 2
