"""Batch normalisation over the samples of all ranks, against torch's BatchNorm on the whole batch.

Compared to 1e-10 in float64: sums of a few numbers near one, in another order than torch's.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from blocks import check_held, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.partition import Partition

CLASSES = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.3, "bias": False})
COUNTS = {2: ([4, 1], [0, 3], [3, 0], [2, 2]), 3: ([4, 1, 2], [0, 3, 2], [0, 0, 3], [3, 1, 0], [2, 2, 2])}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def samples(whole: torch.Tensor, counts: Sequence[int], rank: int) -> torch.Tensor:
    return whole.split(list(counts))[rank].clone()


def twins(P: Partition | None, shape: Sequence[int], options: dict) -> tuple[torch.nn.Module, dl.SyncBatchNorm]:
    serial = CLASSES[len(shape)](shape[1], dtype=torch.float64, **options)
    with torch.no_grad():
        for p in serial.parameters():
            p.uniform_(-1, 2)
    layer = dl.SyncBatchNorm(shape[1], **options, P=P, dtype=torch.float64)
    assert list(layer.state_dict()) == list(serial.state_dict())
    layer.load_state_dict(serial.state_dict())
    return serial, layer


def check_equals_serial(world: Partition) -> None:
    for number, counts in enumerate(COUNTS[world.size]):
        for dims in (2, 3, 4, 5):
            shape = (sum(counts), 3, 4, 2, 3)[:dims]
            for options in OPTIONS if dims == 4 else OPTIONS[(number + dims) % 5 :: 5]:
                is_ambient = number % 2 and world.size == Partition().size
                serial, layer = twins(None if is_ambient else world, shape, options)
                for training in (True, True, False):
                    serial.train(training)
                    layer.train(training)
                    whole = torch.randn(shape, dtype=torch.float64) * 2 + 1
                    g = torch.randn(shape, dtype=torch.float64)
                    x_serial, x = leaf(whole), leaf(samples(whole, counts, world.rank))
                    y_serial, y = serial(x_serial), layer(x)
                    y_serial.backward(g)
                    y.backward(samples(g, counts, world.rank))
                    torch.testing.assert_close(y, samples(y_serial, counts, world.rank), **TOLERANCE)
                    torch.testing.assert_close(x.grad, samples(x_serial.grad, counts, world.rank), **TOLERANCE)
                    check_held(layer, serial, world.rank, **TOLERANCE)


@pytest.mark.check("A21")
@on_ranks(2, mpi=True)
def test_equals_serial_on_two(world: Partition) -> None:
    check_equals_serial(world)


@pytest.mark.check("A21")
@on_ranks(3, mpi=True)
def test_equals_serial_on_three(world: Partition) -> None:
    check_equals_serial(world)


@on_ranks(3, mpi=True)
def test_double_backward(world: Partition) -> None:
    for counts in COUNTS[3]:
        shape = (sum(counts), 2, 3)
        serial, layer = twins(world, shape, {})
        whole, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        x_serial, x = leaf(whole), leaf(samples(whole, counts, world.rank))
        for model, start, w in ((serial, x_serial, weight), (layer, x, samples(weight, counts, world.rank))):
            y = model(start)
            gradients = torch.autograd.grad((y**2 * w).sum(), [start, *model.parameters()], create_graph=True)
            sum(gradient.square().sum() for gradient in gradients).backward()
        # The composition takes the variance about a pivot: 1e-7 of the largest gradient is what is left of it.
        scale = 1e-7 * x_serial.grad.abs().max().item()
        torch.testing.assert_close(x.grad, samples(x_serial.grad, counts, world.rank), rtol=1e-7, atol=scale)
        check_held(layer, serial, world.rank, rtol=1e-7, atol=scale)


@on_ranks(4, mpi=True)
def test_grids_and_teams(world: Partition) -> None:
    """Space and channels cut too, ranks in an order of their own, ranks outside."""
    whole, g = torch.randn(5, 2, 4, 3, dtype=torch.float64), torch.randn(5, 2, 4, 3, dtype=torch.float64)
    for P in (world.grid((2, 1, 2)), world.grid((2, 2)), world.grid((3,), (3, 0, 2)), world.grid((1, 1, 1, 3))):
        serial = torch.nn.BatchNorm2d(2, dtype=torch.float64)
        layer = dl.SyncBatchNorm(2, P=P, dtype=torch.float64)
        grid = P.create_cartesian_topology_partition((*P.shape, 1, 1, 1)[:4])
        block = grid.block(whole.shape)
        x_serial, x = leaf(whole), leaf(grid.cut(whole))
        y_serial, y = serial(x_serial), layer(x)
        y_serial.backward(g)
        y.backward(grid.cut(g))
        if block is not None:
            torch.testing.assert_close(y, y_serial[block], **TOLERANCE)
            torch.testing.assert_close(x.grad, x_serial.grad[block], **TOLERANCE)
        check_held(layer, serial, world.rank, **TOLERANCE)


@on_ranks(4, mpi=True)
def test_samples_of_different_sizes(world: Partition) -> None:
    """As images of several scales, or speech: equal to torch's on all points as one sample."""
    cases = (
        ((4,), [(2, 3, 4, 5), (1, 3, 2, 2), (0, 3, 7, 1), (3, 3, 1, 9)]),
        ((4,), [(2, 3, 5), (0, 3, 0), (1, 3, 0), (1, 3, 1)]),
        ((2, 2), [(2, 2, 4, 5), (2, 1, 4, 5), (1, 2, 3, 2), (1, 1, 3, 2)]),  # channels cut too
    )
    for grid, shapes in cases:
        P = world.grid(grid)
        lines = [shapes[rank :: grid[1]] for rank in range(grid[1])] if len(grid) > 1 else [shapes]
        parts = [[torch.randn(shape, dtype=torch.float64) for shape in line] for line in lines]
        flat = [torch.cat([x.movedim(1, 0).flatten(1) for x in line], 1) for line in parts]
        whole = leaf(torch.cat(flat).unsqueeze(0))
        serial, layer = torch.nn.BatchNorm1d(3, dtype=torch.float64), dl.SyncBatchNorm(3, P=P, dtype=torch.float64)
        line, index = (world.rank % grid[-1], world.rank // grid[-1]) if len(grid) > 1 else (0, world.rank)
        x = leaf(parts[line][index])
        first, start = (
            sum(shape[1] for shape in shapes[:line]),
            sum(y.numel() // y.shape[1] for y in parts[line][:index]),
        )
        mine = slice(None), slice(first, first + x.shape[1]), slice(start, start + x.numel() // x.shape[1])
        for training in (True, False):
            y_whole, y = serial.train(training)(whole), layer.train(training)(x)
            whole.grad = x.grad = None
            (y_whole**3).sum().backward()
            (y**3).sum().backward()
            for found, wanted in ((y, y_whole), (x.grad, whole.grad)):
                torch.testing.assert_close(found.movedim(1, 0).flatten(1), wanted[mine][0], **TOLERANCE)
            check_held(layer, serial, world.rank, **TOLERANCE)


class Net(torch.nn.Module):
    """Norms of two kinds, one of them used twice, one frozen, one in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.BatchNorm2d(3))
        self.again = self.first[1]
        self.inner = torch.nn.ModuleDict(
            {"norm": torch.nn.BatchNorm1d(3, momentum=None), "head": torch.nn.Linear(3, 2)}
        )
        self.unused = torch.nn.BatchNorm3d(2, affine=False, track_running_stats=False)
        self.double()
        self.frozen = torch.nn.BatchNorm2d(3).eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.tanh(self.first(x)))
        x = self.frozen(x.float()).double()
        return self.inner["head"](self.inner["norm"](x.mean((2, 3))))


@pytest.mark.check("A21")
@on_ranks(3, mpi=True)
def test_converted_network_trains_as_on_one_rank(world: Partition) -> None:
    torch.manual_seed(world.rank)  # the ranks' values differ, and become those of rank 0
    net = Net()
    before = dict(net.named_parameters()), dict(net.named_buffers())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    assert dl.SyncBatchNorm.convert(net, world) is net
    assert net.again is net.first[1]
    kinds = {type(m).__name__ for m in net.modules()}
    assert "SyncBatchNorm" in kinds
    assert not any(name.startswith("BatchNorm") for name in kinds)
    after = dict(net.named_parameters()), dict(net.named_buffers())
    for old, new in zip(before, after, strict=True):
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)
    assert [net.frozen.training, net.frozen.weight.requires_grad, net.frozen.weight.dtype] == [
        False,
        False,
        torch.float32,
    ]
    assert net.inner["norm"].training
    assert net.inner["norm"].momentum is None
    torch.manual_seed(0)
    serial = Net()
    with torch.no_grad():  # the layers that are no norms are the user's to make equal
        for name, p in net.named_parameters():
            p.copy_(dict(serial.named_parameters())[name])
    serial_optimizer = torch.optim.SGD(serial.parameters(), lr=0.1, momentum=0.9)
    norms = {id(p) for m in net.modules() if isinstance(m, dl.SyncBatchNorm) for p in m.parameters()}
    for step in range(5):
        counts = COUNTS[3][step]
        whole, target = torch.randn(sum(counts), 1, 4, 4).double(), torch.randn(sum(counts), 2).double()
        for model, run, x, t in (
            (serial, serial_optimizer, whole, target),
            (net, optimizer, samples(whole, counts, world.rank), samples(target, counts, world.rank)),
        ):
            run.zero_grad()
            ((model(x) - t).square().sum() / len(whole)).backward()
            if model is net:  # as a container would
                for p in model.parameters():
                    if id(p) not in norms and p.grad is not None:
                        world.world_transport.all_reduce(world.team, p.grad)
            run.step()
    wanted = serial.state_dict()
    for name, value in net.state_dict().items():
        # float32 in the frozen layer
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)


@on_ranks(2, mpi=True)
def test_converting_one_layer(world: Partition) -> None:
    for kind in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm):
        norm = kind(3, eps=0.1, momentum=0.3, bias=False, dtype=torch.bfloat16).eval()
        norm.running_mean.fill_(world.rank + 1.0)
        layer = dl.SyncBatchNorm.convert(norm, None if world.size == Partition().size else world)
        assert isinstance(layer, dl.SyncBatchNorm)
        assert (layer.eps, layer.momentum, layer.bias, layer.training) == (0.1, 0.3, None, False)
        assert layer.weight is norm.weight
        assert layer.running_mean is norm.running_mean
        assert layer.running_mean.tolist() == [1.0] * 3
        assert layer.running_var.dtype is torch.bfloat16
    untouched = torch.nn.Linear(2, 2)
    assert dl.SyncBatchNorm.convert(untouched) is untouched
    alone = dl.SyncBatchNorm.convert(torch.nn.BatchNorm1d(3), world.grid((1,)))
    assert alone.weight.numel() == (3 if world.rank == 0 else 0)
    assert alone(torch.rand(4, 3) if world.rank == 0 else dl.zero_volume_tensor()).numel() == 12 * (world.rank == 0)


@on_ranks(2)
def test_life_and_changing_dims(world: Partition) -> None:
    layer = dl.SyncBatchNorm(3, P=world)
    x = leaf(torch.randn(2, 3))
    assert layer(x).shape == (2, 3)
    assert layer(torch.randn(1 + world.rank, 3, 4, 5)).shape == (1 + world.rank, 3, 4, 5)
    with dl.count() as counted:
        layer(x).square().sum().backward()
    assert counted.collectives == 2
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied(x), layer(x))
    x.grad = None
    layer(x).square().sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(lambda x: layer(x * 1), x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, plain)
    x = torch.randn(2, 3, requires_grad=world.rank == 1)
    layer(x).square().sum().backward()
    assert (x.grad is None) == (world.rank == 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype is torch.bfloat16
    assert "SyncBatchNorm(num_features=3, eps=1e-05" in repr(layer)


@on_ranks(2, mpi=True)
def test_refusals(world: Partition) -> None:
    layer = dl.SyncBatchNorm(3, P=world)
    one = torch.rand(1 - world.rank, 3)
    cases = (
        (lambda: layer(one), "SyncBatchNorm: Expected more than 1 value per channel when training, got input size"),
        (lambda: layer(torch.rand(2, 4)), "SyncBatchNorm: running_mean should contain 4 elements not 3"),
        (
            lambda: layer(torch.rand(1, 2 + world.rank, 1 + world.rank)),
            "SyncBatchNorm: the blocks form no tensor product",
        ),
        (
            lambda: layer(torch.rand(1 - world.rank, 3, 1 + world.rank)),
            "SyncBatchNorm: Expected more than 1 value per channel",
        ),
        (lambda: layer(torch.rand(4)), "SyncBatchNorm: expected at least 2D input (got 1D input)"),
        (lambda: layer(torch.rand((2, 3) if world.rank else (2, 3, 1))), "SyncBatchNorm: the ranks disagree"),
        (
            lambda: dl.SyncBatchNorm(3, P=world.grid((1, 1, 2)))(torch.rand(2, 3)),
            "a tensor of shape (2, 3) has 2 dims, its partition of shape (1, 1, 2) has 3 axes",
        ),
        (
            lambda: dl.SyncBatchNorm.convert(torch.nn.BatchNorm1d(4), world.grid((1, 2))),
            "SyncBatchNorm.convert keeps whole weights, which P of shape (1, 2) cuts by channels",
        ),
        (lambda: dl.SyncBatchNorm.convert(torch.nn.LazyBatchNorm1d(), world), "has not seen data"),
    )
    for attempt, text in cases:
        assert_refused(world, world, attempt, text)
    assert_refused(world, world, lambda: layer("x"), "SyncBatchNorm: rank 0 passed str", TypeError)
