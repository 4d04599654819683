"""The root's modes hold on all ranks: training, gradients, autocast, inference; checkpoints and compilation around it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from roots import assert_same, build, call, gradients, mlp, real
from torch import nn
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        modes = [self.training, self.drop.training, torch.is_grad_enabled(), y.dtype == torch.bfloat16]
        return y, torch.tensor(modes).float().expand(len(x), 4)


@on_ranks(2)
def test_modes_of_the_root(world: dl.Partition) -> None:
    net = Modes()
    dp = dl.RootDataParallel(net, world)
    x = torch.rand(4, 2)

    def check(*expected: bool) -> None:
        found = call(dp, world, x)
        if world.rank == 0:
            assert found[1].bool().tolist() == [list(expected)] * 4

    check(True, True, True, False)
    if world.rank == 0:
        net.drop.eval()
    check(True, False, True, False)
    if world.rank == 1:
        net.eval()
    with torch.autocast("cpu", enabled=world.rank == 0):
        check(True, False, True, True)
    with torch.autocast("cpu", enabled=world.rank == 1):
        check(True, False, True, False)
    with torch.set_grad_enabled(world.rank == 1):
        check(True, False, False, False)
    with torch.inference_mode():
        dp.eval()
        if world.rank == 0:
            net.linear.weight.mul_(2)
        check(False, False, False, False)
    y = call(dp, world, x)
    (y[0] if world.rank == 0 else y).sum().backward()  # the weights came in inference mode
    if world.rank == 0:
        assert_same(net.linear.weight.grad.double(), x.sum(0).expand(2, 2).double())
    with torch.set_grad_enabled(world.rank == 0):
        y = call(dp, world, x)
    (y[0] if world.rank == 0 else y).sum().backward()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@on_ranks(2, mpi=True)
def test_checkpoints(world: dl.Partition) -> None:
    net = build(partial(Checkpointed, False))
    plain = copy.deepcopy(net)
    dp = dl.RootDataParallel(net, world)
    for rows in (5, 1):  # with one, the other rank has none to go through again
        x = real(rows, 3)
        y = checkpoint(dp, x if world.rank == 0 else real(0), use_reentrant=False)
        (y.square() if world.rank == 0 else y).sum().backward()
        if world.rank == 0:
            plain(x).square().sum().backward()
            assert_same(gradients(net), gradients(plain))
    x = real(5, 3)
    with dp.serve() as at_root:
        if at_root:
            for reentrant in (False, True):
                y = checkpoint(dp, x, use_reentrant=reentrant)
                with pytest.raises(
                    RuntimeError, match="RootDataParallel: called again in a backward, as by a checkpoint"
                ):
                    y.square().sum().backward()
            for transform in (torch.func.vmap(dp), torch.func.grad(lambda x: dp(x).sum())):
                with pytest.raises(
                    RuntimeError, match=r"RootDataParallel: torch.func's transforms \(grad, vmap, ...\) see"
                ):
                    transform(x)
            with torch.autograd.graph.save_on_cpu():
                assert_same(dp(x), plain(x))
    dp = dl.RootDataParallel(build(partial(Checkpointed, True)), world)
    y = call(dp, world, x)
    with pytest.raises(RuntimeError, match="replica 0, on rank 0: When use_reentrant=True"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@on_ranks(2, mpi=True)
def test_compiled(world: dl.Partition) -> None:
    """What is around the container is compiled, and calls it as it is."""
    dp, x = dl.RootDataParallel(build(mlp), world), real(5, 3)
    with dp.serve() as at_root:
        if at_root:
            inside = torch.compile(lambda x: dp(x * 2).sin(), backend="eager")
            with torch._dynamo.config.patch(recompile_limit=2):
                for rows in range(4, 9):  # more than dynamo recompiles for
                    y = real(rows, 3)
                    assert_same(torch.compile(dp, backend="eager")(y), dp(y))
                    assert_same(inside(y), dp(y * 2).sin())
            inside(x).sum().backward()
            (expected,) = torch.autograd.grad(dp(2 * x).sin().sum(), x)
            assert_same(x.grad, expected)
