"""Data parallelism in five ways, each beside one process on the whole batch: scikit-learn's digits.

    mpirun -n 2 python docs/examples/digits_data_parallel.py --out curves.png

Every rank has the whole network, and its own rows of each batch:

now        `dl.DataParallel`: gradients are summed while backward runs
deferred   the same, with a `dl.DataParallelOptimizer`: the step happens in the next forward, layer by layer
root       `dl.RootDataParallel`: rank 0 runs the script of one process, the others serve it
ddp        torch's own DistributedDataParallel, under mpirun over `dl.MPIProcessGroup`
local_sgd  `dl.LocalSGD`: ranks train by themselves, and average their parameters from time to time

The first four have the loss curve of one process up to rounding, on any number of ranks. There are 1439 images to train with, a
prime number, so the last batch of an epoch is uneven. `dl.DataParallel` weighs ranks by their rows; ddp and local_sgd take
the mean over ranks, and leave that batch out. The curve of local_sgd is its own, unless ``--period`` is 1: as a step of SGD is
linear, with momentum too, the mean of the parameters is then the parameter of the mean gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sklearn.datasets
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import distdl_lite as dl
from distdl_lite.data import Collate, ShardBatchSampler, ShuffledLoader, permutation

TRAIN = 1439  # of 1797 images; the others are kept for the test

# ---- data and network ------------------------------------------------------------------------------------------------


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Images of shape (N, 64) and labels of shape (N,), to train with and to test with; the same on all ranks."""
    images, labels = map(torch.tensor, sklearn.datasets.load_digits(return_X_y=True))
    order = permutation(len(images), seed)
    return tuple(TensorDataset(images[part] / 16, labels[part]) for part in (order[:TRAIN], order[TRAIN:]))


def network(seed: int) -> nn.Sequential:
    """In float64, so that curves can be compared; the same weights on all ranks."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)).double()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


# ---- the five faces --------------------------------------------------------------------------------------------------

Losses = list[tuple[float, int]]  # of each step the sum over this rank's rows, and their number


class Job(NamedTuple):
    world: dl.Partition
    data: TensorDataset
    options: argparse.Namespace

    def batches(self, P: dl.Partition, drop_last: bool = False) -> DataLoader[Any]:
        """This rank's rows of each batch, where batches are cut over the ranks of P."""
        size, seed = self.options.batch // P.size, self.options.seed
        sampler = ShardBatchSampler(self.data, P, size, seed=seed, drop_last=drop_last)
        return DataLoader(self.data, batch_sampler=sampler, collate_fn=Collate(self.data))

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> Losses:
        """The loop of one process is that of every rank."""
        losses, title = [], type(model).__name__
        for _ in tqdm(range(self.options.epochs), title, unit="epoch", disable=self.world.rank != 0):
            for x, y in batches:
                loss = nn.functional.cross_entropy(model(x), y)  # the mean over this rank's rows
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append((loss.item() * len(x) if len(x) else 0.0, len(x)))
        return losses


