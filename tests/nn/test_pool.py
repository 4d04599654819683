"""Pools against torch's, with blocks of all sizes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, assert_second_gradients, assert_twins, integers

import distdl_lite as dl
from distdl_lite.nn.pool import adaptive_pool, pool
from distdl_lite.testing import count

ROUNDING = 1e-14  # averages: the order of the sums differs


def twin(name: str, P: dl.CartesianPartition, options: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    module = adaptive_pool if "Adaptive" in name else pool
    return getattr(module, f"Distributed{name}")(P, **options), getattr(torch.nn, name)(**options)


CASES: list[tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ("MaxPool1d", {"kernel_size": 1, "stride": 2}, (1, 1, 4), (2, 2, 9)),
    ("MaxPool1d", {"kernel_size": 2, "padding": 1}, (1, 1, 4), (1, 2, 7)),
    ("MaxPool1d", {"kernel_size": 3}, (1, 1, 4), (1, 2, 7)),  # fewer outputs than ranks, points nobody reads
    ("AvgPool1d", {"kernel_size": 7, "stride": 1, "padding": 3}, (1, 1, 4), (1, 2, 5)),  # several hops
    ("AvgPool1d", {"kernel_size": 2}, (1, 1, 4), (0, 2, 7)),
    ("AvgPool1d", {"kernel_size": 1}, (1, 1, 4), (2, 2, 3)),  # a rank without input
    ("MaxPool2d", {"kernel_size": 3, "dilation": 2, "padding": 1, "stride": 1}, (1, 1, 2, 2), (2, 2, 7, 6)),
    ("MaxPool2d", {"kernel_size": 2, "ceil_mode": True}, (1, 1, 2, 2), (1, 3, 7, 5)),
    (
        "AvgPool2d",
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        (2, 1, 1, 2),
        (3, 2, 7, 7),
    ),
    ("AvgPool2d", {"kernel_size": 2, "stride": 3, "ceil_mode": True, "padding": 1}, (1, 1, 4, 1), (1, 2, 10, 6)),
    ("AvgPool2d", {"kernel_size": (3, 2), "divisor_override": 5}, (1, 2, 2, 1), (1, 3, 8, 8)),
    ("MaxPool3d", {"kernel_size": 3, "stride": 1, "padding": 1}, (1, 1, 2, 1, 2), (1, 2, 3, 4, 5)),
    ("AvgPool3d", {"kernel_size": 3, "stride": 2, "padding": 1}, (1, 1, 1, 2, 2), (1, 1, 4, 5, 6)),
    ("AdaptiveAvgPool2d", {"output_size": 1}, (1, 1, 2, 2), (2, 2, 5, 3)),
    ("AdaptiveMaxPool2d", {"output_size": (3, None)}, (1, 1, 2, 2), (2, 2, 7, 5)),
]


@on_ranks(4, mpi=True)
def test_awkward(world: dl.Partition) -> None:
    """Named cases, on threads and on MPI ranks."""
    for name, options, grid, shape in CASES:
        P = world.grid(grid)
        assert_twins(*twin(name, P, options), integers(*shape), P, tolerance=0 if "Max" in name else ROUNDING)


@on_ranks(4)
def test_placement(world: dl.Partition) -> None:
    """Ranks outside the partition return what they pass; grids may be in any order of ranks."""
    for ranks, grid in (([3, 1], (1, 1, 2)), ([2], (1, 1, 1)), ([3, 0, 2], (1, 1, 3))):
        P = world.create_partition_inclusive(ranks).grid(grid)
        for name in ("MaxPool1d", "AvgPool1d"):
            assert_twins(*twin(name, P, {"kernel_size": 3, "padding": 1, "stride": 2}), integers(2, 2, 8), P)


@on_ranks(2)
def test_minus_infinity(world: dl.Partition) -> None:
    """The gradient of a window of nothing but -inf goes where the serial layer's goes."""
    P = world.grid((1, 1, 2, 1))
    x = torch.full((1, 1, 6, 4), -torch.inf, dtype=torch.float64)
    assert_twins(*twin("MaxPool2d", P, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}), x, P)


