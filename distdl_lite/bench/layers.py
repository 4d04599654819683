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
                a, b = interleaved(P, [calls_of(call, shape, mode) for call in (ours, theirs)], seconds)
                size = f"({','.join(map(str, shape))})"
                found.append(Row(name, size, mode, a, b, times=1.05, more=12))
    return found


def _pairs(P: Partition, line: Partition, shape: tuple[int, ...]) -> Iterator[Pair]:
    """Names, our layers and torch's of the same weights."""
    _, channels, _, width = shape
    for name, arguments, options in (
        ("Conv2d", (channels, channels, 3), {"padding": 1}),
        ("ConvTranspose2d", (channels, channels, 3), {"padding": 1}),
        ("BatchNorm2d", (channels,), {}),
        ("BatchNorm2d, eval", (channels,), {}),
        ("InstanceNorm2d", (channels,), {}),
        ("GroupNorm", (4, channels), {}),
        ("LayerNorm", (width,), {}),
        ("RMSNorm", (width,), {}),
        *((f"{kind}Pool2d", (2,), {}) for kind in ("Max", "Avg")),
        *((f"Adaptive{kind}Pool2d", (7,), {}) for kind in ("Max", "Avg")),
        ("Upsample", (), {"scale_factor": 2, "mode": "nearest"}),
        ("Upsample", (), {"scale_factor": 2, "mode": "bilinear"}),
        *((f"{kind}Pad2d", (1,), {}) for kind in ("Zero", "Reflection", "Replication", "Circular")),
        ("Softmax", (1,), {}),
        ("LogSoftmax", (1,), {}),
        ("Dropout", (), {}),
        ("Dropout, eval", (), {}),
        ("Flatten", (), {}),
    ):
        kind, _, mode = name.partition(", ")
        own_kind = "Distributed" + (kind.removesuffix("2d") if "Norm" in kind else kind)
        ours, theirs = getattr(dnn, own_kind)(P, *arguments, **options), getattr(nn, kind)(*arguments, **options)
        yield f"{name} {options.get('mode', '')}".rstrip(), ours.train(not mode), theirs.train(not mode)
    linears = (
        dnn.DistributedColumnParallelLinear(line, width, width),
        dnn.DistributedRowParallelLinear(line, width, width),
    )
    for layer in (dnn.DistributedLinear(P, None, None, width, width), *linears):
        yield type(layer).__name__.removeprefix("Distributed"), layer, nn.Linear(width, width)
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


def _with(loss: nn.Module, target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: loss(x, target)
