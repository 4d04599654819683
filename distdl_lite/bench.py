"""Benchmarks: our calls beside what a programmer writes by hand, in turns within one run.

Each repetition starts at a barrier and counts the slower rank; the figures are medians. Ratios within one run hold where
times between runs do not.
"""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from distdl_lite import handwritten
from distdl_lite import layout as lay
from distdl_lite import nn as dnn
from distdl_lite.grid import Grid
from distdl_lite.partition import Partition
from distdl_lite.plan import plan

Call = Callable[[], Any]

RANKS = {"primitives": (2, 4, 8, 16), "conv": (1, 2, 4, 8, 16)}  # that cut the tensors evenly
_KIB = 1024
_BLOCKS = {1 * _KIB: (1, 1, 16, 16), 64 * _KIB: (1, 4, 64, 64), 4096 * _KIB: (1, 16, 256, 256)}
_FORWARD, _BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Row:
    """One line of a table; `bar` is in words, `holds` whether the figure keeps it (None: there is no bar)."""

    what: str
    size: str
    mode: str
    ours: float
    other: float | None
    unit: str = "us"
    bar: str = ""
    holds: bool | None = None

    def cells(self) -> tuple[str, ...]:
        other = self.other
        return (
            self.what,
            self.size,
            self.mode,
            f"{self.ours:.4g} {self.unit}",
            "" if other is None else f"{other:.4g} {self.unit}",
            "" if other is None else f"{self.ours - other:+.1f}",
            "" if not other else f"{self.ours / other:.2f}",
            self.bar,
            {None: "", True: "holds", False: "FAILS"}[self.holds],
        )


