"""Sharded weights with torch: torchrun --nproc-per-node 2 fsdp2_before.py"""

# launch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as sd
from torch import nn
from torch.distributed.fsdp import (
    fully_shard,
)

dist.init_process_group("gloo")
rank, ranks = (
    dist.get_rank(),
    dist.get_world_size(),
)
mesh = dist.init_device_mesh(
    "cpu", (ranks,)
)

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(8, 6, generator=gen)
y = x.cumsum(1)
x, y = (
    x.chunk(ranks)[rank],
    y.chunk(ranks)[rank],
)

# model
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(6, 32),
    nn.GELU(),
    nn.Linear(32, 6),
)
for layer in model:
    fully_shard(layer, mesh=mesh)
net = fully_shard(model, mesh=mesh)
adam = torch.optim.Adam(
    net.parameters(), lr=0.01
)

# step
for _ in range(20):
    adam.zero_grad()
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(
        net.parameters(), 1
    )
    adam.step()

# evaluate
with torch.no_grad():
    loss = nn.functional.mse_loss(net(x), y)
dist.all_reduce(loss)
if rank == 0:
    print(f"mean {loss / ranks:.5f}")

# save
model_state, adam_state = sd.get_state_dict(
    net, adam
)
state = {
    "model": model_state,
    "adam": adam_state,
}
dcp.save(state, checkpoint_id="run_dcp")
dcp.load(state, checkpoint_id="run_dcp")
sd.set_state_dict(
    net,
    adam,
    model_state_dict=state["model"],
    optim_state_dict=state["adam"],
)

# end
dist.destroy_process_group()
