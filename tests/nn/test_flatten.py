"""Flattening against torch's, with blocks of all sizes."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any

import torch
from blocks import block, cuts_of, leaf
from ranks import on_ranks
from twins import assert_refused, integers, uneven

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import count


def assert_flat(
    layer: dnn.DistributedFlatten, x: torch.Tensor, cuts: Any, P_x: dl.CartesianPartition, P_y: dl.CartesianPartition
) -> None:
    """Compare block and gradient with those of the whole tensor: the rows of the first flattened dim stay together."""
    start, end = layer.start_dim % x.dim(), layer.end_dim % x.dim()
    x_local, x_whole = leaf(block(x, P_x, cuts)), leaf(x)
    y, whole = layer(x_local), x_whole.flatten(start, end)
    row = x.shape[start + 1 : end + 1].numel()
    if layer.P_y is None:
        cuts_y = [*cuts[:start], [c * row for c in cuts[start]], *cuts[end + 1 :]]
    else:
        cuts_y = cuts_of((*x.shape[: start + 1], *x.shape[end + 1 :]), P_y.shape)
        cuts_y[start] = [c * row for c in cuts_y[start]]
    assert torch.equal(y, block(whole, P_y, cuts_y) if P_y.active else y.new_empty(len(x_local), 0))
    g = integers(*whole.shape)
    whole.backward(g)
    y.backward(block(g, P_y, cuts_y).view(y.shape))
    if P_x.active:
        assert torch.equal(x_local.grad, block(x_whole.grad, P_x, cuts))


@on_ranks(4, mpi=True)
def test_all_grids(world: dl.Partition) -> None:
    """Every span of dims on every grid of four ranks, in even and uneven blocks, with P_y where it is needed and not."""
    rng = random.Random(3)
    grids = [grid for grid in itertools.product((1, 2, 4), repeat=3) if torch.Size(grid).numel() == 4]
    for grid, (start, end) in itertools.product(grids, itertools.combinations_with_replacement(range(3), 2)):
        P_x, shape = world.grid(grid), tuple(rng.choice([1, 2, 3, 7]) for _ in range(3))
        cuts = uneven(rng, shape, grid) if rng.random() < 0.5 else cuts_of(shape, grid)
        merged = (*grid[:start], torch.Size(grid[start : end + 1]).numel(), *grid[end + 1 :])
        P_y = world.grid(merged)
        assert_flat(dnn.DistributedFlatten(P_x, start, end - 3, P_y), integers(*shape), cuts, P_x, P_y)
        if max((1, *grid[start + 1 : end + 1])) == 1:
            assert_flat(dnn.DistributedFlatten(P_x, start, end), integers(*shape), cuts, P_x, P_y)


@on_ranks(4)
def test_placement_and_life(world: dl.Partition) -> None:
    """Disjoint partitions, empty batches, changing shapes, copies, permuted memory; without P_y nothing is sent."""
    P_x = world.create_partition_inclusive([2, 1]).grid((1, 1, 1, 2))
    P_y = world.create_partition_inclusive([0, 3]).grid((1, 2))
    layer = dnn.DistributedFlatten(P_x, P_y=P_y)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for batch in (2, 0, 1):
            x = integers(batch, 3, 4, 5).transpose(2, 3)
            assert_flat(module, x, cuts_of(x.shape, P_x.shape), P_x, P_y)
    assert "start_dim=1, end_dim=-1, P_x=(1, 1, 1, 2), P_y=(1, 2)" in repr(layer)
    P = world.grid((2, 2, 1, 1))
    x = integers(4, 6, 2, 3)
    with count() as c:
        y = dnn.DistributedFlatten(P)(block(x, P, cuts_of(x.shape, P.shape)))
    assert c.messages == 0
    assert torch.equal(y, x.flatten(1)[P.create_cartesian_topology_partition((2, 2)).block((4, 36))])


@on_ranks(2)
def test_a_gradient_on_one_rank_alone(world: dl.Partition) -> None:
    """Ranks whose input needs no gradient take part in the backward of the one that does."""
    P_x, P_y = world.grid((1, 1, 2)), world.grid((1, 2))
    x = integers(1, 2, 4)[P_x.block((1, 2, 4))].requires_grad_(world.rank == 1)
    dnn.DistributedFlatten(P_x, P_y=P_y)(x).sum().backward()
    assert (x.grad is None) if world.rank == 0 else torch.equal(x.grad, torch.ones_like(x))


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 1, 1, 2))
    attempts: list[tuple[Any, str]] = [
        (lambda: dnn.DistributedFlatten(P), "give P_y, such as a partition of shape (1, 2)"),
        (lambda: dnn.DistributedFlatten(P, 2, 1), "start_dim=2 to end_dim=1"),
        (lambda: dnn.DistributedFlatten(P, 0, 4), "end_dim=4"),
        (lambda: dnn.DistributedFlatten(P, P_y=P), "has 4 axes, the output has 2 dims"),
        (
            lambda: dnn.DistributedFlatten(P, 0, 1)(integers(1, 2, 3) if P.active else dl.zero_volume_tensor()),
            "has 3 dims",
        ),
    ]
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)
