"""Data parallel training with torch: torchrun --nproc-per-node 2 ddp_before.py"""

# launch
import torch
import torch.distributed as dist
import torch.utils.data as td
from torch import nn

dist.init_process_group("gloo")
rank = dist.get_rank()

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(22, 3, 8, 8, generator=gen)
data = td.TensorDataset(
    x, x.mean((1, 2, 3))
)
mine = td.DistributedSampler(
    data, shuffle=False
)
loader = td.DataLoader(
    data, 4, sampler=mine
)

# model
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3),
    nn.Tanh(),
    nn.Flatten(),
    nn.Linear(288, 1),
    nn.Flatten(0),
)
net = nn.parallel.DistributedDataParallel(
    model
)
adam = torch.optim.Adam(
    net.parameters(), lr=0.01
)

# step
for epoch in range(2):
    mine.set_epoch(epoch)
    for x, y in loader:
        adam.zero_grad()
        loss = nn.functional.mse_loss(
            net(x), y
        )
        loss.backward()
        nn.utils.clip_grad_norm_(
            net.parameters(), 1
        )
        adam.step()

# evaluate
sums = torch.zeros(2)
with torch.no_grad():
    for x, y in loader:
        sums[0] += (
            (net(x) - y).square().sum()
        )
        sums[1] += len(y)
dist.all_reduce(sums)
if rank == 0:
    print(f"mean {sums[0] / sums[1]:.5f}")

# save
if rank == 0:
    state = {
        "model": model.state_dict(),
        "adam": adam.state_dict(),
    }
    torch.save(state, "run.pt")
dist.barrier()
state = torch.load("run.pt")
model.load_state_dict(state["model"])
adam.load_state_dict(state["adam"])

# end
dist.destroy_process_group()
