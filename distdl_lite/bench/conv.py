"""Convolutions beside the same ones without any exchange."""

from __future__ import annotations

import torch

from distdl_lite import nn as dnn
from distdl_lite.bench.table import BOTH, Row, calls_of, interleaved
from distdl_lite.partition import Partition

RANKS = 1, 2, 4, 8, 16  # that cut the tensors evenly


def rows(P: Partition, seconds: float) -> list[Row]:
    """Convolutions cut along the height beside the same ones on the local blocks without any exchange."""
    rows = []
    for count, channels, length, factor, more in ((8, 16, 256, 1.1, 0), (3, 16, 512, 1.1, 0), (1, 8, 64, 1, 300)):
        shape = 1, channels, length // P.size, length
        calls = [calls_of(net, shape, BOTH) for net in (_network(P, count, channels), _network(None, count, channels))]
        ours, floor = interleaved(P.comm, calls, 3 * seconds)
        what = f"{count} x (conv 3x3 + ReLU), other is without exchange"
        bar = f"+{more} us" if more else f"{factor} x"
        size = f"(1,{channels},{length},{length})"
        rows.append(Row(what, size, BOTH, ours, floor, bar=bar, holds=ours <= factor * floor + more))
    return rows


def _network(P: Partition | None, count: int, channels: int) -> torch.nn.Module:
    """Convolutions on blocks cut along the height, or plain ones where there is no partition."""
    layers: list[torch.nn.Module] = []
    for _ in range(count):
        if P is None:
            layers.append(torch.nn.Conv2d(channels, channels, 3, padding=1))
        else:
            layers.append(dnn.DistributedConv2d(P.grid((1, 1, P.size, 1)), channels, channels, 3, padding=1))
        layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers)
