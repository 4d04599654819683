"""`DataParallel` under every kind of graph: several forwards, checkpoints, penalties, adversaries."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from copies import assert_gradients, assert_parameters, draw, mean_square, mlp, twins
from ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl

OPTIONS = [{}, {"bucket_mb": 1e-4}, {"overlap": False}, {"average": "ranks"}]
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def compare(world: dl.Partition, make: Callable[[], nn.Module], loss: Loss, steps: int = 2, rows: int = 3, **options):
    """Backwards of a loss on even batches."""
    dp, single = twins(make(), world, **options)
    for step in range(steps):
        x = draw(rows * world.size, 3, seed=step)
        dp.zero_grad()
        single.zero_grad()
        loss(dp, x[rows * world.rank :][:rows]).backward()
        loss(single, x).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A16")
@on_ranks(2, mpi=True)
def test_forwards_and_backwards_in_any_number(world: dl.Partition) -> None:
    for options in OPTIONS:
        compare(world, lambda: mlp(3, 5, 3), lambda f, x: mean_square(f(x)) + mean_square(f(2 * x)), **options)
        compare(world, lambda: mlp(3, 5, 3), lambda f, x: mean_square(f(f(x))), **options)
        dp, single = twins(mlp(3, 5, 2), world, **options)
        for step in range(2):
            x = draw(6, 3, seed=step)
            for model, batch in ((dp, x[3 * world.rank :][:3]), (single, x)):
                model.zero_grad()
                first, second = mean_square(model(batch)), model(2 * batch).sin().mean()
                first.backward(retain_graph=step == 1)
                second.backward()
                if step == 1:
                    first.backward()
            assert_gradients(dp, single)


class Branches(nn.Module):
    """Two layers, of which a forward uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(3, 3, dtype=torch.float64) for name in "abc"})

    def forward(self, x: torch.Tensor, uses: str) -> torch.Tensor:
        for name in uses:
            x = torch.tanh(self.layers[name](x))
        return x


@pytest.mark.check("A16")
@on_ranks(2, mpi=True)
def test_all_forwards_of_a_backward_weigh_together(world: dl.Partition) -> None:
    """Also where the layers that one uses are through before backward reaches the other."""
    uses = [("a", "b", "c"), ("abc", "cab", "bca"), ("ab", "c", "a")]
    cases = itertools.product(OPTIONS, ("samples", "sum", "ranks"), ([(2, 2), (2, 2)], [(1, 2), (3, 6)]), uses, uses)
    for options, average, rows, *used in cases:
        dp, single = twins(Branches(), world, **{**options, "average": average})
        whole = [
            [draw(n, 3, seed=10 * r + i) for i, n in enumerate((*rows[r], *rows[r][:1]))] for r in range(world.size)
        ]
        loss = 0.0
        for x, names in zip(whole[world.rank], used[world.rank], strict=True):
            y = dp(x, names).square()
            loss = loss + (y.sum() if average == "sum" else y.mean())
        loss.backward()
        total = sum(len(x) for batches in whole for x in batches)
        for batches, names in zip(whole, used, strict=True):
            share = {"samples": sum(map(len, batches)) / total, "sum": 1 / total, "ranks": 1 / world.size}[average]
            for x, name in zip(batches, names, strict=True):
                y = single(x, name).square()
                (share * (y.sum() if average == "sum" else y.mean())).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A16")
@on_ranks(2)
def test_a_forward_that_comes_again_too_late_is_refused(world: dl.Partition) -> None:
    """Its graph was kept, and gone back through before."""
    dp, single = twins(Branches(), bucket_mb=1e-4, average="sum")
    x = draw(2, 3)
    dp(x, "abc").sum().backward()  # from now on the sums of c and b start before that of a
    dp.zero_grad()
    first = dp(x, "a").sum()
    first.backward(retain_graph=True)
    dp.zero_grad()
    second = dp(x, "bc").sum()
    with pytest.raises(RuntimeError, match=r"reached another forward after sums had started: .*overlap=False"):
        (first + second).backward()
    dp.zero_grad()
    dp(x, "abc").sum().backward()
    (single(x, "abc").sum() / 2).backward()
    assert_gradients(dp, single)


class Normed(nn.Sequential):
    """A network with BatchNorm."""

    def __init__(self, inner: int, outer: int) -> None:
        torch.manual_seed(inner)
        super().__init__(nn.Linear(3, inner), nn.BatchNorm1d(inner), nn.ReLU(), nn.Linear(inner, outer))
        self.double()


