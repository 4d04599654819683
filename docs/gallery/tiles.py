"""
Tiles and their seams
=====================

A picture that does not fit on a device is often run through a network tile by tile. This page shows what that changes, how far
tiles must overlap until it changes nothing, what the overlap costs, and what a network that is cut over ranks does instead.
"""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import skimage.data
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

SIGMA, TILE = 0.1, 64

# %%
# The U-Net is that of the page on denoising a photograph. It is trained whole, cut over four ranks.


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


def train(world: dl.Partition, steps: int = 15) -> SimpleNamespace:
    P = world.grid(h=2, w=2, of="n c h w")
    image = torch.from_numpy(skimage.data.hubble_deep_field()[300:492, 380:636])
    clean = image.permute(2, 0, 1)[None] / 255
    torch.manual_seed(0)
    net, measure = dl.distribute(UNet(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    noisy = clean + SIGMA * torch.randn(clean.shape)  # kept for the end
    for _ in range(steps):
        loss = measure(net(P.cut(clean + SIGMA * torch.randn(clean.shape))), P.cut(clean))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        denoised = dl.gather(net.eval()(P.cut(noisy)), P)
    return SimpleNamespace(noisy=noisy, denoised=denoised, report=net.report(), state=dl.serial_state_dict(net))


result = launch(4, train)

# %%
# The same weights on one device, over the whole picture, are what all else is compared with.

serial = UNet().eval()
serial.load_state_dict(result.state)
with torch.no_grad():
    whole = serial(result.noisy)
error = (whole - result.denoised).abs()
difference = error.max().item()
print(f"largest difference of the cut network to the serial one: {difference:.1e}")

# %%
# Tile by tile: each tile is cut out with ``overlap`` more pixels on each side, as far as there are any, and its middle is kept.


def in_tiles(net: nn.Module, x: torch.Tensor, overlap: int) -> torch.Tensor:
    y = torch.empty_like(x)
    for top in range(0, x.shape[2], TILE):
        for left in range(0, x.shape[3], TILE):
            above, before = min(overlap, top), min(overlap, left)
            tile = x[..., top - above : top + TILE + overlap, left - before : left + TILE + overlap]
            with torch.no_grad():
                y[..., top : top + TILE, left : left + TILE] = net(tile)[..., above:, before:][..., :TILE, :TILE]
    return y


# %%
# How far does a tile see beyond its edge? A NaN spreads to whatever depends on it: it is put into one row after another above a
# tile, until none of it arrives. Tiles begin where the windows of the pools do, at multiples of 4.


def reach(net: nn.Module) -> int:
    seen = 0
    for rows in range(1, 32):
        x = torch.zeros(1, 3, 64, 32)
        x[:, :, 32 - rows] = torch.nan
        with torch.no_grad():
            seen = rows if net(x)[:, :, 32:].isnan().any() else seen
    return seen


exact = -(-reach(serial) // 4) * 4
print(f"a tile sees {reach(serial)} rows beyond its edge: overlaps are exact from {exact} on")

# %%
# That holds in evaluation. In training a batch norm takes the mean and variance of what it is given, which is the tile alone, and
# no overlap mends that. The cut network sums them over all ranks: they are those of the whole picture.

overlaps = range(0, 25, 4)
training = UNet()
training.load_state_dict(result.state)
with torch.no_grad():
    wanted = training(result.noisy)
seams = {overlap: (in_tiles(serial, result.noisy, overlap) - whole).abs()[0].amax(0) for overlap in overlaps}
trained = {overlap: (in_tiles(training, result.noisy, overlap) - wanted).abs().max().item() for overlap in overlaps}
for overlap, found in seams.items():
    print(f"overlap {overlap:2}: error {found.max().item():.1e} in evaluation, {trained[overlap]:.1e} in training")

# %%
# What it costs, by dry runs: the multiply-adds of all tiles, and those of all ranks, over those of the whole picture at once. The
# cut network computes no pixel twice, as each layer fetches what it needs of its neighbours: here one pixel around a block.


def multiply_adds(shape: tuple[int, ...], grid: tuple[int, ...] = (1, 1, 1, 1)) -> int:
    return dl.report(UNet(), grid, shape, train=False).multiply_adds


def spans(length: int, overlap: int) -> list[int]:
    return [min(at + TILE + overlap, length) - max(at - overlap, 0) for at in range(0, length, TILE)]


shape = tuple(result.noisy.shape)
once = multiply_adds(shape)
per_pixel = once / (shape[2] * shape[3])
tiled = [per_pixel * sum(spans(shape[2], o)) * sum(spans(shape[3], o)) / once for o in overlaps]
cut = 4 * multiply_adds(shape, (1, 1, 2, 2)) / once
sent = dl.report(UNet(), (1, 1, 2, 2), shape, train=False).forward.bytes
print(f"work: tiles with an overlap of {exact}: {tiled[overlaps.index(exact)]:.2f} x, cut network: {cut:.2f} x")
print(f"a rank of the cut network sends {sent / 1e3:.0f} kB in a forward, and computes {cut / 4:.2f} of the whole")

# %%

figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
maps = {"tiles side by side": seams[0], "cut over four ranks": error[0].amax(0)}
for ax, (title, found) in zip(axes[0], maps.items(), strict=True):
    image = ax.imshow(found.clamp(1e-8).log10().numpy(), cmap="magma", vmin=-8, vmax=-1)
    ax.set_title(f"{title}: largest error {found.max().item():.0e}")
    ax.set_axis_off()
figure.colorbar(image, ax=axes[0], shrink=0.9, label="error, as power of 10")
axes[0, 1].axhline(96 - 0.5, color="orange", linestyle="--", linewidth=1)
axes[0, 1].axvline(128 - 0.5, color="orange", linestyle="--", linewidth=1)
ax = axes[1, 0]
ax.semilogy(overlaps, [found.max().item() for found in seams.values()], "o-", color="tab:blue", label="evaluation")
ax.semilogy(overlaps, list(trained.values()), "s-", color="tab:red", label="training")
ax.axvline(exact, color="0.4", linestyle=":", label=f"what a tile sees: {exact}")
ax.set(title="error of tiles", xlabel="overlap on each side (pixels)", ylabel="largest error")
ax.legend()
ax = axes[1, 1]
ax.bar([str(o) for o in overlaps], tiled, color=["tab:blue" if o >= exact else "0.75" for o in overlaps])
ax.bar("cut", cut, color="orange")
ax.axhline(1, color="0.4", linestyle=":")
ax.set(title="work, over that of the whole at once", xlabel="tiles by overlap (grey: not exact), and the cut network")
figure.savefig("tiles.png")
