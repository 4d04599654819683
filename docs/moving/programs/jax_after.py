"""The same with distdl_lite: mpirun -n 2 python jax_after.py"""

# launch
import numpy as np
import torch
from torch import nn

import distdl_lite as dl
import distdl_lite.nn as dnn

dl.abort_on_exception()
world = dl.Partition.world()
P = world.grid(h=world.size, of="n c h w")

# data
rng = np.random.default_rng(1)
x = rng.standard_normal((2, 1, 10, 6))
x = P.cut(
    torch.tensor(x, dtype=torch.float32)
)

# model
conv = nn.Conv2d(
    1, 1, 3, padding=1, bias=False
)
nn.init.constant_(conv.weight, 0.1)
model = nn.Sequential(conv, nn.Tanh())
net = dl.distribute(model, P)

# step
measure = dl.distribute(nn.MSELoss(), P)
sgd = torch.optim.SGD(
    net.parameters(), lr=0.5
)

for _ in range(20):
    sgd.zero_grad()
    loss = measure(net(x), x)
    loss.backward()
    sgd.step()

# evaluate
with torch.no_grad():
    P.print(
        f"mean {measure(net(x), x):.5f}"
    )

# own
total = dnn.AllSumReduce(P, [2])


def means(
    block,
):  # a sum over ranks, with its adjoint
    sums = block.sum((2, 3), keepdim=True)
    return total(sums) / 60


P.print(f"{means(x)[0, 0].item():.5f}")

# end
