"""Who gets which rows: shares, subsets of ranks, what a replica's own statistics and numbers become, and the adjoint."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import on_ranks
from roots import F64, Where, assert_same, build, gradients, real
from torch import nn

import distdl_lite as dl
from distdl_lite.parallel.root.batch import Places, cut_rows
from distdl_lite.testing import adjoint_test, count


@on_ranks(1)
def test_shares_of_rows(world: dl.Partition) -> None:
    for rows in range(12):
        for parts in range(1, 6):
            for root in range(parts):
                cuts = cut_rows(rows, parts, root)
                sizes = [b - a for a, b in pairwise(cuts)]
                assert (sum(sizes), len(sizes), max(sizes) - min(sizes) <= 1) == (rows, parts, True)
                assert sizes[root] or not rows


class Statistics(nn.Module):
    """Numbers without dims, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        self.calls += 1
        return self.norm(x), x.square().mean(), self.calls, len(x)


@pytest.mark.check("A27")
@on_ranks(4, mpi=True)
def test_numbers_and_buffers(world: dl.Partition) -> None:
    """Per rank that had rows one entry, and the root's statistics, which the others start each forward with."""
    for options in ({}, {"device_ids": [2, 0, 3], "output_device": 3}, {"device_ids": [3, 1]}):
        torch.manual_seed(world.rank)  # only the root's weights are read
        net = Statistics().double()
        dp = dl.RootDataParallel(net, world, **options)
        ranks, place = len(dp.device_ids), dp.device_ids.index(dp.output_device)
        plain = copy.deepcopy(net)
        for rows in (8, 10):
            x = real(rows, 3)
            if world.rank != dp.output_device:
                dp().sum().backward()
                continue
            cuts = cut_rows(rows, ranks, place)
            parts = [x[a:b] for a, b in pairwise(cuts)]
            expected = [copy.deepcopy(plain)(part)[0] for part in parts]
            plain(parts[place])
            y, means, calls, seen = dp(x)
            assert_same(y, torch.cat(expected))
            assert_same(means, torch.stack([part.square().mean() for part in parts]))
            assert (calls, seen) == (plain.calls, len(parts[place]))
            assert_same(list(net.buffers()), list(plain.buffers()))
            (y.sum() + means.sum()).backward()  # the sum of a normalised tensor has no gradient
            assert_same(x.grad, torch.cat([2 * part / part.numel() for part in parts]).detach())
        dp.eval()
        x = real(5, 3)
        y = dp(x)[0] if world.rank == dp.output_device else dp()
        if world.rank == dp.output_device:
            assert_same(y, plain.eval()(x)[0])
        dp.train()


@on_ranks(3)
def test_subsets(world: dl.Partition) -> None:
    """Ranks outside device_ids take no part, those inside get rows in their order."""
    dp = dl.RootDataParallel(Where(world.rank), world, device_ids=[2, 0])
    with count() as counted:
        y = dp(torch.zeros(5)) if world.rank == 2 else dp()
    if world.rank == 2:
        assert y.tolist() == [2, 2, 2, 0, 0]
    if world.rank == 1:
        assert (counted.messages, counted.seconds, y.shape) == (0, 0, (0,))
        dp().sum().backward()
        with pytest.raises(ValueError, match="rank 1 passed tensors of shapes \\(2,\\), but is not the root"):
            dp(torch.zeros(2))
    with dp.serve() as at_root:
        assert at_root == (world.rank == 2)
    alone = dl.RootDataParallel(nn.Linear(2, 2), world, device_ids=[1])
    with alone.serve() as at_root:
        if at_root:
            x = torch.ones(3, 2)
            assert torch.equal(alone(x), alone.module(x))
    assert (dp.device_ids, dp.output_device, dp.dim) == ([2, 0], 2, 0)


@pytest.mark.check("A27")
@on_ranks(3, mpi=True)
def test_between_distributed_layers(world: dl.Partition) -> None:
    """Blocks gathered on the root, through the container, and scattered again."""
    P, x = world.grid((3, 1)), torch.arange(14, dtype=F64).view(7, 2)
    block = x[P.block(x.shape)].requires_grad_()
    dp = dl.RootDataParallel(nn.Linear(2, 3, dtype=F64), P)
    y = dl.scatter(dp(dl.gather(block, P)), P)
    y.square().sum().backward()
    if world.rank == 0:
        plain = copy.deepcopy(dp.module)
        x.requires_grad_()
        plain(x).square().sum().backward()
        assert_same(gradients(dp.module), gradients(plain))
    expected = world.broadcast_data(x.grad)
    assert_same(block.grad, expected[P.block(x.shape)])


def adjoints(world: dl.Partition) -> None:
    size = world.size
    for ranks, root in ((tuple(range(size)), 0), (tuple(range(size))[::-1], size - 1)):
        team = Places(world.world_transport, ranks, root)
        at_root = world.rank == team.root_rank
        for rows in (7, 1, 0):
            cuts = cut_rows(rows, size, root)
            operators = [
                (team.rows_operator((3, rows, 2), 1, cuts), (3, rows, 2)),
                (team.weights_operator(rows), (rows,)),
            ]
            for operator, shape in operators:
                x = torch.randn(shape if at_root else 0, dtype=F64)
                assert adjoint_test(operator, x, P=world) < 1e-12
                g = torch.randn(operator.plan.returned_shape, dtype=F64)
                assert adjoint_test(operator.adjoint, g, P=world) < 1e-12
    for rows in (7, 1):
        dp = dl.RootDataParallel(build(lambda: nn.Linear(3, 2, bias=False)), world)
        x = torch.randn((rows, 3) if world.rank == 0 else 0, dtype=F64)
        assert adjoint_test(dp, x, P=world) < 1e-12


a29 = pytest.mark.check("A29")
test_adjoints_on_2 = a29(on_ranks(2)(adjoints))
test_adjoints_on_3 = a29(on_ranks(3)(adjoints))
test_adjoints_on_4 = a29(on_ranks(4, mpi=True)(adjoints))
