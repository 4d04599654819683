"""Every primitive beside the calls that a programmer writes by hand with mpi4py or torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import torch

from distdl_lite import nn as dnn
from distdl_lite.bench import gloo, handwritten
from distdl_lite.bench.table import BOTH, FORWARD, Row, calls_of, interleaved, is_over_torch
from distdl_lite.partition import Partition

RANKS = 2, 4, 8, 16  # that cut the tensors evenly
_MODES = FORWARD, BOTH
_SMALL, _INSIDE = ({"more": 35}, {"more": 80}), ({"more": 20}, {"more": 60})  # bars of each mode
_LARGE = ({"times": 1.15}, {"times": 1.15})
_OVER_TORCH = {"64 KiB": ({"more": 60}, {}), "4096 KiB": _LARGE}
_SEVERAL = 8  # layers inside one module
# The size of a rank's block, the block, the number of layers, and their bars.
_SIZES: list[tuple[str, tuple[int, ...], int, tuple[dict[str, float], ...]]] = [
    ("1 KiB", (1, 1, 16, 16), 1, _SMALL),
    ("64 KiB", (1, 4, 64, 64), 1, _SMALL),
    ("4096 KiB", (1, 16, 256, 256), 1, _LARGE),
    ("1 KiB", (1, 1, 16, 16), _SEVERAL, _INSIDE),
]

Layer = Callable[[torch.Tensor], torch.Tensor]
Case = tuple[str, Callable[[], Layer], Callable[[], Layer], tuple[int, ...]]


def _cases(P: Partition, block: tuple[int, ...]) -> Iterator[Case]:
    """Per primitive: its name, what makes ours and the hand-written one, and this rank's input shape."""
    n, one, line, first = P.size, P.grid((1,)), P.grid((P.size,)), P.grid((P.size, 1, 1, 1))
    rows, columns = P.grid((1, 1, n, 1)), P.grid((1, 1, 1, n))
    at_root = block if P.rank == 0 else (0,)
    # Scattered along the first dim, so that the sizes per rank stay those of the table.
    whole = n, block[1], block[2] // n, block[3]
    for layer, shape in (
        (partial(dnn.Broadcast, one, line), at_root),
        (partial(dnn.SumReduce, line, one), block),
        (partial(dnn.AllSumReduce, line, axes_reduce=(0,)), block),
        (partial(dnn.AllGather, first, axes_all_gather=(0,)), block),
        (partial(dnn.ReduceScatter, first, axes_reduce_scatter=(0,)), whole),
        (partial(dnn.Repartition, rows, columns), block),
        (partial(dnn.HaloExchange, rows, (0, 0, 1, 0)), block),
    ):
        name = layer.func.__name__
        yield name, layer, partial(getattr(handwritten, name), P, block), shape


class _Several(dnn.Module):
    """Layers that agree once, all of them on the same tensor."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _sum_of(self.layers, x)


def _sum_of(layers: Any, x: torch.Tensor) -> torch.Tensor:
    return reduce(torch.add, (layer(x) for layer in layers))


def rows(P: Partition, seconds: float) -> list[Row]:
    """Every primitive beside the hand-written calls: at three sizes per rank, several in a module, a large Repartition."""
    rows = []
    for size, block, n, bars in _SIZES:
        bars = _OVER_TORCH.get(size, ({}, {})) if is_over_torch(P) else bars
        for name, layer, by_hand, shape in _cases(P, block):
            calls = layer(), by_hand()
            _check_same(name, calls, shape)
            if n > 1:  # where one agreement serves all
                name = f"{name}, one of {n} in a module"
                calls = _Several([layer() for _ in range(n)]), partial(_sum_of, [by_hand() for _ in range(n)])
            for mode, bar in zip(_MODES, bars, strict=True):
                a, b = interleaved(P, [calls_of(call, shape, mode) for call in calls], seconds)
                rows.append(Row(name, size, mode, a / n, b / n, **bar))
    return rows + _large_repartition(P, seconds)


def _check_same(name: str, calls: tuple[Layer, Layer], shape: tuple[int, ...]) -> None:
    """Refuse to time two calls that do not give the same."""
    results = []
    for call in calls:
        x = torch.arange(float(torch.Size(shape).numel())).view(shape).requires_grad_()
        y = call(x)
        y.backward(torch.arange(float(y.numel())).view(y.shape))
        results.append((y.detach().flatten(), x.grad.flatten()))
    if not all(map(torch.equal, *results)):
        raise RuntimeError(f"{name}: the hand-written call gives another result")


def _large_repartition(P: Partition, seconds: float) -> list[Row]:
    n, size, what = P.size, "(1,16,512,512)", "Repartition H-cut to W-cut"
    shape = 1, 16, 512 // n, 512
    ours = dnn.Repartition(P.grid((1, 1, n, 1)), P.grid((1, 1, 1, n)))
    reason = gloo.start(P)
    functions = [ours, handwritten.Repartition(P, shape), *([] if reason else [_redistribution(n)])]
    times = interleaved(P, [calls_of(function, shape, BOTH) for function in functions], 2 * seconds)
    by_hand = Row(what, size, BOTH, *times[:2], times=1.2)
    if reason:
        return [by_hand, Row(f"{what}, DTensor: {reason}", size, BOTH, times[0])]
    return [by_hand, Row(f"{what}, other is DTensor on gloo", size, BOTH, times[0], times[2], times=1)]


def _redistribution(n: int) -> Layer:
    """The same by torch's DTensor."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (n,))
    return lambda x: DTensor.from_local(x, mesh, [Shard(2)]).redistribute(mesh, [Shard(3)]).to_local()
