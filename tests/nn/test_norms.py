"""Layer, RMS, group and instance norms: statistics over any dims, however they are cut.

Compared to 1e-9 in float64: sums of a few numbers near one, in another order than torch's.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from blocks import block, check_held, cuts_of, held, leaf
from families import FAMILIES
from generated import SIZE, run
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, assert_starts_alike

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.nn.norm import normalised
from distdl_lite.nn.norm.normalised import _composed
from distdl_lite.partition import Partition
from distdl_lite.testing import spmd

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
INSTANCE = {3: torch.nn.InstanceNorm1d, 4: torch.nn.InstanceNorm2d, 5: torch.nn.InstanceNorm3d}
Twins = tuple[torch.nn.Module, torch.nn.Module]


def twins(P: Partition, kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **given: Any) -> Twins:
    """torch's layer, with random weights, and ours with its values; `given` has the arguments of the kind."""
    number = given.pop("number")
    arguments = {
        "layer": lambda: (shape[len(shape) - number :],),
        "rms": lambda: (shape[len(shape) - number :],),
        "group": lambda: (number, shape[1]),
        "instance": lambda: (shape[1],),
        "batch": lambda: (shape[1],),
    }[kind]()
    ours, theirs = {
        "layer": (dnn.DistributedLayerNorm, torch.nn.LayerNorm),
        "rms": (dnn.DistributedRMSNorm, torch.nn.RMSNorm),
        "group": (dnn.DistributedGroupNorm, torch.nn.GroupNorm),
        "instance": (dnn.DistributedInstanceNorm, INSTANCE.get(len(shape))),
        "batch": (dnn.DistributedBatchNorm, torch.nn.BatchNorm2d),
    }[kind]
    serial, layer = theirs(*arguments, dtype=dtype, **given), ours(P, *arguments, dtype=dtype, **given)
    if kind == "rms":
        serial.register_parameter("bias", None)  # as ours has it
    assert list(layer.state_dict()) == list(serial.state_dict())
    assert_starts_alike(layer, serial, P.world_transport.rank)
    with torch.no_grad():
        for p in serial.parameters():
            p.uniform_(-1, 2)
    dl.load_serial_state_dict(layer, serial.state_dict())
    return serial, layer


