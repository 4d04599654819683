"""
Choose a grid
=============

How many ranks does a network need to fit into memory, how should they cut it, and from when on do more of them bring little? Dry
runs tell, for 1 to 4,096 ranks, on one process and in seconds. What they say of messages is what a run counts.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

SHAPE, MEMORY = (1, 4, 16384, 16384), 16e9  # a satellite's picture in four bands, and the memory of a small GPU

# %%
# The network is a small U-Net of plain torch, for training. For one device it is far too large, with this picture.


class UNet(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.middle = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.last = nn.Conv2d(3 * channels, 3, 3, padding=1)
        self.pool, self.grow = nn.AvgPool2d(4), nn.Upsample(scale_factor=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.norm(self.first(x)).relu()
        coarse = self.middle(self.pool(fine)).relu()
        return self.last(torch.cat([fine, self.grow(coarse)], dim=1))


# %%
# :func:`distdl_lite.report` makes a dry run over a grid that nobody has: nothing has memory but the weights. Its predicted times
# are those of a machine that you describe; here with links of 10 GB/s and a latency of 10 us, on which nothing overlaps.

machine = dl.Machine(latency=1e-5, bandwidth=1e10, rate=5e12, memory_bandwidth=1e12)
squares, strips = [(1, 1, n, n) for n in (1, 4, 16, 64)], [(1, 1, n, 1) for n in (256, 4096)]
reports = [dl.report(UNet(), grid, SHAPE, machine=machine) for grid in squares + strips]
for report in reports:
    sent = report.forward.bytes + report.backward.bytes
    print(
        f"{report.ranks:4} ranks, {'x'.join(map(str, report.grid)):11} {report.peak / 1e9:7.2f} GB a rank, "
        f"sends {sent / 1e6:7.2f} MB, predicted step {1e3 * report.seconds:8.2f} ms, {max(report.parts, key=report.parts.get)}"
    )

# %%
# All grids of a number of ranks, those that fit first by predicted time: :func:`distdl_lite.suggest`.

suggestions = dl.suggest(UNet(), SHAPE, ranks=16, memory=MEMORY, machine=machine)
print(suggestions)

# %%
# A point is a grid, and the line goes through the best ones. Strips over 4,096 ranks are four rows high. Bytes of squares rise
# at the end as the statistics of the norm are counted once for each other rank; their time is that of a sum over all of them.

figure = dl.show.scaling([*reports, *suggestions])
figure.axes[0].axhline(MEMORY, color="orange", linestyle="--", linewidth=1.5)
figure.axes[0].text(4096, 1.2 * MEMORY, "16 GB", color="darkorange", ha="right", fontsize=8)
figure.suptitle("a U-Net on 16,384 x 16,384 pixels: predictions for 1 to 4,096 ranks", fontsize=10)
figure.savefig("choose_a_grid.png")

# %%
# What takes the time of a step: the arithmetic and the memory are shared among ever more ranks, what each message takes is not.

figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
bottom = [0.0] * len(reports)
for name in reports[0].parts:
    shares = [100 * report.parts[name] / report.seconds for report in reports]
    ax.bar(["x".join(map(str, report.grid[2:])) for report in reports], shares, bottom=bottom, label=name)
    bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
ax.set(title="what a predicted step is made of", xlabel="grid of ranks", ylabel="share of the step (%)", ylim=(0, 100))
ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
figure.savefig("choose_a_grid_parts.png")

# %%
# Times are a model's; messages and bytes are not. On four ranks that exist, each counts what it sends in the second step of a
# training (from then on the sums of gradients are planned), of a small picture.

SMALL = (1, 4, 100, 84)


def counted(world: dl.Partition) -> torch.Tensor:
    P = world.grid((1, 1, 2, 2))
    net = dl.distribute(UNet(), P)
    for _ in range(2):
        with dl.count() as forward:
            y = net(P.cut(torch.ones(SMALL)))
        with dl.count() as backward:
            y.square().sum().backward()
    numbers = [forward.messages, forward.bytes, backward.messages, backward.bytes]
    return dl.gather(torch.tensor(numbers).view(1, 4, 1, 1), P)


found = launch(4, counted).amax((0, 2, 3)).tolist()
predicted = dl.report(UNet(), (1, 1, 2, 2), SMALL)
wanted = [n for way in (predicted.forward, predicted.backward) for n in (way.messages, way.bytes)]
difference = max(abs(n - m) for n, m in zip(found, wanted, strict=True))
print(f"messages and bytes of the fullest rank, forward and backward: counted {found}, predicted {wanted}")
