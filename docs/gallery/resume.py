"""
Lose a rank, and go on on three
===============================

A network trains on a grid of 2 x 2 ranks that cut its channels and the rows of pictures. In the middle a rank is lost. The run
goes on from the last checkpoint on the three that are left, which cut channels alone, and has the losses that it would have had.
"""

import shutil
import tempfile
from itertools import pairwise
from types import SimpleNamespace

import matplotlib.pyplot as plt
import skimage.data
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

# %%
# The network learns to sharpen a photograph, in float64 to compare losses to the last digits.


def photograph() -> torch.Tensor:
    return torch.from_numpy(skimage.data.astronaut()[::8, ::8].copy()).permute(2, 0, 1)[None].double() / 255


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
        nn.Conv2d(16, 3, 3, padding=1),
    ).double()  # fmt: skip


class LostError(Exception):
    """Stands for a kill: here the ranks of one launch live on, and all of them raise it."""


# %%
# A run begins with the newest checkpoint of its folder, if there is one, and writes one every so many steps, with all that is to
# go on. Where channels are cut, a network has its blocks of the weights from its first call on, so it is called once before
# blocks of the optimizer's state are read.


def train(P: dl.Partition, folder: str, steps: int, log: SimpleNamespace, lost_at: int | None = None) -> None:
    sharp = photograph()
    blurred = P.cut(nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2))
    net, measure = dl.distribute(network(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    state = {"model": net, "optimizer": optimizer, "scheduler": schedule, "P": P}
    log.bounds = P.bounds((1, 16, 64, 64))[1]  # between blocks of channels
    if newest := dl.latest_checkpoint(folder):
        net(blurred)
        log.losses = dl.load(newest, **state).extra
        log.began = len(log.losses)
        P.print(f"goes on after step {log.began} on the ranks {list(P.ranks)}")
    while len(log.losses) < steps:
        if len(log.losses) == lost_at:
            raise LostError
        loss = measure(net(blurred), P.cut(sharp))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.losses.append(loss.item())
        if len(log.losses) % max(steps // 4, 1) == 0:
            dl.save(f"{folder}/step_{len(log.losses)}", **state, extra=log.losses)
            weight = net.get_parameter("3.weight")
            held = tuple(weight.shape), tuple(optimizer.state[weight]["exp_avg"].shape)
            log.held = dict(zip(P.ranks, P.allgather_data(held), strict=True))


# %%
# Both runs are in one launch here: the second is on a grid over the ranks 0, 1 and 3 of the four. An exception cannot show that
# files survive a kill; :doc:`denoise.py </examples>` does: kill it, and start it on other ranks with ``--resume``.


def body(world: dl.Partition, steps: int = 40) -> SimpleNamespace:
    folder = world.broadcast_data(tempfile.mkdtemp() if world.rank == 0 else None)
    four, three = world.grid(c=2, h=2, of="n c h w"), world.grid(c=3, of="n c h w", ranks=[0, 1, 3])
    first, second = SimpleNamespace(losses=[]), SimpleNamespace(losses=[])
    try:
        train(four, folder, steps, first, lost_at=steps * 5 // 8)
    except LostError:
        world.print(f"a rank is lost after step {len(first.losses)}")
    if three.active:
        train(three, folder, steps, second)
    return SimpleNamespace(first=first, second=second, folder=folder)


result = launch(4, body)
first, second = result.first, result.second
tensors = dl.read_checkpoint(f"{result.folder}/step_{second.began}")
weights = {name: tensors[name] for name in ("model.3.weight", "optimizer.state.3.weight.exp_avg")}
shutil.rmtree(result.folder)

# %%
# The unbroken run is one on one device:

sharp, serial, losses = photograph(), network(), []
blurred = nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2)
optimizer = torch.optim.Adam(serial.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(second.losses))
for _ in second.losses:
    loss = nn.functional.mse_loss(serial(blurred), sharp)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
errors = [abs(a - b) for a, b in zip(second.losses, losses, strict=True)]
difference, TOLERANCE = max(errors), 1e-12  # in float64
print(f"largest difference to the unbroken run: {difference:.1e}")
for rank, (weight, average) in first.held.items():
    now = "{} and {}".format(*second.held[rank]) if rank in second.held else "nothing"
    print(f"rank {rank} had {weight} of 3.weight and {average} of Adam's average of its gradients, then {now}")

# %%
# Steps between the last checkpoint and the loss of the rank are taken again.

figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), height_ratios=[2, 1], layout="constrained")
at = range(1, len(losses) + 1)
top.semilogy(at, losses, color="0.8", linewidth=8, label="one device, unbroken")
top.semilogy(at[: len(first.losses)], first.losses, "o-", color="C0", label="2 x 2 ranks")
top.semilogy(at[second.began :], second.losses[second.began :], ".-", color="C3", label="ranks 0, 1 and 3, resumed")
bottom.semilogy(at, [max(error, 1e-18) for error in errors], ".", color="C3")
for ax in (top, bottom):
    ax.axvspan(second.began + 0.5, len(first.losses) + 0.5, color="orange", alpha=0.25, label="taken again")
    ax.axvline(len(first.losses) + 0.5, color="orange", linestyle="--")
top.set(title="a rank is lost, three go on", ylabel="loss")
top.legend()
bottom.set(title=f"difference to the unbroken run: at most {difference:.0e}", xlabel="step", ylabel="difference")
figure.savefig("resume.png")

# %%
# One checkpoint, held in two ways: the weights of the second convolution, which are cut in input channels, here from top to
# bottom, and Adam's average of their gradients, which is cut like them.

figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
for ax, (name, whole) in zip(axes, weights.items(), strict=True):
    for half, log in zip(ax, (first, second), strict=True):
        ranks, blocks = list(log.held), len(log.bounds) - 1
        share, limit = len(ranks) // blocks, whole.abs().max().item()
        shades = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
        half.imshow(whole.transpose(0, 1).flatten(1).numpy(), aspect="auto", interpolation="nearest", **shades)
        for end in log.bounds[1:-1]:
            half.axhline(end - 0.5, color="orange", linestyle="--", linewidth=2.5)
        middles = [(start + end - 1) / 2 for start, end in pairwise(log.bounds)]
        owners = [", ".join(map(str, ranks[i * share : (i + 1) * share])) for i in range(blocks)]
        half.set_yticks(middles, owners)
        short = name.removeprefix("model.").removeprefix("optimizer.state.")
        half.set(title=f"{short} on {len(ranks)} ranks", ylabel="ranks", xticks=[])
figure.suptitle(f"the checkpoint after step {second.began}")
figure.savefig("resume_blocks.png")