_HEADS = ("what", "size", "mode", "ours", "other", "difference", "ratio", "bar", "")


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    lines = [_HEADS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_json(rows: Sequence[Row], path: str) -> None:
    """Write the rows as a list of objects."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump([asdict(row) for row in rows], file, indent=1)


def interleaved(comm: Any, calls: Sequence[Call], seconds: float) -> list[float]:
    """Median microseconds of each call, the calls taking turns for about `seconds`; the slower rank counts."""
    began = perf_counter()
    for _ in range(3):
        for call in calls:
            call()
    once = comm.allgather((perf_counter() - began) / 3 / len(calls))[0]
    batch = max(1, min(20, int(1e-3 / once)))
    repetitions = max(15, int(seconds / len(calls) / batch / once))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repetitions):
        for call, seen in zip(calls, times, strict=True):
            comm.Barrier()
            began = perf_counter()
            for _ in range(batch):
                call()
            seen.append((perf_counter() - began) / batch)
    by_call = zip(*comm.allgather(times), strict=True)
    return [1e6 * median(map(max, zip(*ranks, strict=True))) for ranks in by_call]


def _calls(function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int], mode: str) -> Call:
    """A call of `function` on a tensor of a shape, without grad or with a backward."""
    x = torch.rand(tuple(shape), requires_grad=mode == _BOTH)
    if mode == _FORWARD:

        def forward() -> None:
            with torch.no_grad():
                function(x)

        return forward
    gradient = torch.ones_like(function(x))

    def both() -> None:
        x.grad = None
        function(x).backward(gradient)

    return both


# ---- primitives ------------------------------------------------------------------------------------------------------


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


def primitives_rows(P: Partition, seconds: float) -> list[Row]:
    """Every primitive at three sizes per rank beside the hand-written calls, then a large Repartition."""
    rows = []
    for size, block in _BLOCKS.items():
        for name, ours, theirs, shape in _pairs(P, block):
            _check_same(name, ours, theirs, shape)
            bar, holds = _bar(name, size)
            for mode in (_FORWARD, _BOTH):
                a, b = interleaved(P.comm, [_calls(call, shape, mode) for call in (ours, theirs)], seconds)
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
    times = interleaved(P.comm, [_calls(function, shape, _BOTH) for function in functions], 2 * seconds)
    size, what = "(1,16,512,512)", "Repartition H-cut to W-cut"
    rows = [Row(what, size, _BOTH, *times[:2], bar="1.2 x", holds=times[0] <= 1.2 * times[1])]
    if dtensor is None:
        return [*rows, Row(f"{what}, DTensor: {reason}", size, _BOTH, times[0], None)]
    return [
        *rows,
        Row(f"{what}, other is DTensor on gloo", size, _BOTH, times[0], times[2], bar="1 x", holds=times[0] < times[2]),
    ]


def _redistribution(P: Partition) -> tuple[Callable[[torch.Tensor], torch.Tensor] | None, str]:
    """The same by torch's DTensor on gloo, or why that cannot be had here."""
    folder = P.broadcast_data(tempfile.mkdtemp() if P.rank == 0 else None)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    move, reason = None, ""
    try:
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh

        store = dist.FileStore(os.path.join(folder, "store"), P.size)
        dist.init_process_group("gloo", store=store, rank=P.rank, world_size=P.size)
        mesh = init_device_mesh("cpu", (P.size,))

        def move(x: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(x, mesh, [Shard(2)]).redistribute(mesh, [Shard(3)]).to_local()

    except (ImportError, RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    reasons = [found for found in P.allgather_data(reason) or [] if found]
    return (None, reasons[0]) if reasons else (move, "")


# ---- convolutions ----------------------------------------------------------------------------------------------------


def conv_rows(P: Partition, seconds: float) -> list[Row]:
    """Convolutions cut along the height beside the same ones on the local blocks without any exchange."""
    rows = []
    for count, channels, length, bar in ((8, 16, 256, 1.3), (3, 16, 512, None), (1, 8, 64, None)):
        shape = 1, channels, length // P.size, length
        calls = [_calls(net, shape, _BOTH) for net in (_network(P, count, channels), _network(None, count, channels))]
        ours, floor = interleaved(P.comm, calls, 3 * seconds)
        what = f"{count} x (conv 3x3 + ReLU), other is without exchange"
        holds = None if bar is None else ours <= bar * floor
        size = f"(1,{channels},{length},{length})"
        rows.append(Row(what, size, _BOTH, ours, floor, bar=f"{bar} x" if bar else "", holds=holds))
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


# ---- plans and set-up ------------------------------------------------------------------------------------------------


def plan_rows(P: Partition, seconds: float) -> list[Row]:
    """Plans on 65,536 ranks, what an unchanged forward agrees on, and communicators left by 3,000 layers."""
    n = 256
    grid, other = Grid((n, n), range(n * n)), Grid((n, n), range(n * n)[::-1])
    shape = 40 * n, 40 * n + 7
    cases: dict[str, Call] = {
        "plan: blocks to the reverse order": lambda: plan(_blocks(grid, shape), _blocks(other, shape), n // 2),
        "plan: 256x256 to 128x512 blocks": lambda: plan(_blocks(grid, shape), _blocks(_wide(n), shape), n // 2),
        "plan: halo": lambda: plan(_blocks(grid, shape), lay.haloed(_blocks(grid, shape), [(1, 1)] * 2), n // 2),
    }
    rows = [row for what, build in cases.items() for row in _cost_of_plan(what, build)]
    return [*rows, *_setup_rows(P), _dropped_layers(P)]


def _blocks(grid: Grid, shape: Sequence[int]) -> lay.Layout:
    return lay.balanced_blocks(grid, shape)


def _wide(n: int) -> Grid:
    return Grid((n // 2, 2 * n), range(n * n))


def _cost_of_plan(what: str, build: Call) -> list[Row]:
    times = []
    for _ in range(5):
        began = perf_counter()
        build()
        times.append(perf_counter() - began)
    tracemalloc.start()
    build()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    ranks = "65536 ranks"
    slowest = max(times)
    return [
        Row(what, ranks, "time", slowest, None, "s", "0.1 s", slowest < 0.1),
        Row(what, ranks, "memory", peak, None, "MB", "10 MB", peak < 10),
    ]


def _setup_rows(P: Partition) -> list[Row]:
    """Count what a forward sends besides its data: first, unchanged, and back to a structure seen before."""
    layer = dnn.HaloExchange(P.grid((P.size, 1)), (1, 1))
    small, large = torch.rand(4, 5), torch.rand(6, 5)
    rows = []
    for mode, x in (("first", small), ("unchanged", small), ("changed", large), ("seen before", small)):
        agreements, gathers = _setup_calls(P.world_transport, lambda x=x: layer(x))  # type: ignore[misc]
        bar = mode in ("unchanged", "seen before")
        size = f"{P.size} ranks"
        rows.append(
            Row(
                "set-up: agreements",
                size,
                mode,
                agreements,
                None,
                "",
                "1" if bar else "",
                agreements <= 1 if bar else None,
            )
        )
        rows.append(
            Row("set-up: gathers", size, mode, gathers, None, "", "0" if bar else "", gathers == 0 if bar else None)
        )
    return rows


def _setup_calls(transport: Any, call: Call) -> tuple[int, int]:
    """How many agreements and gathers of host data a call makes."""
    made = {"start_agreeing": 0, "gather_objects": 0}

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(transport, name)

        def wrapper(*arguments: Any) -> Any:
            made[name] += 1
            return method(*arguments)

        return wrapper

    for name in made:
        setattr(transport, name, counted(name))
    try:
        call()
    finally:
        for name in made:
            delattr(transport, name)
    return made["start_agreeing"], made["gather_objects"]


def _dropped_layers(P: Partition, count: int = 3000) -> Row:
    """Construct, call and drop layers over the same teams; the registry of communicators must not grow."""
    rows, line = P.grid((P.size, 1)), P.grid((P.size,))
    x, teams = torch.rand(2, 2), P.world_transport._teams

    def some(number: int) -> None:
        for _ in range(number):
            dnn.HaloExchange(rows, (1, 0))(x)
            dnn.AllSumReduce(line, axes_reduce=(0,))(x)

    some(1)
    before = len(teams)
    some(count // 2)
    growth = len(teams) - before
    return Row(
        f"{count} layers dropped: communicators", f"{P.size} ranks", "growth", growth, None, "", "0", growth == 0
    )