def test_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, of which no wide copy is made, by taking small ones for large."""
    monkeypatch.setattr(normalised, "_AT_ONCE", 5)
    for family, number in itertools.product(("layer_norm", "rms_norm", "group_norm", "instance_norm"), range(6)):
        spmd(SIZE, lambda world, case=(family, number): run(world, FAMILIES, *case))
    test_dtypes_formats_and_life("threads")


class _Large(TorchDispatchMode):
    """Collects the sizes in bytes of new tensors of so many bytes and more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.sizes = least, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known and t.nbytes >= self.least:
                self.sizes.append(t.nbytes)
        return made


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training makes the output and the gradient of the input, and beside them nothing of a block's size."""
    monkeypatch.setattr(normalised, "_AT_ONCE", 300)

    @on_ranks(2)
    def measure(world: Partition) -> None:
        P = world.grid((1, 1, 1, 2))
        layers = (
            dnn.DistributedBatchNorm(P, 4),
            dnn.DistributedInstanceNorm(P, 4, affine=True),
            dnn.DistributedGroupNorm(P, 2, 4),
            dnn.DistributedLayerNorm(P, (200,)),
            dnn.DistributedRMSNorm(P, (200,)),
        )
        for layer in layers:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                layer = layer.to(torch.float64) if dtype is torch.float64 else layer
                x, g = leaf(torch.randn(4, 4, 8, 100).to(dtype)), torch.randn(4, 4, 8, 100).to(dtype)
                layer(x).backward(g)
                x.grad = None
                with _Large(x.nbytes // 4) as large:
                    layer(x).backward(g)
                assert large.sizes == [x.nbytes] * 2, (layer, dtype, large.sizes)

    measure("threads")


@on_ranks(2)
def test_second_gradients_beside_an_empty_block(world: Partition) -> None:
    """They reach the same weights on a rank without samples, also where no gradient depends on the bias."""
    P, shape = world.grid((2, 1, 1)), (2, 3, 4)
    cuts, whole = [(0, 2, 2), (0, 3), (0, 4)], torch.randn(shape, dtype=torch.float64)
    layers = (
        dnn.DistributedBatchNorm(P, 3).eval(),
        dnn.DistributedInstanceNorm(P, 3, affine=True),
        dnn.DistributedGroupNorm(P, 1, 3),
        dnn.DistributedLayerNorm(P, 4),
        dnn.DistributedRMSNorm(P, 4),
    )
    for layer in layers:
        x, times = leaf(block(whole, P, cuts)), block(torch.rand(shape, dtype=torch.float64), P, cuts)
        (gradient,) = torch.autograd.grad((layer.double()(x) * times).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert layer.weight.grad.any()


@on_ranks(2)
def test_instance_norm_of_no_samples(world: Partition) -> None:
    """Its running statistics become nan, as torch's; gradients of weights, for which torch raises, are zero."""
    shape = (0, 3, 4)
    for grid in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        P = world.grid(grid)
        for affine in (False, True):
            serial = torch.nn.InstanceNorm1d(3, track_running_stats=True)
            layer = dnn.DistributedInstanceNorm(P, 3, affine=affine, track_running_stats=True)
            for training in (False, True):
                serial.train(training)
                layer.train(training)
                x = leaf(block(torch.rand(shape), P, P.bounds(shape)))
                y = layer(x)
                y.sum().backward()
                assert serial(torch.rand(shape)).shape == shape
                assert y.shape == x.shape == x.grad.shape
                for name in ("running_mean", "running_var"):
                    wanted = held(layer, name, getattr(serial, name), world.rank)
                    if wanted is not None:
                        torch.testing.assert_close(getattr(layer, name), wanted, rtol=0, atol=0, equal_nan=True)
            if affine and P.active:
                assert not layer.weight.grad.any()


CASES = (  # kind, shape, grid, options
    ("layer", (3, 7), (1, 4), {"number": 1}),
    ("layer", (2, 3, 5), (2, 1, 2), {"number": 2}),
    ("layer", (3, 2, 5), (1, 2, 2), {"number": 2, "bias": False}),
    ("rms", (3, 7), (2, 2), {"number": 1}),
    ("rms", (2, 3, 4), (1, 2, 2), {"number": 3}),
    ("group", (2, 6, 3), (1, 4, 1), {"number": 2}),  # cuts inside groups
    ("group", (3, 4, 3), (1, 2, 2), {"number": 4}),
    ("group", (2, 5), (2, 2), {"number": 1, "affine": False}),
    ("instance", (2, 3, 5), (2, 1, 2), {"number": 0, "affine": True, "track_running_stats": True}),
    ("instance", (3, 2, 3, 4), (1, 1, 2, 2), {"number": 0, "affine": True}),
    ("instance", (3, 2, 4), (2, 2, 1), {"number": 0, "affine": True, "track_running_stats": True}),
)


@on_ranks(4, mpi=True)
def test_double_backward(world: Partition) -> None:
    """Values, gradients and gradients of gradients, over MPI too; replicas stay bitwise equal."""
    rng = random.Random(1)
    for number, (kind, shape, grid, given) in enumerate(CASES * 2):
        P = world.grid(grid)
        serial, layer = twins(P, kind, shape, **given)
        whole, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        cuts = cuts_of(shape, grid, rng if number < len(CASES) else None)
        x_serial, x = leaf(whole), leaf(block(whole, P, cuts))
        y_serial, y = serial(x_serial), layer(x)
        torch.testing.assert_close(y, block(y_serial, P, cuts), **TOLERANCE)
        for model, start, z, w in ((serial, x_serial, y_serial, weight), (layer, x, y, block(weight, P, cuts))):
            gradients = torch.autograd.grad((z**2 * w).sum(), [start, *model.parameters()], create_graph=True)
            sum(gradient.square().sum() for gradient in gradients).backward()
        # The composition takes the variance about a pivot: 1e-7 of the largest gradient is what is left of it.
        scale = 1e-7 * x_serial.grad.abs().max().item()
        torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), rtol=1e-7, atol=scale)
        check_held(layer, serial, world.rank, rtol=1e-7, atol=scale)
        layer.zero_grad()
        layer(x).square().sum().backward()
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            value = tensor if tensor.grad is None else tensor.grad
            shared = layer._distdl_places[name].replicas.team
            copies = shared.world.gather_objects(shared, value.detach().clone())
            assert all(torch.equal(copies[0], other) for other in copies)


