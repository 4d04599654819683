"""Every primitive beside the calls that a programmer writes by hand with mpi4py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distdl_lite import handwritten
from distdl_lite import nn as dnn
from distdl_lite.bench import gloo
from distdl_lite.bench.table import BOTH, FORWARD, Row, calls_of, interleaved
from distdl_lite.partition import Partition

RANKS = 2, 4, 8, 16  # that cut the tensors evenly
_KIB = 1024
_BLOCKS = {1 * _KIB: (1, 1, 16, 16), 64 * _KIB: (1, 4, 64, 64), 4096 * _KIB: (1, 16, 256, 256)}


def _pairs(P: Partition, block: tuple[int, ...]) -> list[tuple[str, Any, Any, tuple[int, ...]]]:
    """Per primitive: its name, ours, the hand-written one, and this rank's input shape."""
    n, comm = P.size, P.comm
    one, line = P.grid((1,)), P.grid((n,))
    first = P.grid((n, 1, 1, 1))
    rows, columns = P.grid((1, 1, n, 1)), P.grid((1, 1, 1, n))
    at_root = block if P.rank == 0 else (0,)
    return [
        ("Broadcast", dnn.Broadcast(one, line), handwritten.Broadcast(comm, block), at_root),
        ("SumReduce", dnn.SumReduce(line, one), handwritten.SumReduce(comm, block), block),
        ("AllSumReduce", dnn.AllSumReduce(line, axes_reduce=(0,)), handwritten.AllSumReduce(comm, block), block),
        ("AllGather", dnn.AllGather(first, axes_all_gather=(0,)), handwritten.AllGather(comm, block), block),
        ("ReduceScatter", *_reduce_scatter(first, comm, block)),
        ("Repartition", dnn.Repartition(rows, columns), handwritten.Repartition(comm, block), block),
        ("HaloExchange", dnn.HaloExchange(rows, (0, 0, 1, 0)), handwritten.HaloExchange(comm, block), block),
    ]


def _reduce_scatter(P: Partition, comm: Any, block: tuple[int, ...]) -> tuple[Any, Any, tuple[int, ...]]:
    """Scattered along the first dim, so that the sizes per rank stay those of the table."""
    whole = P.size, block[1], block[2] // P.size, block[3]
    part = (1, *whole[1:])
    return dnn.ReduceScatter(P, axes_reduce_scatter=(0,)), handwritten.ReduceScatter(comm, part), whole


def _bar(name: str, size: int) -> tuple[str, Callable[[float, float], bool]]:
    if size > 64 * _KIB:
        return "1.15 x", lambda ours, other: ours <= 1.15 * other
    more = 30 if name in ("Repartition", "HaloExchange") else 15
    return f"+{more} us", lambda ours, other: ours <= other + more


def rows(P: Partition, seconds: float) -> list[Row]:
    """Every primitive at three sizes per rank beside the hand-written calls, then a large Repartition."""
    rows = []
    for size, block in _BLOCKS.items():
        for name, ours, theirs, shape in _pairs(P, block):
            _check_same(name, ours, theirs, shape)
            bar, holds = _bar(name, size)
            for mode in (FORWARD, BOTH):
                a, b = interleaved(P.comm, [calls_of(call, shape, mode) for call in (ours, theirs)], seconds)
                rows.append(Row(name, f"{size // _KIB} KiB", mode, a, b, bar=bar, holds=holds(a, b)))
    return rows + _large_repartition(P, seconds)


def _check_same(name: str, ours: Any, theirs: Any, shape: tuple[int, ...]) -> None:
    """Refuse to time two calls that do not give the same."""
    results = []
    for call in (ours, theirs):
        x = torch.arange(float(torch.Size(shape).numel())).view(shape).requires_grad_()
        y = call(x)
        y.backward(torch.arange(float(y.numel())).view(y.shape))
        results.append((y.detach().flatten(), x.grad.flatten()))
    if not all(map(torch.equal, *results)):
        raise RuntimeError(f"{name}: the hand-written call gives another result")


def _large_repartition(P: Partition, seconds: float) -> list[Row]:
    n = P.size
    shape = 1, 16, 512 // n, 512
    ours = dnn.Repartition(P.grid((1, 1, n, 1)), P.grid((1, 1, 1, n)))
    functions = [ours, handwritten.Repartition(P.comm, shape)]
    dtensor, reason = _redistribution(P)
    functions += [dtensor] if dtensor else []
    times = interleaved(P.comm, [calls_of(function, shape, BOTH) for function in functions], 2 * seconds)
    size, what = "(1,16,512,512)", "Repartition H-cut to W-cut"
    rows = [Row(what, size, BOTH, *times[:2], bar="1.2 x", holds=times[0] <= 1.2 * times[1])]
    if dtensor is None:
        return [*rows, Row(f"{what}, DTensor: {reason}", size, BOTH, times[0], None)]
    return [
        *rows,
        Row(f"{what}, other is DTensor on gloo", size, BOTH, times[0], times[2], bar="1 x", holds=times[0] < times[2]),
    ]


def _redistribution(P: Partition) -> tuple[Callable[[torch.Tensor], torch.Tensor] | None, str]:
    """The same by torch's DTensor on gloo, or why that cannot be had here."""
    reason = gloo.start(P)
    if reason:
        return None, reason
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (P.size,))

    def move(x: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(x, mesh, [Shard(2)]).redistribute(mesh, [Shard(3)]).to_local()

    return move, ""
