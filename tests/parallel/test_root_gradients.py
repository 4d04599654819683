"""Backward through the container: of weights that not all ranks use, twice, of a gradient, into hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from roots import F64, assert_same, build, call, mlp, real, told
from torch import nn

import distdl_lite as dl


@on_ranks(3, mpi=True)
def test_unused(world: dl.Partition) -> None:
    """Weights that no rank used get no gradient, those that some did the whole one."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.ones((), dtype=F64)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            return x * (self.b if x[0] > 1 else self.c), x.detach(), x * self.c

    net = Some()
    dp = dl.RootDataParallel(net, world)
    if world.rank == 0:
        x = torch.arange(3, dtype=F64).requires_grad_()
        y, detached, other = dp(x)
        assert (y.requires_grad, detached.requires_grad) == (True, False)
        y.sum().backward()
        assert (net.a.grad, net.b.grad.item(), net.c.grad.item(), x.grad.tolist()) == (None, 2, 1, [1, 1, 1])
        y, _, other = dp(x)
        assert torch.autograd.grad(other.sum(), [net.c, net.a, net.b], allow_unused=True) == (3, None, None)
        y, _, other = dp(x)  # to no weight that a rank elsewhere holds
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 1]
        y, _, other = dp(x)
        y.sum().backward(retain_graph=True)
        other.sum().backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            y.sum().backward()
        y, _, other = dp(x.double())
        (g,) = torch.autograd.grad((y * y).sum(), net.c, create_graph=True)
        with pytest.raises(RuntimeError, match="a gradient of a gradient is not supported"):
            g.backward()
    else:
        for _ in range(3):
            dp().sum().backward()
        y = dp()
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            y.sum().backward()
        y = dp()
        y.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a gradient of a gradient is not supported"):
            y.sum().backward()


@pytest.mark.check("A27")
@on_ranks(2, mpi=True)
def test_a_gradient_of_a_gradient_is_refused(world: dl.Partition) -> None:
    """Also where what comes back from the loss requires no gradient, so that torch sees nothing to differentiate."""
    dp, x = dl.RootDataParallel(build(mlp), world), real(5, 3)

    def refused(y: torch.Tensor, of: torch.Tensor) -> tuple[type, str]:
        (g,) = torch.autograd.grad(y.sum(), of, create_graph=True)
        return told(world, (y.square().mean() + g.square().mean()).backward)

    expected = (
        RuntimeError,
        "RootDataParallel: a gradient of a gradient is not supported: its graph is on several ranks",
    )
    of = x if world.rank == 0 else real(0)
    assert refused(dp(of), of) == expected
    with dp.serve() as at_root:
        if at_root:
            y = dp(x)
            with pytest.raises(RuntimeError, match="a gradient of a gradient is not supported"):
                torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()
            z = dp(x) * (scale := real())
            (g,) = torch.autograd.grad(z.square().sum(), scale, create_graph=True)  # not through the container
            (expected,) = torch.autograd.grad(4 * (dp(x) ** 2).sum() * scale.detach(), x)
            assert_same(torch.autograd.grad(2 * g, x)[0], expected)


@on_ranks(2)
def test_hooks_see_the_whole_gradient_once(world: dl.Partition) -> None:
    net = build(lambda: nn.Linear(2, 1))
    dp, seen = dl.RootDataParallel(net, world), []
    net.weight.register_hook(lambda g: seen.append(g.clone()))
    y = call(dp, world, torch.ones(5, 2, dtype=F64))
    y.sum().backward()
    if world.rank == 0:
        assert [g.tolist() for g in seen] == [[[5, 5]]]
        with torch.no_grad():
            y = dp(torch.ones(4, 2, dtype=F64))
            net.weight += 1
            assert not y.requires_grad
        y = dp(torch.ones(4, 2, dtype=F64, requires_grad=True))
        with torch.no_grad():
            net.weight += 1
        with pytest.raises(RuntimeError, match=r"replica 0, on rank 0: one of the variables .* modified by an inplace"):
            y.sum().backward()
    else:
        assert not dp().requires_grad
        with pytest.raises(RuntimeError, match=r"replica 0, on rank 0: one of the variables .* modified by an inplace"):
            dp().sum().backward()


class Constant(nn.Module):
    """A graph of its own, that leads to nothing of the root's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones(1, requires_grad=True)


@on_ranks(2)
def test_a_graph_that_leads_nowhere(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Constant(), world)
    call(dp, world, torch.ones(3)).sum().backward()
    with dp.serve() as at_root:
        if at_root:
            dp(torch.ones(3)).sum().backward()
