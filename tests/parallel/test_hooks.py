"""Gradients that travel otherwise than they are: hooks of one's own, and those that round."""

from __future__ import annotations

import itertools

import pytest
import torch
from copies import assert_gradients, draw, mean_square, mlp, twins
from ranks import on_ranks
from torch import nn
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.parallel.buckets import Bucket
from distdl_lite.parallel.hooks import bf16_compress_hook, fp16_compress_hook
from distdl_lite.testing import count, spmd
from distdl_lite.transport.sums import ENGINES

HOOKS = [(fp16_compress_hook, torch.float16), (bf16_compress_hook, torch.bfloat16)]
SIZES = {2: ([2, 2], [5, 1], [0, 3]), 3: ([2, 2, 2], [4, 0, 1], [1, 300, 7])}


def test_names_are_those_of_torch() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    for hook, _ in HOOKS:
        assert hasattr(default_hooks, hook.__name__)


def parts(model: nn.Module, x: torch.Tensor, sizes: list[int], average: str) -> list[list[torch.Tensor]]:
    """What each rank adds to the gradients."""
    shares = [n / sum(sizes) if average == "samples" else 1 / len(sizes) for n in sizes]
    losses = [share * mean_square(model(part)) for share, part in zip(shares, x.split(sizes), strict=True) if share]
    return [list(torch.autograd.grad(loss, list(model.parameters()))) for loss in losses]


def check_rounding(world: dl.Partition, average: str, **options: object) -> None:
    """Each part is rounded once, and with more than two ranks their sum once more."""
    for (hook, dtype), sizes in itertools.product(HOOKS, SIZES[world.size]):
        if average == "ranks" and 0 in sizes:
            continue
        dp, single = twins(mlp(3, 40, 2, dtype=torch.float32), world, comm_hook=hook, average=average, **options)
        rounded = False
        for step in range(3):
            x = draw(sum(sizes), 3, seed=step, dtype=torch.float32)
            added = parts(single, x, sizes, average)
            dp.zero_grad()
            mean_square(dp(x.split(sizes)[world.rank])).backward()
            half = torch.finfo(dtype).eps / 2 if step else 0.0
            tiny = torch.finfo(dtype).smallest_normal * half
            for parameter, own in zip(dp.parameters(), zip(*added, strict=True), strict=True):
                most = half * sum(g.abs() for g in own) + (half * sum(own).abs() if world.size > 2 else 0)
                error = (parameter.grad - sum(own)).abs()
                assert (error <= 1.01 * most + 2 * world.size * tiny + 1e-6).all()
                rounded |= bool((error > 1e-5).any())
        assert rounded or dtype is torch.float16
        dp.check_replicas()
        told = world.allgather_data([p.grad.tolist() for p in dp.parameters()])
        assert all(other == told[0] for other in told)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_exact_but_for_rounding(ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        for average, bucket in itertools.product(("samples", "ranks"), (None, 1e-4)):
            check_rounding(world, average, bucket_mb=bucket)

    spmd(ranks, body)


@on_ranks(3, mpi=True)
def test_with_every_engine(world: dl.Partition) -> None:
    for engine, overlap in itertools.product(ENGINES, (True, False)):
        check_rounding(world, "samples", engine=engine, overlap=overlap, bucket_mb=1e-4)
    check_rounding(world, "samples", engine="inline", timeout=60)


@on_ranks(2)
def test_half_the_bytes_travel(world: dl.Partition) -> None:
    moved = {}
    for hook in (None, fp16_compress_hook, bf16_compress_hook):
        dp, _ = twins(mlp(3, 1000, 2, dtype=torch.float32), comm_hook=hook)
        mean_square(dp(draw(2, 3, dtype=torch.float32))).backward()
        with count() as c:
            mean_square(dp(draw(2, 3, dtype=torch.float32))).backward()
        moved[hook] = c.by_label["sums"].bytes
    assert moved[None] > 24_000
    assert moved[fp16_compress_hook] == moved[bf16_compress_hook] < moved[None] / 2 + 100


@on_ranks(2)
def test_many_tokens_do_not_overflow(world: dl.Partition) -> None:
    """Weights are no part of what is rounded, from the first backward on."""
    dp, _ = twins(nn.Linear(1, 1, bias=False), comm_hook=fp16_compress_hook)
    for _ in range(3):
        dp.zero_grad()
        dp.loss_weight = 100_000 + 50_000 * world.rank
        (dp(torch.ones(1, 1)) * 512.0).sum().backward()
        assert dp.module.weight.grad.item() == pytest.approx(512, rel=2**-11)


@on_ranks(3, mpi=True)
def test_what_is_out_of_range_is_seen(world: dl.Partition) -> None:
    """By a GradScaler, on all ranks."""
    for (hook, dtype), value in itertools.product(HOOKS, (1e5, torch.inf, torch.nan)):
        dp, _ = twins(nn.Linear(3, 1, bias=False), world, comm_hook=hook)
        for _ in range(2):
            dp.zero_grad()
            scale = torch.tensor([3 * value if world.rank == 1 else 1.0, 1.0, 1.0])
            dp(scale[None]).sum().backward()
        (grad,) = dp.module.weight.grad
        passes = dtype is torch.bfloat16 and value == 1e5
        assert grad[0].isfinite() == passes
        assert torch.equal(grad[1:], torch.ones(2))


@on_ranks(2)
def test_complex_gradients_travel_whole(world: dl.Partition) -> None:
    class Waves(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.weight.dtype)).abs()

    for hook, _ in HOOKS:
        dp, single = twins(nn.Sequential(Waves(3, 2, dtype=torch.complex64), nn.Linear(2, 2)), comm_hook=hook)
        for step in range(2):
            x = draw(4, 3, seed=step, dtype=torch.float32)
            for model, rows in ((dp, x[2 * world.rank :][:2]), (single, x)):
                model.zero_grad()
                mean_square(model(rows)).backward()
        torch.testing.assert_close(dp.module[0].weight.grad, single[0].weight.grad)
        torch.testing.assert_close(dp.module[1].weight.grad, single[1].weight.grad, rtol=2**-7, atol=2**-9)


