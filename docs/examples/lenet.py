"""LeNet-5 on scikit-learn's digits: convolutions cut in space, linear layers cut in features.

    mpirun -n 4 python docs/examples/lenet.py

Runs on 1, 2 or 4 ranks. Rank 0 holds the images and labels and trains the serial network beside the distributed one, on
the same batches: both loss curves are printed, and are equal up to rounding. The images, 8 x 8, are enlarged to LeNet's
32 x 32; a fifth of them is kept for the test. Tanh and average pools are those of LeCun et al., 1998, and smooth: with ReLU and
max pools the curves would part after two epochs, as training amplifies rounding at kinks.
"""

from __future__ import annotations

import argparse

import sklearn.datasets
import torch
from torch import nn

import distdl_lite as dl
import distdl_lite.nn as dnn

GRIDS = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # by number of ranks

# ---- the two networks, line by line ----------------------------------------------------------------------------------


def serial_lenet() -> nn.Sequential:
    """LeNet-5 for images of shape (N, 1, 32, 32); the identities stand where the distributed one moves data."""
    return nn.Sequential(
        nn.Identity(),
        nn.Conv2d(1, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Identity(),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
        nn.Identity(),
    )


def distributed_lenet(world: dl.Partition) -> nn.Sequential:
    """The same network, for images on rank 0, which gets the output too; other ranks pass and get empty tensors."""
    a, b = GRIDS[world.size]
    P_root, P_output = world.grid((1, 1, 1, 1)), world.grid((1, 1))
    P_space = world.grid((1, 1, a, b))  # blocks of each image
    P_channels = world.grid((1, b, 1, 1))  # whole images of some channels, so that flattening is local
    P_a, P_b = world.grid((1, a)), world.grid((1, b))  # blocks of features
    P_ab, P_ba = world.grid((a, b)), world.grid((b, a))  # weights: output features x input features
    return nn.Sequential(
        dnn.Repartition(P_root, P_space),
        dnn.DistributedConv2d(P_space, 1, 6, 5),
        nn.Tanh(),
        dnn.DistributedAvgPool2d(P_space, 2),
        dnn.DistributedConv2d(P_space, 6, 16, 5),
        nn.Tanh(),
        dnn.DistributedAvgPool2d(P_space, 2),
        dnn.Repartition(P_space, P_channels),
        nn.Flatten(),
        dnn.DistributedLinear(P_b, P_a, P_ab, 400, 120),
        nn.Tanh(),
        dnn.DistributedLinear(P_a, P_b, P_ba, 120, 84),
        nn.Tanh(),
        dnn.DistributedLinear(P_b, P_a, P_ab, 84, 10),
        dnn.Repartition(P_a, P_output),
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


def on_root(world: dl.Partition, x: torch.Tensor) -> torch.Tensor:
    """The data on rank 0, elsewhere none."""
    return x if world.rank == 0 else dl.zero_volume_tensor(len(x), dtype=x.dtype)


def accuracy(output: torch.Tensor, labels: torch.Tensor) -> float:
    return (output.argmax(dim=1) == labels).float().mean().item()


def run(world: dl.Partition, epochs: int, batch: int, seed: int) -> tuple[list[tuple[float, float]], list[float]]:
    """Train both networks; on rank 0 returns the losses of each step and the accuracies, distributed before serial."""
    generator = torch.Generator().manual_seed(seed)
    (images, labels), (test_images, test_labels) = digits(generator)
    torch.manual_seed(seed)
    net, measure = distributed_lenet(world), dnn.DistributedCrossEntropyLoss(world.grid((1, 1)))
    torch.manual_seed(seed)  # both networks start with the same weights
    twin, measure_twin = serial_lenet(), nn.CrossEntropyLoss()
    optimizer, optimizer_twin = (torch.optim.Adam(model.parameters(), lr=2e-3) for model in (net, twin))
    losses: list[tuple[float, float]] = []
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            x, y = images[chosen], labels[chosen]
            loss = step(net, measure, optimizer, on_root(world, x), on_root(world, y))
            if world.rank == 0:
                losses.append((loss, step(twin, measure_twin, optimizer_twin, x, y)))
        if world.rank == 0:
            print_epoch(epoch, losses)
    with torch.no_grad():
        output = net(on_root(world, test_images))
        if world.rank != 0:
            return [], []
        return losses, [accuracy(output, test_labels), accuracy(twin(test_images), test_labels)]


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
    _, accuracies = run(world, options.epochs, options.batch, options.seed)
    if world.rank == 0:
        print(f"test accuracy: {accuracies[0]:.2%}, serial {accuracies[1]:.2%}")


if __name__ == "__main__":
    main()
