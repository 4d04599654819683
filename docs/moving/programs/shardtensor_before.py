"""Tensor parallel and sharded tensors with torch's DTensor: torchrun --nproc-per-node 2 shardtensor_before.py"""

# launch
import torch
import torch.distributed as dist
import torch.distributed.tensor as dt
import torch.distributed.tensor.parallel as tp
from torch import nn

dist.init_process_group("gloo")
ranks = dist.get_world_size()
mesh = dist.init_device_mesh(
    "cpu", (ranks,)
)

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(8, 6, generator=gen)
x = dt.distribute_tensor(
    x, mesh, [dt.Replicate()]
)
y = dt.distribute_tensor(
    x.full_tensor().cumsum(1),
    mesh,
    [dt.Replicate()],
)

# model
torch.manual_seed(0)
net = nn.Sequential(
    nn.Linear(6, 32),
    nn.GELU(),
    nn.Linear(32, 6),
)
rowwise = tp.RowwiseParallel(
    use_local_output=False
)
plan = {
    "0": tp.ColwiseParallel(),
    "2": rowwise,
}
tp.parallelize_module(net, mesh, plan)
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
loss = loss.full_tensor()
if dist.get_rank() == 0:
    print(f"mean {loss:.5f}")

# end
dist.destroy_process_group()