@on_ranks(2)
def test_windows_joins_and_failures_take_the_same_way(world: dl.Partition) -> None:
    dp, single = twins(mlp(3, 4, 2, dtype=torch.float32), comm_hook=bf16_compress_hook, average="sum", bucket_mb=1e-4)
    x = draw(12, 3, dtype=torch.float32)
    with dp.join():
        for _ in range(3 + world.rank):
            dp.zero_grad()
            with dp.no_sync():
                dp(x[world.rank :][:3]).square().sum().backward()
            dp(x[6 + world.rank :][:3]).square().sum().backward()
    rows = torch.cat([x[1:4], x[7:10]])
    (single(rows).square().sum() / 6).backward()
    for a, b in zip(dp.parameters(), single.parameters(), strict=True):
        assert world.rank == 0 or torch.allclose(a.grad, b.grad, rtol=2**-7, atol=2**-9)
    if world.rank == 0:
        rows = x[:1].clone().requires_grad_()
        rows.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dp(rows).sum().backward()
        dp(x[:1]).sum().backward()
    else:
        with pytest.raises(RuntimeError, match="backward failed on another rank"):
            dp(x[:1]).sum().backward()
        dp(x[:1]).sum().backward()
    dp.zero_grad()
    dp(x[:1]).sum().backward()
    told = world.allgather_data([p.grad.tolist() for p in dp.parameters()])
    assert told[0] == told[1]


def halve(bucket: Bucket) -> None:
    bucket.gradients.div_(2)


@on_ranks(2)
def test_a_hook_of_ones_own(world: dl.Partition) -> None:
    dp, single = twins(mlp(3, 4, 2), comm_hook=halve)
    x = draw(4, 3)
    mean_square(dp(x[2 * world.rank :][:2])).backward()
    (mean_square(single(x)) / 2).backward()
    assert_gradients(dp, single)


@on_ranks(2)
def test_hooks_that_differ_are_refused(world: dl.Partition) -> None:
    hook = fp16_compress_hook if world.rank else None
    text = "DataParallel: rank 1 has comm_hook='fp16_compress_hook', rank 0 None"
    assert_refused(world, world, lambda: dl.DataParallel(mlp(3, 2), comm_hook=hook), text, ValueError)
