"""Training steps of a model of Gaussians on several ranks beside those of each rank by itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from distdl_lite.bench.table import BOTH, Call, Row, interleaved
from distdl_lite.partition import Partition
from distdl_lite.tagi.ddp import DDPConfig, DDPSequential
from distdl_lite.tagi.layers import Linear, ReLU
from distdl_lite.tagi.sequential import Sequential
from distdl_lite.tagi.updater import OutputUpdater

RANKS = 2, 3, 4
_SIZES, _ROWS = (784, 256, 128, 11), 16


def rows(P: Partition, seconds: float) -> list[Row]:
    """A step with 16 rows a rank beside one without sums."""
    models = [DDPSequential(_network(), DDPConfig(P=P), average) for average in (False, True)]
    total, mean, plain = interleaved(P, [*map(_step, models), _step(_network())], 3 * seconds)
    size = "-".join(map(str, _SIZES)) + f", {_ROWS} rows"
    return [
        Row(f"step, {what}; other is one process", size, BOTH, ours, plain, times=1.4)
        for what, ours in (("average=False", total), ("average=True", mean))
    ]


def _network() -> Sequential:
    torch.manual_seed(0)
    layers: list[Any] = []
    for a, b in itertools.pairwise(_SIZES):
        layers += [Linear(a, b), ReLU()]
    return Sequential(*layers[:-1])


def _step(net: Any) -> Call:
    x, y = torch.rand(_ROWS, _SIZES[0]).numpy(), torch.rand(_ROWS, _SIZES[-1]).numpy()
    updater = OutputUpdater()

    def step() -> None:
        net(x)
        updater.update(net.output_z_buffer, y, 0.1, net.input_delta_z_buffer)
        net.backward()
        net.step()

    return step
