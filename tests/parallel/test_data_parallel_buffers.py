"""What becomes of buffers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from copies import draw, mean_square, twins
from ranks import on_ranks
from torch import nn
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.testing import count, spmd

FLOATS, INTEGERS = ["running_mean", "running_var"], ["num_batches_tracked"]


def normed(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options)).double()


@pytest.mark.check("A21")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mode", ["root", "mean", "none"])
def test_running_statistics(mode: str, ranks: int) -> None:
    """Those of BatchNorm, each step from the same start: the first rank's, the mean of all, or each its own."""

    def body(world: dl.Partition) -> None:
        dp, single = twins(normed(), sync_buffers=mode)
        singles = [single] if mode == "none" else []
        for step in range(3):
            x = [draw(4, 3, seed=10 * step + rank) for rank in range(ranks)]
            mean_square(dp(x[world.rank])).backward()
            if mode == "none":
                singles[0](x[world.rank])
            else:
                singles = [copy.deepcopy(single) for _ in range(ranks)]
                for model, batch in zip(singles, x, strict=True):
                    model(batch)
                for name in FLOATS:
                    found = [getattr(model[1], name) for model in singles]
                    getattr(single[1], name).copy_(found[0] if mode == "root" else sum(found) / ranks)
                single[1].num_batches_tracked += 1
            for name, buffer in single[1].named_buffers():
                torch.testing.assert_close(dict(dp.module[1].named_buffers())[name], buffer, rtol=0, atol=1e-10)
        if mode != "none":
            dp.check_replicas()

    spmd(ranks, body)


@pytest.mark.check("A21")
@on_ranks(2, mpi=True)
def test_mean_of_equal_blocks_is_the_whole_batch(world: dl.Partition) -> None:
    """The running mean of one process on the full batch; its variance lacks what the blocks' means differ by."""
    dp, single = twins(normed(), world, sync_buffers="mean")
    for step in range(3):
        x = draw(8, 3, seed=step)
        mean_square(dp(x[4 * world.rank :][:4])).backward()
        single(x)
    torch.testing.assert_close(dp.module[1].running_mean, single[1].running_mean, rtol=0, atol=1e-10)
    assert int(dp.module[1].num_batches_tracked) == 3


@pytest.mark.check("A21")
@on_ranks(2)
def test_only_buffers_that_have_changed_travel(world: dl.Partition) -> None:
    for mode, collectives in (("root", 2), ("mean", 2), ("none", 0)):
        dp, _ = twins(normed(), sync_buffers=mode)
        x = draw(4, 3, seed=world.rank)
        for training, expected in ((True, collectives), (False, 0), (True, collectives)):
            dp.train(training)
            loss = mean_square(dp(x))
            with count() as c:
                loss.backward()
            assert c.collectives == 1 + expected  # floats and integers apart
        if world.rank == 1:  # a change on one rank alone is enough
            dp.module[1].running_mean += 1
        dp.eval()
        with count() as c:
            mean_square(dp(x)).backward()
        assert c.collectives == 1 + collectives


@pytest.mark.check("A21")
@on_ranks(2)
def test_windows_leave_buffers_alone_until_the_sum(world: dl.Partition) -> None:
    dp, _ = twins(normed())
    x = draw(4, 3, seed=world.rank)
    with dp.no_sync():
        for _ in range(3):
            mean_square(dp(x)).backward()
    told = world.allgather_data(dp.module[1].running_mean.tolist())
    assert told[0] != told[1]
    mean_square(dp(x)).backward()
    dp.check_replicas()
    assert int(dp.module[1].num_batches_tracked) == 4


@pytest.mark.check("A21")
@on_ranks(2)
def test_buffers_of_every_dtype(world: dl.Partition) -> None:
    values = [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.int8, torch.int64, torch.bool]
    for mode in ("root", "mean"):
        model = nn.Linear(3, 2).double()
        for number, dtype in enumerate(values):
            model.register_buffer(f"b{number}", torch.full((3,), 2 * world.rank).to(dtype), persistent=number % 2 == 0)
        model.register_buffer("scalar", torch.tensor(float(2 * world.rank)))
        model.register_buffer("absent", None)
        dp = dl.DataParallel(model, init="none", sync_buffers=mode)
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())  # a change
        dp(draw(2, 3)).sum().backward()
        for buffer in model.buffers():
            averaged = mode == "mean" and (buffer.is_floating_point() or buffer.is_complex())
            assert (buffer == (1 if averaged else 0)).all()
        dp.check_replicas()


