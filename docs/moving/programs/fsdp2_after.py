"""Weights cut by features with distdl_lite: mpirun -n 2 python fsdp2_after.py"""

# launch
import torch
from torch import nn

import distdl_lite as dl

dl.abort_on_exception()
world = dl.Partition.world()
P = world.grid(batch=1, features=world.size)

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(8, 6, generator=gen)
y = x.cumsum(1)
x, y = P.cut(x), P.cut(y)

# model
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(6, 32),
    nn.GELU(),
    nn.Linear(32, 6),
)
net = dl.distribute(model, P)
measure = dl.distribute(nn.MSELoss(), P)
net(x)  # cuts the weights
adam = torch.optim.Adam(
    net.parameters(), lr=0.01
)

# step
for _ in range(20):
    adam.zero_grad()
    loss = measure(net(x), y)
    loss.backward()
    dl.clip_grad_norm_(net, 1)
    adam.step()

# evaluate
with torch.no_grad():
    loss = measure(net(x), y)
P.print(f"mean {loss:.5f}")

# save
state = {
    "model": net,
    "optimizer": adam,
    "P": P,
}
dl.save("runs/step_20", **state)
dl.load("runs/step_20", **state)

# end
