"""What a script changes about the module while it serves is what the other ranks compute with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from roots import Odd, assert_same, build, loss_of, real
from torch import nn

import distdl_lite as dl


class Changing(nn.Module):
    """Settings of every kind, and some that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.powers, self.calls = 1.0, [1, 2], 0
        self.linear, self.slope, self.drop = nn.Linear(3, 3), nn.LeakyReLU(0.1), nn.Dropout(0.0)
        self.more = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = [x.detach()]
        self.function = lambda: self.calls  # which cannot be pickled, and need not be
        y = self.drop(self.slope(self.linear(x))) * self.times
        return self.more(sum(y**power for power in self.powers))

    def halved(self, module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return args[0] / (2 * self.times)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.inner(x)


class Bent(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


class Elsewhere(nn.Tanh):
    """Pickled here, refused by the ranks that get it, at first."""

    refused = True

    def __setstate__(self, state: Any) -> None:
        if Elsewhere.refused:
            raise Odd("no room")
        super().__setstate__(state)


def doubled(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    return 2 * y


def first(module: nn.Module, args: Any, y: Any) -> Any:
    return y[0]


def sequences(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    return args[0][:, None]


def wrap(net: Any) -> None:
    net.linear = Around(net.linear)
    net.linear.inner.register_forward_hook(doubled)


def recur(net: Any) -> None:
    net.more = nn.LSTM(3, 2, batch_first=True)
    net.more.register_forward_pre_hook(sequences)
    net.more.register_forward_hook(first)


CHANGES: list[Callable[[Any], Any]] = [
    lambda net: setattr(net, "times", 3),
    lambda net: setattr(net, "times", -0.5),
    lambda net: setattr(net.slope, "negative_slope", 0.5),
    lambda net: setattr(net.drop, "p", 1.0),
    lambda net: setattr(net.drop, "p", 0.0),
    lambda net: net.powers.append(3),
    lambda net: net.linear.register_forward_hook(doubled),
    lambda net: net.linear._forward_hooks.clear(),
    lambda net: net.more.register_forward_pre_hook(net.halved),
    lambda net: setattr(net, "slope", nn.Sigmoid()),
    lambda net: setattr(net, "slope", net.more[1]),
    lambda net: setattr(net.linear, "__class__", Bent),
    wrap,
    lambda net: setattr(net, "more", nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))),
    lambda net: net.more.append(Around(nn.Linear(2, 2))),
    lambda net: net.more.__delitem__(1),
    recur,
    lambda net: setattr(net, "more", None) or setattr(net, "more", nn.Identity()),
    lambda net: net.__dict__.pop("function"),
]


def has_norm(net: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm1d) for module in net.modules())


@pytest.mark.check("A27")
@on_ranks(3, mpi=True)
def test_what_a_script_changes_about_the_module(world: dl.Partition) -> None:
    """Is what the other ranks compute with, in the block, in the next, and not sent where nothing has changed."""
    net = build(Changing)
    dp, x = dl.RootDataParallel(net, world), real(7, 3)
    twin = copy.deepcopy(net)
    for changes in (CHANGES[: len(CHANGES) // 2], CHANGES[len(CHANGES) // 2 :]):
        if world.rank == 0:
            net.times = twin.times = 2.0
        with dp.serve() as at_root:
            for change in changes if at_root else []:
                for module in (net, twin):
                    build(lambda: change(module))  # noqa: B023
                (y, z), expected = (dp(x), dp(x)), twin(x)
                assert_same((y, z), (expected, expected)) if not has_norm(net) else assert_same(y, z)
                loss_of(y).backward()
                x.grad = None
                assert dp._settings.changes(net) is None
    with dp.serve() as at_root:
        if at_root:
            dp.module = build(lambda: nn.Linear(3, 1))
            assert_same(dp(x), dp.module(x))
            handle = dp.module.register_forward_hook(lambda module, args, y: 2 * y)
            with pytest.raises(
                RuntimeError, match=r"the script has changed _forward_hooks, which .* it on all ranks before serve\(\)"
            ):
                dp(x)
            handle.remove()
            assert_same(dp(x), dp.module(x))
            dp.module.register_state_dict_post_hook(lambda *args: None)  # which no forward runs
            dp.module = build(lambda: nn.Sequential(nn.Linear(3, 1), Elsewhere()))
            for _ in range(2):
                with pytest.raises(Odd, match="replica 1, on rank 1: no room"):
                    dp(x)
            dp.module[1].kind = "room"
            expected = dp.module(x)
            with pytest.raises(Odd, match="replica 1, on rank 1: no room"):
                dp(x)
    Elsewhere.refused = False
    with dp.serve() as at_root:
        if at_root:
            assert_same(dp(x), expected)
