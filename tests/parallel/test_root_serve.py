"""A script for one process, in `serve()`: it trains as the plain module, changes it as it likes, and lets graphs go."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import on_ranks
from roots import F64, Odd, assert_same, build, mlp, real
from torch import nn

import distdl_lite as dl


def script(net: nn.Module, model: nn.Module, steps: int = 4) -> list[float]:
    """Written for one process."""
    torch.manual_seed(5)
    x, target = torch.randn(10, 3, dtype=F64), torch.randn(10, 2, dtype=F64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    losses = []
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        for rows in (slice(0, 6), slice(6, 10 - step)):
            nn.functional.mse_loss(model(x[rows]), target[rows]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(x), target).item())
    return losses


@pytest.mark.check("A27")
@on_ranks(3, mpi=True)
def test_a_script_for_one_process(world: dl.Partition) -> None:
    net = build(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)))
    plain = copy.deepcopy(net)
    dp = dl.RootDataParallel(net, world)
    with dp.serve() as at_root:
        if at_root:
            losses = script(net, dp)
    if world.rank == 0:
        torch.testing.assert_close(losses, script(plain, plain), rtol=1e-11, atol=0)
        assert losses[-1] < losses[0]


@on_ranks(2, mpi=True)
def test_serving(world: dl.Partition) -> None:
    """Two containers, errors on the way, graphs kept and let go, blocks inside blocks, and an error that ends it."""
    net = build(lambda: nn.Linear(2, 2))
    one, two, x = dl.RootDataParallel(net, world), dl.RootDataParallel(build(mlp), world), real(4, 2)
    two.module[0] = nn.Linear(2, 5, dtype=F64)
    with one.serve() as at_root:
        if at_root:
            y = one(x)
            twice = two(y)
            with pytest.raises(RuntimeError, match="replica 0"):
                one(x.float())
            with pytest.raises(RuntimeError, match="is at construct of container 0, but rank 1 serves containers"):
                dl.RootDataParallel(net, world)
            twice.sum().backward(retain_graph=True)
            first = x.grad.clone()
            twice.sum().backward()
            assert_same(x.grad, 2 * first)
            with pytest.raises(RuntimeError, match="second time"):
                twice.sum().backward()
            with two.serve():
                one(x).sum().backward()
            kept = [one(x) for _ in range(5)]
            del kept, y, twice
            one(x), two(x)
    assert not one._served
    for _ in range(2):
        with two.serve() as at_root:
            assert at_root == (world.rank == 0)
    y = None

    def fails() -> None:
        nonlocal y
        with one.serve() as at_root:
            if at_root:
                y = one(x)
                raise Odd

    if world.rank == 0:
        with pytest.raises(Odd):
            fails()
    else:
        fails()
    if world.rank == 0:
        with one.serve(), pytest.raises(RuntimeError, match="is at backward of forward"):
            y.sum().backward()
    else:
        with one.serve():
            pass


@on_ranks(2, mpi=True)
def test_what_a_script_may_change_about_the_module(world: dl.Partition) -> None:
    """Its weights and modes; other layers are refused on all ranks, as long as they are there."""
    net = build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0), nn.Tanh()))
    dp, x = dl.RootDataParallel(net, world), real(4, 2)
    changes = [
        (lambda: setattr(net[1], "p", 0.5), "Dropout(p=1.0, inplace=False), not Dropout(p=0.5, inplace=False)"),
        (lambda: net.append(nn.ReLU()), "layer 3 missing, not ReLU()"),
        (lambda: setattr(net, "2", nn.Sigmoid()), "layer 2 Tanh(), not Sigmoid()"),
    ]
    with dp.serve() as at_root:
        if at_root:
            for change in (
                net.eval,
                net.train,
                lambda: net[1].eval(),
                lambda: net[0].bias.requires_grad_(False),
                lambda: setattr(net[0], "weight", nn.Parameter(torch.ones(2, 2, dtype=F64))),
            ):
                change()
                y, expected = dp(x), net(x)
                assert_same(y, expected)
                found = torch.autograd.grad(y.sum(), net[0].weight)
                assert_same(found, torch.autograd.grad(expected.sum(), net[0].weight))
            layers = dict(net._modules)
            for change, text in changes:
                change()
                for _ in range(2):
                    with pytest.raises(ValueError, match=r"replica 1, on rank 1: .* before serve\(\)") as raised:
                        dp(x)
                    assert text in str(raised.value)
                net._modules, net[1].p = dict(layers), 1.0
                assert_same(dp(x), net(x))


@on_ranks(2)
def test_served_graphs_are_let_go(world: dl.Partition) -> None:
    net = build(lambda: nn.Linear(2, 2))
    dp, x, most = dl.RootDataParallel(net, world), real(4, 2), []
    if world.rank == 1:
        answer = dp._answer
        dp._answer = lambda order: (answer(order), most.append(len(dp._served)))
    with dp.serve() as at_root:
        for _ in range(20 * at_root):
            y = dp(x)
            if len(y) == 3:
                y.sum().backward()
    assert at_root or max(most) <= 2
