"""LeNet-5 on scikit-learn's digits: channels, features and rows of the pictures are cut.

    mpirun -n 4 python docs/examples/lenet.py

Runs on 1, 2 or 4 ranks. Rank 0 trains the same network on one device beside the distributed one, on the same batches: both
loss curves are printed, and are equal up to rounding. At the end it prints which part of each weight it holds. The images,
8 x 8, are enlarged to LeNet's 32 x 32; a fifth of them is kept for the test. Tanh and average pools are those of LeCun et
al., 1998, and smooth: with ReLU and max pools the curves would part after two epochs, as training amplifies rounding at kinks.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import sklearn.datasets
import torch
from torch import nn

import distdl_lite as dl

GRIDS = {1: (1, 1, 1, 1), 2: (1, 2, 1, 1), 4: (1, 2, 2, 1)}  # by number of ranks: batch, channels, height, width
IMAGES = (0, None, 2, 3)  # the axes that cut them: their one channel is whole on every rank
CUT = {
    "5": (0, 1, None, None)
}  # the last pool's output: some channels, whole, so that linear layers are cut in features


def lenet() -> nn.Sequential:
    """LeNet-5 for images of shape (N, 1, 32, 32); it knows nothing of ranks."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


# ---- data and training -----------------------------------------------------------------------------------------------


def digits(generator: torch.Generator) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Images of shape (N, 1, 32, 32) and labels of shape (N,), to train with and to test with."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = nn.functional.interpolate(images, scale_factor=4, mode="bilinear")
    order = torch.randperm(len(images), generator=generator)
    test, train = order.tensor_split([len(order) // 5])
    labels = torch.tensor(labels)
    return (images[train], labels[train]), (images[test], labels[test])


def step(
    net: nn.Module, measure: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    """One step of training, serial or distributed: the lines are the same."""
    loss = measure(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def accuracy(output: torch.Tensor, labels: torch.Tensor) -> float:
    return (output.argmax(dim=1) == labels).float().mean().item()


class Result(NamedTuple):
    """What a run found on rank 0."""

    losses: list[tuple[float, float]]  # of each step, distributed and serial
    accuracies: tuple[float, float]
    held: dict[str, tuple[torch.Size, torch.Size]]  # for each weight, what this rank has of what there is


def run(world: dl.Partition, epochs: int, batch: int, seed: int) -> Result | None:
    """Train both networks; returns what rank 0 found."""
    P, is_root = world.grid(GRIDS[world.size]), world.rank == 0
    generator = torch.Generator().manual_seed(seed)
    (images, labels), (test_images, test_labels) = digits(generator)
    torch.manual_seed(seed)
    twin, measure_twin = lenet(), nn.CrossEntropyLoss()
    torch.manual_seed(seed)  # both networks start with the same weights
    net = dl.distribute(lenet(), P, in_axes=[IMAGES], cut=CUT)
    measure = dl.distribute(nn.CrossEntropyLoss(), P)
    optimizer, optimizer_twin = (torch.optim.Adam(model.parameters(), lr=2e-3) for model in (net, twin))
    losses: list[tuple[float, float]] = []
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            x, y = images[chosen], labels[chosen]
            loss = step(net, measure, optimizer, x[P.block(x.shape, IMAGES)], y)  # no axis cuts the batch
            if is_root:
                losses.append((loss, step(twin, measure_twin, optimizer_twin, x, y)))
        if is_root:
            print_epoch(epoch, losses)
    with torch.no_grad():
        output = net(test_images[P.block(test_images.shape, IMAGES)])
        if not is_root:
            return None
        accuracies = accuracy(output, test_labels), accuracy(twin(test_images), test_labels)
    pairs = zip(net.named_parameters(), twin.parameters(), strict=True)
    return Result(losses, accuracies, {name: (mine.shape, whole.shape) for (name, mine), whole in pairs})


def print_epoch(epoch: int, losses: list[tuple[float, float]]) -> None:
    loss, serial = losses[-1]
    difference = max(abs(ours - theirs) for ours, theirs in losses)
    print(f"epoch {epoch + 1:2}: loss {loss:.6f}, serial {serial:.6f}, largest difference so far {difference:.1e}")


def main() -> None:
    dl.abort_on_exception()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world = dl.Partition.world()
    if world.size not in GRIDS:
        parser.error(f"runs on {', '.join(map(str, GRIDS))} ranks, not {world.size}")
    result = run(world, options.epochs, options.batch, options.seed)
    if result is not None:
        print("test accuracy: {:.2%}, serial {:.2%}".format(*result.accuracies))
        for name, (mine, whole) in result.held.items():
            print(f"rank 0 holds {tuple(mine)} of {name} {tuple(whole)}")


if __name__ == "__main__":
    main()