@on_ranks(4)
def test_the_fused_function_is_the_composition(world: Partition) -> None:
    for kind, shape, grid, given in CASES:
        P = world.grid(grid)
        _, layer = twins(P, kind, shape, **given)
        x = leaf(block(torch.randn(shape, dtype=torch.float64), P, P.bounds(shape)))
        g = torch.randn_like(x)
        y = layer(x)
        names = layer._distdl_plan.compiler.names
        rows, kernel = names["Rows"], names["by_rows"].__self__
        weight, bias = (
            None if t is None else kernel.per_channel(t, x) for t in (layer.weight, getattr(layer, "bias", None))
        )
        pivot = torch.zeros(math.prod(rows.shape), dtype=torch.float64)
        plain = _composed(kernel.as_channels(x), weight, bias, pivot, kernel.eps, rows).view(x.shape)
        torch.testing.assert_close(y, plain, **TOLERANCE)
        (fused,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(fused, torch.autograd.grad(plain, x, g)[0], **TOLERANCE)


@on_ranks(4, mpi=True)
def test_far_from_zero(world: Partition) -> None:
    """Float32 values of mean 1e4 and deviation 1: rounding them to float32 is 5e-4, the statistics add nothing to it."""
    whole = torch.randn(4, 6, 16) + 1e4
    for kind, grid, given in (("layer", (1, 1, 4), {"number": 1}), ("group", (1, 4, 1), {"number": 2})):
        P = world.grid(grid)
        serial, layer = twins(P, kind, tuple(whole.shape), torch.float32, eps=0.0, **given)
        y = layer(block(whole, P, P.bounds(whole.shape)))
        wanted = serial.double()(whole.double()).float()
        torch.testing.assert_close(y, block(wanted, P, P.bounds(whole.shape)), rtol=0, atol=6e-3)


@on_ranks(4)
def test_collectives(world: Partition) -> None:
    """How many forward, and how many in backward without weights; none where no row is cut."""
    wanted = (
        ("layer", (2, 3, 4), (1, 2, 2), {"number": 1, "elementwise_affine": False}, 1, 1),
        ("layer", (2, 3, 4), (2, 2, 1), {"number": 1, "elementwise_affine": False}, 0, 0),
        ("rms", (2, 3, 4), (1, 1, 4), {"number": 2, "elementwise_affine": False}, 1, 1),
        ("group", (2, 6, 4), (1, 2, 2), {"number": 2, "affine": False}, 1, 1),
        ("group", (2, 6, 4), (2, 2, 1), {"number": 2, "affine": False}, 0, 0),
        ("group", (2, 6, 4), (1, 4, 1), {"number": 1, "affine": False}, 1, 1),
        ("instance", (2, 3, 4), (1, 2, 2), {"number": 0}, 1, 1),
        ("instance", (2, 3, 4), (2, 2, 1), {"number": 0}, 0, 0),
        ("instance", (2, 3, 4), (1, 1, 4), {"number": 0, "track_running_stats": True}, 2, 1),
        ("instance", (2, 3, 4), (2, 1, 1), {"number": 0, "track_running_stats": True}, 1, 0),
    )
    for dtype in (torch.float32, torch.float64):
        for kind, shape, grid, given, forward, backward in wanted:
            P = world.grid(grid)
            _, layer = twins(P, kind, shape, dtype, **given)
            x = leaf(block(torch.randn(shape, dtype=dtype), P, P.bounds(shape)))
            layer(x).sum().backward()
            with dl.testing.count() as counts:
                y = layer(x)
                assert counts.collectives == counts.messages == forward * P.active
                y.sum().backward()
            assert counts.collectives == counts.messages == (forward + backward) * P.active
            if "track_running_stats" in given:
                layer.eval()
                with dl.testing.count() as counts:
                    layer(x).sum().backward()
                assert counts.messages == 0


@on_ranks(4)
def test_a_group_across_some_cuts_takes_messages(world: Partition) -> None:
    """Blocks of channels [0, 2), [2, 3), [3, 5), [5, 6) and groups of three: only ranks that share a group meet."""
    P = world.grid((1, 4, 1))
    _, layer = twins(P, "group", (2, 6, 3), torch.float32, number=2, affine=False)
    x = leaf(torch.randn(2, (2, 1, 2, 1)[world.rank], 3))
    layer(x).sum().backward()
    with dl.testing.count() as counts:
        layer(x).sum().backward()
    assert (counts.collectives, counts.messages) == (0, 2)


@on_ranks(4)
def test_a_rank_whose_input_needs_no_gradient(world: Partition) -> None:
    for kind, shape, grid, given in CASES:
        P = world.grid(grid)
        affine = given.get("affine", True)
        for frozen in (True, False) if affine else (False,):
            _, layer = twins(P, kind, shape, **given)
            layer.requires_grad_(not frozen)
            x = block(torch.randn(shape, dtype=torch.float64), P, P.bounds(shape)).requires_grad_(world.rank == 1)
            layer(x).square().sum().backward()
            assert (x.grad is not None) == (world.rank == 1)
            if layer.weight is not None:
                assert (layer.weight.grad is None) == frozen


@on_ranks(2)
def test_dtypes_formats_and_life(world: Partition) -> None:
    for kind, grid, given in (
        ("layer", (1, 1, 1, 2), {"number": 2}),
        ("rms", (1, 1, 1, 2), {"number": 1, "eps": None}),
        ("group", (1, 2, 1, 1), {"number": 1}),
        ("instance", (1, 1, 2, 1), {"number": 0, "affine": True}),
    ):
        P, shape = world.grid(grid), (4, 3, 5, 6)
        serial, layer = twins(P, kind, shape, torch.float32, **given)
        whole, g, cuts = torch.randn(shape), torch.randn(shape), P.bounds(shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for fmt in (torch.contiguous_format, torch.channels_last):
                x_serial = leaf(whole.to(dtype))  # its own statistics in float32, then rounded
                x = leaf(block(x_serial, P, cuts).contiguous(memory_format=fmt))
                y_serial, y = serial(x_serial.float()), layer(x)
                y_serial.backward(g.to(dtype).float())
                y.backward(block(g, P, cuts).to(dtype))
                assert y.dtype is dtype
                torch.testing.assert_close(y, block(y_serial, P, cuts).to(dtype))  # the dtype's default tolerance
                assert x.grad.dtype is dtype
                atol = max(2 * torch.finfo(dtype).eps, 1e-5)
                torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), rtol=1e-2, atol=atol)
                assert layer.weight.grad.dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.detach()).dtype is torch.bfloat16
        x, g_x = leaf(block(whole, P, cuts)), block(g, P, cuts)
        flipped = leaf(x.transpose(0, 3).contiguous()).transpose(0, 3)
        flipped.retain_grad()
        y, y_flipped = layer(x), layer(flipped)
        y.backward(g_x)
        y_flipped.backward(g_x.transpose(1, 3).contiguous().transpose(1, 3))
        torch.testing.assert_close(y_flipped, y)
        torch.testing.assert_close(flipped.grad, x.grad)
        layer.zero_grad()
        layer(x).sum().backward()  # a gradient of stride 0
        x = leaf(block(whole, P, cuts))
        assert torch.equal(copy.deepcopy(layer)(x), pickle.loads(pickle.dumps(layer))(x))
        layer.zero_grad()
        layer(x).square().sum().backward()
        plain, of_weight = x.grad, layer.weight.grad
        x.grad = None
        layer.zero_grad()
        checkpoint(lambda x, layer: layer(x * 1), x, layer, use_reentrant=False).square().sum().backward()
        assert torch.equal(x.grad, plain)
        assert torch.equal(layer.weight.grad, of_weight)
        with torch.no_grad():
            assert not layer(x).requires_grad
        assert f"P_x={grid}" in repr(layer)


