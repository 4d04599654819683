"""torch's own parallel modules over MPI give what they give over gloo, bit for bit on two ranks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import beside_gloo, on_group
from ranks import over_mpi
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distdl_lite as dl
from distdl_lite.parallel.process_group import MPIProcessGroup

pytestmark = [pytest.mark.check("A44"), pytest.mark.filterwarnings("ignore")]  # torch's modules warn of each other


class Net(nn.Module):
    """Convolution and norm, half of the parameters in a dtype of its own, one branch that is not always used."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head, self.other = (nn.Linear(4, 3, dtype=dtype) for _ in range(2))

    def forward(self, x: torch.Tensor, other: bool = False) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu().mean(-1).to(self.head.weight.dtype)
        return (self.head(y) + self.other(y)) if other else self.head(y)


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(17 * rank + step))


Prepare = Callable[[DistributedDataParallel, Any], None]


def trained(
    group: Any,
    prepare: Prepare | None = None,
    other: bool = True,
    steps: int = 5,
    accumulate: bool = False,
    net: nn.Module | None = None,
    over: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> list[torch.Tensor]:
    """What a model and its gradients are after some steps."""
    torch.manual_seed(5)
    model = DistributedDataParallel(copy.deepcopy(net) or Net(), process_group=group, **options)
    if prepare:
        prepare(model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    called = over(model)
    for step in range(steps):
        with model.no_sync() if accumulate and step % 2 == 0 else nullcontext():
            called(batch(group.rank(), step), other).square().sum().backward()
        if not accumulate or step % 2:
            optimizer.step()
            optimizer.zero_grad()
    called(batch(group.rank(), steps), other).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*(t.clone() for t in model.state_dict().values()), *gradients]


def assert_same(over_mpi: list[torch.Tensor], over_gloo: list[torch.Tensor]) -> None:
    assert len(over_mpi) == len(over_gloo)
    assert all(torch.equal(a, b) for a, b in zip(over_mpi, over_gloo, strict=True))


@beside_gloo
def test_ddp(group: MPIProcessGroup, gloo: Any) -> None:
    for options in (
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True, "other": False},
        {"static_graph": True, "other": False},
        {"batched_grad_copy": True},
        {"bucket_cap_mb": 1e-4},
        {"accumulate": True},
        {"accumulate": True, "gradient_as_bucket_view": True, "find_unused_parameters": True},
        {"broadcast_buffers": False},
    ):
        assert_same(trained(group, **options), trained(gloo, **options))


@on_group(2)
def test_ddp_compiled(group: MPIProcessGroup) -> None:
    """torch.compile runs the group's calls as they stand."""
    assert_same(trained(group, over=partial(torch.compile, backend="eager")), trained(group))


@on_group(2)
def test_ddp_with_our_batch_norm(group: MPIProcessGroup) -> None:
    """Its gradients are sums over the ranks, as the guide says, where DDP's are means."""
    torch.manual_seed(3)
    serial = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    P = dl.Partition().create_partition_inclusive(range(group.size()))
    net = dl.SyncBatchNorm.convert(copy.deepcopy(serial), P)
    x = torch.randn(8, 3, dtype=torch.float64)
    serial(x).square().mean().backward()
    for options in ({}, {"gradient_as_bucket_view": True}):
        model = DistributedDataParallel(net, **options)
        model.zero_grad()
        model(x[4 * group.rank() : 4 * group.rank() + 4]).square().mean().backward()
        for p in net[1].parameters():
            p.grad /= dist.get_world_size()
        for mine, other in zip(net.parameters(), serial.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9)


@beside_gloo
def test_ddp_hooks(group: MPIProcessGroup, gloo: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    def power(model: DistributedDataParallel, group: Any) -> None:
        options = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2, "min_compression_rate": 0.5}
        model.register_comm_hook(powerSGD_hook.PowerSGDState(group, **options), powerSGD_hook.powerSGD_hook)

    def hook(function: Any) -> Prepare:
        return lambda model, group: model.register_comm_hook(group, function)

    for prepare in (hook(default_hooks.allreduce_hook), hook(default_hooks.fp16_compress_hook), power):
        # one bucket: over gloo two of PowerSGD's call in the order in which their threads come, and hang
        options = {"prepare": prepare, "net": Net(torch.float32), "steps": 6}
        assert_same(trained(group, **options), trained(gloo, **options))
    state = trained(group, power, bucket_cap_mb=1e-4)
    assert all(t.isfinite().all() for t in state)
    theirs = trained(group, power, bucket_cap_mb=1e-4)
    dist.broadcast(theirs[0], 0)
    assert torch.equal(state[0], theirs[0])


