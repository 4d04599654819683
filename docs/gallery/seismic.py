"""
See into the ground with sound
==============================

Sources at the surface shake the ground, and receivers record what comes back. Full waveform inversion finds the velocities
below: it simulates the records, and follows the gradient of their misfit, which autograd takes back through all time steps. The
ground is cut 2 x 2 over four ranks, and a time step is a halo exchange and a stencil.
"""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import adjoint_test, launch

TOLERANCE = 1e-11  # of the gradient in float64, relative to its largest value
SPACING, TIME_STEP, FREQUENCY = 12.5, 2.5e-3, 5.6  # of points in m, of the simulation in s, of the sources in Hz
ROWS, COLUMNS, TIMES = (torch.arange(n).double() for n in (52, 80, 264))
ROWS = ROWS.view(1, 52, 1)
SOURCES, TOP = (7, 28, 49, 71), 2  # columns of the sources, and the row of sources and receivers

# %%
# There are four layers with folds, and in the second one a body that is harder than what is around it. The inversion starts
# from smooth layers without it.


def ground() -> tuple[torch.Tensor, torch.Tensor]:
    """Velocities in m/s, of shape (1, 52, 80): the true ones, and those to start from."""
    fold = ROWS + 3.2 * torch.sin(COLUMNS / 12)
    layers = 1700 + sum(v * torch.sigmoid((fold - row) / 0.6) for row, v in ((14.5, 300), (29, 350), (42, 350)))
    body = 500 * torch.exp(-((((ROWS - 24) / 5.6) ** 2 + ((COLUMNS - 49) / 9) ** 2) ** 3))
    kernel = torch.exp(-(torch.arange(-10, 11).double() ** 2) / 20)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    return layers + body, F.conv2d(F.pad(layers, (10,) * 4, mode="replicate"), kernel[None, None])


# %%
# The physics is written once, for a whole ground and for a block. ``grow`` adds a point on each side: zeros on one device,
# what the neighbours hold on a rank. Waves are damped at all edges but the surface.


def records(velocity, source, grow, damping, receivers) -> torch.Tensor:
    """What receivers in a row of the block record, of shape (times * shots, rows with receivers, columns)."""
    phase = (math.pi * FREQUENCY * (TIMES * TIME_STEP - 1.1 / FREQUENCY)) ** 2
    courant = (TIME_STEP / SPACING * velocity) ** 2 / (1 + damping)
    keep, drop = 2 / (1 + damping) - 4 * courant, (1 - damping) / (1 + damping)
    before = now = torch.zeros_like(source)
    seen = []
    for wavelet in ((1 - 2 * phase) * torch.exp(-phase)).tolist():
        wide = grow(now)
        around = wide[:, :-2, 1:-1] + wide[:, 2:, 1:-1] + wide[:, 1:-1, :-2] + wide[:, 1:-1, 2:]
        before, now = now, keep * now - drop * before + courant * around + wavelet * source
        seen.append(now[:, receivers])
    return torch.cat(seen)


SHOTS = torch.stack([(ROWS[0] == TOP) & (column == COLUMNS) for column in SOURCES]).double()
DAMPING = 0.12 * (torch.maximum((COLUMNS - 39.5).abs() - 29.5, ROWS - 41).clamp(0, 10) / 10) ** 2
RECEIVERS = (ROWS == TOP).flatten()

# %%
# On ranks ``grow`` is a halo exchange. In a module of the library all time steps share one agreement of the ranks. The loss
# is one number on all ranks; its gradient is each rank's block of the whole gradient, and the optimizer steps as on one
# device.