def now(job: Job, net: nn.Module) -> Losses:
    """Here the rows are in memory, each on one rank; they are dealt anew for each epoch, as the sampler would."""
    world, options = job.world, job.options
    mine = [tensor.tensor_split(world.size)[world.rank] for tensor in job.data.tensors]
    batches = ShuffledLoader(mine, options.batch // world.size, world, seed=options.seed)
    return job.train(dl.DataParallel(net, world), sgd(net), batches)


def deferred(job: Job, net: nn.Module) -> Losses:
    optimizer = dl.DataParallelOptimizer(sgd(net))
    model = dl.DataParallel(net, job.world, optimizer, update="deferred")
    losses = job.train(model, optimizer, job.batches(job.world))
    model.synchronize()  # carries out the last step
    return losses


def root(job: Job, net: nn.Module) -> Losses:
    """Rank 0 has the whole batches, and the only optimizer."""
    model = dl.RootDataParallel(net, job.world)
    with model.serve() as at_root:
        return one_process(job, model) if at_root else []


def ddp(job: Job, net: nn.Module) -> Losses:
    is_there = dist.is_initialized()  # as under torchrun
    group = job.world.comm if is_there else dl.MPIProcessGroup.init(job.world)
    model = DistributedDataParallel(net, process_group=group)
    losses = job.train(model, sgd(net), job.batches(job.world, drop_last=True))
    if not is_there:
        dist.destroy_process_group()
    return losses


def local_sgd(job: Job, net: nn.Module) -> Losses:
    optimizer = dl.LocalSGD(sgd(net), job.options.period, P=job.world)
    losses = job.train(net, optimizer, job.batches(job.world, drop_last=True))
    optimizer.synchronise()  # the mean of the last parameters
    return losses


def one_process(job: Job, model: nn.Module, drop_last: bool = False) -> Losses:
    """What the faces are compared with, on rank 0: whole batches."""
    return job.train(model, sgd(model), job.batches(job.world.create_partition_inclusive([0]), drop_last))


FACES = {face.__name__: face for face in (now, deferred, root, ddp, local_sgd)}
EVEN = {"ddp", "local_sgd"}  # ranks weigh alike, so the uneven last batch is left out

# ---- the comparison --------------------------------------------------------------------------------------------------

Curve = list[float]


def curve(world: dl.Partition, losses: Losses) -> Curve:
    """The mean loss of each step over the rows of all ranks, the same on all; one message at the end of training."""
    by_rank = [mine for mine in world.allgather_data(losses) if mine]  # a rank that serves the root has none
    sums, rows = torch.tensor(by_rank, dtype=torch.float64).sum(0).T
    return (sums / rows).tolist()


def accuracy(net: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    return (net(images).argmax(dim=1) == labels).double().mean().item()


def report(names: Sequence[str], curves: Sequence[Curve], accuracies: Sequence[float], epochs: int) -> None:
    steps, shown = len(curves[0]) // epochs, range(epochs, 0, -max(1, epochs // 5))[::-1]
    difference = max(abs(ours - serial) for ours, serial in zip(*curves, strict=True))
    print(f"{names[0]}: largest difference to one process {difference:.1e}; losses after epochs {[*shown]}:")
    for name, losses, share in zip(names, curves, accuracies, strict=True):
        values = " ".join(f"{losses[epoch * steps - 1]:.6f}" for epoch in shown)
        print(f"  {name:11}  {values}, test accuracy {share:.2%}")


def draw(path: str, curves: dict[str, tuple[Curve, Curve]], ranks: int) -> None:
    """Write the curves, each over that of one process."""
    figure = Figure(figsize=(3.2 * len(curves), 3.2), layout="constrained")
    row = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axis, (name, (ours, serial)) in zip(row, curves.items(), strict=True):
        axis.semilogy(serial, color="orange", linewidth=4, label="one process")
        axis.semilogy(ours, color="black", linewidth=0.8, label=f"{ranks} ranks")
        axis.set(title=name, xlabel="step")
        axis.legend()
    row[0].set_ylabel("loss")
    figure.savefig(path, dpi=90)


def run(world: dl.Partition, options: argparse.Namespace) -> dict[str, tuple[Curve, Curve]]:
    """Train each face and then one process; returns both curves of each, on all ranks."""
    train_data, test_data = digits(options.seed)
    job, curves = Job(world, train_data, options), {}
    for name in options.faces:
        net, twin = network(options.seed), network(options.seed)
        ours = curve(world, FACES[name](job, net))
        serial = curve(world, one_process(job, twin, name in EVEN) if world.rank == 0 else [])
        curves[name] = ours, serial
        if world.rank == 0:
            accuracies = [accuracy(net, test_data), accuracy(twin, test_data)]
            report([name, "one process"], curves[name], accuracies, options.epochs)
    if world.rank == 0 and options.out:
        draw(options.out, curves, world.size)
    return curves


def parse(ranks: int = 1, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--face", choices=[*FACES, "all"], default="all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=96, help="rows of all ranks together")
    parser.add_argument("--period", type=int, default=8, help="steps between two averages of local_sgd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the picture to write")
    options = parser.parse_args(arguments)
    options.faces = list(FACES) if options.face == "all" else [options.face]
    if options.batch % ranks:
        parser.error(f"--batch {options.batch} must be divisible by {ranks}, the number of ranks")
    return options


def main() -> None:
    dl.abort_on_exception()
    torch.set_num_threads(1)
    parse()  # before ranks are needed
    world = dl.Partition.world()
    run(world, parse(world.size))


if __name__ == "__main__":
    main()
