"""The root's weights: they travel when they change and not else, the ranks' modules must fit them, copies keep them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import torch
from ranks import on_ranks
from roots import F64, assert_same, build, call, mlp, real, told
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import count


@on_ranks(2, mpi=True)
def test_weights_travel_when_they_change(world: dl.Partition) -> None:
    net = build(mlp)  # parameters, statistics, and a counter of batches
    dp = dl.RootDataParallel(net, world)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    x = real(6, 3, grad=False)

    def sent(backward: bool = False) -> int:
        with count() as counted:
            y = call(dp, world, x)
            if backward:
                y.sum().backward()
        found = counted.by_label.get("RootDataParallel weights")
        return found.messages if found else 0

    assert sent(backward=True) == 3 + 1  # three groups, and one sum
    assert sent(backward=True) == 2 + 1  # statistics have changed, in a forward that was for training
    dp.eval()
    assert sent() == 2
    with torch.no_grad():
        assert [sent(), sent(), sent()] == [0, 0, 0]
    dp.train(world.rank == 1)  # the root's mode counts
    assert sent() == 0
    changes = [
        optimizer.step,  # which leaves the version counters as they are
        lambda: net[0].weight.data.add_(1),
        lambda: setattr(net[0], "bias", nn.Parameter(torch.ones(5, dtype=F64))),
        lambda: net[0].weight.data[0, 0].fill_(torch.nan),
        lambda: net[2].running_mean.fill_(-0.0),
        lambda: net[2].running_mean.fill_(0.0),
    ]
    for change in changes:
        if world.rank == 0:
            change()
        assert sent() == 1
        assert sent() == 0
        if world.rank == 0:
            expected = copy.deepcopy(net).eval()(x)
            assert torch.equal(call(dp, world, x).isnan(), expected.isnan())
        else:
            call(dp, world)
    if world.rank == 0:
        net[0].requires_grad_(False)
    assert sent() == 3
    if world.rank == 0:
        net.float()
        x = x.float()
    assert sent() == 3
    if world.rank == 1:
        assert all(not p.is_floating_point() or p.dtype == torch.float32 for p in net.state_dict().values())


@on_ranks(2)
def test_state_and_life(world: dl.Partition) -> None:
    net = build(mlp) if world.rank == 0 else build(mlp).to("meta")
    dp = dl.RootDataParallel(net, world)
    twin = torch.nn.DataParallel(copy.deepcopy(net))
    assert list(dp.state_dict()) == list(twin.state_dict())
    assert repr(dp).startswith(
        "RootDataParallel(\n  dim=0, device_ids=[0, 1], output_device=0\n  (module): Sequential("
    )
    x = real(6, 3)
    first = call(dp.eval(), world, x)
    for other in (copy.deepcopy(dp), pickle.loads(pickle.dumps(dp))):
        found = call(other, world, x)
        if world.rank == 0:
            assert_same(found, first)
            assert_same(found, net(x))
    assert all(not p.is_meta for p in net.parameters())  # the copy of the root's
    assert list(dp.state_dict()) == list(twin.state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


@on_ranks(3)
def test_modules_that_differ(world: dl.Partition) -> None:
    for other, text in [
        (nn.Linear(2, 3), "the module is not the root's: bias (3,), not (2,); weight (3, 2), not (2, 2)"),
        (nn.Linear(2, 2, bias=False), "bias missing, not (2,)"),
        (Tied(), "a.weight (2, 2), not missing; b.weight (2, 2), not missing; bias missing, not (2,)"),
    ]:
        dp = dl.RootDataParallel(other if world.rank == 1 else nn.Linear(2, 2), world)
        for rows in (4, 1):  # also where it has nothing to do
            kind, found = told(world, call, dp, world, torch.ones(rows, 2))
            assert (kind, text in found, "replica 1, on rank 1" in found) == (ValueError, True, True), found
    tied = Tied()
    if world.rank == 1:
        tied.to("meta")
        tied.b.weight = nn.Parameter(torch.empty(2, 2))
    dp = dl.RootDataParallel(tied, world)
    call(dp, world, torch.ones(4, 2)).sum().backward()
    assert tied.b.weight is tied.a.weight
    lazy = dl.RootDataParallel(nn.LazyLinear(2), world)
    assert told(world, call, lazy, world, torch.ones(4, 2))[0] in (ValueError, RuntimeError, TypeError)


class Frozen(nn.Module):
    """It names what it trains alone, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x))

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return ((name, p) for name, p in super().named_parameters(prefix, recurse) if p.requires_grad)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 1)
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.first(x).expand(-1, 2))


@on_ranks(2)
def test_weights_that_have_no_name_or_two(world: dl.Partition) -> None:
    torch.manual_seed(world.rank)  # the root's weights count
    dp = dl.RootDataParallel(Frozen())
    with dp.serve() as is_root:
        if is_root:
            torch.testing.assert_close(dp(torch.ones(4, 2)), dp.module(torch.ones(4, 2)))
    model = Twice()
    dp = dl.RootDataParallel(copy.deepcopy(model))
    with dp.serve() as is_root:
        for net, inner in ((model, model), (dp, dp.module)) if is_root else ():
            weight, optimizer = inner.first.weight, torch.optim.SGD(inner.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.ones(4, 2)).square().mean().backward()
                optimizer.step()
            assert inner.first.weight is inner.again.weight is weight
    if is_root:
        for mine, wanted in zip(dp.module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, wanted)
