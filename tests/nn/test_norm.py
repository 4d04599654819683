"""Batch normalisation: statistics of the whole tensor on any partition.

Compared to 1e-9 in float64: sums of a few numbers near one, in another order than torch's.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from blocks import block, check_held, cuts_of, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
from distdl_lite.nn import DistributedBatchNorm
from distdl_lite.nn.norm import normalised
from distdl_lite.nn.norm.normalised import _composed
from distdl_lite.partition import Partition

CLASSES = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
HALVES = (torch.float16, torch.bfloat16)
CASES = (  # shape, grid, ranks
    ((6, 3), (4, 1), (0, 1, 2, 3)),
    ((3, 5), (2, 2), (3, 1, 0, 2)),
    ((2, 1, 7), (1, 1, 4), (0, 1, 2, 3)),
    ((3, 3, 2), (4, 1, 1), (0, 1, 2, 3)),
    ((2, 3, 5, 3), (1, 2, 2, 1), (0, 1, 2, 3)),
    ((1, 2, 3, 4), (1, 1, 1, 3), (1, 2, 3)),
    ((2, 1, 3, 4), (1, 2, 1, 2), (0, 1, 2, 3)),
    ((2, 5, 3, 2), (1, 4, 1, 1), (0, 1, 2, 3)),
    ((2, 2, 3, 2, 3), (1, 1, 2, 1, 2), (0, 1, 2, 3)),
    ((4, 3, 2), (1, 1, 1), (2,)),
    ((0, 3, 2), (2, 1, 1), (0, 1)),
)
OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.3, "momentum": 0.4})
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def twins(P: Partition, shape: tuple[int, ...], options: dict) -> tuple[torch.nn.Module, DistributedBatchNorm]:
    """torch's layer and ours with its values."""
    serial = CLASSES[len(shape)](shape[1], dtype=torch.float64, **options)
    layer = DistributedBatchNorm(P, shape[1], dtype=torch.float64, **options)
    assert list(layer.state_dict()) == list(serial.state_dict())
    with torch.no_grad():
        for p in serial.parameters():
            p.uniform_(-1, 2)
    dl.load_serial_state_dict(layer, serial.state_dict())
    return serial, layer


@on_ranks(4, mpi=True)
def test_equals_serial(world: Partition) -> None:
    rng = random.Random(0)
    for number, (shape, grid, ranks) in enumerate(CASES):
        for options in OPTIONS if number < 3 else OPTIONS[number % 2 :: 3]:
            P = world.grid(grid, ranks)
            serial, layer = twins(P, shape, options)
            for step, training in enumerate((True, True, False)):
                serial.train(training)
                layer.train(training)
                cuts = cuts_of(shape, grid, rng if (number + step) % 2 else None)
                whole = torch.randn(shape, dtype=torch.float64) * 3 + 50
                g = torch.randn(shape, dtype=torch.float64)
                x_serial, x = leaf(whole), leaf(block(whole, P, cuts))
                y_serial, y = serial(x_serial), layer(x)
                y_serial.backward(g)
                y.backward(block(g, P, cuts))
                if P.active:
                    torch.testing.assert_close(y, block(y_serial, P, cuts), **TOLERANCE)
                    torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), **TOLERANCE)
                check_held(layer, serial, world.rank, **TOLERANCE)


@on_ranks(4, mpi=True)
def test_double_backward(world: Partition) -> None:
    for shape, grid, ranks in CASES[:-1]:
        P = world.grid(grid, ranks)
        serial, layer = twins(P, shape, {"affine": shape[0] > 1})
        whole, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        cuts = P.bounds(shape)
        x_serial, x = leaf(whole), leaf(block(whole, P, cuts))
        for model, start, w in ((serial, x_serial, weight), (layer, x, block(weight, P, cuts))):
            if start.numel() or P.active:
                leaves = [start, *(p for p in model.parameters())]
                gradients = torch.autograd.grad((model(start) ** 2 * w).sum(), leaves, create_graph=True)
                sum(gradient.square().sum() for gradient in gradients).backward()
        if P.active:
            # The composition takes the variance about a pivot: 1e-7 of the largest gradient is what is left of it.
            scale = 1e-7 * x_serial.grad.abs().max().item()
            torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), rtol=1e-7, atol=scale)
            check_held(layer, serial, world.rank, rtol=1e-7, atol=scale)


