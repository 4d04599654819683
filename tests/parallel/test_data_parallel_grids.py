"""`DataParallel` on teams of some ranks, and around models whose tensors are cut over the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from copies import assert_gradients, draw, mean_square, mlp, train, twins
from ranks import on_ranks, over_mpi
from torch import nn

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import count


@pytest.mark.check("A1")
@on_ranks(4, mpi=True)
def test_some_ranks(world: dl.Partition) -> None:
    """In any order; the others make the same calls."""
    for ranks in ([3, 1], [2], [2, 0, 3]):
        for P in (world.create_partition_inclusive(ranks), world.grid((len(ranks),), ranks)):
            dp, single = twins(mlp(3, 4, 2), P)
            optimizer = torch.optim.SGD(dp.parameters(), 0.1)
            x = draw(2 * len(ranks), 3)
            mine = x[2 * P.rank :][:2] if P.active else dl.zero_volume_tensor(dtype=x.dtype)
            with dp.join(), dp.no_sync():
                pass
            dp.check_replicas()
            y = dp(mine)
            y.square().mean().backward()
            optimizer.step()
            assert y.shape == ((2, 2) if P.active else (0,))
            if P.active:
                mean_square(single(x)).backward()
                assert_gradients(dp, single)
            else:
                assert all(p.grad is None for p in dp.parameters())
            with torch.no_grad():
                assert not dp(mine).requires_grad


@pytest.mark.check("A22")
@on_ranks(3, mpi=True)
def test_the_first_of_the_lowest_ranks_is_the_root(world: dl.Partition) -> None:
    P = world.create_partition_inclusive([2, 1])
    model = nn.Linear(2, 2)
    torch.manual_seed(world.rank)
    nn.init.normal_(model.weight)
    told = world.allgather_data(model.weight.tolist())
    dl.DataParallel(model, P)
    assert model.weight.tolist() == (told[1] if P.active else told[0])


@over_mpi
@pytest.mark.mpi(min_size=3)
@pytest.mark.check("A1")
def test_communicators() -> None:
    """Of mpi4py: the world's, and parts of it."""
    from mpi4py import MPI

    part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
    for comm in (MPI.COMM_WORLD, part):
        dp, single = twins(mlp(3, 4, 2), comm)
        assert MPI.Comm.Compare(dp.comm, comm) in (MPI.IDENT, MPI.CONGRUENT)
        x = draw(2 * comm.size, 3)
        mean_square(dp(x[2 * comm.rank :][:2])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)
    part.Free()


Conv = Callable[[dl.CartesianPartition, int, int], nn.Module]


def cut_net(conv: Conv, P: dl.CartesianPartition) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(P, 2, 4), nn.Tanh(), conv(P, 4, 3)).double()


def distributed(P: dl.CartesianPartition, a: int, b: int) -> nn.Module:
    return dnn.DistributedConv2d(P, a, b, 3, padding=1, dtype=torch.float64)


def serial(P: dl.CartesianPartition, a: int, b: int) -> nn.Module:
    return nn.Conv2d(a, b, 3, padding=1, dtype=torch.float64)


@pytest.mark.check("A42")
@on_ranks(4, mpi=True)
def test_batch_times_space(world: dl.Partition) -> None:
    """Layers on the space axis alone are summed along the batch axis; those of the whole grid have been."""
    P = world.grid((2, 1, 2, 1))
    space = P.create_cartesian_subtopology_partition([False, True, True, True])
    line = space.create_cartesian_topology_partition((1, 1, 2, 1))
    x, target = draw(4, 2, 6, 5), draw(4, 3, 6, 5, seed=1)
    for options in ({}, {"overlap": False}, {"bucket_mb": 1e-4}, {"engine": "thread"}, {"engine": "poll"}):
        for inner in (line, P):
            single = cut_net(serial, P)
            dp = dl.DataParallel(cut_net(distributed, inner), P, **options)
            loss = dnn.DistributedMSELoss(inner)
            for _ in range(2):
                dp.zero_grad()
                single.zero_grad()
                block = P.block(x.shape)
                with count() as c:
                    loss(dp(x[block]), target[P.block(target.shape)]).backward()
                nn.functional.mse_loss(single(x), target).backward()
                assert_gradients(dp, single)
                if inner is P:
                    assert "sums" in c.by_label
            dp.check_replicas()


