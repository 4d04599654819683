"""Whole loops: loaders that deal an odd number of samples, and each container, beside one process on the whole batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from copies import assert_parameters, draw, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distdl_lite as dl
from distdl_lite.data import Collate, ShardBatchSampler, ShuffledLoader
from distdl_lite.testing import spmd

BATCH, ROWS = 12, 37  # the last batch of an epoch has one row, and other ranks have none


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def batches(P: dl.Partition, drop_last: bool = False) -> Iterator[list[torch.Tensor]]:
    """This rank's rows in three epochs."""
    data = TensorDataset(draw(ROWS, 3), draw(ROWS, 2))
    sampler = ShardBatchSampler(data, P, BATCH // P.size, drop_last=drop_last)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=Collate(data))
    for _ in range(3):
        yield from loader


def shuffled(P: dl.Partition) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same, of rows that lie on the ranks."""
    mine = [whole.tensor_split(P.size)[P.rank] for whole in (draw(ROWS, 3), draw(ROWS, 2))]
    loader = ShuffledLoader(mine, BATCH // P.size, P)
    for _ in range(3):
        yield from loader


def train(model: nn.Module, optimizer: torch.optim.Optimizer, given: Iterator[list[torch.Tensor]]) -> list[float]:
    losses = []
    for x, y in given:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(x) if len(x) else 0.0)
    return losses


def at_once(net: nn.Module, world: dl.Partition) -> list[float]:
    return train(dl.DataParallel(net, world), sgd(net), shuffled(world))


def deferred(net: nn.Module, world: dl.Partition) -> list[float]:
    optimizer = dl.DataParallelOptimizer(sgd(net))
    model = dl.DataParallel(net, world, optimizer, update="deferred")
    losses = train(model, optimizer, batches(world))
    model.synchronize()
    return losses


def by_the_root(net: nn.Module, world: dl.Partition) -> list[float]:
    model = dl.RootDataParallel(net, world)
    with model.serve() as at_root:
        return train(model, sgd(net), batches(world.create_partition_inclusive([0]))) if at_root else []


def averaged_at_every_step(net: nn.Module, world: dl.Partition) -> list[float]:
    """A step of SGD is linear: the mean of the weights is the weight of the mean gradient."""
    return train(net, dl.LocalSGD(sgd(net), 1, P=world), batches(world, drop_last=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("way", [at_once, deferred, by_the_root, averaged_at_every_step])
def test_losses_and_weights_are_those_of_one_process(way: object, ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        net = mlp(3, 6, 2)
        single = copy.deepcopy(net)
        told = [mine for mine in world.allgather_data(way(net, world)) if mine]
        one = world.create_partition_inclusive([0])
        if world.rank == 0:
            wanted = train(single, sgd(single), batches(one, way is averaged_at_every_step))
            assert len(wanted) == (9 if way is averaged_at_every_step else 12)
            torch.testing.assert_close(torch.tensor(told, dtype=torch.float64).sum(0), torch.tensor(wanted).double())
            assert_parameters(net, single)

    spmd(ranks, body)
