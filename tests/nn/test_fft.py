"""Fourier transforms against torch's, with blocks of all sizes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import torch
from blocks import block, cuts_of, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.factors import axes_of, blocks
from distdl_lite.grid import Grid
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.shape import fft
from distdl_lite.testing import adjoint_test, count

ROUNDING = 1e-13  # the order of the transforms differs


def transform(x: torch.Tensor, function: str, dim: Any, s: Any = None, norm: Any = None) -> torch.Tensor:
    return getattr(torch.fft, f"{function}n")(x, s=s, dim=dim, norm=norm)


def assert_transformed(layer: fft.DistributedFFT, x: torch.Tensor, cuts: Any, P: dl.CartesianPartition) -> None:
    """Compare block and gradient with those of torch's transform of the whole tensor."""
    x_local, x_whole = leaf(block(x, P, cuts)), leaf(x)
    y, whole = layer(x_local), transform(x_whole, layer.function, layer.dim, layer.s, layer.norm)
    if not P.active:
        assert y is x_local
        return
    torch.testing.assert_close(y, whole[P.block(whole.shape)], rtol=0, atol=ROUNDING * x.numel())
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(whole.shape, dtype=whole.dtype, generator=generator)
    whole.backward(g)
    y.backward(g[P.block(g.shape)])
    torch.testing.assert_close(x_local.grad, block(x_whole.grad, P, cuts), rtol=0, atol=ROUNDING * x.numel())


def exchanges_of(layer: fft.DistributedFFT, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How often its program moves a tensor in balanced blocks."""
    grid = layer.P_x.grid_of_ranks
    c = Compiler(grid, grid.ranks[0])
    y = layer.rule(c, c.new(blocks(shape, range(grid.dim), grid), dtype, False))
    c.move(y, blocks(y.shape, range(grid.dim), grid))
    return len(c.movements)


@on_ranks(4, mpi=True)
def test_cases(world: dl.Partition) -> None:
    """Two exchanges where one grid leaves the dims whole, one where a first transform needs none; adjoints are exact."""
    cases: list[tuple[tuple[int, ...], tuple[int, ...], str, tuple[int, ...], int]] = [
        ((1, 1, 2, 2), (2, 6, 8, 10), "rfft", (2, 3), 2),
        ((1, 1, 2, 2), (1, 1, 8, 10), "rfft", (2, 3), 3),
        ((1, 1, 2, 2), (1, 1, 8, 10), "irfft", (3, 2), 3),
        ((2, 2, 1), (5, 6, 7), "fft", (0, 1, 2), 2),
        ((4, 1, 1), (5, 6, 7), "fft", (0, 1, 2), 2),
        ((1, 1, 4), (4, 4, 4), "ifft", (0, 1), 0),
    ]
    for grid, shape, function, dim, exchanges in cases:
        P = world.grid(grid)
        layer = dnn.DistributedFFT(P, function, dim)
        dtype = torch.float64 if function == "rfft" else torch.complex128
        x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        assert_transformed(layer, x, cuts_of(shape, grid), P)
        assert exchanges_of(layer, shape, dtype) == exchanges
        if function.endswith("fft") and function[0] in "fi" and function != "irfft":
            assert adjoint_test(layer, x[P.block(shape)], P=P) < 1e-14


@on_ranks(4)
def test_messages(world: dl.Partition) -> None:
    """Only the ranks of a line exchange: three others of four along the dim, one of two."""
    for grid, messages in (((1, 4), 6), ((2, 2), 2)):
        P = world.grid(grid)
        x = torch.randn(8, 8)[P.block((8, 8))]
        layer = dnn.DistributedFFT(P, dim=1)
        layer(x)
        with count() as c:
            layer(x)
        assert c.messages == messages


@on_ranks(4)
def test_second_gradients(world: dl.Partition) -> None:
    """Double backward is the serial one's, also where a rank holds nothing."""
    for grid, shape in (((1, 1, 2, 2), (1, 1, 6, 5)), ((1, 4), (3, 6))):
        P = world.grid(grid)
        layer = dnn.DistributedFFT(P, "rfft", (-2, -1) if len(grid) == 4 else -1)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        x_local, x_whole = leaf(x[P.block(shape)]), leaf(x)
        for module, start in ((layer, x_local), (lambda z, layer=layer: transform(z, "rfft", layer.dim), x_whole)):
            (g,) = torch.autograd.grad(module(start).abs().pow(3).sum(), start, create_graph=True)
            g.square().sum().backward()
        torch.testing.assert_close(x_local.grad, x_whole.grad[P.block(shape)], rtol=1e-10, atol=1e-10)


@on_ranks(4)
def test_placement_and_life(world: dl.Partition) -> None:
    """Ranks in any order and outside, empty batches, integers, copies, checkpoints, one rank's gradient alone."""
    P = world.create_partition_inclusive([3, 1, 0]).grid((1, 3))
    layer = dnn.DistributedFFT(P, "rfft", 1, 6, "ortho")
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for rows in (4, 2, 7):
            x = torch.randn(5, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)).T
            assert_transformed(module, x, cuts_of(x.shape, P.shape), P)
    assert "function='rfft', dim=(1,), s=(6,), norm='ortho', P_x=(1, 3)" in repr(layer)
    if not P.active:
        return
    assert layer(torch.zeros(0, 5)[P.block((0, 5))]).shape == (0, 2 if P.rank == 0 else 1)
    whole = torch.arange(15).view(3, 5)
    y = transform(whole, "rfft", (1,), (6,), "ortho")
    torch.testing.assert_close(layer(whole[P.block((3, 5))]), y[P.block(y.shape)])
    x = torch.rand(3, 5, dtype=torch.float64)
    x_local, x_whole = leaf(x[P.block((3, 5))]), leaf(x)
    checkpoint(lambda z: layer(z * z), x_local, use_reentrant=False).abs().sum().backward()
    transform(x_whole * x_whole, "rfft", (1,), (6,), "ortho").abs().sum().backward()
    torch.testing.assert_close(x_local.grad, x_whole.grad[P.block((3, 5))])
    x_local = x[P.block((3, 5))].requires_grad_(P.rank == 1)
    layer(x_local).abs().sum().backward()
    assert (x_local.grad is None) == (P.rank != 1)


