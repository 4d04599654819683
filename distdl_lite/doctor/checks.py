"""What the ranks try together, through the transport that models will use.

A check returns what is wrong first, "" if nothing is. It goes on to its end, for the other ranks may find nothing wrong.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import distdl_lite
from distdl_lite.grid import Grid
from distdl_lite.layout import balanced_blocks
from distdl_lite.operator import Operator
from distdl_lite.plan import plan
from distdl_lite.transport import Transport

_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.int64
_LENGTHS = 1, 1000, 300_000  # the last is above what MPIs send at once
_SIZES = 8, 1 << 10, 1 << 15, 1 << 18, 1 << 20, 1 << 22  # bytes of the messages that are timed


class Devices:
    """The CUDA device of a rank: that which its transport has taken."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._work = torch.zeros(4096, 4096, device=self.device)
        self._work = self._work @ self._work  # what the first product sets up would wait for the stream

    def synchronise(self) -> None:
        """Wait for all that the device was given to do."""
        torch.cuda.synchronize(self.device)

    def fill_late(self, x: torch.Tensor, value: float) -> None:
        """Let the current stream fill a tensor after it has been busy for a while; returns at once."""
        for _ in range(20):
            self._work = self._work @ self._work
        x.fill_(value)

    def side_stream(self) -> Any:
        """Make another stream the current one."""
        return torch.cuda.stream(torch.cuda.Stream(self.device))


def facts() -> dict[str, Any]:
    """What this process is, and what it has to compute with and to send on."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    fast = Path("/sys/class/infiniband")
    return {
        "host": platform.node(),
        "cores": cores,
        "quota": _quota(),
        "host_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "distdl_lite": distdl_lite.__version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "torch.distributed": _backends(),
        },
        "mpirun": shutil.which("mpirun"),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "interfaces": sorted(name for _, name in socket.if_nameindex() if name != "lo"),
        "route": _route(),
        "infiniband": sorted(entry.name for entry in fast.iterdir()) if fast.is_dir() else [],
    }


def _backends() -> str:
    """What torch.distributed was built with; nothing of it is begun."""
    known = torch.distributed
    usable = ("gloo", "nccl") if known.is_available() else ()
    return ", ".join(name for name in usable if getattr(known, f"is_{name}_available")()) or "not available"


def _quota() -> float | None:
    """The cores that a container may use, None if there is no limit."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(most) / int(period)
    except (OSError, ValueError):
        return None


def _route() -> str | None:
    """The interface of the default route."""
    try:
        lines = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    except OSError:
        return None
    return next((line[0] for line in lines if line[1] == "00000000"), None)


def mover(world: Transport, sources: Sequence[int], targets: Sequence[int], length: int) -> Operator:
    """Blocks of `length` go from each source to the target at the same place."""
    X, Y = (balanced_blocks(Grid((len(ranks),), tuple(ranks)), (length * len(ranks),)) for ranks in (sources, targets))
    return Operator(plan(X, Y, world.rank), world)


def _ring(world: Transport, length: int) -> Operator:
    ranks = list(range(world.size))
    return mover(world, ranks, ranks[1:] + ranks[:1], length)


def messages(world: Transport, device: torch.device) -> str:
    """Each rank sends tensors to the next."""
    before, wrong = (world.rank - 1) % world.size, []
    for length in _LENGTHS:
        move, values = _ring(world, length), torch.arange(length, device=device) % 97
        for dtype in _DTYPES:
            y, right = move.apply((values + world.rank % 31).to(dtype)), (values + before % 31).to(dtype)
            if not torch.equal(y, right):
                wrong.append(f"{int((y != right).sum())} of {length} {dtype} from rank {before} arrived wrong")
    return next(iter(wrong), "")


def sums(world: Transport, device: torch.device) -> str:
    """Sums, maxima, sums beside the computation, copies of rank 0's tensor, and agreements."""
    team, total = world.team(range(world.size)), sum(r % 31 for r in range(world.size))
    mine, wrong = world.rank % 31, []
    world.open_sums(team)
    for length in _LENGTHS:
        for dtype in _DTYPES[:2]:
            x = torch.full((length,), mine, dtype=dtype, device=device)
            made = {"sum": world.all_reduce(team, x.clone()), "maximum": world.all_reduce(team, x.clone(), "max")}
            made["sum beside the computation"], made["copy of rank 0's"] = later, copy = x.clone(), x.clone()
            world.start_sum(team, later).wait()
            world.broadcast(team, copy, 0)
            values = total, min(world.size - 1, 30), total, 0
            for (name, y), value in zip(made.items(), values, strict=True):
                if not bool((y == value).all()):
                    wrong.append(f"the {name} of {length} {dtype} is wrong: {y[y != value][0].item()}, not {value}")
    agreed, right = world.agree(team, 2**63 + world.rank), sum(2**63 + rank for rank in range(world.size)) % 2**64
    if agreed != right:
        wrong.append(f"the ranks' numbers add up to {agreed}, not {right}")
    return next(iter(wrong), "")