def in_order(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The same values, with dims from the outermost to the innermost in memory."""
    return x.permute(dims).contiguous().permute([dims.index(d) for d in range(x.dim())])


@on_ranks(2)
def test_any_order_in_memory(world: Partition) -> None:
    """Dims of length one may hide the order of the others: torch's own layers then get gradients wrong."""
    orders = ((0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2), (3, 0, 2, 1), (3, 1, 2, 0))
    kinds: tuple[tuple[str, dict[str, Any], bool], ...] = (
        ("batch", {}, True),
        ("batch", {}, False),
        ("instance", {"affine": True}, True),
        ("instance", {"affine": True, "track_running_stats": True}, False),
        ("layer", {"number": 2}, True),
        ("rms", {"number": 2}, True),
        ("group", {"number": 1}, True),
    )
    cases = (
        ((2, 2, 2, 2), (2, 1, 1, 1)),
        ((2, 2, 2, 2), (1, 1, 1, 2)),
        ((1, 4, 1, 4), (1, 1, 1, 2)),
        ((3, 2, 2, 1), (1,) * 4),
    )
    for (shape, grid), (kind, given, training) in product(cases, kinds):
        P = world.grid(grid)
        serial, layer = twins(P, kind, shape, **{"number": 0, **given})
        whole, g = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        x_serial, cuts = leaf(whole), P.bounds(shape)
        serial.train(training)(x_serial).backward(g)
        layer.train(training)
        for of_x, of_g in product(orders, orders) if P.active else ():
            x = in_order(block(whole, P, cuts), of_x).requires_grad_()
            layer.zero_grad()
            layer(x).backward(in_order(block(g, P, cuts), of_g))
            torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), **TOLERANCE)
            torch.testing.assert_close(
                layer.weight.grad, held(layer, "weight", serial.weight.grad, world.rank), **TOLERANCE
            )