@pytest.mark.check("A16")
@on_ranks(2, mpi=True)
def test_adversaries_with_batch_norm(world: dl.Partition) -> None:
    """Batches are the same on both ranks, so that local statistics are those of one process."""
    for options in OPTIONS:
        makers, judges = twins(Normed(4, 3), world, **options), twins(Normed(5, 1), world, **options)
        for step in range(3):
            real, noise = draw(6, 3, seed=step), draw(6, 3, seed=9 + step)
            for maker, judge in zip(makers, judges, strict=True):
                fake = maker(noise)
                judge.zero_grad()
                (judge(real).sigmoid().mean() - judge(fake.detach()).sigmoid().mean()).backward()
                maker.zero_grad()
                judge(fake).sigmoid().mean().backward()  # through both
            assert_gradients(makers[0], makers[1])
            assert_gradients(judges[0], judges[1])
            assert_parameters(judges[0], judges[1], 1e-12)
            judges[0].check_replicas()


class Checkpointed(nn.Module):
    """A layer used under a checkpoint, some times."""

    def __init__(self, reentrant: bool, times: int = 1) -> None:
        super().__init__()
        self.first, self.inner, self.last = mlp(3, 3), mlp(3, 4, 3), mlp(3, 2)
        self.reentrant, self.times = reentrant, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.check("A17")
@on_ranks(2, mpi=True)
def test_checkpoints(world: dl.Partition) -> None:
    def loss(f: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return mean_square(f(x))

    for options in OPTIONS:
        compare(world, lambda: Checkpointed(False, 1), loss, **options)
        compare(world, lambda: Checkpointed(False, 2), loss, **options)
        compare(world, lambda: Checkpointed(True, 1), loss, **options)
        for reentrant in (False, True):  # the container itself, of which backward makes the forward
            compare(
                world,
                lambda: mlp(3, 4, 2),
                lambda f, x, r=reentrant: mean_square(checkpoint(f, x.requires_grad_(), use_reentrant=r)),
                **options,
            )
    for options in ({}, {"overlap": False}):
        compare(world, lambda: Checkpointed(True, 3), loss, **options)


@pytest.mark.check("A17")
@on_ranks(2, mpi=True)
def test_reentrant_checkpoints_of_a_layer_used_twice_need_the_end_of_backward(world: dl.Partition) -> None:
    dp, single = twins(Checkpointed(True, 2), world, engine="thread")
    x = draw(4, 3)
    text = r"the gradient of inner\.\d\.\w+ came twice in one backward, as under reentrant checkpoints: .*overlap=False"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            mean_square(dp(x[2 * world.rank :][:2])).backward()
    dp.zero_grad()
    dp.module.times = single.times = 1
    mean_square(dp(x[2 * world.rank :][:2])).backward()
    mean_square(single(x)).backward()
    assert_gradients(dp, single)


def penalty(f: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """That of Wasserstein adversaries (Gulrajani et al. 2017)."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return (g.norm(2, dim=1) - 1).square().mean()


@pytest.mark.check("A18")
@on_ranks(2, mpi=True)
def test_gradient_penalties(world: dl.Partition) -> None:
    for options in OPTIONS:
        compare(world, lambda: mlp(3, 5, 2), penalty, **options)
        compare(world, lambda: mlp(3, 5, 2), lambda f, x: mean_square(f(x)) + penalty(f, x), **options)
        compare(world, lambda: mlp(3, 5, 2), lambda f, x: penalty(f, x) + mean_square(f(x)), **options)


@pytest.mark.check("A18")
@on_ranks(2)
def test_uneven_penalties_alternate_with_losses(world: dl.Partition) -> None:
    sizes = [4, 1]
    dp, single = twins(mlp(3, 5, 2))
    for step in range(4):
        x = draw(5, 3, seed=step)
        dp.zero_grad()
        single.zero_grad()
        for loss in (penalty, lambda f, x: mean_square(f(x)))[step % 2 :]:
            loss(dp, x.split(sizes)[world.rank]).backward()
            loss(single, x).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A18")
@on_ranks(2, mpi=True)
def test_gradients_that_are_returned_are_local(world: dl.Partition) -> None:
    """`autograd.grad` sums nothing, so that one rank alone may call it."""
    dp, single = twins(mlp(3, 4, 2), world)
    x = draw(4, 3)
    mine = x[2 * world.rank :][:2].requires_grad_()
    if world.rank == 0:
        (g,) = torch.autograd.grad(mean_square(dp(mine)), mine)
        assert torch.equal(g, torch.autograd.grad(mean_square(single(mine)), mine)[0])
        torch.autograd.grad(mean_square(dp(mine)), list(dp.parameters()))
        mean_square(dp(mine)).backward(inputs=[mine])
        dp(mine)  # no backward at all
    mean_square(dp(mine)).backward()
    mean_square(single(x)).backward()
    assert_gradients(dp, single)
