"""Denoise a whole photograph with a U-Net whose tensors are cut over ranks.

    mpirun -n 4 python docs/examples/denoise.py

The photograph is the Hubble Deep Field that scikit-image ships, 872 x 1000 pixels. There are no patches: every activation
of the network is one tensor over the whole picture, and each rank holds a block of it, with ``--grid 2x2`` a quarter. Ranks
fetch what they need from their neighbours, so the network is the serial one up to rounding, and the same seed gives
the same loss curve on every grid. Three halvings make the blocks uneven: 55 and 54 rows, 63 and 62 columns.

The network is smooth on purpose, with SiLU and average pools: the kinks of ReLU and of maxima let training amplify the
rounding of sums, which depends on the grid, a millionfold within thirty steps. Every curve then is a good one, but another.

What is trained on what: each step adds fresh Gaussian noise to the photograph, and the loss is the mean squared difference
between the network's output and the clean photograph. The PSNR printed at the end is that of a noise the network was not
trained on. The scene is the one it was trained on, so the gain says how well this photograph can be denoised, not how well
others can; the weight of the total-variation filter beside it was chosen for this photograph too.

With ``--save FOLDER`` a checkpoint is written every twenty steps while training goes on, and ``--resume`` goes on from the
newest, on any grid, with the losses that the run would have had.

The network is plain torch. At the end the trained weights go into one that runs on a single rank, as it is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from time import perf_counter
from typing import Any

import skimage.data
import torch
from matplotlib.figure import Figure
from skimage.restoration import denoise_tv_chambolle
from torch import nn
from tqdm import tqdm

import distdl_lite as dl

SIGMA = 0.1  # of the noise; colours lie in [0, 1], so that the noisy picture has a PSNR of 20 dB
LEARNING_RATE = 1e-2
TV_WEIGHT = 0.09  # the best of 0.05, 0.07, ... 0.15 for this photograph

# ---- the network -----------------------------------------------------------------------------------------------------


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """Convolution, BatchNorm (which makes a bias useless) and SiLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.SiLU(inplace=True))


