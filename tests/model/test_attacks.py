"""Networks that are called wrongly on one rank: all ranks are told the same, and the next call is right."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import distdl_lite as dl
from distdl_lite.model.capture import capture


class Scaled(nn.Module):
    """A convolution, dropout that does nothing in evaluation, and numbers that a record holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor, self.table = nn.Conv2d(2, 2, 3, padding=1), 2.0, torch.ones(2, 1, 1)

    def forward(self, x: torch.Tensor, a: Any = None, b: Any = None) -> torch.Tensor:
        y = self.factor * self.inner(x) * self.table
        y = y if a is None else y + a
        return y if b is None else y - b


def grid(world: dl.Partition, shape: tuple[int, ...] = (1, 1, 2, 1)) -> tuple[dl.Partition, torch.Tensor, torch.Tensor]:
    """A grid, a whole input and this rank's block."""
    P, x = world.grid(shape), torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    return P, x, P.cut(x)


def eval_inside(net: Any) -> None:
    net.inner.eval()


def freeze(net: Any) -> None:
    net.inner.weight.requires_grad_(False)


def set_factor(net: Any) -> None:
    net.model.factor = 3.0


def set_table(net: Any) -> None:
    net.model.table = torch.zeros(2, 1, 1)


@on_ranks(2, mpi=True)
def test_one_rank_does_otherwise(world: dl.Partition) -> None:
    """What a call's operations follow from is the same on all ranks, or an error on all."""
    P, x, mine = grid(world)
    changes: dict[str, Callable[[Any], None]] = {
        r"rank 1: modules in another mode \['inner'\]": eval_inside,
        r"rank 1: frozen parameters \['inner.weight'\]": freeze,
        "the model does .*3.0": set_factor,
        "the model does take": set_table,
    }
    for text, change in changes.items():
        torch.manual_seed(0)
        model = Scaled()
        net = dl.distribute(model, P)
        if world.rank == 1:
            change(net)
        with pytest.raises(ValueError, match=f"(?s)ranks disagree: .*{text}"):
            net(mine)
        if world.rank == 0:
            change(net)
        torch.testing.assert_close(net(mine), model(x)[P.block(x.shape)])
    with pytest.raises(ValueError, match=r"ranks disagree: rank 1: arguments \['1'\], others \['0'\]"):
        net(mine, world.rank)
    with pytest.raises(ValueError, match="ranks disagree: rank 1: structure of the arguments"):
        net(**{"ab"[world.rank]: mine}, x=mine)


@on_ranks(2)
def test_structures_of_arguments(world: dl.Partition) -> None:
    """The same tensors under other names, and other numbers, are other calls; what is no dense tensor is refused."""
    P, _, mine = grid(world)
    net = dl.distribute(lambda x, a=0, b=0: x + a - 2 * b, P)
    for _ in range(2):
        torch.testing.assert_close(net(mine, a=mine), 2 * mine)
        torch.testing.assert_close(net(mine, b=mine), -mine)
        torch.testing.assert_close(net(mine, 1, 2), mine - 3)
        torch.testing.assert_close(net(mine, 2, 1), mine)
    with pytest.raises(TypeError, match=r"passed a tensor of torch\.sparse_coo, a tensor is needed"):
        net(mine.to_sparse())


@on_ranks(2)
def test_replaced_modules(world: dl.Partition) -> None:
    """A module in another's place is used at the next call, also where it lies in memory at a place that was free."""
    P, x, mine = grid(world)
    model = Scaled()
    net = dl.distribute(model, P)
    for factor in (1.0, 2.0, 3.0):
        new = nn.Conv2d(2, 2, 1, bias=False)
        nn.init.constant_(new.weight, factor)
        net.inner = new
        torch.testing.assert_close(net(mine), model(x)[P.block(x.shape)])
        del new
    net = dl.distribute(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), world.grid((1, 2)))
    assert net(torch.ones(3, 2)).shape == (3, 1)
    net.get_submodule("1").weight = nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"1.weight has the shape \(2, 8\), .*load_serial_state_dict"):
        net(torch.ones(3, 2))
    head = dl.distribute(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), P)
    for classes in (2, 3):
        setattr(head, "1", nn.Linear(48, classes))
        torch.testing.assert_close(head(mine), head.model(x))
    rows = nn.Embedding(5, 2, sparse=True)
    index = torch.arange(4)
    table = dl.distribute(rows, world.grid((2,)))
    table(index.chunk(2)[world.rank]).sum().backward()
    assert rows.weight.grad.tolist() == [[1.0, 1.0]] * 4 + [[0.0, 0.0]]  # dense, as it is a sum


@on_ranks(2)
def test_wrong_models(world: dl.Partition) -> None:
    """What holds no Python, or what is distributed already, is refused by name, and the next call is right."""
    P, x, mine = grid(world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that tracing is of the past
        traced = torch.jit.trace(nn.ReLU(), x)
    with pytest.raises(TypeError, match="scripted or traced"):
        dl.distribute(traced, P)
    model = nn.Conv2d(2, 2, 3, padding=1)
    for inner in (dl.distribute(model, P), dl.nn.DistributedConv2d(P, 2, 2, 1)):
        with pytest.raises(RuntimeError, match=r"module 0, .*, is distributed already"):
            dl.distribute(nn.Sequential(inner), P)(mine)
    for wrong, text in (
        (None, "a function is needed, not NoneType"),
        (nn.ReLU(), "the model is a ReLU, others"),
        (nn.Conv2d(2, 3, 3), r"the model is weight \(3, 2, 3, 3\)"),
        (nn.Conv2d(2, 2, 3, device="meta"), "weight has no values yet: it is on the meta device"),
        (nn.LazyConv2d(2, 3), "weight has no values yet: it is lazy"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"distribute: .*{text}"):
            dl.distribute(wrong if world.rank else model, P)
    for axes in ((0, 1), (0, 1, 2, 2), (0, 1, 2, 4), (0, 1, 2, -1), (0, 1, 2, 0.5), 3):
        for which in ("in_axes", "out_axes"):
            with pytest.raises(ValueError, match=r"the axes .* do not fit a tensor of 4 dims"):
                dl.distribute(model, P, **{which: [axes]})(mine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="in_axes and out_axes have axes"):
        dl.distribute(model, P, in_axes="0123")  # type: ignore[arg-type]
    net = dl.distribute(model, P)
    torch.testing.assert_close(net(mine), model(x)[P.block(x.shape)])
    net(mine).sum().backward()


def test_records_are_freed() -> None:
    """What capturing makes goes with the record."""

    def alive() -> int:
        gc.collect()
        return sum(type(o) is FakeTensorMode for o in gc.get_objects())

    model, before = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()), alive()
    for size in (4, 5):
        capture(model, (torch.empty(1, 2, size, 4, device="meta"),), {})
    assert alive() == before
