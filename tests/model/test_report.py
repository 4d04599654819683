"""Reports say, without ranks, what ranks then send, compute and hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from networks import held_in_a_step
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.model.capture import capture
from distdl_lite.model.compile import default_axes
from distdl_lite.nn.value import NoRule
from distdl_lite.testing import count, spmd


class Shapes(nn.Module):
    """Joins, shifts, slices, sums and views across cuts."""

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.cat([x.roll((3, 1), (2, 3)), x[..., 2:-3, 1:].flip(1).mean((2, 3), keepdim=True).expand_as(x)], 1)
        with torch.no_grad():
            scale = y.var((0, 2, 3), keepdim=True)
        return (y * y / (1 + scale)).flatten(2).sum(1), y.std((1, 2))


class Unread(nn.Module):
    """A movement that backward does not reach, and one that it does not need."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.detach().roll(1, 2) + x.roll(2, 2).round().detach() * 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.second(self.frozen(self.first(x))) @ y.transpose(0, 1)


class Block(nn.Sequential):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU())


class UNet(nn.Module):
    """Of two levels."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.down, self.below = Block(3, width), nn.MaxPool2d(2), Block(width, 2 * width)
        self.up, self.last = nn.ConvTranspose2d(2 * width, width, 2, 2), Block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.head(self.last(torch.cat([self.up(self.below(self.down(y))), y], 1)))


# A model, its grid, and its arguments as shapes; with a "g" before it a shape's tensor requires a gradient.
MODELS: list[tuple[Callable[[], Any], tuple[int, ...], list[Any]]] = [
    (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2)), (1, 1, 2, 2), [("g", 2, 3, 37, 29)]),
    (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Linear(15, 4), nn.GELU()), (1, 1, 3, 2), [("g", 2, 3, 37, 29)]),
    (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d((4, 3)), nn.Flatten(), nn.Linear(36, 5)),
        (2, 1, 2, 1),
        [(3, 3, 13, 9)],
    ),
    (
        lambda: nn.Sequential(nn.Linear(9, 4), nn.AdaptiveMaxPool1d(3), nn.Upsample(scale_factor=3)),
        (1, 1, 4),
        [("g", 2, 4, 9)],
    ),
    (UNet, (1, 1, 2, 2), [("g", 2, 3, 26, 22)]),
    (UNet, (1, 2, 2, 1), [(2, 3, 26, 22)]),
    (lambda: UNet(8).requires_grad_(), (1, 1, 3, 1), [(2, 3, 390, 256)]),
    (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)), (1, 2, 2), [("g", 2, 7, 6)]),
    (Shapes, (1, 1, 2, 3), [("g", 2, 3, 17, 11)]),
    (Shapes, (2, 1, 2, 1), [(2, 3, 17, 11)]),
    (Unread, (1, 1, 3), [("g", 1, 2, 11)]),
    (Tied, (2, 1), [("g", 5, 6), ("g", 3, 6)]),
    (Tied, (1, 3), [(5, 6), ("g", 3, 6)]),
    (lambda: nn.Softmax(2), (1, 2, 2), [("g", 3, 4, 5)]),
    (lambda: nn.Sequential(nn.Linear(5, 7), nn.LogSoftmax(1)), (1, 3, 1), [("g", 3, 4, 5)]),
    (lambda: lambda x, y: torch.nn.functional.mse_loss(x, y), (2, 2), [("g", 5, 6), (5, 6)]),
]


def tensors_of(inputs: list[Any], device: str = "meta") -> list[torch.Tensor]:
    found = []
    for shape in inputs:
        wanted = shape[0] == "g"
        found.append(torch.zeros(shape[1:] if wanted else shape, device=device).requires_grad_(wanted))
    return found


def measured(make: Callable[[], Any], shape: tuple[int, ...], inputs: list[Any], steps: int = 1) -> list[Any]:
    """What each rank counts in the forward and the backward of a step, and what it reports itself."""

    known: dict[str, Any] = {}

    def shared(model: Any, args: Any, kwargs: Any, *options: Any) -> Any:
        """One capture for all ranks."""
        key = str((args, kwargs, options))
        known[key] = known.get(key) or capture(model, args, kwargs, *options)
        return known[key]

    def body(world: dl.Partition) -> Any:
        P = world.grid(shape)
        net = dl.distribute(make(), P)
        net.__dict__["_capture"] = shared
        for _ in range(steps):
            blocks = []
            for x in tensors_of(inputs, "cpu"):
                block = x[P.block(x.shape, default_axes(x.dim(), x.dtype, P.grid_of_ranks))]
                blocks.append(block.detach().clone().requires_grad_(x.requires_grad))
            with count() as forward:
                outputs = [y for y in pytree.tree_leaves(net(*blocks)) if y.requires_grad]
            with count() as backward:
                if outputs:
                    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        made = net.report() if world.rank in (0, world.size - 1) else None
        return (forward.messages, forward.bytes, backward.messages, backward.bytes), made

    return spmd(math.prod(shape), body)


@pytest.mark.parametrize(("make", "shape", "inputs"), MODELS)
def test_messages_and_bytes_are_those_counted(make: Any, shape: Any, inputs: Any) -> None:
    ranks = measured(make, shape, inputs)
    found = dl.report(make(), shape, *tensors_of(inputs))
    for made in (found, ranks[0][1], ranks[-1][1]):
        told = made.forward.messages, made.forward.bytes, made.backward.messages, made.backward.bytes
        assert told == tuple(max(column) for column in zip(*(numbers for numbers, _ in ranks), strict=True))
        assert made.to_dict() == found.to_dict()


def test_large_models_sum_gradients_early_from_the_second_step_on() -> None:
    """In other buckets than at the end of the first; a bucket is one message."""

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(800, 800) for _ in range(3)))

    (numbers, made), *_ = measured(make, (2, 1), [(4, 800)], steps=2)
    assert (made.backward.messages, made.backward.bytes) == numbers[2:] == (3, 3 * 4 * 801 * 800)


def test_memory_is_what_torch_allocates() -> None:
    """On one rank, with what libraries take beside."""
    net, x = UNet(32), torch.randn(2, 3, 64, 48)
    net(x).sum().backward()
    net.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        net(x).sum().backward()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    found = dl.report(UNet(32), (1, 1, 1, 1), (2, 3, 64, 48))
    assert found.peak - found.weights - found.optimizer - x.nbytes == pytest.approx(max(live), rel=0.1)


def test_memory_is_what_a_step_holds() -> None:
    """Beside the buffers of movements, which a first step makes."""

    def body(world: dl.Partition) -> tuple[int, int]:
        P = world.grid((1, 1, 2, 1))
        torch.manual_seed(0)
        return held_in_a_step(dl.distribute(UNet(8), P), P, (2, 3, 128, 96))

    found = dl.report(UNet(8), (1, 1, 2, 1), (2, 3, 128, 96))
    for kept, peak in spmd(2, body):
        assert found.kept == pytest.approx(kept, rel=0.02)
        assert found.peak - found.weights - found.optimizer == pytest.approx(peak, rel=0.15)  # messages are copies
    weights = sum(t.nbytes for t in (*UNet(8).parameters(), *UNet(8).buffers()))
    assert found.weights == sum(row.weights for row in found.rows) == weights
    assert found.kept == sum(row.kept for row in found.rows)
    assert found.optimizer == 2 * found.gradients


def test_the_table_says_module_by_module_what_happens() -> None:
    net = UNet(4)
    found = dl.report(net, (1, 1, 2, 2), (1, 3, 36, 26))
    rows = {row.path: row for row in found.rows}
    assert list(rows)[:5] == ["inputs", "first.0", "first.1", "first.2", "down"]
    assert rows["first.0"].operations == ("conv2d",)
    assert rows["first.0"].output == "(1, 4, 36/2, 26/2)"
    assert rows["first.0"].movements == {"halo": 1}
    assert (rows["first.0"].forward.messages, rows["first.0"].forward.bytes) == (3, (18 + 13 + 1) * 3 * 4)
    assert 1 <= rows["first.0"].multiply_adds / (18 * 13 * 4 * 27) < 1.15  # and its halo
    assert rows["first.0"].weights == 4 * (4 * 27 + 4)
    assert rows["gradients"].backward.bytes == found.gradients == sum(p.nbytes for p in net.parameters())
    assert found.backward_multiply_adds > found.multiply_adds
    assert 1 <= found.ratio < 1.05
    assert not found.gathered
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    for text in (str(found), found.to_markdown()):
        assert "(1, 4, 36/2, 26/2)" in text
        assert "total" in text
        assert "peak memory" in text
        assert "GATHERED" not in text
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["movements"] == {"halo": 1}
    assert net.training
    evaluated = dl.report(net, (1, 1, 2, 2), (1, 3, 36, 26), train=False)
    assert net.training
    assert (evaluated.backward, evaluated.gradients, evaluated.backward_multiply_adds) == (type(found.backward)(), 0, 0)
    assert evaluated.peak < found.peak
    assert "statistics" not in evaluated.rows[2].movements


@pytest.mark.parametrize(("heads", "kind"), [(4, "heads"), (3, "gather")])
def test_the_products_of_attention_are_counted(heads: int, kind: str) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    inputs = [torch.zeros(2, heads, n, d, requires_grad=True) for n, d in ((64, 8), (48, 8), (48, 8))]
    products = 2 * heads * 64 * 48 * (8 + 8)  # queries with keys, and weights with values
    for grid, parts in (((1, 1, 1, 1), 1), ((1, 1, 4, 1), 4)):
        found = dl.report(attend, grid, *inputs)
        assert found.multiply_adds == products // parts
        assert found.backward_multiply_adds == 5 * products // parts // 2  # scores again, and four for gradients
        assert parts == 1 or kind in found.rows[1].movements


def test_what_is_gathered_is_marked_with_its_line() -> None:

    class Largest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + torch.linalg.svd(x.relu())[1].amax()

    found = dl.report(Largest(), (2, 2), (6, 6))
    assert len(found.gathered) == 1
    assert "test_report.py" in found.gathered[0]
    assert "svd" in found.gathered[0]
    assert "amax, add, GATHERED" in str(found)
    assert str(found).endswith(found.gathered[0])
    assert found.ratio > 1
    with pytest.raises(RuntimeError, match="svd"):
        dl.report(Largest(), (2, 2), (6, 6), strict=True)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the axes \(0, 2\) do not fit a tensor of 2 dims"):
        dl.report(nn.ReLU(), (2, 2), (4, 4), in_axes=[(0, 2)])
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module or a function is needed"):
        dl.report(3, (2, 2), (4, 4))


def test_many_ranks() -> None:
    """Few of them are looked at, and those that send most are among them."""
    few, many = (dl.report(UNet(2), (1, 1, n, n), (1, 3, 1024, 1024)) for n in (4, 64))
    assert many.ranks == 4096
    assert many.forward.messages == few.forward.messages
    assert many.forward.bytes < few.forward.bytes + 4 * 4096 * 100
    assert many.peak < few.peak


def test_grids_are_suggested_by_time_among_those_that_fit() -> None:
    model = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.ReLU())
    found = dl.suggest(model, (2, 3, 64, 32), ranks=8)
    assert {s.grid for s in found} == {(b, 1, h, 8 // b // h) for b in (1, 2) for h in (1, 2, 4, 8) if 8 % (b * h) == 0}
    assert found[0].grid == (2, 1, 4, 1)
    near = dl.suggest(nn.AvgPool2d(3, 1, 1), (1, 3, 2048, 2048), ranks=16, machine=dl.Machine(latency=0))
    for grids in (found, near):  # the first three of the latter are alike in two digits
        times = [float(f"{s.report.seconds:.2e}") for s in grids]
        assert times == sorted(times)
    assert all(s.fits for s in found)
    assert "of it latency" in found[0].reason
    assert "less" not in found[0].reason  # two are alike
    assert "more" in found[-1].reason
    assert str(found).splitlines()[0].startswith("2x1x4x1")
    none = dl.suggest(model, (2, 3, 64, 32), ranks=8, memory=10)
    assert not any(s.fits for s in none)
    assert "does not fit" in none[0].reason
    assert any(s.grid[1] > 1 for s in dl.suggest(model, (2, 4, 64, 32), ranks=4, channels=True))
    slow = dl.suggest(model, (2, 3, 64, 32), ranks=2, machine=dl.Machine(latency=0, bandwidth=1e30, memory_bandwidth=1))
    assert "100 % of it memory" in slow[0].reason
    with pytest.raises(ValueError, match="5 ranks have no grid for a tensor of shape"):
        dl.suggest(model, (2, 3, 4, 3), ranks=5)


def test_a_network_reports_shapes_it_was_not_called_with() -> None:
    """Also where its weights are cut by then."""

    def body(world: dl.Partition) -> list[bool]:
        net = dl.distribute(UNet(4), world.grid((1, 2, 1, 1)))
        for shape in [(3, 3, 8, 8), (2, 3, 8, 8)]:
            net(torch.zeros(shape)[net.P.block(shape)])
        return [net.report(shape).to_dict() == wanted[shape] for shape in wanted]

    wanted = {shape: dl.report(UNet(4), (1, 2, 1, 1), shape).to_dict() for shape in [(2, 3, 8, 8), (1, 3, 16, 12)]}
    assert spmd(2, body) == [[True, True]] * 2


def test_what_the_user_cuts_and_rules_is_reported() -> None:
    def declined(*given: Any) -> Any:
        raise NoRule

    def body(world: dl.Partition) -> None:
        x = torch.ones(1, 2, 6, 6)[(P := world.grid((1, 1, 2, 1))).block((1, 2, 6, 6))]
        model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh())
        for options, is_gathered in (({"cut": {"0": (0, 1, None, 2)}}, False), ({"rules": {"tanh": declined}}, True)):
            net = dl.distribute(model, P, **options)
            with count() as forward:
                net(x)
            for found in (net.report(), net.report((1, 2, 6, 6))):
                assert (found.forward.messages, found.forward.bytes) == (forward.messages, forward.bytes)
                assert forward.bytes > 0
                assert bool(found.gathered) == is_gathered

    spmd(2, body)


def test_a_grid_may_be_a_partition_and_wrong_orders_are_named() -> None:
    def body(world: dl.Partition) -> None:
        P, model, shape = world.grid((1, 1, 2, 1)), nn.Conv2d(3, 2, 1), (1, 3, 8, 8)
        assert dl.report(model, P, shape).to_dict() == dl.report(model, P.shape, shape).to_dict()
        assert dl.prove(model, P, shape).worst < 1e-9
        assert dl.report(model, P, tuple(map(np.int64, shape))).to_dict() == dl.report(model, P, shape).to_dict()
        for empty in ((), (1, 1, 0, 1), (1, 1, -2, 1)):
            with pytest.raises(ValueError, match="has no ranks"):
                dl.report(model, empty, shape)
        with pytest.raises(ValueError, match="for which no tensor was passed"):
            dl.report(model, P, shape, in_axes=[None, None, (0,)])
        with pytest.raises(RuntimeError, match=r"the grid was \(1, 3, 8, 8\) and the input \(1, 1, 2, 1\)"):
            dl.report(model, shape, P.shape)
        for wrong in (lambda: dl.report(model, shape, P), lambda: dl.summary(model, P, shape)):
            with pytest.raises(TypeError, match="a partition stands among the inputs"):
                wrong()
        for look in (lambda net: dl.report(net, P, shape), lambda net: dl.suggest(net, shape, ranks=2)):
            with pytest.raises(TypeError, match=r"Sequential is cut already; .* dl\.summary"):
                look(nn.Sequential(dnn.DistributedConv2d(P, 3, 2, 1)))

    spmd(2, body)