@beside_gloo
def test_join(group: MPIProcessGroup, gloo: Any) -> None:
    """Rank 1 has three more batches."""

    def joined(group: Any) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = DistributedDataParallel(Net(), process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join():
            for step in range(2 + 3 * group.rank()):
                optimizer.zero_grad()
                model(batch(group.rank(), step), other=True).square().sum().backward()
                optimizer.step()
        return list(model.state_dict().values())

    assert_same(joined(group), joined(gloo))


@on_group(3)
def test_zero_is_adam(group: MPIProcessGroup) -> None:
    """The sharded optimizer takes the same steps; its state is put together on one rank, and loaded again."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    whole = torch.optim.Adam(twin.parameters(), lr=0.01)
    for step in range(8):
        for net, optimizer in ((model, sharded), (twin, whole)):
            optimizer.zero_grad()
            net(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        if step == 3:
            sharded.consolidate_state_dict(to=1)
            saved = [sharded.state_dict() if group.rank() == 1 else None]
            dist.broadcast_object_list(saved, src=1)
            moments = [state["exp_avg"] for state in saved[0]["state"].values()]
            assert_same(moments, [state["exp_avg"] for state in whole.state.values()])
            sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
            sharded.load_state_dict(saved[0])
    assert_same(list(model.parameters()), list(twin.parameters()))


@beside_gloo
def test_post_local_sgd(group: MPIProcessGroup, gloo: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    def averaged(group: Any, alone: Any) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = DistributedDataParallel(Net(), process_group=group)
        model.register_comm_hook(hook.PostLocalSGDState(group, alone, start_localSGD_iter=2), hook.post_localSGD_hook)
        averager = PeriodicModelAverager(period=2, warmup_steps=2, process_group=group)
        optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
        for step in range(7):
            optimizer.zero_grad()
            model(batch(group.rank(), step), other=True).square().sum().backward()
            optimizer.step()
        return list(model.state_dict().values())

    alone = [dist.new_group([rank]) for rank in range(2)][group.rank()]
    gloo_alone = [dist.new_group([rank], backend="gloo") for rank in range(2)][group.rank()]
    assert_same(averaged(group, alone), averaged(gloo, gloo_alone))


@on_group(3)
def test_fully_shard_and_checkpoint(group: MPIProcessGroup) -> None:
    """FSDP2 takes the steps of the plain model on all batches; its checkpoint is loaded over another number of ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    def made(mesh: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        if mesh is not None:
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: list[int]) -> None:
        optimizer.zero_grad()
        loss = sum(model(batch(rank, 0)[..., :4].double()).square().mean() for rank in ranks) / len(ranks)
        loss.backward()
        optimizer.step()

    mesh = dist.init_device_mesh("cpu", (3,))
    model, optimizer = made(mesh)
    twin, twins = made()
    for _ in range(4):
        step(model, optimizer, [group.rank()])
        step(twin, twins, [0, 1, 2])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-12, atol=1e-14)  # the means round elsewhere
    folder = [tempfile.mkdtemp() if group.rank() == 0 else None]
    dist.broadcast_object_list(folder)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder[0])
    pair = dist.new_group([0, 1])
    if group.rank() < 2:
        other, optimizer = made(dist.DeviceMesh.from_group(pair, "cpu"))
        weights, moments = get_state_dict(other, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder[0], process_group=pair)
        set_state_dict(other, optimizer, model_state_dict=weights, optim_state_dict=moments)
        step(other, optimizer, [0, 1])
        step(twin, twins, [0, 1])
        for p, q in zip(other.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-12, atol=1e-14)


@on_group(4)
def test_tensors_over_a_mesh(group: MPIProcessGroup) -> None:
    """DTensor, and functional collectives below it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2))
    a, b = (torch.randn(6, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (1, 2))
    x = distribute_tensor(a, mesh, [Shard(0), Shard(1)])
    y = distribute_tensor(b, mesh, [Replicate(), Shard(1)])
    assert torch.equal(x.redistribute(mesh, [Shard(1), Replicate()]).full_tensor(), a)
    torch.testing.assert_close((x @ y.t()).full_tensor(), a @ b.t())
    assert torch.equal(x.redistribute(mesh, [Shard(1), Shard(0)]).full_tensor(), a)


@over_mpi
@pytest.mark.mpi(min_size=2)
def test_the_library_and_ddp_together() -> None:
    """The library's own messages and those of a group do not meet."""
    import distdl_lite.nn as dnn

    P = dl.Partition().grid((2,))
    if not P.active:
        return
    group = MPIProcessGroup.init(P)
    assert group is not None
    layer = dnn.DistributedConv1d(dl.Partition().grid((1, 1, 2)), 2, 2, 3, padding=1)
    net = DistributedDataParallel(nn.Linear(3, 3))
    for _ in range(3):
        (layer(torch.ones(1, 2, 4)).sum() + net(torch.ones(2, 3) * group.rank()).sum()).backward()
    assert torch.equal(net.module.weight.grad, torch.full((3, 3), 3.0))
    dist.destroy_process_group()
