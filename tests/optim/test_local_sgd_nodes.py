"""Averages within nodes and between them, over any grouping of the ranks and over a part of the world."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.replicas import Replicas, adam, plain, start_of, train
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import spmd


def check_nodes(world: dl.Partition, options: dict[str, Any], nodes: list[list[int]], delay: int) -> None:
    """Averages within a node every 2 steps, over all every 4."""
    optimizer = dl.LocalSGD(adam(start_of(world.rank)), dl.Periodic(4, 2, delay), P=world, **options)
    by_hand, begun, mean = Replicas(world.size, adam), -1, None
    for step in by_hand.beside(world, optimizer):
        if mean is not None and step == begun + delay:
            by_hand.merge("daso", by_hand.values(), mean, delay, len(nodes))
            mean = None
        if step % 2:
            for node in nodes:
                by_hand.put(by_hand.mean(node), node)
        if step % 4 == 3:
            begun, mean = step, by_hand.mean()
            if not delay:
                by_hand.put(mean)
                mean = None
    optimizer.drain()


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(
    ("size", "options", "nodes"),
    [
        (4, {"ranks_per_node": 2}, [[0, 1], [2, 3]]),
        (4, {"ranks_per_node": 1}, [[0], [1], [2], [3]]),
        (3, {"ranks_per_node": 2}, [[0, 1], [2]]),
        (4, {"groups": [[3, 0], [2, 1]]}, [[0, 3], [1, 2]]),
        (3, {"groups": "node"}, [[0, 1, 2]]),
    ],
)
def test_nodes(size: int, options: dict[str, Any], nodes: list[list[int]], delay: int) -> None:
    spmd(size, lambda world: check_nodes(world, options, nodes, delay))


@on_ranks(4, mpi=True)
def test_nodes_on_four_ranks(world: dl.Partition) -> None:
    for delay in (0, 1, 2):
        check_nodes(world, {"ranks_per_node": 2}, [[0, 1], [2, 3]], delay)
        check_nodes(world, {"ranks_per_node": 3}, [[0, 1, 2], [3]], delay)


@on_ranks(4)
def test_rounding_between_nodes(world: dl.Partition) -> None:
    """The ranks that talk for their nodes change; what each keeps comes with its next turn."""
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = dl.LocalSGD(plain(1.0, w), dl.Periodic(1, 1), ranks_per_node=2, wire=torch.bfloat16)
    for _ in range(100):
        w.grad = torch.full((5,), -1e-4 * (1 + world.rank / 7))
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((5,), 1 + 0.01 * (1 + 1.5 / 7)), rtol=1e-5, atol=0)


@on_ranks(4)
def test_groups_along_an_axis(world: dl.Partition) -> None:
    grid = world.grid((2, 2))
    optimizer = dl.LocalSGD(adam(start_of(0)), 1, groups=grid.create_cartesian_subtopology_partition([True, False]))
    assert optimizer.levels.nodes == ((0, 2), (1, 3))
    assert [*map(tuple, optimizer.levels.crossings)] == [(0, 1), (2, 3)]


@on_ranks(4, mpi=True)
def test_part_of_the_world(world: dl.Partition) -> None:
    """Ranks outside are alone, and two teams train beside each other."""
    pair = world.create_partition_inclusive([2, 0])
    w = torch.nn.Parameter(torch.tensor([float(world.rank)]))
    optimizer = dl.LocalSGD(plain(1.0, w), 1, P=pair, wire=torch.bfloat16)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == (1.0 if pair.active else world.rank)
    lines = world.grid((2, 2)).create_cartesian_subtopology_partition([False, True])
    optimizer = dl.LocalSGD(plain(1.0, w), 1, P=lines, delay=1)
    train(world, optimizer, range(5))
    optimizer.synchronise()
    assert w.item() == lines.broadcast_data(w.item())