@on_ranks(2)
def test_dtypes(world: dl.Partition) -> None:
    """Integers have maxima; half precision averages round once."""
    P, square = world.grid((1, 1, 2)), world.grid((1, 1, 2, 1))
    options = {"kernel_size": 3, "padding": 1, "stride": 1}
    layer, serial = twin("MaxPool2d", square, options)
    x = integers(1, 2, 7, 5, dtype=torch.int64)
    assert torch.equal(layer(x[square.block(x.shape)]), serial(x)[square.block(x.shape)])
    for name in ("AvgPool1d", "MaxPool1d"):
        assert_twins(*twin(name, P, options), torch.randn(1, 2, 7).bfloat16(), P)


@on_ranks(3)
def test_indices_where_nothing_is_pooled(world: dl.Partition) -> None:
    """A rank without outputs, and one outside the partition, get pairs too; integers have places, where torch pools them."""
    P = world.grid((1, 1, 2))
    for name, size in (("MaxPool1d", {"kernel_size": 3}), ("AdaptiveMaxPool1d", {"output_size": 1})):
        layer, serial = twin(name, P, {**size, "return_indices": True})
        x = integers(1, 2, 4, dtype=torch.int64 if name == "MaxPool1d" else torch.float64)
        y, places = layer(P.cut(x))
        assert places.dtype is torch.int64
        if P.active:
            assert all(torch.equal(a, b[P.block(b.shape)]) for a, b in zip((y, places), serial(x), strict=True))
        assert "return_indices=True" in repr(layer)


@on_ranks(4)
def test_second_gradients(world: dl.Partition) -> None:
    """Double backward is the serial one's."""
    P = world.grid((1, 1, 2, 2))
    for name in ("MaxPool2d", "AvgPool2d"):
        layer, serial = twin(name, P, {"kernel_size": 3, "stride": 2, "padding": 1})
        assert_second_gradients(layer, serial, torch.randn(1, 2, 5, 6, dtype=torch.float64), P)
    for name in ("AdaptiveMaxPool2d", "AdaptiveAvgPool2d"):
        layer, serial = twin(name, P, {"output_size": (2, 3)})
        assert_second_gradients(layer, serial, torch.randn(1, 2, 5, 7, dtype=torch.float64), P)


@on_ranks(2)
def test_without_a_batch(world: dl.Partition) -> None:
    """In a network torch's pools take (C, *space) too."""
    for function, shape in (
        (lambda x: F.max_pool2d(x, 2), (4, 8, 6)),
        (lambda x: F.avg_pool2d(x, (2, 3)), (4, 8, 6)),
        (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (4, 8, 6)),
        (lambda x: F.adaptive_max_pool2d(x, (3, 2)), (4, 8, 6)),
        (lambda x: F.max_pool1d(x, 2), (4, 8)),
    ):
        x, P = integers(*shape), world.grid((1, 2, *(1 for _ in shape[2:])))
        y = function(x)
        assert torch.equal(dl.distribute(function, P)(x[P.block(x.shape)]), y[P.block(y.shape)])


@on_ranks(2)
def test_no_message_where_none_is_needed(world: dl.Partition) -> None:
    """Aligned windows, and a cut of the batch alone, cost no communication."""
    for grid, shape in (((1, 1, 2), (2, 2, 8)), ((2, 1, 1), (2, 2, 7))):
        P = world.grid(grid)
        layer = pool.DistributedMaxPool1d(P, 2)
        x = integers(*shape)
        with count() as c:
            layer(x[P.block(shape)])
        assert c.messages == 0


