"""A picture cut over ranks with distdl_lite: mpirun -n 2 python shardtensor_after.py"""

# launch
import torch
from torch import nn

import distdl_lite as dl

dl.abort_on_exception()
world = dl.Partition.world()
P = world.grid(h=world.size, of="n c h w")

# data
whole = None
if world.rank == 0:
    gen = torch.Generator().manual_seed(1)
    whole = torch.randn(
        1, 3, 33, 20, generator=gen
    )
x = dl.scatter(whole, P)

# model
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(
        3, 8, 3, 2, padding=1, bias=False
    ),
    nn.BatchNorm2d(8),
    nn.SiLU(),
    nn.Upsample(size=(33, 20)),
    nn.Conv2d(8, 3, 3, padding=1),
)
net = dl.distribute(model, P)
measure = dl.distribute(nn.MSELoss(), P)
adam = torch.optim.Adam(
    net.parameters(), lr=0.01
)

# step
for _ in range(20):
    adam.zero_grad()
    loss = measure(net(x), x)
    loss.backward()
    dl.clip_grad_norm_(net, 1)
    adam.step()

# evaluate
net.eval()
with torch.no_grad():
    loss = measure(net(x), x)
P.print(f"mean {loss:.5f}")
whole = dl.gather(net(x), P)
P.print(tuple(whole.shape))

# save
state = {
    "model": net,
    "optimizer": adam,
    "P": P,
}
dl.save("runs/step_20", **state)
dl.load("runs/step_20", **state)

# end