@on_ranks(2)
def test_a_rank_keeps_buffers_of_its_own(world: dl.Partition) -> None:
    """Also where the container sets up anew, for a copy or after a cast."""
    for init, make in itertools.product(("broadcast", "check"), (copy.deepcopy, lambda dp: dp.float())):
        dp = make(dl.DataParallel(nn.BatchNorm1d(3).double(), world, sync_buffers="none", init=init))
        dp.running_mean.fill_(world.rank)
        dp(draw(4, 3).to(dp.running_mean)).sum().backward()
        dp.eval()
        assert (dp.running_mean > 0.5).all() == bool(world.rank)


class Holder(nn.Module):
    """Its forward changes a buffer, or puts another one in its place."""

    def __init__(self, buffer: torch.Tensor, later: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.later = nn.Linear(1, 1), later
        self.register_buffer("inner", buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner = 2 * self.inner if self.later is None else self.later
        return self.layer(x)


def odd(kind: str, factor: int) -> torch.Tensor:
    numbers = factor * torch.tensor([1 + 2j, 3 - 1j])
    kinds = {"conj": numbers.conj(), "neg": numbers.conj().imag, "sparse": numbers.to_sparse()}
    return kinds[kind] if kind in kinds else torch.full((1,), factor).expand(3)


@on_ranks(2, mpi=True)
def test_views_that_are_conjugate_or_negative(world: dl.Partition) -> None:
    for kind, mode, init in itertools.product(("conj", "neg"), ("root", "mean"), ("broadcast", "check", "none")):
        module = Holder(odd(kind, 1 + 2 * world.rank if init != "check" else 1))
        dp = dl.DataParallel(module, world, sync_buffers=mode, init=init)
        if init != "none":
            dp.check_replicas()
            assert torch.equal(module.inner, odd(kind, 1))
        module.inner = odd(kind, 1 + 2 * world.rank)
        dp(torch.ones(1, 1)).sum().backward()
        assert torch.equal(module.inner, odd(kind, 2 if mode == "root" else 4))
        dp.check_replicas()
    for kind in ("conj", "neg"):
        module = Holder(odd(kind, 1 + 2 * world.rank))
        optimizer = dl.LocalSGD(torch.optim.SGD(module.parameters(), 0.1), 1, P=world, buffers=[module.inner])
        optimizer.synchronise()
        assert torch.equal(module.inner, odd(kind, 2))


@on_ranks(2)
def test_buffers_that_cannot_be_written_to_are_named(world: dl.Partition) -> None:
    text = "inner cannot take the values of other ranks: it is sparse or expanded"
    for kind, alone in itertools.product(("sparse", "expanded"), (False, True)):
        made = odd(kind, 1).to_dense().clone() if alone and world.rank else odd(kind, 1)
        assert_refused(world, world, lambda m=made: dl.DataParallel(Holder(m), world), f"DataParallel: {text}")
        dl.DataParallel(Holder(made, made), world, sync_buffers="none", init="none")(torch.ones(1, 1)).sum().backward()
        dp = dl.DataParallel(Holder(odd(kind, 1).to_dense().clone(), made), world)
        text_later = "DataParallel: forward has put a sparse or expanded tensor into a buffer's place"
        for _ in range(2):
            step = lambda dp=dp: dp(torch.ones(1, 1)).sum().backward()  # noqa: E731
            assert_refused(world, world, step, text_later, RuntimeError)
        module = Holder(made)
        optimizer = dl.DASO(torch.optim.SGD(module.parameters(), 0.1), 2, world, steps_per_epoch=2)
        make = lambda m=module, o=optimizer: dl.DataParallelMultiGPU(m, o)  # noqa: E731
        assert_refused(world, world, make, f"DataParallelMultiGPU: {text}")
    options = {"P": world, "buffers": [torch.ones(1), torch.ones(1).expand(2)]}
    make = lambda: dl.LocalSGD(torch.optim.SGD(module.parameters(), 0.1), 1, **options)  # noqa: E731
    assert_refused(world, world, make, f"LocalSGD: {text.replace('inner', 'buffer 1')}")