@on_ranks(2)
def test_life(world: dl.Partition) -> None:
    """Shapes may change, layers be copied and pickled; the description names options and partition."""
    P = world.grid((1, 1, 2))
    layer, serial = twin("AvgPool1d", P, {"kernel_size": 3, "padding": 1, "stride": 1})
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for n in (5, 8, 5):
            assert_twins(module, serial, integers(1, 1, n), P, tolerance=ROUNDING)
    assert "kernel_size=(3,)" in repr(layer)
    assert "P_x=(1, 1, 2)" in repr(layer)


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 1, 2))
    square = world.create_partition_inclusive([0, 2]).grid((1, 1, 1, 2))

    def with_input(make: Any, x: torch.Tensor) -> Any:
        return lambda: make()(P.cut(x))

    x = integers(1, 1, 7)
    attempts: list[tuple[Any, str]] = [
        (with_input(lambda: adaptive_pool.DistributedAdaptiveAvgPool1d(P, 0), x), "output_size=(0,)"),
        (lambda: pool.DistributedMaxPool2d(P, 2), "has 3 axes"),
        (with_input(lambda: adaptive_pool.DistributedAdaptiveAvgPool1d(P, -1), x), "output_size=-1"),
        (with_input(lambda: pool.DistributedMaxPool1d(P, 2, padding=2), x), "padding=2"),
        (with_input(lambda: pool.DistributedMaxPool1d(P, 2, stride=0), x), "stride=0"),
        (with_input(lambda: pool.DistributedMaxPool1d(P, (2, 2)), x), "kernel_size=(2, 2)"),
        (with_input(lambda: pool.DistributedMaxPool1d(P, 9), integers(1, 1, 7)), "kernel_size=9"),
        (with_input(lambda: pool.DistributedMaxPool1d(P, 2, padding=1, dilation=2), integers(1, 1, 1)), "but padding"),
        (with_input(lambda: pool.DistributedMaxPool1d(P, 1), integers(1, 1, 0)), "(1, 1, 0)"),
    ]
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)
    override: Any = {"divisor_override": 2}
    assert_refused(world, P, lambda: pool.DistributedAvgPool1d(P, 2, **override), "divisor_override=2", TypeError)
    flat = torch.ones((1, 1, 7, 4) if square.active else (0,))
    divided = lambda: pool.DistributedAvgPool2d(square, 2, divisor_override=0)(flat)  # noqa: E731
    assert_refused(world, square, divided, "divisor_override=0")
    cube = world.create_partition_inclusive([0, 2]).grid((2, 1, 1, 1, 1))
    short = torch.zeros((1, 1, 2, 4, 4) if cube.active else (0,))  # which padding would make long enough
    layer = pool.DistributedAvgPool3d(cube, 3, padding=1)
    assert_refused(world, cube, lambda: layer(short), "smaller than kernel size")
    cube = world.create_partition_inclusive([0, 2]).grid((1, 1, 2, 1, 1))
    half = torch.ones(1, 1, 1, 2, 2).bfloat16()  # rank 2 has no outputs, and would call nothing of torch that refuses
    block = cube.cut(half)
    assert_refused(world, cube, lambda: pool.DistributedAvgPool3d(cube, 1)(block), "torch.bfloat16", TypeError)
    whole = with_input(lambda: pool.DistributedAvgPool1d(P, 2), integers(1, 1, 7, dtype=torch.int64))
    assert_refused(world, P, whole, "torch.int64", TypeError)


@on_ranks(2)
def test_checkpoints_where_nothing_moves(world: dl.Partition) -> None:
    """The input of one rank requires grad; the checkpoint runs the layer again, and agrees again, on both."""
    P = world.grid((1, 1, 2))
    adaptive = adaptive_pool.DistributedAdaptiveAvgPool1d(P, 4)
    for layer in (pool.DistributedAvgPool1d(P, 2), pool.DistributedMaxPool1d(P, 2), adaptive):
        x = integers(1, 2, 4).requires_grad_(world.rank == 0)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert (x.grad is not None) == (world.rank == 0)
