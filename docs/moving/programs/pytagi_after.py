"""The same on several ranks with distdl_lite: mpirun -n 2 python pytagi_after.py"""

# launch
import numpy as np
import torch

import distdl_lite as dl
from distdl_lite.tagi import (
    DDPConfig,
    DDPSequential,
    Linear,
    OutputUpdater,
    ReLU,
    Sequential,
)

dl.abort_on_exception()
P = dl.Partition.world()

# data
x = np.linspace(-1, 1, 60, dtype=np.float32)
y = x**2
var_y = 0.01

# model
torch.manual_seed(0)
net = Sequential(
    Linear(1, 32), ReLU(), Linear(32, 1)
)
config = DDPConfig(P=P)
net = DDPSequential(
    net, config, average=False
)
updater = OutputUpdater()

# step
for step in range(90):
    rows = slice(step % 3, None, 3)
    mine = slice(P.rank, None, P.size)
    net(x[rows][mine])
    updater.update(
        output_states=net.output_z_buffer,
        mu_obs=y[rows][mine],
        var_obs=var_y,
        delta_states=net.input_delta_z_buffer,
    )
    net.backward()
    net.step()

# evaluate
net.eval()
mean, variance = net(x)
error = np.square(mean.ravel() - y).mean()
P.print(f"mean below 0.01: {error < 0.01}")

# save
if P.rank == 0:
    torch.save(net.state_dict(), "net.pt")
net.barrier()
net.load_state_dict(torch.load("net.pt"))

# end