def test_where_the_cuts_go() -> None:
    """The ranks of a line stay together, and go where most points are, or home."""

    def axes(grid: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> list[tuple[int, ...]]:
        c = Compiler(Grid(grid, range(math.prod(grid))), 0)
        x = c.new(blocks(shape, range(len(shape)), c.grid), torch.float32, False)
        return [axes_of(factors) for factors in fft._without(c, x, whole)]

    assert axes((2, 2), (8, 8), (1,)) == [(0, 1), ()]
    assert axes((2, 2), (8, 8), (0,)) == [(), (1, 0)]
    assert axes((1, 2, 3), (4, 9, 9), (1, 2)) == [(1, 2), (), ()]
    assert axes((1, 2, 3, 1), (4, 9, 9, 5), (1, 2)) == [(2,), (), (), (1,)]
    assert axes((2,), (8,), (0,)) == [()]


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 2))
    line = world.create_partition_inclusive([0, 2]).grid((2,))

    def given(x: torch.Tensor, P: dl.CartesianPartition, *options: Any) -> Any:
        return lambda: dnn.DistributedFFT(P, *options)(P.cut(x))

    attempts: list[tuple[Any, str]] = [
        (lambda: dnn.DistributedFFT(P, "dct"), "function 'dct' is none of"),
        (lambda: dnn.DistributedFFT(P, norm="unit"), "norm 'unit' is none of"),
        (lambda: dnn.DistributedFFT(P, dim=2), "dim=(2,)"),
        (lambda: dnn.DistributedFFT(P, dim=(1, -1)), "dim=(1, -1) are not different"),
        (lambda: dnn.DistributedFFT(P, dim=()), "dim=()"),
        (lambda: dnn.DistributedFFT(P, s=(3, 4)), "s=(3, 4)"),
        (given(torch.zeros(8), line), "no dim of a tensor of shape (8,) can be cut in place of dims (0,)"),
        (given(torch.zeros(1, 8), P), "no dim of a tensor of shape (1, 8) can be cut in place of dims (1,)"),
        (given(torch.zeros(3, 1), P, "irfft"), "no points"),
        (given(torch.zeros(3, 8), P, "fft", 1, 0), "no points"),
    ]
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)
    for options, text in (({"dim": 1.5}, "dim=1.5 is not an integer"), ({"s": ("x",)}, "s='x' is not an integer")):
        assert_refused(world, P, lambda options=options: dnn.DistributedFFT(P, **options), text, TypeError)
    assert_refused(world, P, given(torch.zeros(3, 8).bfloat16(), P), "dtype torch.bfloat16", TypeError)
    complex_rfft = given(torch.zeros(3, 8, dtype=torch.complex64), P, "rfft")
    assert_refused(world, P, complex_rfft, "dtype torch.complex64", TypeError)
