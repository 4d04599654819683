"""DataParallel around layers that sum over the batch themselves: the mean is still that of the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn

ROWS = [3, 0, 4, 2]


def net() -> torch.nn.Module:
    torch.manual_seed(2)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(36, 3),
        torch.nn.BatchNorm1d(3),
    ).double()  # fmt: skip


def shards(world: dl.Partition, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch, and this rank's rows."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(ROWS[: world.size]), 2, 5, 5, dtype=torch.float64, generator=generator)
    start = sum(ROWS[: world.rank])
    return x, x[start : start + ROWS[world.rank]]


def assert_same(ours: torch.nn.Module, serial: torch.nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-12, msg=name)
    for (name, a), b in zip(ours.named_buffers(), serial.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.check("A21")
@on_ranks(4, mpi=True)
def test_sync_batch_norm_with_uneven_and_empty_batches(world: dl.Partition) -> None:
    for size in (2, 3, 4):
        P = world.create_partition_inclusive(range(size))
        if not P.active:
            continue
        for average in ("samples", "sum"):
            serial = net()
            module = dl.SyncBatchNorm.convert(copy.deepcopy(serial), P)
            dp = dl.DataParallel(module, P, average=average, sync_buffers="none")
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (module, serial)]
            for step in range(3):
                x, mine = shards(P, step)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss = dp(mine).square()
                (loss.mean(1).mean() if average == "samples" else loss.mean(1).sum()).backward()
                serial(x).square().mean().backward()
                assert_same(module, serial)
                for optimizer in optimizers:
                    optimizer.step()


@on_ranks(3)
def test_accumulation_weighs_each_backward(world: dl.Partition) -> None:
    serial = net()
    module = dl.SyncBatchNorm.convert(copy.deepcopy(serial), world)
    dp = dl.DataParallel(module, world, sync_buffers="none")
    for step in range(3):
        x, mine = shards(world, step)
        if step < 2:
            with dp.no_sync():
                dp(mine).square().mean().backward()
        else:
            dp(mine).square().mean().backward()
        serial(x).square().mean().backward()
    assert_same(module, serial)


@on_ranks(2)
def test_refusals(world: dl.Partition) -> None:
    module = dl.SyncBatchNorm.convert(net(), world)
    dp = dl.DataParallel(module, world, average="sum")
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    y = dp(x)
    with dp.no_sync(), pytest.raises(RuntimeError, match=r'average="sum" allows no no_sync'):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="join is not for it"), dp.join():
        pass
    dp = dl.DataParallel(dl.SyncBatchNorm.convert(net(), world), world)  # gradients have their weights before the sum
    dp(x).sum().backward()
    with dp.no_sync(), pytest.raises(RuntimeError, match=r"grad holds a sum over ranks"):
        dp(x).sum().backward()


@on_ranks(4)
def test_a_global_loss_and_distributed_layers_beside_plain_ones(world: dl.Partition) -> None:
    """A convolution cut by batch and space, which sums its own gradients, and a scale that does not."""
    P = world.grid((2, 1, 2, 1))
    torch.manual_seed(4)
    serial = torch.nn.Conv2d(2, 3, 3, padding=1).double()
    torch.manual_seed(4)
    conv = dnn.DistributedConv2d(P, 2, 3, 3, padding=1).double()

    class Scaled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.full((1, 3, 1, 1), 2.0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    ours, theirs = Scaled(conv), Scaled(serial)
    dp = dl.DataParallel(ours, P, average="none")
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = dp(x[P.block(x.shape)])
    dnn.DistributedMSELoss(P)(y, torch.zeros_like(y)).backward()
    theirs(x).square().mean().backward()
    torch.testing.assert_close(conv.weight.grad, serial.weight.grad, rtol=1e-12, atol=1e-12)
    # along the space axis the scale's parts are the caller's to add up: each rank of a row of the grid has its own
    total = P.world_transport.all_reduce(P.team, ours.scale.grad.clone()) / 2
    torch.testing.assert_close(total, theirs.scale.grad, rtol=1e-12, atol=1e-12)
