"""Movements of blocks, and layers that change their grid, send what meets in both and nothing else."""

from __future__ import annotations

import math

import torch
from ranks import on_ranks
from traffic import LINE, NOTHING, SHAPE, SQUARE, assert_sends, block, collective, cuts, exchanged, gradient_sum

import distdl_lite as dl
import distdl_lite.nn as dnn


@on_ranks(4, mpi=True)
def test_movements(world: dl.Partition) -> None:
    """Each primitive as one collective, or as the messages between boxes that meet."""
    size, first = 4 * 16 * 64, world.rank == 0
    alone, square, line = world.grid((1, 1)), world.grid((2, 2)), world.grid((4, 1))
    give, take = collective(size, 3 * first), collective(size, not first)
    x = torch.ones(16, 64, requires_grad=True)
    lone = x if first else dl.zero_volume_tensor().requires_grad_()
    assert_sends(dnn.Broadcast(alone, square), [lone], give, take)
    assert_sends(dnn.SumReduce(square, alone), [x], take, give)
    for P, team in ((line, 4), (square, 2)):
        assert_sends(dnn.AllSumReduce(P, axes_reduce=(0,)), [x], *[collective(size, team - 1)] * 2)
        assert_sends(dnn.AllGather(P, axes_all_gather=(0,)), [x], *[collective(size, team - 1)] * 2)
        assert_sends(dnn.ReduceScatter(P, axes_reduce_scatter=(0,)), [x], *[collective(size // team, team - 1)] * 2)
    for grid in ((1, 4), (2, 2)):
        sides = exchanged(cuts((64, 96), (4, 1)), cuts((64, 96), grid), world.rank, 4)
        assert_sends(dnn.Repartition(line, world.grid(grid)), [block(line, (64, 96))], *sides)


@on_ranks(4, mpi=True)
def test_changes_of_grid(world: dl.Partition) -> None:
    """Flattening moves blocks once; a Fourier transform along cut dims twice, and each rank keeps its quarter."""
    P = world.grid(SQUARE)
    sides = exchanged(cuts(SHAPE, SQUARE), cuts(SHAPE, (4, 1, 1, 1)), world.rank, 4)
    assert_sends(dnn.DistributedFlatten(P, P_y=world.grid((4, 1))), [block(P, SHAPE)], *sides)
    P = world.grid((1, 4, 1, 1))
    assert_sends(dnn.DistributedFlatten(P), [block(P, SHAPE)], NOTHING, NOTHING)
    quarter = math.prod(SHAPE) // 4 * 3 // 4  # points of a block that go to others
    there, home = 4 * quarter, 8 * quarter  # real, complex
    P = world.grid(SQUARE)
    assert_sends(dnn.DistributedFFT(P, dim=(2, 3)), [block(P, SHAPE)], *[(6, 0, there + home)] * 2)
    P = world.grid(LINE)
    assert_sends(dnn.DistributedFFT(P, dim=2), [block(P, SHAPE)], *[(6, 0, there + home)] * 2)
    assert_sends(dnn.DistributedFFT(P, dim=(2, 3)), [block(P, SHAPE)], *[(6, 0, home + home)] * 2)
    assert_sends(dnn.DistributedFFT(P, dim=3), [block(P, SHAPE)], NOTHING, NOTHING)


@on_ranks(4, mpi=True)
def test_linear(world: dl.Partition) -> None:
    """Three partitions: blocks of x to the ranks with their columns, partial sums to those with their rows."""
    rows, ins, outs = 16, 64, 32
    P, P_w = world.grid((1, 2)), world.grid((2, 2))
    # Rank 2 o + i of P_w has the rows o and columns i. Ranks 0 and 1 hold the halves of x, and of y.
    half_x, half_y = 4 * rows * ins // 2, 4 * rows * outs // 2
    x_to = [1, 1, 0, 0]  # rank 0 to 2, and keeps one for itself; rank 1 to 3, as does rank 1
    y_to = [0, 1, 1, 1]  # rank 1 to 0, ranks 2 and 3 to 1
    y_from = [1, 2, 0, 0]
    x_from = [0, 0, 1, 1]
    r = world.rank
    layer = dnn.DistributedLinear(P, P, P_w, ins, outs)
    forward = (x_to[r] + y_to[r], 0, x_to[r] * half_x + y_to[r] * half_y)
    backward = (x_from[r] + y_from[r], 0, x_from[r] * half_x + y_from[r] * half_y)
    assert_sends(layer, [block(P, (rows, ins))], forward, backward)
    P = world.grid((4, 1))
    layer = dnn.DistributedLinear(P, None, None, ins, outs)
    assert_sends(layer, [block(P, (rows, ins))], NOTHING, gradient_sum(layer))
