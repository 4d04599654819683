"""Means against torch.mean, with blocks of all sizes."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any

import torch
from blocks import block, cuts_of, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, integers, uneven

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import count

GRIDS = [(4, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2), (1, 1, 1)]
DIMS = [None, 0, -1, (1, 2), (0, -1), (2, 0, 1)]


def assert_mean(layer: torch.nn.Module, x: torch.Tensor, cuts: Any, P: dl.CartesianPartition) -> None:
    """Compare value, gradient and the gradient of the gradient with torch's."""
    dims = (layer.dim,) if isinstance(layer.dim, int) else range(x.dim()) if layer.dim is None else layer.dim
    dims = {d % x.dim() for d in dims}
    kept = [((0, 1),) * layer.keepdim if d in dims else (cut,) for d, cut in enumerate(cuts)]
    cuts_y = [cut for found in kept for cut in found]
    axes = [d for d in range(x.dim()) if layer.keepdim or d not in dims]

    def part(whole: torch.Tensor) -> torch.Tensor:
        at = [cuts_y[i][P.index[d] if d not in dims else 0 :][:2] for i, d in enumerate(axes)]
        return whole[tuple(slice(*ends) for ends in at)]

    x_local, x_whole = leaf(block(x, P, cuts)), leaf(x)
    y, whole = layer(x_local), x_whole.mean(layer.dim, layer.keepdim)
    if not P.active:
        assert y is x_local
        return
    torch.testing.assert_close(y, part(whole), rtol=0, atol=0, equal_nan=True)
    g = integers(*whole.shape).to(x.dtype) + 5
    (wanted,) = torch.autograd.grad(whole.pow(3), x_whole, g, create_graph=True)
    (found,) = torch.autograd.grad(y.pow(3), x_local, part(g), create_graph=True)
    torch.testing.assert_close(found, block(wanted, P, cuts), rtol=0, atol=0, equal_nan=True)
    wanted.square().sum().real.backward()
    found.square().sum().real.backward()
    torch.testing.assert_close(x_local.grad, block(x_whole.grad, P, cuts), rtol=1e-13, atol=1e-13, equal_nan=True)


@on_ranks(4, mpi=True)
def test_all_grids(world: dl.Partition) -> None:
    """All dims on all grids, in blocks of any sizes; the sums are of integers, and so exact."""
    rng = random.Random(5)
    for grid, dim, keepdim in itertools.product(GRIDS, DIMS, (False, True)):
        P, shape = world.grid(grid), (rng.choice([0, 1, 2]), 7, rng.choice([2, 5, 8]))
        cuts = uneven(rng, shape, grid) if rng.random() < 0.5 else cuts_of(shape, grid)
        assert_mean(dnn.DistributedMean(P, dim, keepdim), integers(*shape), cuts, P)


@on_ranks(4)
def test_awkward(world: dl.Partition) -> None:
    """Ranks in any order and outside, complex numbers, permuted memory, copies, one rank's gradient alone, checkpoints."""
    P = world.create_partition_inclusive([3, 1]).grid((1, 2))
    layer = dnn.DistributedMean(P, 1)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for x in (integers(7, 3).T, integers(2, 4, dtype=torch.complex128)):
            assert_mean(module, x, cuts_of(x.shape, P.shape), P)
    assert "dim=1, keepdim=False, P_x=(1, 2)" in repr(layer)
    if P.active:
        x = integers(3, 5)[P.block((3, 5))].requires_grad_(P.rank == 1)
        layer(x).sum().backward()
        assert (x.grad is None) if P.rank == 0 else torch.equal(x.grad, torch.full_like(x, 0.2))
        x = leaf(integers(3, 5)[P.block((3, 5))])
        checkpoint(lambda z: layer(z * z), x, use_reentrant=False).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach() / 5, rtol=1e-15, atol=0)


@on_ranks(2)
def test_one_allreduce(world: dl.Partition) -> None:
    """Forward adds up once, backward not at all, and a dim that is not cut is averaged alone; bfloat16 rounds once."""
    P = world.grid((2, 1))
    x = torch.rand(64, 3).bfloat16()
    with count() as c:
        y = dnn.DistributedMean(P, 0)(leaf(x[P.block(x.shape)]))
        y.sum().backward()
    assert (c.messages, c.collectives) == (1, 1)
    assert torch.equal(y, x.mean(0))
    with count() as c:
        dnn.DistributedMean(P, 1)(x[P.block(x.shape)])
    assert c.messages == 0


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 2))
    assert_refused(world, P, lambda: dnn.DistributedMean(P, 2), "dim=2")
    assert_refused(world, P, lambda: dnn.DistributedMean(P, (1, -1)), "different dims")
    assert_refused(world, P, lambda: dnn.DistributedMean(P, (0, 1.5)), "dim=1.5 is not an integer", TypeError)
    assert_refused(world, P, lambda: dnn.DistributedMean(P, 0, 1), "keepdim=1 is neither True nor False", TypeError)

    def average(x: torch.Tensor) -> Any:
        return lambda: dnn.DistributedMean(P)(x if P.active else dl.zero_volume_tensor())

    assert_refused(world, P, average(integers(2, 3, dtype=torch.int64)), "torch.int64", TypeError)
    assert_refused(world, P, average(integers(2, 3, 4)), "has 3 dims")
