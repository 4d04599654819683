"""Containers whose convolutions share one halo, against torch.nn.Sequential: values, messages, fallbacks."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from families import FAMILIES
from generated import Draw
from ranks import on_ranks
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from traffic import numbers, traffic
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.nn import deep_halo
from distdl_lite.testing import assert_equals_serial, count

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

Layers = Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]  # names, arguments and options, as of torch.nn
POINTWISE = sorted(kind.__name__ for kind in deep_halo._POINTWISE)
ARGUMENTS = {"Threshold": (0.1, 0.5)}


def twins(P: Any, layers: Layers, most: float = 100.0, dtype: torch.dtype = torch.float64) -> tuple[Any, nn.Sequential]:
    """The container and its serial twin, from the same seed."""
    made = []
    for ours in (True, False):
        torch.manual_seed(3)
        found: list[Any] = []
        for name, arguments, options in layers:
            if name in ("Conv1d", "Conv2d", "Conv3d"):
                kind = getattr(dnn, f"Distributed{name}") if ours else getattr(nn, name)
                found.append(kind(*((P, *arguments) if ours else arguments), dtype=dtype, **options))
            elif name == "MaxPool":
                dims = P.dim - 2
                kind = getattr(dnn if ours else nn, f"{'Distributed' if ours else ''}MaxPool{dims}d")
                found.append(kind(*((P, *arguments) if ours else arguments), **options))
            else:
                found.append(getattr(nn, name)(*arguments, **options))
        made.append(dnn.DeepHalo(*found, most=most) if ours else nn.Sequential(*found))
    return made[0], made[1]


def convolutions(n: int, dims: int = 2, channels: int = 2, kernel: int = 3, **options: Any) -> Layers:
    layer = (f"Conv{dims}d", (channels, channels, kernel), {"padding": kernel // 2, **options})
    return [each for _ in range(n) for each in (layer, ("ReLU", (), {}))]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def runs(container: Any) -> list[int]:
    """How many layers share each halo."""
    steps = [step for run in container._distdl_plan if isinstance(run, deep_halo._Run) for step in run._distdl_plan]
    return [len(step.steps) for step in steps if isinstance(step, deep_halo._Fused)]


def assert_equal(container: Any, serial: Any, x: torch.Tensor, P: Any, tolerance: float = 1e-9) -> None:
    assert_equals_serial(container, serial, x, P, rtol=tolerance, atol=tolerance)


@on_ranks(4, mpi=True)
def test_many(world: dl.Partition) -> None:
    """Named cases on threads and on MPI ranks; with them how many layers share a halo."""
    reaching = [("Conv1d", (2, 2, 5), {"padding": 2})] * 4  # a halo of 8 points over blocks of 3
    cases: list[tuple[Any, Layers, tuple[int, ...], list[int]]] = [
        ((1, 1, 4, 1), convolutions(8), (1, 2, 35, 6), [8]),
        ((2, 1, 2, 1), convolutions(3), (3, 2, 9, 6), [3]),
        ((1, 1, 2, 2), convolutions(3, stride=2), (1, 2, 33, 29), [3]),
        ((1, 1, 4), reaching, (2, 2, 12), [4]),
        ((1, 1, 4), convolutions(2, 1), (1, 2, 3), []),  # a rank without input
        ((1, 1, 4), convolutions(3, 1, stride=2), (1, 2, 9), []),  # fewer outputs than ranks
        ((1, 1, 4), convolutions(2, 1), (0, 2, 9), []),
        ((1, 1, 2, 1, 2), convolutions(2, 3), (1, 2, 6, 4, 7), [2]),
        ((1, 1, 2, 1), [*convolutions(2), ("MaxPool", (2,), {}), *convolutions(3)], (1, 2, 20, 8), [2, 3]),
        ((1, 1, 2, 1), [*convolutions(2), *convolutions(1, padding_mode="reflect"), *convolutions(2)], (1, 2, 9, 5), [2, 2]),
        ((1, 1, 1, 1), convolutions(3), (1, 2, 9, 5), []),
    ]  # fmt: skip
    for grid, layers, shape, expected in cases:
        P = world.grid(grid)
        container, serial = twins(P, layers)
        assert_equal(container, serial, normal(*shape), P)
        assert not P.active or runs(container) == expected, (grid, layers, runs(container))


@on_ranks(4)
def test_many_of_the_random_lists_share_a_halo(world: dl.Partition) -> None:
    """Those that `generated` compares with the serial ones."""
    found = 0
    for number in range(20):
        drawn = FAMILIES["deep_halo"](Draw(world, "deep_halo", number))
        container, slices = drawn.layer(), drawn.take[0](drawn.inputs[0].shape)
        if slices is not None:
            with suppress(ValueError):
                container(drawn.inputs[0][slices])
                found += bool(runs(container))
    assert max(world.allgather_data(found)) > 5


@on_ranks(4)
def test_every_activation(world: dl.Partition) -> None:
    P = world.grid((1, 1, 4))
    conv = ("Conv1d", (2, 2, 3), {"padding": 1})
    for name in POINTWISE:
        act = (name, ARGUMENTS.get(name, ()), {})
        container, serial = twins(P, [conv, act, conv, act, conv, act])
        assert_equal(container, serial, normal(2, 2, 17), P)
        assert runs(container) == [3], name


# ---- messages --------------------------------------------------------------------------------------------------------


@on_ranks(4)
def test_messages(world: dl.Partition) -> None:
    """Eight layers send one halo of eight rows forward, its gradient and one sum backward."""
    P, rank = world.grid((1, 1, 4, 1)), world.rank
    layers = convolutions(8)
    container, _ = twins(P, layers, 0.3)
    forward, backward = traffic(container, normal(1, 2, 256, 6)[P.block((1, 2, 256, 6))].requires_grad_())
    assert runs(container) == [8]
    neighbours = (rank > 0) + (rank < 3)
    assert numbers(forward) == (neighbours, 0, neighbours * 2 * 8 * 6 * 8)
    weights = 8 * (2 * 2 * 9 + 2) * 8
    assert numbers(backward) == (neighbours + 1, 1, neighbours * 2 * 8 * 6 * 8 + weights)
    assert set(forward.by_label) == {"DeepHalo"}


@on_ranks(2)
def test_most(world: dl.Partition) -> None:
    """A run is cut where a rank would compute too much beyond its blocks."""
    P = world.grid((1, 1, 2, 1))
    x = normal(1, 2, 64, 4)[P.block((1, 2, 64, 4))]
    found = []
    for most in (100, 0.2, 0.1, 0.05, 0):
        container, _ = twins(P, convolutions(8), most)
        container(x)
        found.append(runs(container))
    assert found[0] == found[1] == [8]
    assert found[-1] == []
    lengths = [max(run, default=1) for run in found]
    assert lengths == sorted(lengths, reverse=True)
    assert 1 < lengths[3] < lengths[2] < 8
    assert sum(found[2]) in (7, 8)


@on_ranks(2)
def test_agreements(world: dl.Partition) -> None:
    """A call agrees once for all its layers; a structure seen before is not set up again."""
    P = world.grid((1, 1, 2, 1))
    container, _ = twins(P, [*convolutions(3), ("MaxPool", (2,), {}), *convolutions(2)])
    transport, calls = P.world_transport, []
    x, other = (normal(1, 2, n, 4)[P.block((1, 2, n, 4))] for n in (16, 22))
    for value in (x, other):
        container(value)
    for name in ("start_agreeing", "gather_objects", "bind"):
        original = getattr(transport, name)
        setattr(transport, name, lambda *args, o=original, n=name: (calls.append(n), o(*args))[1])
    try:
        for value in (x, other, x):
            container(value)
    finally:
        for name in ("start_agreeing", "gather_objects", "bind"):
            delattr(transport, name)
    assert calls == ["start_agreeing"] * 3


# ---- what is called as it stands -------------------------------------------------------------------------------------


class Doubled(dnn.DistributedConv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@on_ranks(2)
def test_layers_that_are_in_no_run(world: dl.Partition) -> None:
    """Subclasses, patched layers, cut features, other grids and dtypes; runs end there."""
    P, Q = world.grid((1, 1, 2, 1)), world.grid((1, 1, 1, 2))
    x = normal(1, 2, 24, 6)

    def conv(kind: Any = dnn.DistributedConv2d, P_x: Any = P, **options: Any) -> Any:
        return kind(P_x, 2, 2, 3, padding=1, dtype=torch.float64, **options)

    def patched() -> Any:
        layer = conv()
        layer.forward = lambda x: 2 * dnn.DistributedConv2d.forward(layer, x)
        return layer

    F = world.grid((1, 2, 1, 1))
    cases: list[tuple[list[Any], list[int]]] = [
        ([conv(), conv(), conv(Doubled), conv(), conv()], [2, 2]),
        ([conv(), conv(), patched(), conv(), conv()], [2, 2]),
        ([conv(), conv(), dnn.Repartition(P, Q), conv(P_x=Q), conv(P_x=Q)], [2, 2]),
        ([conv(), conv(), conv(P_y=Q)], [2]),
        ([dnn.Repartition(P, F), conv(P_x=F), conv(P_x=F), dnn.Repartition(F, P), conv(), conv(P_w=P)], [2]),
        ([nn.ReLU(), conv(), nn.Dropout(0.0), conv()], []),
        ([nn.ReLU(), conv(), dnn.DeepHalo(conv(), conv(), most=9)], []),
        ([conv(), conv().agree_each_layer(), conv().static_shapes(), nn.Sequential(conv(), conv())], [3]),
    ]
    for layers, expected in cases:
        container = dnn.DeepHalo(*layers, most=100)
        results = []
        for model in (container, nn.Sequential(*layers)):
            model.zero_grad()
            block = x[P.block(x.shape)].requires_grad_()
            y = model(block)
            y.pow(2).sum().backward()
            results.append([y, block.grad, *(p.grad for p in model.parameters())])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert runs(container) == expected, layers


@on_ranks(2)
def test_autocast_and_dtypes(world: dl.Partition) -> None:
    """Under autocast, and for a dtype that the weights do not have, each layer does what it does alone."""
    P = world.grid((1, 1, 2, 1))
    container, serial = twins(P, convolutions(3), dtype=torch.float32)
    x = normal(1, 2, 24, 6, dtype=torch.float32)
    block = x[P.block(x.shape)]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = container(block), serial(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected[P.block(expected.shape)], rtol=2e-2, atol=2e-2)
    assert runs(container) == []
    container(block)
    assert runs(container) == [3]
    assert_refused(world, P, lambda: container(block.double()), "the input has dtype torch.float64", TypeError)
    assert_refused(world, P, lambda: container(block[:, :1]), "DistributedConv2d: the input has 1 channels")
    container.half()
    container.bfloat16()
    serial.bfloat16()
    assert_equal(container, serial, x.bfloat16(), P, tolerance=4e-2)
    assert runs(container) == [3]


# ---- hooks -----------------------------------------------------------------------------------------------------------


@on_ranks(3)
def test_hooks_are_called(world: dl.Partition) -> None:
    """A layer with a hook of any kind is called as it stands, and in a run again when that is gone."""
    P = world.grid((1, 1, 3, 1))
    x = normal(1, 2, 24, 6)
    for which in (2, 3):
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            container, serial = twins(P, convolutions(4))
            seen: list[Any] = []
            assert_equal(container, serial, x, P)
            assert runs(container) == [4]
            handle = getattr(container[which], f"register_{kind}_hook")(lambda *args, seen=seen: seen.append(args[0]))
            assert_equal(container, serial, x, P)
            assert seen == [container[which]], (which, kind)
            assert runs(container) == ([2] if which == 2 else [2, 2]), (which, kind)
            handle.remove()
            assert_equal(container, serial, x, P)
            assert runs(container) == [4]
            assert len(seen) == 1
    seen = []
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    container(x[P.block(x.shape)])
    handle.remove()
    assert all(any(layer is other for other in seen) for layer in container)  # of all ranks, where these are threads


@on_ranks(3)
def test_a_hook_on_one_rank(world: dl.Partition) -> None:
    """It is an error on all ranks, also inside a module whose own agreement does not see it, and none once it is gone."""
    P = world.grid((1, 1, 3, 1))
    x = normal(1, 2, 24, 6)[P.block((1, 2, 24, 6))]

    class Net(dnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = twins(P, convolutions(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    net = Net()
    for model in (net.inner, net):
        expected = model(x)
        handle = net.inner[2].register_forward_hook(lambda *args: None) if world.rank == 1 else None
        assert_refused(
            world, P, lambda model=model: model(x), "the ranks disagree: rank 1: mode training, hooks on layer 2"
        )
        if handle is not None:
            handle.remove()
        assert torch.equal(model(x), expected)


@on_ranks(2)
def test_ranks_that_differ(world: dl.Partition) -> None:
    """Options, dtypes and frozen weights that differ between ranks are refused on all of them."""
    P = world.grid((1, 1, 2, 1))
    x = normal(1, 2, 24, 6)[P.block((1, 2, 24, 6))]
    for change, text in (
        (lambda c: c[2].weight.requires_grad_(False), "2.weight torch.float64 frozen"),
        (lambda c: c[2].float(), "2.weight torch.float32"),
        (lambda c: c.register_module("1", nn.LeakyReLU(0.3)), "LeakyReLU(negative_slope=0.3)"),
    ):
        container, _ = twins(P, convolutions(4))
        container(x)
        if world.rank == 1:
            change(container)
        assert_refused(world, P, lambda container=container: container(x), text)
    container, _ = twins(P, convolutions(2), 1.0 + world.rank)
    assert_refused(world, P, lambda: container(x), "most=2.0")


# ---- gradients and life ----------------------------------------------------------------------------------------------


@on_ranks(4)
def test_training(world: dl.Partition) -> None:
    """Twenty steps leave the serial weights on all ranks."""
    P = world.grid((1, 1, 2, 2))
    container, serial = twins(P, [*convolutions(4), ("Conv2d", (2, 1, 1), {})])
    x, target = normal(2, 2, 17, 15), normal(2, 1, 17, 15)
    loss = dnn.DistributedMSELoss(P)
    for model, parts in ((container, P.block), (serial, lambda shape: tuple(slice(None) for _ in shape))):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        inputs, wanted = x[parts(x.shape)], target[parts(target.shape)]
        for _ in range(20):
            optimizer.zero_grad()
            value = loss(model(inputs), wanted) if model is container else nn.functional.mse_loss(model(inputs), wanted)
            value.backward()
            optimizer.step()
    assert runs(container) == [5]
    for p, expected in zip(container.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-8, atol=1e-8)


@on_ranks(3)
def test_who_requires_grad(world: dl.Partition) -> None:
    """Inputs on one rank alone, frozen weights, none at all, no grad, and one gradient by itself."""
    P = world.grid((1, 1, 3, 1))
    x = normal(1, 2, 25, 6)
    for frozen in (
        (),
        ("0.weight", "0.bias"),
        ("4.bias",),
        tuple(f"{n}.{w}" for n in (0, 2, 4) for w in ("weight", "bias")),
    ):
        for wants in ((0,), (), (1, 2)):
            container, serial = twins(P, convolutions(3))
            for model in (container, serial):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name not in frozen)
            block, whole = x[P.block(x.shape)].clone().requires_grad_(world.rank in wants), x.clone().requires_grad_()
            y, expected = container(block), serial(whole)
            assert runs(container) == [3]
            assert y.requires_grad or len(frozen) == 6
            if y.requires_grad:
                y.square().sum().backward()
            expected.square().sum().backward()
            if world.rank in wants:
                torch.testing.assert_close(block.grad, whole.grad[P.block(x.shape)], rtol=1e-9, atol=1e-9)
            for p, q in zip(container.parameters(), serial.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    container, serial = twins(P, convolutions(3))
    with torch.no_grad():
        y = container(x[P.block(x.shape)])
    assert not y.requires_grad
    assert runs(container) == [3]
    (found,) = torch.autograd.grad(container(x[P.block(x.shape)]).sum(), container[2].weight)
    (expected,) = torch.autograd.grad(serial(x).sum(), serial[2].weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    shared = container[0]
    container, serial = dnn.DeepHalo(shared, nn.ReLU(), shared, most=9), nn.Sequential(serial[0], nn.ReLU(), serial[0])
    assert_equal(container, serial, x, P)
    assert runs(container) == [2]


@on_ranks(4)
def test_second_gradients(world: dl.Partition) -> None:
    P = world.grid((1, 1, 4, 1))
    tanh = [each if each[0] != "ReLU" else ("Tanh", (), {}) for each in convolutions(3)]
    for layers in (tanh, convolutions(3)):
        container, serial = twins(P, layers)
        x = normal(1, 2, 17, 4)
        found = []
        for model, start in ((container, x[P.block(x.shape)]), (serial, x)):
            leaf = start.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
            g.square().sum().backward()
            found.append(leaf.grad)
        torch.testing.assert_close(found[0], found[1][P.block(x.shape)], rtol=1e-9, atol=1e-9)
        for p, q in zip(container.parameters(), serial.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


@on_ranks(3)
def test_life(world: dl.Partition) -> None:
    """Other shapes, copies, pickles, checkpoints, changed layers, states of the serial model."""
    P = world.create_partition_inclusive([2, 0]).grid((1, 1, 2, 1))
    container, serial = twins(P, convolutions(4))
    for module in (container, copy.deepcopy(container), pickle.loads(pickle.dumps(container))):
        for n in (16, 23, 16):
            assert_equal(module, serial, normal(1, 2, n, 4), P)
            assert not P.active or runs(module) == [4]
    state = dl.serial_state_dict(container)
    assert [*container.state_dict()] == [*serial.state_dict()]
    if world.rank == 0:
        serial.load_state_dict(state)
    x = normal(1, 2, 16, 4)
    block = x[P.block(x.shape)] if P.active else dl.zero_volume_tensor(dtype=x.dtype)
    container.zero_grad()
    y = checkpoint(container, block.requires_grad_(world.rank == 0), use_reentrant=False)
    if P.active:
        y.sum().backward()
    serial.zero_grad()
    serial(x).sum().backward()
    for p, q in zip(container.parameters(), serial.parameters(), strict=True):
        assert not p.numel() or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    container.register_module("2", dnn.DistributedConv2d(P, 2, 2, 5, padding=2, dtype=torch.float64))
    serial[2] = nn.Conv2d(2, 2, 5, padding=2, dtype=torch.float64)
    assert_equal(container, serial, x, P)


@on_ranks(2)
def test_as_a_sequential(world: dl.Partition) -> None:
    P = world.grid((1, 1, 2, 1))
    container, _ = twins(P, convolutions(3))
    assert len(container) == 6
    assert [type(layer) for layer in container][1] is nn.ReLU
    assert container[-2] is container[4]
    part = container[2:4]
    assert isinstance(part, dnn.DeepHalo)
    assert [*part.state_dict()] == ["2.weight", "2.bias"]
    named = dnn.DeepHalo(OrderedDict(first=container[0], second=nn.ReLU()), most=0)
    assert [*named.state_dict()] == ["first.weight", "first.bias"]
    assert "most=100.0" in repr(container)
    x = normal(1, 2, 16, 4)
    y = container(x[P.block(x.shape)])
    assert y.is_contiguous()
    assert torch.equal(dnn.DeepHalo()(x), x)
    assert torch.equal(dnn.DeepHalo(nn.ReLU())(x), x.relu())
    for most, text, error in ((-1, "most=-1 must not be negative", ValueError), (math.nan, "most=nan", ValueError),
                              ("much", "most='much' is not a number", TypeError)):  # fmt: skip
        assert_refused(world, P, lambda most=most: dnn.DeepHalo(nn.ReLU(), most=most), text, error)
    assert_refused(world, P, lambda: setattr(container, "most", 1), "most is fixed by the constructor", AttributeError)
    with count() as c:
        alone = world.grid((1, 1, 1, 1))
        single, _ = twins(alone, convolutions(3))
        if alone.active:
            single(x)
    assert c.messages == 0


@on_ranks(2)
def test_points_that_lack_inputs_do_not_overflow(world: dl.Partition) -> None:
    """Beside a cut, a sum of a part of the inputs, which no layer of the serial model makes and no output reads."""
    P, x = world.grid((1, 1, 2)), torch.full((1, 1, 400), 6e4, dtype=torch.float16)
    x[..., :4] = x[..., -4:] = 0
    container, serial = twins(
        P, [("Conv1d", (1, 1, 4), {"stride": 2, "padding": 1}), ("Conv1d", (1, 1, 3), {"padding": 1})], dtype=x.dtype
    )
    found = []
    for model, block in ((container, x[P.block(x.shape)]), (serial, x)):
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[[1, 1, -1, -1]]]))
            model[0].bias.zero_()
        (model(block).float() * 1e-3).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert runs(container) == [2]
    assert all(g.isfinite().all() for g in found[0] + found[1])
