"""
Denoise a photograph
====================

A U-Net of plain torch learns to denoise a part of the Hubble Deep Field. Each of four ranks holds a quarter of the picture and of
every activation; there are no patches, and no seams.
"""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import skimage.data
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

SIGMA = 0.1  # of the noise; colours lie in [0, 1]

# %%
# The network is written for one device, and knows nothing of ranks.


def convolution(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.SiLU())


class UNet(nn.Module):
    """Finds the noise in a picture of shape (1, 3, H, W), and takes it away; H and W are multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([convolution(3, 8), convolution(8, 16), convolution(16, 32)])
        self.up = nn.ModuleList([convolution(48, 16), convolution(24, 8)])
        self.pool, self.grow = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        self.noise = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.down[0](x)
        middle = self.down[1](self.pool(fine))
        y = self.down[2](self.pool(middle))
        y = self.up[0](torch.cat([middle, self.grow(y)], dim=1))
        y = self.up[1](torch.cat([fine, self.grow(y)], dim=1))
        return x - SIGMA * self.noise(y)


# %%
# Training is a loop as on one device. ``P`` cuts height and width in two; :func:`distdl_lite.distribute` runs the network on it,
# with the weights that the seed gives. Each step adds fresh noise, of which all ranks draw the whole and take their block.


def photograph() -> torch.Tensor:
    """A part of the Hubble Deep Field, of shape (1, 3, 204, 236)."""
    image = torch.from_numpy(skimage.data.hubble_deep_field()[300:504, 380:616])
    return image.permute(2, 0, 1)[None] / 255


def train(world: dl.Partition, steps: int = 30) -> SimpleNamespace:
    P = world.grid(h=2, w=2, of="n c h w")
    whole = photograph()
    clean = P.cut(whole)
    torch.manual_seed(0)
    net, measure = dl.distribute(UNet(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    noisy = whole + SIGMA * torch.randn(whole.shape)  # kept for the end
    for step in range(steps):
        loss = measure(net(P.cut(whole + SIGMA * torch.randn(whole.shape))), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            P.print(f"step {step + 1}: loss {loss.item():.6f}")
    with torch.no_grad():
        denoised = net.eval()(P.cut(noisy))
    return SimpleNamespace(
        noisy=noisy,
        denoised=dl.gather(denoised, P),
        clean=whole,
        P=P,
        report=net.report(),
        state=dl.serial_state_dict(net),
    )


result = launch(4, train)

# %%
# The trained weights go into the same network on one device. Its output is the same, at the cuts too:

serial = UNet().eval()
serial.load_state_dict(result.state)
with torch.no_grad():
    error = (serial(result.noisy) - result.denoised).abs()[0].amax(0)
difference = error.max().item()


def psnr(picture: torch.Tensor) -> float:
    return -10 * math.log10((picture - result.clean).square().mean().item())


print(f"PSNR: noisy {psnr(result.noisy):.2f} dB, denoised {psnr(result.denoised):.2f} dB")
print(f"largest difference to the serial network: {difference:.1e}")

# %%

rows, columns = result.P.bounds(result.clean.shape)[2:]
figure, axes = plt.subplots(2, 2, figsize=(9, 8), layout="constrained")
titles = {"noisy": result.noisy, "denoised on four ranks": result.denoised, "clean": result.clean}
for ax, (title, picture) in zip(axes.flat, titles.items(), strict=False):
    ax.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).numpy())
    ax.set_title(title)
image = axes[1, 1].imshow(error.numpy(), cmap="magma")
axes[1, 1].set_title("difference to one device")
figure.colorbar(image, ax=axes[1, 1], shrink=0.8, format="%.0e")
for ax in axes.flat:
    ax.axhline(rows[1] - 0.5, color="orange", linestyle="--", linewidth=1)
    ax.axvline(columns[1] - 0.5, color="orange", linestyle="--", linewidth=1)
    ax.set_axis_off()
figure.savefig("hubble.png")

# %%
# What a rank holds of each layer and what it sends for it, by the network's own report. Halos are a row or a column of a block;
# the statistics of norms are a number a channel.

figure = dl.show.layers(result.report)
figure.savefig("hubble_layers.png")
