"""
A Fourier neural operator
=========================

Two-dimensional turbulence, which the page computes with a pseudo-spectral solver, and a Fourier neural operator that learns to go
from the vorticity at one time to that at a later one in a single call. Fields and network are cut in space over 2 x 2 ranks, the
Fourier transforms too.
"""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

N, FIELDS, TESTS = 48, 100, 4
TIME, STEP, VISCOSITY = 0.5, 0.02, 4e-3

# %%
# The vorticity w of a flow in a periodic box changes as it is carried along, and by friction. In Fourier space the velocity and
# the gradient of w are products with wave numbers; only the product of the two is made at points. The upper third of the wave
# numbers is cut off, or products would come back as others (aliasing). Time goes on by Heun's method, friction exactly.

K_Y, K_X = torch.fft.fftfreq(N, 1 / N)[:, None], torch.fft.rfftfreq(N, 1 / N)[None]
SQUARE = K_Y**2 + K_X**2
KEPT = (K_Y.abs() < N / 3) & (K_X < N / 3)


def carried(w: torch.Tensor) -> torch.Tensor:
    stream = w / SQUARE.clamp(min=1)
    velocity_and_gradient = torch.stack([1j * K_Y * stream, -1j * K_X * stream, 1j * K_X * w, 1j * K_Y * w])
    u, v, w_x, w_y = torch.fft.irfft2(velocity_and_gradient)
    return -1.0 * KEPT * torch.fft.rfft2(u * w_x + v * w_y)


def solve(w: torch.Tensor) -> torch.Tensor:
    w, friction = torch.fft.rfft2(w), torch.exp(-VISCOSITY * SQUARE * STEP)
    for _ in range(round(TIME / STEP)):
        first = carried(w)
        second = carried((w + STEP * first) * friction)
        w = (w + STEP / 2 * first) * friction + STEP / 2 * second
    return torch.fft.irfft2(w)


def random_vorticity() -> torch.Tensor:
    w = torch.fft.irfft2(torch.fft.rfft2(torch.randn(FIELDS, 1, N, N)) * torch.exp(-SQUARE / 8) * (SQUARE > 0))
    return 2 * w / w.std((2, 3), keepdim=True)


# %%
# The operator is written for one device. A spectral convolution multiplies the channels of each of the lowest Fourier modes with
# a matrix of its own; a pointwise convolution is added, and a GELU follows.


class Spectral(nn.Module):
    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes, shape = modes, (channels, channels, modes, modes)
        self.low, self.high = (nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / channels) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum, m = torch.fft.rfft2(x), self.modes
        kept = torch.zeros_like(spectrum)
        kept[:, :, :m, :m] = torch.einsum("nihw,iohw->nohw", spectrum[:, :, :m, :m], self.low)
        kept[:, :, -m:, :m] = torch.einsum("nihw,iohw->nohw", spectrum[:, :, -m:, :m], self.high)
        return torch.fft.irfft2(kept, s=x.shape[2:])


class FNO(nn.Module):
    def __init__(self, channels: int = 12, modes: int = 10, depth: int = 2) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv2d(1, channels, 1), nn.Conv2d(channels, 1, 1)
        self.spectral = nn.ModuleList(Spectral(channels, modes) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(depth))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        x = self.lift(w)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = nn.functional.gelu(spectral(x) + pointwise(x))
        return w + self.project(x)


# %%
# Rank 0 solves, and each rank gets its block. Training is a loop as on one device; the last fields are kept for the end.


def train(world: dl.Partition, steps: int = 60) -> SimpleNamespace:
    P = world.grid(h=2, w=2, of="n c h w")
    torch.manual_seed(0)
    before = random_vorticity()
    after = dl.scatter(solve(before) if P.rank == 0 else None, P)
    before = P.cut(before)
    net, measure = dl.distribute(FNO(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for step in range(steps):
        batch = torch.randperm(FIELDS - TESTS)[:8]
        loss = measure(net(before[batch]), after[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            P.print(f"step {step + 1}: loss {loss.item():.4f}")
    before, after = before[-TESTS:], after[-TESTS:]
    with torch.no_grad():
        found = net.eval()(before)
    before, after, found = (dl.gather(w, P) for w in (before, after, found))
    state = dl.serial_state_dict(net)
    return SimpleNamespace(P=P, before=before, after=after, found=found, report=net.report(), state=state)


result = launch(4, train)

# %%
# The same weights on one device, on fields that neither has seen:

serial = FNO().eval()
serial.load_state_dict(result.state)
with torch.no_grad():
    apart = (serial(result.before) - result.found).abs()
difference = apart.max().item()
print(f"largest difference to one device: {difference:.1e}")


def error(forecast: torch.Tensor) -> float:
    return 100 * ((forecast - result.after).norm() / result.after.norm()).item()


print(f"error: {error(result.found):.0f} % of the vorticity; if nothing had changed, {error(result.before):.0f} %")

# %%

rows, columns = result.P.bounds(result.after.shape)[2:]
figure, axes = plt.subplots(2, 4, figsize=(11, 5.8), layout="constrained")
titles = {
    "before": result.before,
    "after, by the solver": result.after,
    "after, by the operator": result.found,
    "error of the operator": result.found - result.after,
}
for line, field in zip(axes, (-1, -2), strict=True):
    for ax, (title, w) in zip(line, titles.items(), strict=True):
        image = ax.imshow(w[field, 0].numpy(), cmap="RdBu_r", vmin=-5, vmax=5, interpolation="bilinear")
        ax.axhline(rows[1] - 0.5, color="orange", linestyle="--", linewidth=1)
        ax.axvline(columns[1] - 0.5, color="orange", linestyle="--", linewidth=1)
        ax.set_title(title if field == -1 else "")
        ax.set_axis_off()
figure.colorbar(image, ax=axes, shrink=0.6, extend="both", label="vorticity")
figure.suptitle(f"two flows that were not trained on; four ranks differ from one device by {difference:.0e} at most")
figure.savefig("fourier_operator.png")

# %%
# A transform of a cut dim needs all of it: the ranks exchange blocks so that each has whole lines, and go back. That is what the
# spectral convolutions send, and the sums behind them, in ``.``, to which their results go home; the pointwise ones send nothing.

figure = dl.show.layers(result.report)
figure.savefig("fourier_operator_layers.png")