class UNet(nn.Module):
    """Finds the noise in a picture of shape (1, 3, H, W) and takes it away; H and W are multiples of ``2**levels``.

    It knows nothing of ranks: `dl.distribute` runs it as it is.

    Parameters
    ----------
    levels : int
        How often the picture is halved.
    channels : int
        At full size; each halving doubles them.
    """

    def __init__(self, levels: int = 3, channels: int = 8) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(convolution(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(convolution(a + 2 * a, a) for a in reversed(widths[:-1]))
        self.pool, self.grow = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        self.noise = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, skips = self.down[0](x), []
        for down in self.down[1:]:
            skips.append(y)
            y = down(self.pool(y))
        for up in self.up:
            y = up(torch.cat([skips.pop(), self.grow(y)], dim=1))
        return x - SIGMA * self.noise(y)


# ---- the picture -----------------------------------------------------------------------------------------------------


def photograph(size: tuple[int, int]) -> torch.Tensor:
    """The middle of the Hubble Deep Field, of shape (1, 3, H, W)."""
    image = torch.from_numpy(skimage.data.hubble_deep_field()).permute(2, 0, 1)[None] / 255
    top, left = ((whole - wanted) // 2 for whole, wanted in zip(image.shape[2:], size, strict=True))
    return image[:, :, top : top + size[0], left : left + size[1]].contiguous()


def noise_block(P: dl.Partition, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """This rank's block of the next noise. Every rank draws all of it, so that it is the same on every grid."""
    noise = SIGMA * torch.randn((1, 3, *size), generator=generator)
    return noise[P.block(noise.shape)]


def psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 1."""
    return -10 * math.log10(mean_square)


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    net: nn.Module, clean: torch.Tensor, P: dl.Partition, options: Any, generator: torch.Generator
) -> list[float]:
    """Train on this rank's block of the clean picture; returns the loss of each step, the same on all ranks."""
    measure, losses = dl.distribute(nn.MSELoss(), P), []
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=options.steps)
    state = {"model": net, "optimizer": optimizer, "scheduler": schedule, "P": P}
    if options.resume and (newest := dl.latest_checkpoint(options.save)):
        losses = dl.load(newest, **state).extra
        for _ in losses:
            noise_block(P, options.size, generator)  # those of the steps that are done
    steps = tqdm(range(len(losses), options.steps), "training", unit="step", disable=P.rank != 0)
    with dl.testing.count() as tally:
        began = perf_counter()
        for _ in steps:
            loss = measure(net(clean + noise_block(P, options.size, generator)), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            steps.set_postfix_str(f"{psnr(losses[-1]):.2f} dB", refresh=False)
            if options.save and len(losses) % options.every == 0:
                dl.save(options.save / f"step_{len(losses)}", **state, extra=losses, keep=2, wait=False)
        wall = perf_counter() - began
    print_cost(P, wall, tally, max(len(steps), 1))
    return losses


@torch.no_grad()
def denoise(net: nn.Module, noisy: torch.Tensor) -> torch.Tensor:
    """The network's output with BatchNorm's running statistics."""
    return net.eval()(noisy)


# ---- the report ------------------------------------------------------------------------------------------------------


def print_cost(P: dl.Partition, wall: float, tally: Any, steps: int) -> None:
    """Where the time went on each rank, and what moved."""
    costs = P.allgather_data((wall, tally.seconds, tally.bytes))
    if P.rank != 0:
        return
    print(f"\n{wall / steps:.2f} s a step; communication includes packing and waiting for other ranks")
    for rank, (total, talk, _) in enumerate(costs):
        print(f"  rank {rank}: {total:6.1f} s = {total - talk:6.1f} s computation + {talk:6.1f} s communication")
    print(f"{sum(size for *_, size in costs) / steps:,.0f} bytes sent per step, all ranks together")


def report(
    options: Any, losses: list[float], pictures: dict[str, torch.Tensor], state: dict[str, torch.Tensor]
) -> None:
    """Print the gains and the difference to the serial network; on the rank that has the whole pictures."""
    noisy, denoised, clean = pictures.values()
    shown = sorted({step * (len(losses) - 1) // 5 for step in range(6)})
    print("\nloss at step", ", ".join(f"{step + 1}: {losses[step]:.6e}" for step in shown))
    filtered = denoise_tv_chambolle(noisy[0].numpy(), weight=TV_WEIGHT, channel_axis=0)
    before, after, other = (psnr((y - clean).square().mean().item()) for y in (noisy, denoised, torch.tensor(filtered)))
    print(f"PSNR before {before:.2f} dB, after {after:.2f} dB: gain {after - before:.2f} dB")
    print(f"gain of skimage's denoise_tv_chambolle(weight={TV_WEIGHT}): {other - before:.2f} dB")
    twin = UNet(options.levels)
    twin.load_state_dict(state)
    difference = (denoise(twin, noisy) - denoised).abs().max().item()
    print(f"largest difference to the serial network's output: {difference:.1e}")


def draw(path: str, P: dl.Partition, pictures: dict[str, torch.Tensor]) -> None:
    """Write the pictures side by side with the cuts between the ranks, and below them where cuts meet."""
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    axes = figure.subplots(2, len(pictures), gridspec_kw={"height_ratios": [1.6, 1]})
    for (title, picture), (above, below) in zip(pictures.items(), axes.T, strict=True):
        rows, columns = P.bounds(picture.shape)[2:]
        for axis in (above, below):
            axis.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.hlines([r - 0.5 for r in rows[1:-1]], -0.5, columns[-1] - 0.5, "orange", "dashed", linewidth=0.8)
            axis.vlines([c - 0.5 for c in columns[1:-1]], -0.5, rows[-1] - 0.5, "orange", "dashed", linewidth=0.8)
            axis.set_axis_off()
        above.set_title(title)
        row, column = rows[len(rows) // 2], columns[len(columns) // 2]
        below.set_xlim(column - 100, column + 100)
        below.set_ylim(row + 60, row - 60)
    figure.savefig(path, dpi=90)


# ---- the main job ----------------------------------------------------------------------------------------------------


def pair(text: str) -> tuple[int, int]:
    """Two numbers written as ``2x3``."""
    rows, columns = map(int, text.split("x"))
    return rows, columns


def most_square(ranks: int) -> tuple[int, int]:
    """The grid of all ranks whose sides are closest.

    >>> most_square(6)
    (2, 3)
    """
    rows = max(n for n in range(1, math.isqrt(ranks) + 1) if ranks % n == 0)
    return rows, ranks // rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", type=pair, help="rows x columns of blocks, such as 1x2; default: all ranks")
    parser.add_argument("--size", type=pair, default=(872, 1000), help="height x width of the middle to take")
    parser.add_argument("--levels", type=int, default=3, help="how often the picture is halved")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="for checkpoints")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (20)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--out", default="denoise.png", help="the picture to write")
    options = parser.parse_args(arguments)
    if any(n % 2**options.levels for n in options.size):
        parser.error(f"--size {options.size} must be divisible by {2**options.levels}, for {options.levels} halvings")
    if options.resume and options.save is None:
        parser.error("--resume needs --save, the folder to look in")
    return options


def run(P: dl.Partition, options: argparse.Namespace) -> list[float]:
    """Train, judge and report; returns the losses."""
    clean = dl.scatter(photograph(options.size) if P.rank == 0 else None, P)
    torch.manual_seed(options.seed)
    net = dl.distribute(UNet(options.levels), P)
    generator = torch.Generator().manual_seed(options.seed)
    noisy = clean + noise_block(P, options.size, generator)  # drawn first: no later draw, used for training, repeats it
    losses = train(net, clean, P, options, generator)
    denoised = denoise(net, noisy)
    pictures = {"noisy": noisy, "denoised": denoised, "clean": clean}
    pictures = {title: dl.gather(block, P) for title, block in pictures.items()}
    state = dl.serial_state_dict(net)
    if P.rank == 0:
        report(options, losses, pictures, state)
        draw(options.out, P, pictures)
    return losses


def main() -> None:
    dl.abort_on_exception()
    torch.set_num_threads(1)
    options = parse()
    world = dl.Partition.world()
    grid = options.grid or most_square(world.size)
    P = world.grid((1, 1, *grid))
    if P.active:  # a rank outside the grid has nothing to do
        run(P, options)


if __name__ == "__main__":
    main()