@pytest.mark.check("A42")
@on_ranks(4, mpi=True)
def test_uneven_batches_of_cut_images_train(world: dl.Partition) -> None:
    P = world.grid((2, 1, 2, 1))
    line = P.create_cartesian_subtopology_partition([False, True, True, True]).create_cartesian_topology_partition(
        (1, 1, 2, 1)
    )
    single, dp = cut_net(serial, P), dl.DataParallel(cut_net(distributed, line), P)
    loss = dnn.DistributedMSELoss(line)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (dp, single)]
    for step in range(5):
        x = draw(4, 2, 6, 5, seed=step)
        rows = (slice(0, 3), slice(3, 4))[P.index[0]]
        height = slice(3 * P.index[2], 3 * P.index[2] + 3)
        target = torch.ones(3 - 2 * P.index[0], 3, 3, 5, dtype=x.dtype)
        values = [loss(dp(x[rows, :, height]), target), (single(x) - 1).square().mean()]
        for value, optimizer in zip(values, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for actual, expected in zip(dp.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.check("A42")
@on_ranks(4)
def test_plain_and_distributed_layers_in_one_module(world: dl.Partition) -> None:
    """Models of one rank's rows beside a layer cut over the other axis."""
    P = world.grid((2, 2))
    line = P.create_cartesian_subtopology_partition([False, True])

    class Mixed(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            self.first, self.last = mlp(3, 4), mlp(4, 2)
            torch.manual_seed(5)
            self.wide = (
                dnn.DistributedColumnParallelLinear(line, 4, 4, dtype=torch.float64, gather_output=True)
                if cut
                else nn.Linear(4, 4, dtype=torch.float64)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.wide(self.first(x)))

    single, dp = Mixed(False), dl.DataParallel(Mixed(True), P)
    for step in range(2):
        x = draw(5, 3, seed=step)
        dp.zero_grad()
        single.zero_grad()
        mean_square(dp(x.split([4, 1])[P.index[0]])).backward()
        mean_square(single(x)).backward()
        for name in ("first", "last"):
            assert_gradients(getattr(dp.module, name), getattr(single, name))
        rows = slice(2 * P.index[1], 2 * P.index[1] + 2)
        torch.testing.assert_close(dp.module.wide.weight.grad, single.wide.weight.grad[rows], rtol=0, atol=1e-12)


@pytest.mark.check("A42")
@on_ranks(4)
def test_replicas_on_some_ranks_of_the_batch_axis_are_refused(world: dl.Partition) -> None:
    P = world.grid((4,))
    pair = world.grid((2, 1), [0, 1]) if world.rank < 2 else world.grid((2, 1), [2, 3])
    model = nn.Sequential(dnn.DistributedLayerNorm(pair, (3,)))
    with pytest.raises(
        ValueError, match=r"0\.weight has replicas on ranks \[\d, \d\], some of the ranks \[0, 1, 2, 3\]"
    ):
        dl.DataParallel(model, P)


@pytest.mark.check("A42")
@on_ranks(4, mpi=True)
def test_layers_that_sum_beside_plain_ones_that_get_a_mean_are_refused(world: dl.Partition) -> None:
    """Their gradients would have another scale; not so where only one kind is trained, or gradients are weighed before."""
    P = world.grid((2, 1, 2, 1))

    def both(P: dl.CartesianPartition = P) -> nn.Sequential:
        conv = dnn.DistributedConv2d(P, 2, 3, 3, padding=1, dtype=torch.float64)
        return nn.Sequential(conv, dnn.DistributedMean(P, (2, 3)), nn.Linear(3, 3).double())

    for average in ("samples", "sum", "ranks"):
        for frozen in (None, 1):
            model = both()
            if frozen == world.rank:  # what one rank trains is trained
                model[2].requires_grad_(False)
            text = (
                r"the gradient of 0\.weight is summed over the batch axis by its layer, that of 2\.weight by the container, "
                rf'whose average="{average}" has another scale: write average="none" and a loss over P, or build'
            )
            with pytest.raises(ValueError, match=text):
                dl.DataParallel(model, P, average=average)
    for of_layer in (0, 2):
        model = both()
        model[of_layer].requires_grad_(False)
        dl.DataParallel(model, P)
    dl.DataParallel(both(), P, average="none")
    Q = world.grid((2, 1, 1, 1), [0, 1])
    if Q.active:
        torch.manual_seed(0)
        dp = dl.DataParallel(
            nn.Sequential(*both(Q), dl.SyncBatchNorm(3, P=Q.create_partition_inclusive([0, 1])).double()), Q
        )
        torch.manual_seed(0)
        single = nn.Sequential(serial(Q, 2, 3), nn.Flatten(2), nn.Linear(3, 3).double(), nn.BatchNorm1d(3).double())
        x = draw(5, 2, 4, 5)
        mean_square(dp(x[Q.block(x.shape)])).backward()
        mean_square(single[3](single[2](single[0](x).mean((2, 3))))).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A2")
@on_ranks(2)
def test_containers_as_layers(world: dl.Partition) -> None:
    """Of a plain network."""
    single = mlp(3, 4, 2)
    model = mlp(3, 4, 2)
    model[0], model[2] = dl.DataParallel(model[0]), dl.DataParallel(model[2])
    whole = [draw(4, 3, seed=step) for step in range(4)]
    train(model, torch.optim.SGD(model.parameters(), 0.1), [x[2 * world.rank :][:2] for x in whole])
    train(single, torch.optim.SGD(single.parameters(), 0.1), whole)
    for actual, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