@on_ranks(4)
def test_the_fused_function_is_the_composition(world: Partition) -> None:
    P = world.grid((2, 1, 2))
    layer = DistributedBatchNorm(P, 3, dtype=torch.float64)
    x, g = leaf(torch.randn(2, 3, 4, dtype=torch.float64) + world.rank), torch.randn(2, 3, 4, dtype=torch.float64)
    y = layer(x)
    rows = layer._distdl_plan.compiler.names["Rows"]
    plain = _composed(x, layer.weight, layer.bias, torch.zeros(3, dtype=torch.float64), layer.eps, rows)
    torch.testing.assert_close(y, plain, **TOLERANCE)
    (fused,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(fused, torch.autograd.grad(plain, x, g)[0], **TOLERANCE)


@on_ranks(4, mpi=True)
def test_variance_far_from_zero(world: Partition) -> None:
    """Float32 values of mean 1e4 have a float32 variance right to 1e-6, where E[x^2] - E[x]^2 is off by more than it is."""
    whole = torch.randn(8, 2, 50) + 1e4
    wanted = whole.double().var((0, 2))
    P = world.grid((4, 1, 1))
    layer = DistributedBatchNorm(P, 2, momentum=1.0)
    for _ in range(2):  # about the pivots 0 and the running mean
        y = layer(block(whole, P, P.bounds(whole.shape)))
        torch.testing.assert_close(layer.running_var.double(), wanted, rtol=1e-6, atol=0)
    # The mean, 1e4, is rounded to float32, which is 5e-4; torch's layer does the same.
    serial = torch.nn.functional.batch_norm(whole, None, None, training=True)
    torch.testing.assert_close(y, block(serial, P, P.bounds(whole.shape)), rtol=0, atol=3e-3)


def test_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, of which no wide copy is made, by taking small ones for large."""
    monkeypatch.setattr(normalised, "_AT_ONCE", 5)
    for test in (test_variance_far_from_zero, test_dtypes_formats_and_life, test_the_fused_function_is_the_composition):
        test("threads")


@on_ranks(2)
def test_variance_of_large_blocks(world: Partition) -> None:
    """Far from zero, and with an outlier as the value that the others are seen from."""
    P = world.grid((1, 1, 2))
    for dtype, tolerance in ((torch.float32, 2e-8), (torch.float64, 1e-10)):  # n times 2e-16 at worst
        whole = torch.randn(2, 3, 2 * normalised._AT_ONCE, dtype=dtype) + 1e4
        whole[0, 2, 0] = -1e6
        layer, x = DistributedBatchNorm(P, 3, dtype=dtype), block(whole, P, P.bounds(whole.shape))
        layer(x)
        mean, var = normalised.statistics(x, None, layer._distdl_plan.compiler.names["Rows"])
        torch.testing.assert_close(mean, whole.double().mean((0, 2)), rtol=1e-12, atol=0)
        torch.testing.assert_close(var, whole.double().var((0, 2), correction=0), rtol=tolerance, atol=0)


@on_ranks(4)
def test_collectives(world: Partition) -> None:
    """One all-reduce forward and one backward in training, none with running statistics."""
    P = world.grid((2, 1, 2))
    for dtype in (torch.float32, torch.float64):
        layer = DistributedBatchNorm(P, 3, dtype=dtype)
        x = leaf(torch.rand(2, 3, 4, dtype=dtype))
        layer(x).sum().backward()
        with dl.testing.count() as training:
            y = layer(x)
            assert training.messages == 1
            y.sum().backward()
        assert training.messages == 2
        layer.eval()
        with dl.testing.count() as evaluating:
            layer(x)
        assert evaluating.messages == 0


@on_ranks(4)
def test_a_rank_whose_input_needs_no_gradient(world: Partition) -> None:
    P = world.grid((4, 1))
    for affine in (True, False):
        layer = DistributedBatchNorm(P, 2, affine=affine)
        x = torch.rand(3, 2, requires_grad=world.rank == 1)
        layer(x).square().sum().backward()
        assert (x.grad is not None) == (world.rank == 1)


@on_ranks(2)
def test_dtypes_formats_and_life(world: Partition) -> None:
    P = world.grid((2, 1, 1, 1))
    serial, layer = torch.nn.BatchNorm2d(3), DistributedBatchNorm(P, 3)
    whole, g = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    for kind in (torch.float32, *HALVES):
        for fmt in (torch.contiguous_format, torch.channels_last):
            x_serial, cuts = leaf(whole.to(kind).to(memory_format=fmt)), P.bounds(whole.shape)
            x = leaf(block(x_serial, P, cuts).contiguous(memory_format=fmt))
            y_serial, y = serial(x_serial), layer(x)
            y_serial.backward(g.to(kind))
            y.backward(block(g, P, cuts).to(kind))
            torch.testing.assert_close(y, block(y_serial, P, cuts))  # the dtype's default tolerance
            assert y.is_contiguous(memory_format=fmt)
            # torch rounds to the half type on the way, ours is computed in float32.
            atol = 2 * torch.finfo(kind).eps if kind in HALVES else 1e-5
            torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), rtol=1e-3, atol=atol)
    torch.testing.assert_close(layer.running_var, serial.running_var)
    layer.zero_grad()
    layer(x).sum().backward()  # a gradient of stride 0
    x = leaf(torch.randn(2, 3, 5, 6))
    assert torch.equal(copy.deepcopy(layer)(x), pickle.loads(pickle.dumps(layer))(x))
    layer.zero_grad()
    layer(x).square().sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(lambda x: layer(x * 1), x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, plain)  # about another pivot
    assert layer.gamma is layer.weight
    assert layer.beta is layer.bias
    assert "3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, P_x=(2, 1, 1, 1)" in repr(layer)


@on_ranks(2, mpi=True)
def test_batches_of_nothing_in_a_checkpoint(world: Partition) -> None:
    """A batch is counted again where torch's is run again: of no values it saves the weight alone, if there is one."""
    bodies: tuple[Callable[..., torch.Tensor], ...] = (
        lambda x, norm: norm(x * 1),
        lambda x, norm: norm(x * 1).square(),
    )
    grids, again = [(2, 1, 1), (1, 2, 1), (1, 1, 2)], []
    for shape, affine, grid, body in product([(0, 4, 3), (2, 4, 0)], (True, False), grids, bodies):
        P = world.grid(grid)
        layer, serial = DistributedBatchNorm(P, 4, affine=affine), torch.nn.BatchNorm1d(4, affine=affine)
        for norm, x in ((layer, torch.ones(shape)[P.block(shape)]), (serial, torch.ones(shape))):
            x = x.requires_grad_(norm is serial or world.rank == 1)
            y = checkpoint(body, x, norm, use_reentrant=False)
            if y.requires_grad:
                y.sum().backward()
            assert (x.grad is not None) == x.requires_grad
        assert layer.num_batches_tracked == serial.num_batches_tracked
        again.append(layer.num_batches_tracked.item())
    assert set(again) == {1, 2}


@on_ranks(4)
def test_running_statistics_are_found_anew(world: Partition) -> None:
    """As torch.optim.swa_utils.update_bn does for torch's layers, on ranks without channels too."""
    batches = torch.rand(3, 4, 3, 5, dtype=torch.float64)
    serial = torch.nn.Sequential(torch.nn.BatchNorm1d(3, dtype=torch.float64))
    for grid in ((1, 4, 1), (2, 1, 2)):
        P = world.grid(grid)
        layer = DistributedBatchNorm(P, 3, dtype=torch.float64)
        mine = [block(x, P, P.bounds(x.shape)) for x in batches]
        layer(mine[0] + 7)
        layer.reset_running_stats()
        layer.momentum = None
        for x in mine:
            layer(x)
        torch.optim.swa_utils.update_bn(list(batches), serial)
        found = dl.serial_state_dict(torch.nn.Sequential(layer))
        for name, value in serial.state_dict().items() if found else ():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    bare = DistributedBatchNorm(P, 3, track_running_stats=False)
    bare.reset_running_stats()
    assert bare.running_mean is None


@on_ranks(2)
def test_tracking_is_switched(world: Partition) -> None:
    P, cuts = world.grid((1, 2)), [(0, 4), (0, 1, 3)]  # of channels held otherwise
    serial, layer = twins(P, (4, 3), {})
    x = torch.randn(4, 3, dtype=torch.float64)
    for tracks in (False, True, False, True):
        serial.track_running_stats = layer.track_running_stats = tracks
        torch.testing.assert_close(layer(block(x, P, cuts)), block(serial(x), P, cuts), **TOLERANCE)
        rows = P.block((3,) * 2)[1]
        torch.testing.assert_close(layer.running_var, serial.running_var[rows], **TOLERANCE)
        assert layer.num_batches_tracked == serial.num_batches_tracked
    for norm in (serial, layer):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    torch.testing.assert_close(layer(block(x, P, cuts)), block(serial(x), P, cuts), **TOLERANCE)


@on_ranks(4)
def test_refusals(world: Partition) -> None:
    P = world.grid((2, 2, 1), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="too few axes"):
        DistributedBatchNorm(world.grid((4,)), 3)
    layer = DistributedBatchNorm(P, 3)
    with pytest.raises(ValueError, match="running_mean should contain 4 elements not 3"):
        layer(torch.rand(2, 2, 4))
    with pytest.raises(TypeError, match=r"the input has dtype torch\.float64, weights and statistics torch\.float32"):
        layer(torch.rand(2, 2 - P.index[1], 4).double())
    one = torch.rand(1 - P.index[0], 2 - P.index[1], 1)
    text = r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3, 1\]\)"
    with pytest.raises(ValueError, match=text):
        layer(one)
    assert layer.eval()(one).shape == one.shape
