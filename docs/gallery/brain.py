"""
Reconstruct a brain from two fifths of its data
===============================================

A scanner measures the Fourier transform of a slice line by line. Two fifths of the lines take two fifths of the time, and leave
a picture without its detail. A network of plain torch, of convolutions in three dims and Fourier transforms, learns to find it
again. Each of four ranks holds a quarter of the volume and of every activation.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nibabel
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

# %%
# The head comes with nibabel: two volumes, taken two seconds apart. They are magnitudes, so the lines here are computed from
# a picture and not measured. Each slice has lines of its own, all of those in the middle of the spectrum and some of the
# others.


def volumes() -> tuple[torch.Tensor, torch.Tensor]:
    """Both volumes, of shape (1, 1, 64, 96, 8): left to right, back to front, bottom to top."""
    file = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    data = torch.from_numpy(nibabel.load(file).get_fdata()[32:96, :, 8:16]).float() / 600
    return data[None, None, ..., 0].contiguous(), data[None, None, ..., 1].contiguous()


def measured(volume: torch.Tensor, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The spectrum, zero where it is not measured, and which lines of each slice are."""
    distance = torch.fft.fftfreq(96).abs()[:, None]
    lines = (torch.rand(96, 8, generator=draws) < 0.25 + (distance < 0.08)).view(1, 1, 1, 96, 8)
    return torch.fft.fft(volume, dim=3) * lines, lines


# %%
# The network is written for one device. It makes a picture of the lines that there are, adds a correction, and puts the lines
# that were measured back.


def convolution(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(ins, outs, 3, padding=1), nn.SiLU())


class Reconstruction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.mix = convolution(1, 8), convolution(8, 8)
        self.coarse = nn.Sequential(nn.AvgPool3d(2), convolution(8, 16), convolution(16, 16), convolution(16, 8))
        self.grow, self.end = nn.Upsample(scale_factor=2), nn.Conv3d(8, 1, 3, padding=1)

    def forward(self, spectrum: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        x = torch.fft.ifft(spectrum, dim=3).real
        fine = self.fine(x)
        x = x + self.end(self.mix(fine + self.grow(self.coarse(fine))))
        filled = torch.where(lines, spectrum, torch.fft.fft(x, dim=3))
        return torch.fft.ifft(filled, dim=3).real


# %%
# ``P`` cuts left from right and top from bottom, and leaves whole what the transforms go along, so that they need no message.
# The lines are the same for all of x: ``AXES`` says which dims of them are cut. The network learns on the first volume, with
# other lines in each step, and is tried on the second one.

AXES = None, None, None, None, "z"


def train(world: dl.Partition, steps: int = 30) -> SimpleNamespace:
    P = world.grid(x=2, z=2, of="n c x y z")
    first, second = volumes()
    torch.manual_seed(0)
    net = dl.distribute(Reconstruction(), P, in_axes=[None, AXES])
    measure = dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    draws = torch.Generator().manual_seed(1)
    for step in range(steps):
        spectrum, lines = measured(first, draws)
        loss = measure(net(P.cut(spectrum), P.cut(lines, AXES)), P.cut(first))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            P.print(f"step {step + 1}: loss {loss.item():.6f}")
    spectrum, lines = measured(second, draws)
    with torch.no_grad():
        found = net(P.cut(spectrum), P.cut(lines, AXES))
    return SimpleNamespace(
        spectrum=spectrum,
        lines=lines,
        found=dl.gather(found, P),
        true=second,
        P=P,
        report=net.report(),
        state=dl.serial_state_dict(net),
    )


result = launch(4, train)

# %%
# The trained weights go into the same network on one device. What it makes of the lines is the same, at the cuts too:

serial = Reconstruction()
serial.load_state_dict(result.state)
with torch.no_grad():
    error = (serial(result.spectrum, result.lines) - result.found).abs()
difference = error.max().item()
zeros = torch.fft.ifft(result.spectrum, dim=3).real


def psnr(volume: torch.Tensor) -> float:
    return 10 * math.log10(result.true.max().item() ** 2 / (volume - result.true).square().mean().item())


print(f"{result.lines.float().mean().item():.0%} of the lines: {psnr(zeros):.2f} dB with zeros for the others, "
      f"{psnr(result.found):.2f} dB with the network")  # fmt: skip
print(f"largest difference to the serial network: {difference:.1e}")

# %%
# Slices in three planes: from above, from the front and from the side.

cuts = [bounds[len(bounds) // 2] - 0.5 for bounds in result.P.bounds(result.true.shape)]
pictures = {
    "two fifths of the lines": zeros,
    "reconstructed on four ranks": result.found,
    "all lines": result.true,
    "difference to one device": error,
}
planes = [
    (lambda volume: volume[0, 0, :, :, 5], cuts[2], None),
    (lambda volume: volume[0, 0, :, 44], cuts[2], cuts[4]),
    (lambda volume: volume[0, 0, 24], None, cuts[4]),
]
heights = {"height_ratios": [96, 8, 8 * 64 / 96]}  # of a width of 64 each
figure, axes = plt.subplots(3, 4, figsize=(10, 4.7), layout="constrained", gridspec_kw=heights)
for column, (title, volume) in zip(axes.T, pictures.items(), strict=True):
    style = {"cmap": "magma", "vmin": 0} if volume is error else {"cmap": "gray", "vmin": 0, "vmax": 1.2}
    for ax, (plane, across, up) in zip(column, planes, strict=True):
        image = ax.imshow(plane(volume).T.numpy(), origin="lower", **style)
        if across:
            ax.axvline(across, color="orange", linestyle="--", linewidth=1)
        if up:
            ax.axhline(up, color="orange", linestyle="--", linewidth=1)
        ax.set_axis_off()
    column[0].set_title(title)
figure.colorbar(image, ax=axes, shrink=0.8, format="%.0e")
figure.savefig("brain.png")

# %%
# What a rank holds of each layer and what it sends for it: halos of convolutions, and nothing for the transforms.

figure = dl.show.layers(result.report)
figure.savefig("brain_layers.png")
