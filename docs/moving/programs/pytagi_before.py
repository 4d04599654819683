"""A Gaussian network with pytagi: python pytagi_before.py"""

# launch
import numpy as np
import pytagi
from pytagi.nn import (
    Linear,
    OutputUpdater,
    ReLU,
    Sequential,
)

# data
x = np.linspace(-1, 1, 60, dtype=np.float32)
y = x**2
var_y = np.full_like(y[:20], 0.01)

# model
pytagi.manual_seed(0)
net = Sequential(
    Linear(1, 32), ReLU(), Linear(32, 1)
)
updater = OutputUpdater(net.device)

# step
for step in range(90):
    rows = slice(step % 3, None, 3)
    net(x[rows])
    updater.update(
        output_states=net.output_z_buffer,
        mu_obs=y[rows],
        var_obs=var_y,
        delta_states=net.input_delta_z_buffer,
    )
    net.backward()
    net.step()

# evaluate
net.eval()
mean, variance = net(x)
error = np.square(mean[:60] - y).mean()
print(f"mean below 0.01: {error < 0.01}")

# save
net.save("net.bin")
net.load("net.bin")

# end