class Records(dnn.Module):
    def __init__(self, P: dl.Partition) -> None:
        super().__init__(P)
        self.grow = dnn.HaloExchange(P, (0, 1, 1), boundary="zeros")
        self.fields = P.cut(DAMPING), P.cut(RECEIVERS, ["z"])

    def forward(self, velocity: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return records(velocity, source, self.grow, *self.fields)


def invert(world: dl.Partition, steps: int = 6) -> SimpleNamespace:
    P = world.grid(z=2, x=2, of="shot z x")
    simulate, measure = Records(P), dnn.DistributedMSELoss(P, reduction="sum")
    true, start = (P.cut(velocity) for velocity in ground())
    source, weight = P.cut(SHOTS), P.cut((ROWS > 5) * (ROWS / 52) ** 2, (None, "z", None))
    with torch.no_grad():
        observed = simulate(true, source)
    velocity = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([velocity], lr=1.6e5, momentum=0.5)
    for step in range(steps):
        found = simulate(velocity, source)
        loss = measure(found, observed)
        optimizer.zero_grad()
        loss.backward()
        P.print(f"step {step + 1}: misfit {loss.item():.3f}")
        if step == 0:
            gradient = velocity.grad.clone()
        velocity.grad *= weight  # deep waves are faint, and what is near the surface is known
        optimizer.step()
    with dl.count() as moved:
        adjoint = adjoint_test(lambda source: simulate(true, source), torch.rand_like(source), P=P)
    blocks = {"velocity": velocity, "gradient": gradient, "observed": observed, "left": found - observed}
    whole = {name: dl.gather(block.detach(), P) for name, block in blocks.items()}
    return SimpleNamespace(**whole, P=P, adjoint=adjoint, sent=moved.bytes)


result = launch(4, invert)

# %%
# On one device: the same function, with zeros around the whole ground. Its gradient, through all time steps, is that of the
# ranks. That the library's movements are exact adjoints can be tested for themselves: records are linear in the sources.

true, start = ground()
alone = nn.ZeroPad2d(1), DAMPING, RECEIVERS
with torch.no_grad():
    observed = records(true, SHOTS, *alone)
start.requires_grad_()
(records(start, SHOTS, *alone) - observed).square().sum().backward()
error = ((start.grad - result.gradient) / start.grad.abs().max()).abs()
difference = error.max().item()
print(f"largest difference to one device, of the gradient, over its largest value: {difference:.1e}")
print(f"<F x, y> and <x, F* y> differ by {result.adjoint:.1e} of their largest possible value")
print(f"a rank sends {result.sent / 1e6:.1f} MB in {len(TIMES)} time steps there and back")

# %%
# The body comes out, and the folds become sharp. What the receivers record of one shot is explained but for a little at the
# end.

(_, row, _), (_, column, _) = result.P.bounds(start.shape)[1:]
extent = [0, 80 * SPACING, 52 * SPACING, 0]
figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
grounds = {"true velocity, and the sources": true, "start": start.detach(), "inverted on four ranks": result.velocity}
for ax, (title, velocity) in zip(axes[0], grounds.items(), strict=True):
    image = ax.imshow(velocity[0].numpy(), extent=extent, cmap="viridis", vmin=1500, vmax=2800)
    ax.set(title=title, xlabel="m", ylabel="depth in m")
axes[0, 0].plot([(c + 0.5) * SPACING for c in SOURCES], [(TOP + 0.5) * SPACING] * 4, "*", color="white", markersize=9)
figure.colorbar(image, ax=axes[0], label="m/s")
far = 0.6 * result.gradient[:, 6:].abs().max().item()  # next to sources it is larger
axes[1, 0].imshow(-result.gradient[0].numpy(), extent=extent, cmap="RdBu_r", vmin=-far, vmax=far)
axes[1, 0].set(title=f"first descent, {difference:.0e} from one device", xlabel="m", ylabel="depth in m")
for ax in (*axes[0], axes[1, 0]):
    ax.axhline(row * SPACING, color="orange", linestyle="--", linewidth=1)
gathers = {"records of the second shot": result.observed, "not explained at the end": result.left}
for ax, (title, gather) in zip(axes[1, 1:], gathers.items(), strict=True):
    shot = gather[1 :: len(SOURCES), 0].numpy()
    image = ax.imshow(
        shot, extent=[*extent[:2], len(TIMES) * TIME_STEP, 0], aspect="auto", cmap="gray", vmin=-0.5, vmax=0.5
    )
    ax.set(title=title, xlabel="m", ylabel="time in s")
figure.colorbar(image, ax=axes[1], label="pressure", extend="both")
for ax in axes.flat:
    ax.axvline(column * SPACING, color="orange", linestyle="--", linewidth=1)
figure.savefig("seismic.png")
