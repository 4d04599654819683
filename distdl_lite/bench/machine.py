"""The numbers of `dl.Machine`, from which `dl.report` predicts times, measured where the job runs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from distdl_lite.bench.table import BOTH, FORWARD, Call, Row, calls_of, interleaved
from distdl_lite.model.distributed import distribute
from distdl_lite.model.dry import DryTransport, Meter
from distdl_lite.model.report import Machine
from distdl_lite.partition import Partition

RANKS = None  # any number above one
_MOVES = 8  # of one forward, which agrees once
_SMALL, _LARGE, _IMAGE = (1, 1, 16, 16), (1, 32, 256, 256), (1, 32, 128, 128)  # of a rank's block


def measured(P: Partition, seconds: float) -> Machine:
    """What a message, a convolution, and a norm and an activation take while all ranks do the same."""
    grid = P.grid((1, 1, P.size, 1))
    moves = [calls_of(distribute(partial(_moved, shape[2]), grid), shape, FORWARD) for shape in (_SMALL, _LARGE)]
    weight = torch.rand(32, 32, 3, 3, requires_grad=True)
    convolution, pointwise = (
        calls_of(partial(F.conv2d, weight=weight, padding=1), _IMAGE, BOTH),
        calls_of(_norm, _LARGE, BOTH),
    )
    small, large, *taken = (1e-6 * us for us in interleaved(P, [*moves, convolution, pointwise], 8 * seconds))
    least, most = (4 * torch.Size(shape).numel() for shape in (_SMALL, _LARGE))
    bandwidth = _MOVES * (most - least) / (large - small)
    (multiply_adds, touched), (_, alone) = _work(convolution), _work(pointwise)
    memory_bandwidth = alone / taken[1]
    rate = multiply_adds / (taken[0] - touched / memory_bandwidth)
    return Machine(small / _MOVES - least / bandwidth, bandwidth, rate, memory_bandwidth)


def rows(P: Partition, seconds: float) -> list[Row]:
    """A row for each number."""
    if P.size == 1:
        start = P.world_transport.launcher.format(2)
        raise ValueError(f"bench machine needs ranks that send: use {start}, or as many as a node has")
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


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.silu(F.batch_norm(x, None, None, training=True))


def _work(call: Call) -> tuple[int, int]:
    """The multiply-adds of a call, and the bytes that it touches."""
    with Meter(DryTransport(0, 1)) as meter:
        call()
    return meter.multiply_adds.total(), meter.touched