@on_ranks(4)
def test_constructors_refuse(world: Partition) -> None:
    P = world.grid((2, 2))
    attempts: tuple[tuple[Callable[[], Any], str], ...] = (
        (
            lambda: dnn.DistributedLayerNorm(P, (2, 3, 4)),
            "DistributedLayerNorm: P_x of shape (2, 2) has too few axes for normalized_shape=(2, 3, 4)",
        ),
        (lambda: dnn.DistributedGroupNorm(P, 4, 6), "num_channels (6) must be divisible by num_groups (4)"),
        (lambda: dnn.DistributedGroupNorm(P, 0, 6), "DistributedGroupNorm: num_groups=0"),
        (
            lambda: dnn.DistributedGroupNorm(world.grid((4,)), 1, 6),
            "too few axes",
        ),
        (lambda: dnn.DistributedInstanceNorm(P, 6), "too few axes"),
    )
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)


@on_ranks(4)
def test_inputs_refused(world: Partition) -> None:
    P, lead = world.grid((2, 2, 1)), world.rank // 2
    one = "Expected more than 1 value per channel when training, got input size [1, 6, 1]"
    attempts = (
        (
            dnn.DistributedLayerNorm(P, (2, 4)),
            (1, 2, 4),
            "Given normalized_shape=[2, 4], expected input",
        ),
        (dnn.DistributedRMSNorm(P, 5), (1, 2, 4), "(2, 4, 4), normalized_shape=(5,)"),
        (dnn.DistributedRMSNorm(P, ()), (1, 2, 4), "(2, 4, 4), normalized_shape=()"),
        (dnn.DistributedGroupNorm(P, 2, 6), (1, 2, 4), "(2, 4, 4), num_groups=2, num_channels=6"),
        (dnn.DistributedGroupNorm(P, 6, 6), (1 - lead, 3, 1), one),
        (dnn.DistributedInstanceNorm(P, 6, affine=True), (1, 2, 4), "(2, 4, 4), num_features=6"),
        (
            dnn.DistributedInstanceNorm(P, 6),
            (1, 3, 1),
            "Expected more than 1 spatial element when training, got input size torch.Size([2, 6, 1])",
        ),
    )
    for layer, shape, text in attempts:
        assert_refused(world, P, lambda layer=layer, shape=shape: layer(torch.rand(shape)), text)
    layer = dnn.DistributedGroupNorm(P, 2, 6)
    for dtype, text in (
        (torch.float64, "the input has dtype torch.float64, weights and statistics torch.float32"),
        (torch.int64, "the input has dtype torch.int64, a floating dtype is needed"),
        (torch.complex64, "the input has dtype torch.complex64, a floating dtype is needed"),
    ):
        assert_refused(world, P, lambda dtype=dtype: layer(torch.ones(1, 3, 4, dtype=dtype)), text, TypeError)
    layer = dnn.DistributedInstanceNorm(P, 6)  # holds nothing that other channels would not fit
    assert layer(torch.rand(1, 2, 4)).shape == (1, 2, 4)


