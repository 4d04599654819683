"""Runs that are saved on one grid and go on on another, with the losses they would have had."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.unet import UNet

import distdl_lite as dl
from distdl_lite import nn as dnn
from distdl_lite.model.gradient_norm import _ELEMENTWISE
from distdl_lite.testing import spmd

Grid = tuple[int, ...]
DATA = torch.linspace(-90, 90, 9 * 2 * 8 * 7, dtype=torch.float64).sin().view(9, 2, 8, 7)


def layers(P: dl.Partition, p: float = 0.2) -> torch.nn.Module:
    """A network of the library's layers."""
    return torch.nn.Sequential(
        dnn.DistributedConv2d(P, 2, 5, 3, padding=1),
        dnn.DistributedBatchNorm(P, 5),
        torch.nn.Tanh(),
        dnn.DistributedDropout(P, p),
        dnn.DistributedConv2d(P, 5, 2, 3, padding=1),
    ).double()


def unet(P: dl.Partition) -> torch.nn.Module:
    """A model as its author wrote it."""
    torch.manual_seed(1)
    return dl.distribute(UNet(2, 2).double(), P)


class Run:
    """A training with all that a checkpoint holds."""

    def __init__(self, P: dl.Partition, net: torch.nn.Module, optimizer: Callable[..., Any], batch: int) -> None:
        self.P, self.net, self.measure = P, net, dnn.DistributedMSELoss(P)
        weights = list(net.parameters())
        self.optimizer = optimizer([{"params": weights[:2]}, {"params": weights[2:], "lr": torch.tensor(0.02)}])
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.loader = dl.data.Loader(dl.data.Blocks(DATA, P), P, global_batch_size=batch, seed=1)

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "data": self.loader}

    def steps(self, count: int) -> list[float]:
        losses: list[float] = []
        while len(losses) < count:
            for x in self.loader:
                self.optimizer.zero_grad()
                loss = self.measure(self.net(x), x.flip(1))
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                losses.append(loss.item())
                if len(losses) == count:
                    break
        return losses


def in_turn(
    run: Callable[[dl.Partition, Grid, int, Path | None, Path | None], list[float]], grids: Sequence[Grid]
) -> None:
    """Two steps on each grid in turn, each from the checkpoint of the one before: those of the first grid without a break."""
    with tempfile.TemporaryDirectory() as folder:
        places = [None, *(Path(folder) / f"step_{number}" for number in range(len(grids)))]
        whole = spmd(torch.Size(grids[0]).numel(), lambda world: run(world, grids[0], 2 * len(grids), None, None))
        losses = []
        for grid, before, after in zip(grids, places[:-1], places[1:], strict=True):
            parts = spmd(torch.Size(grid).numel(), lambda world: run(world, grid, 2, before, after))  # noqa: B023
            assert all(part == parts[0] for part in parts)
            losses += parts[0]
    assert losses == pytest.approx(whole[0], rel=1e-9, abs=0)


def resumed(
    make: Callable[[dl.Partition], torch.nn.Module],
    optimizer: Callable[..., Any],
    world: dl.Partition,
    grid: Grid,
    count: int,
    before: Path | None,
    after: Path | None,
) -> list[float]:
    P = world.grid(grid)
    torch.manual_seed(5)
    run = Run(P, make(P), optimizer, 3 if make is unet else 4)
    if before is not None:
        torch.manual_seed(7 + world.rank)
        assert dl.load(before, **run.parts).extra == before.name
    losses = run.steps(count)
    if after is not None:
        dl.save(after, **run.parts, extra=after.name)
    return losses


ANY_GRIDS: list[Grid] = [(1, 1, 2, 2), (1, 1, 3, 1), (1, 1, 1, 2), (1, 1, 1, 1), (1, 1, 1, 4)]


def test_layers_on_any_grid() -> None:
    """Weights, running statistics, moments, milestones, the order of samples and dropout go on."""
    in_turn(partial(resumed, layers, torch.optim.Adam), ANY_GRIDS)


def test_a_unet_as_it_is_on_any_grid() -> None:
    in_turn(partial(resumed, unet, torch.optim.AdamW), ANY_GRIDS[:4])


def test_batches_are_dealt_anew() -> None:
    grids: list[Grid] = [(2, 1, 2, 1), (3, 1, 1, 1), (1, 1, 2, 1), (2, 1, 1, 1)]
    in_turn(partial(resumed, partial(layers, p=0.0), torch.optim.SGD), grids)


OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "lr": 0.1},
    "Adam": {"amsgrad": True},
    "RMSprop": {"centered": True, "momentum": 0.5},
}


@pytest.mark.parametrize("name", sorted(_ELEMENTWISE - {"SparseAdam"}))  # whose gradients are sparse
def test_optimizers(name: str) -> None:
    optimizer = partial(getattr(torch.optim, name), **OPTIONS.get(name, {}))
    in_turn(partial(resumed, layers, optimizer), ANY_GRIDS[1:3])