def stream_order(world: Transport, devices: Devices) -> str:
    """What a stream has yet to compute is sent as it will be, and received before the stream reads it."""
    before, move, wrong = (world.rank - 1) % world.size, _ring(world, _LENGTHS[-1]), []
    for attempt, stream in enumerate([nullcontext(), devices.side_stream()]):
        with stream:
            x = torch.full((_LENGTHS[-1],), -1.0, device=devices.device)
            devices.synchronise()
            devices.fill_late(x, attempt + world.rank)
            y = move.apply(x) * 1
            devices.synchronise()
        if stale := int((y != attempt + before).sum()):
            wrong.append(f"{stale} of {len(y)} numbers were sent before the stream had computed them")
    return next(iter(wrong), "")


def direct(devices: Devices, run: Callable[[torch.Tensor], torch.Tensor], mine: float, right: float) -> str:
    """A call of the MPI library that is given a device's memory, full of `mine`; it should make what is `right`."""
    wrong = []
    for length in _LENGTHS:
        x = torch.full((length,), float(mine), device=devices.device)
        devices.synchronise()
        y = run(x)
        devices.synchronise()
        if not bool((y == right).all()):
            wrong.append(f"of {length} numbers some are {y[y != right][0].item()}, not {right}")
    return next(iter(wrong), "")


def neighbours(hosts: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Pairs of ranks, each rank in one at most: on one host, and across.

    >>> neighbours(["a", "a", "a", "b", "b"])
    {'one host': [(0, 1), (3, 4)], 'across hosts': [(0, 3), (1, 4)]}
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    groups = list(by_host.values())
    inside = [pair for ranks in groups for pair in zip(ranks[::2], ranks[1::2], strict=False)]
    across = [pair for a, b in zip(groups[::2], groups[1::2], strict=False) for pair in zip(a, b, strict=False)]
    return {"one host": inside, "across hosts": across}


def speeds(world: Transport, device: torch.device) -> dict[str, Any]:
    """Latency in seconds and bytes a second of messages, and the seconds by size: those of the slowest pair.

    All pairs send at the same time, as the ranks of a model do.
    """
    team, found = world.team(range(world.size)), {}
    for kind, pairs in neighbours(world.gather_objects(team, platform.node())).items():
        if not pairs:
            continue
        sources, targets = zip(*pairs, strict=True)
        taken = [
            _one_way(mover(world, sources, targets, size // 4), size, device, world.rank in sources) for size in _SIZES
        ]
        told = world.gather_objects(team, taken)
        slowest = [max(times) for times in zip(*(told[rank] for rank in sources), strict=True)]
        latency, bandwidth = fit(_SIZES, slowest)
        found[kind] = {"latency": latency, "bandwidth": bandwidth, "seconds": dict(zip(_SIZES, slowest, strict=True))}
    return found


def _one_way(move: Operator, size: int, device: torch.device, is_source: bool) -> float:
    """Half the median seconds of a message of so many bytes and its way back."""
    x, nothing = torch.ones(size // 4, device=device), torch.empty(0, device=device)
    taken = []
    for _ in range(min(200, 20 + (1 << 22) // size)):
        began = perf_counter()
        y = move.apply(x if is_source else nothing)
        move.adjoint.apply(nothing if is_source else y)
        taken.append(perf_counter() - began)
    return median(taken[5:]) / 2


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bandwidth of ``seconds = latency + size / bandwidth``, by the least squares of relative errors.

    >>> [round(number, 9) for number in fit((8, 1000, 1000000), [1e-5 + n / 2e9 for n in (8, 1000, 1000000)])]
    [1e-05, 2000000000.0]
    """
    u, v = [1 / t for t in seconds], [n / t for n, t in zip(sizes, seconds, strict=True)]
    uu, uv, vv = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    latency, slope = (vv * sum(u) - uv * sum(v)) / determinant, (uu * sum(v) - uv * sum(u)) / determinant
    if latency <= 0 or slope <= 0:  # no line: times that do not rise with the size
        return min(seconds), max(v)
    return latency, 1 / slope
