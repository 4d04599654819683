"""Parameters of every dtype, shape and place, and tensors of every memory format."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from copies import assert_gradients, draw, mean_square, mlp, twins
from ranks import on_ranks
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import count
from distdl_lite.transport.sums import ENGINES

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


class Mixed(nn.Module):
    """A weight of each dtype, the loss of which is a mean over rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3, 4).to(dtype)) for dtype in DTYPES])
        self.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        ys = [(x.to(w.dtype) @ w).abs().square().sum(1).double() for w in self.weights]
        return sum(ys) + self.conv(image.contiguous(memory_format=torch.channels_last)).square().sum((1, 2, 3)).double()


@pytest.mark.check("A19")
@on_ranks(2, mpi=True)
def test_dtypes_in_one_model(world: dl.Partition) -> None:
    for options, sizes in itertools.product(
        [{}, {"bucket_mb": 1e-4}, {"overlap": False}, *[{"engine": engine} for engine in ENGINES]], ([2, 2], [3, 1])
    ):
        dp, single = twins(Mixed(), world, **options)
        for step in range(2):
            x, image = draw(4, 3, seed=step, dtype=torch.float32), draw(4, 2, 5, 5, seed=step, dtype=torch.float32)
            dp.zero_grad()
            single.zero_grad()
            dp(*(t.split(sizes)[world.rank] for t in (x, image))).mean().backward()
            single(x, image).mean().backward()
            for (name, actual), expected in zip(dp.named_parameters(), single.parameters(), strict=True):
                assert actual.grad.dtype is expected.dtype
                wide = torch.complex128 if actual.is_complex() else torch.float64
                error = (actual.grad.to(wide) - expected.grad.to(wide)).abs().max()
                size = expected.grad.to(wide).abs().max()
                assert error <= 4 * torch.finfo(actual.dtype).eps * size, name


@pytest.mark.check("A19")
@on_ranks(2)
def test_many_rows_of_half_precision_do_not_overflow(world: dl.Partition) -> None:
    """Gradients are weighed and added in 32 bits."""
    model = nn.Linear(1, 1, bias=False).half()
    dp, _ = twins(model)
    dp.loss_weight = 100_000
    (model.weight.new_ones(1) * dp(torch.ones(1, 1).half()) * 30_000).sum().backward()
    assert model.weight.grad.item() == 30_000


class Odd(nn.Module):
    """Tied weights, parameters of the root, a scalar and two without elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.root = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.nothing = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))
        self.nowhere = nn.Parameter(torch.empty(0, dtype=torch.float64))
        self.net = mlp(3, 3, 3)
        self.net[2].weight = self.net[0].weight
        self.bias = self.net[0].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * self.root) * self.scale + self.bias + (x @ self.nothing.T).sum()


@pytest.mark.check("A14")
@on_ranks(2, mpi=True)
def test_odd_parameters(world: dl.Partition) -> None:
    for options in ({}, {"bucket_mb": 1e-5}, {"overlap": False}):
        dp, single = twins(Odd(), world, **options)
        for step in range(3):
            x = draw(4, 3, seed=step)
            dp.zero_grad()
            single.zero_grad()
            mean_square(dp(x[2 * world.rank :][:2])).backward()
            mean_square(single(x)).backward()
            assert_gradients(dp, single)


@pytest.mark.check("A14")
@on_ranks(2)
def test_a_module_without_parameters(world: dl.Partition) -> None:
    for init in ("broadcast", "check", "none"):
        dp = dl.DataParallel(nn.Tanh(), init=init)
        x = draw(2, 3).requires_grad_()
        dp(x).sum().backward()
        torch.testing.assert_close(x.grad, 1 - x.tanh().square())
        dp.check_replicas()


@pytest.mark.check("A14")
@on_ranks(2)
def test_the_module_may_change(world: dl.Partition) -> None:
    """New parameters, other dtypes, tensors put in place by `load_state_dict`, weights in other terms."""
    dp, single = twins(mlp(3, 4, 2).float(), bucket_mb=1e-4)

    def check() -> None:
        x = draw(4, 3).to(next(single.parameters()))
        dp.zero_grad()
        single.zero_grad()
        mean_square(dp(x[2 * world.rank :][:2])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)

    changes = [
        lambda m: m.double(),
        lambda m: m.load_state_dict(copy.deepcopy(single.state_dict()), assign=True),
        lambda m: torch.nn.utils.parametrizations.weight_norm(m[0]),
        lambda m: setattr(m[2], "bias", None),
        lambda m: m.append(nn.Linear(2, 2, dtype=torch.float64, bias=False)),
    ]
    check()
    for change in changes:
        for model in (dp.module, single):
            torch.manual_seed(1)
            change(model)
        check()


class Averaging(nn.Module):
    """Puts a new buffer in place of the old at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 2)
        self.register_buffer("average", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return y


@pytest.mark.check("A21")
@on_ranks(2)
def test_buffers_that_forward_replaces(world: dl.Partition) -> None:
    for mode in ("root", "mean"):
        dp, single = twins(Averaging(), sync_buffers=mode, average="sum")
        x = draw(8, 3)
        with count() as c:
            with dp.no_sync():
                dp(x[2 * world.rank :][:2]).square().sum().backward()
            dp(x[4 + 2 * world.rank :][:2]).square().sum().backward()
        assert c.collectives == 2
        parts = {"root": (x[:2], x[4:6]), "mean": (x[:4], x[4:])}[mode]
        for part in parts:
            single(part)
        torch.testing.assert_close(dp.average, single.average, rtol=0, atol=1e-12)
        (single(x).square().sum() / 8).backward()
        assert_gradients(dp, single)
