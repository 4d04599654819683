"""
LeNet-5, cut in channels and features
=====================================

LeNet-5 of plain torch learns scikit-learn's digits. Its convolutions are cut in channels and in rows, its linear layers in
features, and their weights with them; the same network trains on one device with the same batches.
"""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import sklearn.datasets
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import launch

# %%
# The 1,797 pictures of 8 x 8 pixels are enlarged to LeNet's 32 x 32; a fifth of them is kept for the test. The network knows
# nothing of ranks. Its tanh and average pools are those of LeCun et al. (1998).


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures, of shape (1797, 1, 32, 32), and their labels, in an order of chance."""
    images, labels = map(torch.from_numpy, sklearn.datasets.load_digits(return_X_y=True))
    images = nn.functional.interpolate(images.view(-1, 1, 8, 8).float() / 16, scale_factor=4, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


IMAGES, LABELS = digits()
BATCH, TEST = 64, 6 * 64  # the first 384 pictures are for the test


def train(net: nn.Module, measure: nn.Module, mine: tuple[slice, ...], steps: int) -> list[float]:
    """The loop of one device is that of every rank, which takes its rows of the pictures."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(TEST, len(IMAGES), (BATCH,), generator=generator)
        loss = measure(net(IMAGES[chosen][mine]), LABELS[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# The grid has an axis of two for channels and one of two for rows. A picture has one channel, which is whole on all ranks, so
# ``in_axes`` says that its rows alone are cut. Behind the last pool, module 5, each rank takes whole maps of some of the
# channels: so what ``Flatten`` makes of them, and the linear layers from there on, are cut in features.


def body(world: dl.Partition, steps: int = 80) -> SimpleNamespace:
    P = world.grid((1, 2, 2, 1))  # batch, channels, height, width
    images = (0, None, 2, 3)
    net = dl.distribute(lenet(), P, in_axes=[images], cut={"5": (0, 1, None, None)})
    mine = P.block((BATCH, 1, 32, 32), images)
    losses = train(net, dl.distribute(nn.CrossEntropyLoss(), P), mine, steps)
    scores = torch.cat([net(batch[mine]).detach() for batch in IMAGES[:TEST].split(BATCH)])
    held = {name: tuple(weight.shape) for name, weight in net.named_parameters()}
    state = dl.serial_state_dict(net)
    return SimpleNamespace(losses=losses, scores=scores, report=net.report(), held=held, state=state)


result = launch(4, body)

# %%
# One device takes the same steps. The output of the cut network is whole on all ranks, as nothing cuts batches, and its ten
# scores are sums over ranks:

serial = lenet()
losses = train(serial, nn.CrossEntropyLoss(), (slice(None),), len(result.losses))
errors = [abs(ours - theirs) for ours, theirs in zip(result.losses, losses, strict=True)]
difference = max(errors)
found = result.scores.argmax(1)
right = found == LABELS[:TEST]
with torch.no_grad():
    agree = (serial(IMAGES[:TEST]).argmax(1) == found).sum()
print(f"largest difference of the losses of {len(losses)} steps: {difference:.1e}")
print(f"{right.double().mean():.1%} of {TEST} test pictures are right; one device says the same of {agree}")

# %%
# Each picture shows where its rows are cut between the ranks.

figure = plt.figure(figsize=(10, 5), layout="constrained")
left, middle = figure.subfigures(1, 2, width_ratios=[1, 1])
top, bottom = left.subplots(2, 1, sharex=True, height_ratios=[2, 1])
top.plot(losses, color="0.8", linewidth=6, label="one device")
top.plot(result.losses, color="C0", label="four ranks")
top.set(title="LeNet-5 in training", ylabel="loss")
top.legend()
bottom.semilogy([max(error, 1e-8) for error in errors], ".", color="C3")
bottom.set(xlabel="step", ylabel="(none: 1e-8)", title=f"difference to one device: at most {difference:.0e}")
shown = right.int().argsort(stable=True)[[0, 1, *range(-14, 0)]]  # two that are wrong, if there are
for ax, which in zip(middle.subplots(4, 4).flat, shown.tolist(), strict=True):
    ax.imshow(IMAGES[which, 0].numpy(), cmap="gray_r")
    ax.axhline(15.5, color="orange", linestyle="--", linewidth=1.5)
    ax.set_title(f"{found[which]}", color="C0" if right[which] else "C3", pad=2)
    ax.set_axis_off()
middle.suptitle("what it reads in pictures of the test (red: wrong)")
figure.savefig("lenet.png")

# %%
# How the outputs of the modules are cut. Those of module 5 move from halves of rows to whole maps before ``Flatten`` reads them.

ax = dl.show.cuts(result.report)
ax.figure.savefig("lenet_cuts.png")

# %%
# The trained weights and their cuts. Those of convolutions are drawn as kernels, output channels down and input channels to the
# right; those of linear layers as matrices. Ranks 0 and 1 hold what is above or left of the dashed line, ranks 2 and 3 the
# rest. The first and the last linear layer are cut in input features and sum their outputs over the ranks.

figure, axes = plt.subplot_mosaic("abd;ccc;eee", figsize=(9, 7), height_ratios=[3, 4, 1.6], layout="constrained")
weights = {name: weight for name, weight in result.state.items() if name.endswith("weight")}
for ax, (name, weight) in zip(map(axes.get, "abcde"), weights.items(), strict=True):
    size = weight.shape[2:].numel() ** 0.5  # of a kernel; 1 for a linear layer
    ax.imshow((weight.transpose(1, 2).flatten(2).flatten(0, 1) if weight.dim() == 4 else weight).numpy(), cmap="RdBu")
    for dim, line in enumerate((ax.axhline, ax.axvline)):
        if result.held[name][dim] < weight.shape[dim]:
            line(result.held[name][dim] * size - 0.5, color="orange", linestyle="--", linewidth=2)
    ax.set_title(f"{name}: {tuple(weight.shape)},\na rank has {result.held[name]}", fontsize=9)
    ax.set_axis_off()
figure.savefig("lenet_weights.png")
