"""
Data parallelism, side by side
==============================

Every rank has the whole network and its own rows of each batch. This page trains a small network on scikit-learn's digits in the
ways of torch and of Heat: some have the losses of one process on the whole batches, others average weights from time to time.
"""

from collections.abc import Iterator
from itertools import chain, islice, repeat

import matplotlib.pyplot as plt
import sklearn.datasets
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import distdl_lite as dl
from distdl_lite.data import Collate, ShardBatchSampler, permutation
from distdl_lite.testing import launch

# %%
# A batch has 96 rows, of which each rank takes its share; an epoch has 14 batches of the 1,439 images to train with. In float64
# curves can be compared to the last digits.

BATCH, EPOCH, TRAIN = 96, 14, 1439
images, labels = map(torch.from_numpy, sklearn.datasets.load_digits(return_X_y=True))
order = permutation(len(images))
images, labels = images[order] / 16, labels[order]
data = TensorDataset(images[:TRAIN], labels[:TRAIN])


def batches(P: dl.Partition, steps: int) -> Iterator[list[torch.Tensor]]:
    """This rank's rows of batches that are cut over the ranks of P, without end of epochs."""
    sampler = ShardBatchSampler(data, P, BATCH // P.size, drop_last=True)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=Collate(data))
    return islice(chain.from_iterable(repeat(loader)), steps)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)).double()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[list[torch.Tensor]]) -> list[float]:
    """The loop of one process is that of every rank."""
    losses = []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)  # the mean over this rank's rows
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if isinstance(optimizer, dl.DASO) and len(losses) % EPOCH == 0:
            optimizer.epoch_loss_logic(loss)
    return losses


# %%
# The first four are exact. ``DataParallel`` sums gradients while backward runs, as torch's DistributedDataParallel and Heat's
# DataParallel do. With deferred updates, Heat's non-blocking ones, a step happens layer by layer in the next forward. Under
# ``RootDataParallel``, as under torch.nn.DataParallel, rank 0 runs the script of one process and the others serve it.
#
# The fourth is torch's own DDP: over MPI by ``MPIProcessGroup``, under ``torchrun`` by the group that is there. Ranks that are
# threads, as in this manual, have no process group: there it is left out.


def at_once(net: nn.Module, world: dl.Partition, steps: int) -> list[float]:
    return train(dl.DataParallel(net, world), sgd(net), batches(world, steps))


def deferred(net: nn.Module, world: dl.Partition, steps: int) -> list[float]:
    optimizer = dl.DataParallelOptimizer(sgd(net))
    model = dl.DataParallel(net, world, optimizer, update="deferred")
    losses = train(model, optimizer, batches(world, steps))
    model.synchronize()  # carries out the last step
    return losses


def by_the_root(net: nn.Module, world: dl.Partition, steps: int) -> list[float]:
    model = dl.RootDataParallel(net, world)
    with model.serve() as at_root:
        return train(model, sgd(net), batches(world.create_partition_inclusive([0]), steps)) if at_root else []


def ddp_of_torch(net: nn.Module, world: dl.Partition, steps: int) -> list[float]:
    is_there = dist.is_initialized()  # as under torchrun
    try:
        group = world.comm if is_there else dl.MPIProcessGroup.init(world)
    except ValueError:  # of threads
        return []
    losses = train(DistributedDataParallel(net, process_group=group), sgd(net), batches(world, steps))
    if not is_there:
        dist.destroy_process_group()
    return losses


# %%
# These two have losses of their own. With ``LocalSGD`` ranks take steps by themselves, and average the weights every 8 steps.
# Heat's ``DASO`` has nodes, here of two ranks, which average their gradients at every step, while weights are averaged over the
# nodes: at every step in its first and last epoch, and at every fourth between.


def local_sgd(net: nn.Module, world: dl.Partition, steps: int) -> list[float]:
    optimizer = dl.LocalSGD(sgd(net), 8, P=world)
    losses = train(net, optimizer, batches(world, steps))
    optimizer.synchronise()  # the mean of the last weights
    return losses


def daso(net: nn.Module, world: dl.Partition, steps: int) -> list[float]:
    settings = {"warmup_epochs": 1, "cooldown_epochs": 1, "steps_per_epoch": EPOCH, "downcast_type": torch.float}
    optimizer = dl.DASO(sgd(net), steps // EPOCH or 1, world, ranks_per_node=2, **settings)
    losses = train(dl.DataParallelMultiGPU(net, optimizer), optimizer, batches(world, steps))
    optimizer.synchronise()
    return losses


# %%
# All start from the same weights. What the ranks send is counted, but for torch's DDP, whose messages are not the library's. The
# loss of a step is the mean over all ranks.

EXACT = {"at once": at_once, "deferred": deferred, "by the root": by_the_root, "torch's DDP": ddp_of_torch}
OWN = {"local SGD": local_sgd, "DASO": daso}


def body(world: dl.Partition, steps: int = 6 * EPOCH) -> dict[str, tuple[torch.Tensor, float, nn.Module]]:
    found = {}
    for name, way in (EXACT | OWN).items():
        net = network()
        with dl.testing.count() as tally:
            losses = way(net, world, steps)
        told = world.allgather_data((losses, tally.bytes))
        curves = torch.tensor([mine for mine, _ in told if mine], dtype=torch.float64)
        if len(curves):
            found[name] = curves.mean(0), sum(sent for _, sent in told) / steps, net
    if world.rank == 0:
        net = network()
        serial = train(net, sgd(net), batches(world.create_partition_inclusive([0]), steps))
        found["one process"] = torch.tensor(serial, dtype=torch.float64), 0.0, net
    return found


found = launch(4, body)
serial, *_ = found.pop("one process")
errors = {name: (losses - serial).abs() for name, (losses, *_) in found.items()}
difference, TOLERANCE = max(errors[name].max().item() for name in found if name in EXACT), 1e-12  # in float64
for name, (_, sent, net) in found.items():
    right = (net(images[TRAIN:]).argmax(1) == labels[TRAIN:]).double().mean()
    words = f"{sent:,.0f} bytes a step" if sent else "bytes not counted"
    print(f"{name}: differs by {errors[name].max():.1e}, {words}, {right:.1%} of the test are right")

# %%
# What DASO sends is mostly sent inside its nodes.

figure, axes = plt.subplot_mosaic("ab;ac", figsize=(10, 5.5), layout="constrained")
axes["a"].semilogy(serial.numpy(), color="0.85", linewidth=9, label="one process")
for number, (name, (losses, *_)) in enumerate(found.items()):
    style = {"color": f"C{number}", "linewidth": 6 - 1.5 * number if name in EXACT else 1}
    axes["a"].semilogy(losses.numpy(), label=name, **style)
    axes["b"].semilogy(errors[name].clamp(min=1e-17).numpy(), **style)
axes["a"].set(title="training on four ranks", xlabel="step", ylabel="loss")
axes["a"].legend()
axes["b"].set(title=f"exact: within {difference:.0e} of one process", xlabel="step", ylabel="difference")
bars = [name + ("" if sent else "\n(not counted)") for name, (_, sent, _) in found.items()]
axes["c"].barh(bars, [sent / 1e3 for _, sent, _ in found.values()], color=[f"C{n}" for n in range(len(found))])
axes["c"].invert_yaxis()
axes["c"].set(title="sent in a step", xlabel="kB of all ranks together")
figure.savefig("data_parallel.png")
