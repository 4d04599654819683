"""The numbers of `dl.Machine`, from which `dl.report` predicts times, measured where the job runs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from distdl_lite.bench.table import BOTH, FORWARD, Row, calls_of, interleaved
from distdl_lite.model.distributed import distribute
from distdl_lite.model.report import Machine
from distdl_lite.partition import Partition

RANKS = None  # any number above one
_MOVES = 8  # of one forward, which agrees once
_SMALL, _LARGE = (1, 1, 16, 16), (1, 32, 256, 256)  # of a rank's block
_IMAGE, _WEIGHT = (1, 32, 128, 128), (32, 32, 3, 3)


def measured(P: Partition, seconds: float) -> Machine:
    """What a message, a convolution and an operation on each point take while all ranks do the same."""
    grid = P.grid((1, 1, P.size, 1))
    calls = [calls_of(distribute(partial(_moved, shape[2]), grid), shape, FORWARD) for shape in (_SMALL, _LARGE)]
    calls.append(calls_of(partial(F.conv2d, weight=torch.rand(_WEIGHT), padding=1), _IMAGE, BOTH))
    calls.append(calls_of(F.relu, _LARGE, BOTH))
    small, large, product, pointwise = (1e-6 * taken for taken in interleaved(P.comm, calls, 8 * seconds))
    nbytes, more = 4 * torch.Size(_SMALL).numel(), 4 * torch.Size(_LARGE).numel()
    bandwidth = _MOVES * (more - nbytes) / (large - small)
    memory_bandwidth = 5 * more / pointwise  # two tensors in forward, three in backward
    touched = 5 * 4 * torch.Size(_IMAGE).numel() / memory_bandwidth  # in the convolution, whose weight gets no gradient
    multiply_adds = 2 * torch.Size(_IMAGE).numel() * torch.Size(_WEIGHT[1:]).numel()
    return Machine(
        small / _MOVES - nbytes / bandwidth, bandwidth, multiply_adds / (product - touched), memory_bandwidth
    )


def rows(P: Partition, seconds: float) -> list[Row]:
    """A row for each number."""
    if P.size == 1:
        raise ValueError("bench machine needs ranks that send: use mpirun -n 2, or as many as a node has")
    made = measured(P, seconds)
    return [
        Row("latency", "", "a message", 1e6 * made.latency),
        Row("bandwidth", "", "a message", 1e-9 * made.bandwidth, unit="GB/s"),
        Row("rate", "", "multiply-adds", 1e-9 * made.rate, unit="G/s"),
        Row("memory_bandwidth", "", "an operation", 1e-9 * made.memory_bandwidth, unit="GB/s"),
    ]


def _moved(rows: int, x: torch.Tensor) -> torch.Tensor:
    """Blocks go to the next rank, again and again."""
    for _ in range(_MOVES):
        x = x.roll(rows, 2)
    return x
