"""`DataParallel` around modules that take and return tensors inside anything."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from copies import assert_gradients, draw, mean_square, mlp, twins
from ranks import on_ranks
from torch import nn

import distdl_lite as dl


class Pair(NamedTuple):
    y: torch.Tensor
    other: Any


@dataclass
class Result:
    y: Any
    other: Any


class Ordered(OrderedDict[str, Any]):
    """Read by name, as the outputs of transformers are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Slots:
    """An object that shows nobody what is inside."""

    __slots__ = ("y",)


def hidden(y: torch.Tensor) -> Slots:
    made = Slots()
    made.y = y
    return made


WRAPS: list[tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = [
    (lambda y: y, lambda out: out),
    (lambda y: {"a": [y, None, "text"]}, lambda out: out["a"][0]),
    (lambda y: Pair(y, 3), lambda out: out.y),
    (lambda y: Result({"deep": (1, Result(y, y.detach()))}, None), lambda out: out.y["deep"][1].y),
    (lambda y: Ordered(y=y, loss=None), lambda out: out.y),
    (lambda y: (y, Result(y, None)), lambda out: out[0] + out[1].y),
    (hidden, lambda out: out.y),
]


class Wrapped(nn.Module):
    """Takes keyword arguments alone, and returns its output in something, beside a parameter."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.scale = mlp(3, 4, 2), nn.Parameter(torch.ones((), dtype=torch.float64))
        self.wrap = wrap

    def forward(self, *, batch: Any) -> Any:
        return self.wrap(self.net(batch["x"]) * self.scale), self.scale


@pytest.mark.check("A16")
@on_ranks(2)
def test_outputs_of_any_kind(world: dl.Partition) -> None:
    """Also where a forward is never gone back through, and a parameter is among the outputs."""
    sizes = [4, 1]
    for (wrap, unwrap), inputs in itertools.product(WRAPS, (dict, Ordered)):
        dp, single = twins(Wrapped(wrap))
        for step in range(3):
            x = draw(5, 3, seed=step)
            dp.zero_grad()
            single.zero_grad()
            if wrap is not hidden:
                dp(batch=inputs(flag=True, x=x))
            out, scale = dp(batch=inputs(flag=True, x=x.split(sizes)[world.rank]))
            (mean_square(unwrap(out)) + scale.square()).backward()
            out, scale = single(batch=inputs(flag=True, x=x))
            (mean_square(unwrap(out)) + scale.square()).backward()
            assert_gradients(dp, single)
        assert not dp.scale._backward_hooks


@pytest.mark.check("A16")
@on_ranks(2)
def test_another_dim_holds_the_batch(world: dl.Partition) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.GRU(3, 4, dtype=torch.float64)

        def forward(self, lengths: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.cell(x)[0]

    for dim in (1, -2):
        dp, single = twins(Recurrent(), dim=dim)
        x = draw(6, 5, 3)
        mean_square(dp(torch.tensor([5]), x.split([1, 4], 1)[world.rank])).backward()
        mean_square(single(torch.tensor([5]), x)).backward()
        assert_gradients(dp, single)


@on_ranks(3, mpi=True)
def test_outputs_that_depend_on_no_parameter(world: dl.Partition) -> None:
    """On one rank or all: in training each rank can go back through them."""

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp(3, 3)

        def forward(self, x: torch.Tensor, uses: bool) -> dict[str, torch.Tensor]:
            return {"y": self.layer(x) if uses else 2 * x, "place": torch.arange(len(x))}

    x = draw(6, 3)
    mine = x[2 * world.rank :][:2]
    for options, idle in itertools.product(({}, {"engine": "thread", "bucket_mb": 1e-5}), ([1], [0, 2], [0, 1, 2])):
        dp, single = twins(Choice(), world, **options)
        output = dp(mine, world.rank not in idle)
        assert not output["place"].requires_grad
        mean_square(output["y"]).backward()
        loss = sum(mean_square(single(x[2 * r :][:2], True)["y"]) / 3 for r in range(3) if r not in idle)
        if len(idle) < 3:
            loss.backward()
        assert_gradients(dp, single)
        assert not dp.eval()(mine, False)["y"].requires_grad
        dp.train().requires_grad_(False)
        assert not dp(mine, False)["y"].requires_grad


class Skipping(nn.Module):
    """A head that may be skipped, behind a frozen encoder in inference mode or behind nothing."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.shift = encoder.requires_grad_(False), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, skip: bool) -> torch.Tensor:
        with torch.inference_mode(isinstance(self.encoder, nn.Linear)):
            h = self.encoder(x)
        return h if skip else h.clone() + self.shift


@on_ranks(2)
def test_outputs_without_graph_are_copies(world: dl.Partition) -> None:
    """They go back as often as those of others, and do not see what becomes of the input."""
    for encoder in (nn.Linear(2, 2), nn.Identity()):
        net, x = dl.DataParallel(Skipping(encoder)), torch.ones(2, 2)
        loss = (net(x, world.rank == 1) * 2).sum()
        x.fill_(3.0)
        loss.backward(retain_graph=world.rank == 0)
        assert net.module.shift.grad.tolist() == [2.0, 2.0]
    net, x = dl.DataParallel(Skipping(nn.Identity())), torch.ones(2, 2)
    out = net(x, world.rank == 1)
    loss = (out * out).sum()
    x.fill_(3.0)
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert net.module.shift.grad.tolist() == [8.0, 8.0]
