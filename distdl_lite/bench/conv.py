"""Convolutions beside the same ones without any exchange, and beside what one would write by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from distdl_lite import nn as dnn
from distdl_lite.bench import handwritten
from distdl_lite.bench.table import BOTH, Call, Row, calls_of, interleaved, is_over_torch
from distdl_lite.partition import Partition

RANKS = 1, 2, 4, 8, 16  # that cut the tensors evenly


def rows(P: Partition, seconds: float) -> list[Row]:
    """Convolutions cut along the height, beside the same ones on the local blocks without any exchange and by hand."""
    rows = []
    cases = (
        (8, 16, 256, {"times": 1.35 if is_over_torch(P) else 1.1}),
        (3, 16, 512, {"times": 1.1}),
        (1, 8, 64, {"more": 300}),
    )
    for count, channels, length, bar in cases:
        shape = 1, channels, length // P.size, length
        layer, plain = _ours(P, channels), partial(torch.nn.Conv2d, channels, channels, 3, padding=1)
        calls = [calls_of(_network(kind, count), shape, BOTH) for kind in (layer, plain)]
        ours, floor, hand = interleaved(P, [*calls, _by_hand(P, count, shape)], 4 * seconds)
        what, size = f"{count} x (conv 3x3 + ReLU), other is", f"(1,{channels},{length},{length})"
        rows.append(Row(f"{what} without exchange", size, BOTH, ours, floor, **bar))
        rows.append(Row(f"{what} by hand", size, BOTH, ours, hand))
    return rows


def _ours(P: Partition, channels: int) -> Callable[[], torch.nn.Module]:
    return partial(dnn.DistributedConv2d, P.grid((1, 1, P.size, 1)), channels, channels, 3, padding=1)


def _network(layer: Callable[[], torch.nn.Module], count: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(made for _ in range(count) for made in (layer(), torch.nn.ReLU())))


def _by_hand(P: Partition, count: int, shape: Sequence[int]) -> Call:
    """Halos in buffers made beforehand, and one sum of all weights' gradients when backward has ended."""
    network = _network(lambda: _HandWritten(P, shape), count)
    calls = handwritten.calls_over(P)
    step, parameters = calls_of(network, shape, BOTH), list(network.parameters())

    def call() -> None:
        network.zero_grad()
        step()
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        sums = calls.all_reduce(flat).split([parameter.numel() for parameter in parameters])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter)

    return call


class _HandWritten(torch.nn.Module):
    def __init__(self, P: Partition, shape: Sequence[int]) -> None:
        super().__init__()
        self.halo = handwritten.HaloExchange(P, tuple(shape), pads=True)
        self.conv = torch.nn.Conv2d(shape[1], shape[1], 3, padding=(0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.halo(x))
