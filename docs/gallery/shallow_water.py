"""
Shallow water on a sphere
=========================

Waves on a rotating sphere, computed by finite differences on a grid of 91 x 180 points, and a network that learns to forecast
them in one call. Solver and network are plain torch, closed around the sphere by circular padding, and both run on the grid cut
2 x 2 over four ranks: 46 and 45 rows, and the first and the last longitude on different ranks.
"""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import conv2d, pad

import distdl_lite as dl
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
# The state is the height of the water above its depth at rest, and the flow to the east and to the north. How it changes is a
# module of plain torch: one convolution with fixed weights makes the differences to the east, to the north and to all neighbours.


class Change(nn.Module):
    """The change a second of states of shape (n, 3, ROWS, COLUMNS)."""

    def __init__(self) -> None:
        super().__init__()
        east = torch.tensor([[0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0]])
        around = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1.0, 0]])
        stencils = torch.stack([east, -east.T, around])
        self.register_buffer("stencils", torch.einsum("khw,io->kiohw", stencils, torch.eye(4)).flatten(0, 1))
        self.register_buffer("coriolis", 2 * SPIN * torch.sin(LATITUDE))
        self.register_buffer("curvature", torch.tan(LATITUDE) / RADIUS)
        self.register_buffer("cosine", torch.cos(LATITUDE))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        h, u, v = state.split(1, dim=1)
        x, y, around = conv2d(padded(torch.cat([state, v * self.cosine], dim=1), 1), self.stencils).split(4, dim=1)
        x, y = x / (DX * self.cosine), y / DY
        turn = self.coriolis + u * self.curvature
        flow_out = (DEPTH + h) * (x[:, 1:2] + y[:, 3:] / self.cosine)
        forces = torch.cat([-flow_out, turn * v - GRAVITY * x[:, :1], -turn * u - GRAVITY * y[:, :1]], dim=1)
        return forces - u * x[:, :3] - v * y[:, :3] + FRICTION / STEP * around[:, :3]


# %%
# A step, by the third-order method of Shu and Osher, needs no neighbours beside that: it is the same code for a block.


def later(change: nn.Module, state: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(STEPS):
            first = state + STEP * change(state)
            second = 0.75 * state + 0.25 * (first + STEP * change(first))
            state = state / 3 + 2 / 3 * (second + STEP * change(second))
    return state


def start(count: int) -> torch.Tensor:
    """Water at rest with six random hills and hollows each."""
    h = torch.zeros(count, 1, ROWS, COLUMNS)
    for _ in range(6):
        north, east, size = torch.rand(3, count, 1, 1, 1) * torch.tensor([1.6, 2 * math.pi, 0.15]).view(3, 1, 1, 1, 1)
        north = north - 0.8
        cosines = torch.cos(LATITUDE) * torch.cos(north) * torch.cos(LONGITUDE - east)
        angle = torch.acos((torch.sin(LATITUDE) * torch.sin(north) + cosines).clamp(-1, 1))
        h = h + 100 * torch.randn(count, 1, 1, 1) * torch.exp(-((angle / (0.12 + size)) ** 2))
    return torch.cat([h, torch.zeros(count, 2, ROWS, COLUMNS)], dim=1)


# %%
# The network forecasts all 12 steps at once: gravity waves, at 100 m/s, get 720 km far in them, and so do its convolutions.


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
    change, states = dl.distribute(Change(), P), [P.cut(first)]
    for _ in range(6):
        states.append(later(change, states[-1]))
    net, measure = dl.distribute(Forecast(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        now, then = states[1 + step % 5][:3], states[2 + step % 5][:3]
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
for _ in range(6):
    state = later(Change(), state)
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
figure, axes = plt.subplots(2, 2, figsize=(9.6, 5.2), sharex=True, sharey=True, layout="constrained")
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
    for longitude in (0, 360 * columns[1] / COLUMNS, 360):  # the cut, and the seam of the map, which is one as well
        ax.axvline(longitude, color="orange", linestyle="--", linewidth=1)
    ax.set(title=title, xticks=range(0, 361, 90), yticks=range(-60, 61, 30))
figure.supxlabel("longitude (degrees)", fontsize=10)
figure.supylabel("latitude (degrees)", fontsize=10)
figure.colorbar(image, ax=axes, shrink=0.8, label="height (m)")
figure.savefig("shallow_water.png")
