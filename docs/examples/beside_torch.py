"""A network cut over space inside each of two groups of ranks, and torch's DDP or FSDP2 over the groups.

    torchrun --nproc-per-node 4 docs/examples/beside_torch.py --over fsdp2

One device beside it trains on the whole batches. At the end torch.distributed.checkpoint saves the weights and loads them into
another network.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distdl_lite as dl


def serial_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
    return nn.Sequential(convolutions[0], nn.GroupNorm(2, 8), nn.SiLU(), convolutions[1]).double()


def cut_model(mesh: DeviceMesh, over: str, seed: int = 0) -> nn.Module:
    """The model over the rows of this rank's group; the groups share its training out."""
    P = dl.Partition(mesh["space"]).grid((1, 1, mesh["space"].size(), 1))
    net = dl.distribute(serial_model(seed), P)
    if over == "ddp":
        return DistributedDataParallel(net, process_group=mesh["groups"].get_group())
    return fully_shard(net, mesh=mesh["groups"])


def main() -> None:
    """Train for some steps, print both losses, save and load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--over", choices=("ddp", "fsdp2"), default="fsdp2")
    over = parser.parse_args().over
    dl.abort_on_exception()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("groups", "space"))
    P = dl.Partition(mesh["space"]).grid((1, 1, mesh["space"].size(), 1))
    batches = torch.randn(4, 6, 1, 17, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = batches.chunk(2, dim=1)[mesh["groups"].get_local_rank()]  # this group's half of each batch

    model, serial = cut_model(mesh, over), serial_model()
    measure = dl.distribute(nn.MSELoss(), P)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, serial)]
    for step, (x, whole) in enumerate(zip(mine, batches, strict=True)):
        x = x[P.block(x.shape)]
        losses = measure(model(x), x * x), nn.functional.mse_loss(serial(whole), whole * whole)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = losses[0].detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.6f}, of one device {losses[1].item():.6f}")

    with tempfile.TemporaryDirectory() as folder:
        there = [folder]
        dist.broadcast_object_list(there)
        dcp.save(get_model_state_dict(model), checkpoint_id=there[0])
        other = cut_model(mesh, over, seed=7)
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=there[0])
        set_model_state_dict(other, state)
        dist.barrier()
    with torch.no_grad():
        x = mine[0][P.block(mine[0].shape)]
        same = torch.equal(model(x), other(x))
    if dist.get_rank() == 0:
        print(f"a network loaded from the checkpoint computes the same: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
