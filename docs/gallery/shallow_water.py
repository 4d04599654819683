"""
Shallow water on a sphere
=========================

Waves on a rotating sphere, computed by finite differences on a grid of 91 x 180 points, and a network that learns to forecast
them in one call. Both run on the grid cut 2 x 2 over four ranks, with 46 and 45 rows and with the first and the last longitude on
different ranks, closed around the sphere by circular padding: the solver by layers over the grid, the network as plain torch.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import conv2d, pad

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import launch

ROWS, COLUMNS, EDGE = 91, 180, math.radians(67.5)  # from 67.5 degrees north to 67.5 degrees south
RADIUS, SPIN, GRAVITY, DEPTH = 6.371e6, 7.292e-5, 9.81, 1000.0
STEP, STEPS, FRICTION = 600.0, 12, 0.02  # a forecast is 12 steps of ten minutes
DX, DY = RADIUS * 2 * math.pi / COLUMNS, RADIUS * 2 * EDGE / (ROWS - 1)  # between points, at the equator
LATITUDE = torch.linspace(EDGE, -EDGE, ROWS)[:, None]
LONGITUDE = torch.arange(COLUMNS) * 2 * math.pi / COLUMNS
UNIT = torch.tensor([50.0, 5.0, 5.0])[:, None, None]  # m and m/s, for numbers of about one


def padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """Around the sphere what comes next is the other end; beyond the last row stand copies of it."""
    return pad(pad(x, (width, width, 0, 0), mode="circular"), (0, 0, width, width), mode="replicate")


# %%
# The state is the height of the water above its depth at rest, and the flow to the east and to the north. All that the solver
# needs of other points are differences: to the east, to the north, and to the four neighbours, by one convolution with fixed
# weights. The rest is the same code for a block as for the whole, with the latitudes of its points.

EAST = torch.tensor([[0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0]])
AROUND = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1.0, 0]])
STENCILS = torch.einsum("khw,io->kiohw", torch.stack([EAST, -EAST.T, AROUND]), torch.eye(4)).flatten(0, 1)
Differences = Callable[[torch.Tensor], torch.Tensor]


def change(state: torch.Tensor, differences: Differences, latitude: torch.Tensor) -> torch.Tensor:
    """The change a second of states of shape (n, 3, rows, columns)."""
    h, u, v = state.split(1, dim=1)
    cosine = torch.cos(latitude)
    x, y, around = differences(torch.cat([state, v * cosine], dim=1)).split(4, dim=1)
    x, y = x / (DX * cosine), y / DY
    turn = 2 * SPIN * torch.sin(latitude) + u * torch.tan(latitude) / RADIUS
    flow_out = (DEPTH + h) * (x[:, 1:2] + y[:, 3:] / cosine)
    forces = torch.cat([-flow_out, turn * v - GRAVITY * x[:, :1], -turn * u - GRAVITY * y[:, :1]], dim=1)
    return forces - u * x[:, :3] - v * y[:, :3] + FRICTION / STEP * around[:, :3]


def later(state: torch.Tensor, differences: Differences, latitude: torch.Tensor) -> torch.Tensor:
    """The states two hours on, by the third-order method of Shu and Osher."""
    with torch.no_grad():
        for _ in range(STEPS):
            first = state + STEP * change(state, differences, latitude)
            second = 0.75 * state + 0.25 * (first + STEP * change(first, differences, latitude))
            state = state / 3 + 2 / 3 * (second + STEP * change(second, differences, latitude))
    return state


# %%
# Over a grid of ranks three layers make the differences: two pads, of the whole sphere and not of each block, and a convolution
# that fetches its halo.


def cut_differences(P: dl.Partition) -> nn.Module:
    convolution = dnn.DistributedConv2d(P, 4, 12, 3, bias=False)
    dl.load_serial_state_dict(convolution, {"weight": STENCILS})
    around, beyond = dnn.DistributedCircularPad2d(P, (1, 1, 0, 0)), dnn.DistributedReplicationPad2d(P, (0, 0, 1, 1))
    return nn.Sequential(around, beyond, convolution)


def start(count: int) -> torch.Tensor:
    """Water at rest with six random hills and hollows each."""
    h = torch.zeros(count, 1, ROWS, COLUMNS)
    for _ in range(5):
        north, east, size = torch.rand(3, count, 1, 1, 1) * torch.tensor([1.6, 2 * math.pi, 0.15]).view(3, 1, 1, 1, 1)
        north = north - 0.8
        cosines = torch.cos(LATITUDE) * torch.cos(north) * torch.cos(LONGITUDE - east)
        angle = torch.acos((torch.sin(LATITUDE) * torch.sin(north) + cosines).clamp(-1, 1))
        h = h + 100 * torch.randn(count, 1, 1, 1) * torch.exp(-((angle / (0.12 + size)) ** 2))
    return torch.cat([h, torch.zeros(count, 2, ROWS, COLUMNS)], dim=1)


# %%
# The network is written for one device. It makes 12 steps at once. Gravity waves, at 100 m/s, get 720 km far in them: some four
# points to the north, and eight to the east at 65 degrees. Its convolutions see nine points far.


class Forecast(nn.Module):
    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.register_buffer("place", torch.sin(LATITUDE).expand(1, 1, ROWS, COLUMNS).clone())
        sizes = [4, channels, channels, channels, 3]
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, 3, dilation=d) for i, o, d in zip(sizes, sizes[1:], (1, 2, 4, 2), strict=False)
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        x = torch.cat([state / UNIT, self.place.expand(len(state), -1, -1, -1)], dim=1)
        for layer in self.layers[:-1]:
            x = nn.functional.silu(layer(padded(x, layer.dilation[0])))
        return state + UNIT * self.layers[-1](padded(x, 2))


# %%
# Three of four simulations are for training, the last one for the end. The solver makes them in blocks.


def train(world: dl.Partition, steps: int = 40) -> SimpleNamespace:
    P = world.grid(h=2, w=2, of="n c h w")
    torch.manual_seed(0)
    first = start(4)
    differences, latitude, states = cut_differences(P), P.cut(LATITUDE.expand(1, 1, ROWS, COLUMNS)), [P.cut(first)]
    for _ in range(5):
        states.append(later(states[-1], differences, latitude))
    net, measure = dl.distribute(Forecast(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        now, then = states[1 + step % 4][:3], states[2 + step % 4][:3]
        loss = measure(net(now) / UNIT, then / UNIT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            P.print(f"step {step + 1}: loss {loss.item():.5f}")
    with torch.no_grad():
        found = net(states[-2])
    now, then, found = (dl.gather(x, P) for x in (states[-2], states[-1], found))
    return SimpleNamespace(P=P, first=first, now=now, then=then, found=found, state=dl.serial_state_dict(net))


result = launch(4, train)

# %%
# On one device the same solver and the same network give the same: in units of 50 m and 5 m/s,

serial = Forecast()
serial.load_state_dict(result.state)
state = result.first
for _ in range(5):
    state = later(state, lambda x: conv2d(padded(x, 1), STENCILS), LATITUDE)
with torch.no_grad():
    apart = torch.stack([state - result.then, serial(result.now) - result.found]) / UNIT
difference = apart.abs().max().item()
print(f"largest difference to one device: {difference:.1e}")


def height_error(forecast: torch.Tensor) -> float:
    return (forecast - result.then)[-1, 0].square().mean().sqrt().item()


print(f"error of the height in two hours: {height_error(result.found):.2f} m")
print(f"if nothing changed: {height_error(result.now):.2f} m")

# %%

rows, columns = result.P.bounds(result.then.shape)[2:]
degrees = [0, 360, -67.5, 67.5]
figure, axes = plt.subplots(2, 2, figsize=(9.6, 4.4), sharex=True, sharey=True, layout="constrained")
maps = {
    "height now": result.now,
    "in two hours, by the solver": result.then,
    "in two hours, by the network": result.found,
    f"error of the network, {height_error(result.found):.1f} m of {height_error(result.now):.1f} m": result.found
    - result.then,
}
for ax, (title, field) in zip(axes.flat, maps.items(), strict=True):
    image = ax.imshow(field[-1, 0].numpy(), cmap="RdBu_r", vmin=-30, vmax=30, extent=degrees, interpolation="bilinear")
    ax.axhline(67.5 - 135 * rows[1] / ROWS, color="orange", linestyle="--", linewidth=1)
    for longitude in (0, 360 * columns[1] / COLUMNS, 360):  # the seam of the map is a cut as well
        ax.axvline(longitude, color="orange", linestyle="--", linewidth=1)
    ax.set(title=title, xticks=range(0, 361, 90), yticks=range(-60, 61, 30))
figure.supxlabel("longitude (degrees)", fontsize=10)
figure.supylabel("latitude (degrees)", fontsize=10)
figure.colorbar(image, ax=axes, shrink=0.8, extend="both", label="height (m)")
figure.savefig("shallow_water.png")
