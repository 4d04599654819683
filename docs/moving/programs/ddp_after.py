"""The same with distdl_lite: mpirun -n 2 python ddp_after.py, or torchrun --nproc-per-node 2 ddp_after.py"""

# launch
import torch
import torch.utils.data as td
from torch import nn

import distdl_lite as dl

dl.abort_on_exception()
P = dl.Partition.world()

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(22, 3, 8, 8, generator=gen)
data = td.TensorDataset(
    x, x.mean((1, 2, 3))
)
loader = dl.data.Loader(
    data,
    P,
    shuffle=False,
    global_batch_size=8,
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
net = dl.DataParallel(model, P)
adam = torch.optim.Adam(
    net.parameters(), lr=0.01
)

# step
for _epoch in range(2):
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
sums = P.allreduce_data(sums, torch.add)
P.print(f"mean {sums[0] / sums[1]:.5f}")

# save
state = {"model": model, "optimizer": adam}
dl.save("runs/step_6", **state, data=loader)
dl.load("runs/step_6", **state, data=loader)

# end