@on_ranks(2)
def test_gradients_near_and_far_from_zero(world: Partition) -> None:
    """In float32 as exact as float32 is: the mean, of which 1e4 would keep 5e-4, is rounded nowhere."""
    P = world.grid((1, 1, 2))
    for mean in (0.0, 15.0, 1e4):
        whole, g = torch.randn(4, 6, 16) + mean, torch.randn(4, 6, 16)
        serial, layer = torch.nn.BatchNorm1d(6, dtype=torch.float64), dnn.DistributedBatchNorm(P, 6)
        x_whole, x = leaf(whole.double()), leaf(block(whole, P, P.bounds(whole.shape)))
        serial(x_whole).backward(g.double())
        layer(x).backward(block(g, P, P.bounds(whole.shape)))
        wanted = block(x_whole.grad, P, P.bounds(whole.shape)).float()
        torch.testing.assert_close(x.grad, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.weight.grad, serial.weight.grad.float(), rtol=1e-5, atol=1e-5)


@on_ranks(2)
def test_what_follows_in_place(world: Partition) -> None:
    """An activation that overwrites the output changes the layer's own tensor, not a view that backward would copy."""
    for kind, shape, grid, given in CASES:
        P = world.grid((2,) + (1,) * (len(grid) - 1))
        serial, layer = twins(P, kind, shape, **given)
        whole = torch.randn(shape, dtype=torch.float64)
        x_whole, x = leaf(whole), leaf(block(whole, P, P.bounds(shape)))
        torch.relu_(serial(x_whole)).sum().backward()
        y = torch.relu_(layer(x))
        assert not y._is_view() or "Rows" not in layer._distdl_plan.compiler.names
        y.sum().backward()
        torch.testing.assert_close(x.grad, block(x_whole.grad, P, P.bounds(shape)), **TOLERANCE)


@on_ranks(2)
def test_equal_values_leave_nothing(world: Partition) -> None:
    """As with torch's layer norm, not the rounding error of 50 times 316."""
    P = world.grid((1, 2))
    for affine in (False, True):
        layer = dnn.DistributedLayerNorm(P, 4, elementwise_affine=affine)
        assert not layer(torch.full((3, 2), 50.3)).any()


@on_ranks(2)
def test_no_channels(world: Partition) -> None:
    for P in (world.grid((1, 1, 1)), world.grid((1, 1, 2))):
        x = torch.zeros(2, 0, 3, requires_grad=True) if P.active else dl.zero_volume_tensor()
        y = dnn.DistributedGroupNorm(P, 1, 0)(x)
        assert y.shape == x.shape
        if P.active:
            y.sum().backward()
            assert x.grad is not None


@on_ranks(2)
def test_weights_of_an_input_without_gradient(world: Partition) -> None:
    """In channels_last memory, where torch's kernel of GroupNorm ends the process."""
    x, g = torch.randn(4, 4, 4, 3).contiguous(memory_format=torch.channels_last), torch.randn(4, 4, 4, 3)
    serial = torch.nn.GroupNorm(2, 4)
    serial(x.contiguous()).backward(g)
    for P in (world.grid((1, 1, 1, 1)), world.grid((2, 1, 1, 1))):
        if P.active:
            layer = dnn.DistributedGroupNorm(P, 2, 4)
            block = P.block(x.shape)
            layer(x[block]).backward(g[block])
            torch.testing.assert_close(layer.weight.grad, serial.weight.grad)
