"""What a layer on a partition of one rank takes beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from distdl_lite import nn as dnn
from distdl_lite.bench.table import BOTH, FORWARD, Row, calls_of, interleaved
from distdl_lite.partition import Partition

RANKS = None  # any number
_SHAPES = (1, 8, 16, 16), (1, 16, 256, 256)

Pair = tuple[str, Callable[..., Any], Callable[..., Any]]


def rows(P: Partition, seconds: float) -> list[Row]:
    """Every family of layers on a small and a large tensor, each rank for itself on a partition of itself."""
    found = []
    for shape in _SHAPES:
        alone = [P.grid((1,) * len(shape), (rank,)) for rank in range(P.size)][P.rank]
        line = [P.grid((1,), (rank,)) for rank in range(P.size)][P.rank]
        for name, ours, theirs in _pairs(alone, line, shape):
            for mode in (FORWARD, BOTH):
                a, b = interleaved(P.comm, [calls_of(call, shape, mode) for call in (ours, theirs)], seconds)
                size = f"({','.join(map(str, shape))})"
                found.append(Row(name, size, mode, a, b, times=1.05, more=10))
    return found


def _pairs(P: Partition, line: Partition, shape: tuple[int, ...]) -> Iterator[Pair]:
    """Names, our layers and torch's of the same weights."""
    _, channels, _, width = shape
    pairs: list[tuple[str, nn.Module, nn.Module]] = [
        ("Conv2d 3x3", dnn.DistributedConv2d(P, channels, channels, 3, padding=1), _conv(nn.Conv2d, channels)),
        (
            "ConvTranspose2d 3x3",
            dnn.DistributedConvTranspose2d(P, channels, channels, 3, padding=1),
            _conv(nn.ConvTranspose2d, channels),
        ),
        ("Linear", dnn.DistributedLinear(P, None, None, width, width), nn.Linear(width, width)),
        ("ColumnParallelLinear", dnn.DistributedColumnParallelLinear(line, width, width), nn.Linear(width, width)),
        ("RowParallelLinear", dnn.DistributedRowParallelLinear(line, width, width), nn.Linear(width, width)),
        ("BatchNorm2d", dnn.DistributedBatchNorm(P, channels), nn.BatchNorm2d(channels)),
        ("BatchNorm2d, eval", dnn.DistributedBatchNorm(P, channels).eval(), nn.BatchNorm2d(channels).eval()),
        ("InstanceNorm2d", dnn.DistributedInstanceNorm(P, channels), nn.InstanceNorm2d(channels)),
        ("GroupNorm", dnn.DistributedGroupNorm(P, 4, channels), nn.GroupNorm(4, channels)),
        ("LayerNorm", dnn.DistributedLayerNorm(P, width), nn.LayerNorm(width)),
        ("RMSNorm", dnn.DistributedRMSNorm(P, width), nn.RMSNorm(width)),
        ("MaxPool2d", dnn.DistributedMaxPool2d(P, 2), nn.MaxPool2d(2)),
        ("AvgPool2d", dnn.DistributedAvgPool2d(P, 2), nn.AvgPool2d(2)),
        ("AdaptiveMaxPool2d", dnn.DistributedAdaptiveMaxPool2d(P, 7), nn.AdaptiveMaxPool2d(7)),
        ("AdaptiveAvgPool2d", dnn.DistributedAdaptiveAvgPool2d(P, 7), nn.AdaptiveAvgPool2d(7)),
        ("Upsample nearest", dnn.DistributedUpsample(P, scale_factor=2), nn.Upsample(scale_factor=2)),
        ("Upsample bilinear", _bilinear(dnn.DistributedUpsample, P), _bilinear(nn.Upsample)),
        ("ZeroPad2d", dnn.DistributedZeroPad2d(P, 1), nn.ZeroPad2d(1)),
        ("ReflectionPad2d", dnn.DistributedReflectionPad2d(P, 1), nn.ReflectionPad2d(1)),
        ("ReplicationPad2d", dnn.DistributedReplicationPad2d(P, 1), nn.ReplicationPad2d(1)),
        ("CircularPad2d", dnn.DistributedCircularPad2d(P, 1), nn.CircularPad2d(1)),
        ("Softmax", dnn.DistributedSoftmax(P, 1), nn.Softmax(1)),
        ("LogSoftmax", dnn.DistributedLogSoftmax(P, 1), nn.LogSoftmax(1)),
        ("Dropout", dnn.DistributedDropout(P), nn.Dropout()),
        ("Dropout, eval", dnn.DistributedDropout(P).eval(), nn.Dropout().eval()),
        ("Flatten", dnn.DistributedFlatten(P), nn.Flatten()),
    ]
    yield from pairs
    yield "mean", dnn.DistributedMean(P, (2, 3)), lambda x: x.mean((2, 3))
    yield "fft", dnn.DistributedFFT(P, "fft", (2, 3)), lambda x: torch.fft.fftn(x, dim=(2, 3))
    yield "rfft", dnn.DistributedFFT(P, "rfft", (2, 3)), lambda x: torch.fft.rfftn(x, dim=(2, 3))
    target, classes = torch.rand(shape), torch.randint(channels, (shape[0], *shape[2:]))
    yield "MSELoss", *(_with(loss, target) for loss in (dnn.DistributedMSELoss(P), nn.MSELoss()))
    both = dnn.DistributedCrossEntropyLoss(P), nn.CrossEntropyLoss()
    yield "CrossEntropyLoss", *(_with(loss, classes) for loss in both)
    tables = dnn.DistributedEmbedding(line, width, width), nn.Embedding(width, width)
    index = torch.randint(width, shape[:3])
    yield "Embedding", *((lambda x, table=table: table(index)) for table in tables)  # type: ignore[misc]


def _conv(kind: Callable[..., nn.Module], channels: int) -> nn.Module:
    return kind(channels, channels, 3, padding=1)


def _bilinear(kind: Callable[..., nn.Module], *partition: Partition) -> nn.Module:
    return kind(*partition, scale_factor=2, mode="bilinear")


def _with(loss: nn.Module, target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: loss(x, target)
