"""Data parallelism beside torch's DistributedDataParallel on gloo, and what of the sums is hidden."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from distdl_lite.bench import gloo
from distdl_lite.bench.table import BOTH, Call, Row, interleaved, is_over_torch
from distdl_lite.parallel.replicas.data_parallel import DataParallel
from distdl_lite.partition import Partition
from distdl_lite.transport.sums import ENGINES

RANKS = 2, 3, 4
_MODELS = {
    "0.8 MB, 6 parameters": ((256, 512, 128, 10), 64),
    "17 MB, 10 parameters": ((1024, 1024, 1024, 1024, 1024, 256), 32),
    "105 MB, 8 parameters": ((2560, 2560, 2560, 2560, 2560), 16),
    "1.3 MB, 160 parameters": ((64,) * 81, 16),
}
_BARS = 0.9, 1.05  # of a step beside DDP's: over MPI, and where both have Gloo's sums
_LARGE = (724,) * 9  # 8 buckets of 2 MiB


def rows(P: Partition, seconds: float) -> list[Row]:
    """Whole steps beside DDP's, then what overlap hides, overhead, and steps with unused parameters."""
    reason = gloo.start(P)
    if reason:
        raise RuntimeError(f"torch's gloo cannot be had here: {reason}")
    return [
        *_steps(P, 2 * seconds),
        *_overlap(P, 2 * seconds),
        *_overhead(P, seconds),
        *_unused(P, 2 * seconds),
    ]


def _network(sizes: tuple[int, ...]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def _ddp(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, **options)


def _step(model: torch.nn.Module, x: torch.Tensor) -> Call:
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(x).square().mean().backward()

    return step


def _without_sums(model: Any, x: torch.Tensor) -> Call:
    step = _step(model, x)

    def local() -> None:
        with model.no_sync():
            step()

    return local


def _steps(P: Partition, seconds: float) -> list[Row]:
    rows, bar = [], _BARS[is_over_torch(P)]
    for size, (sizes, batch) in _MODELS.items():
        x = torch.rand(batch, sizes[0])
        models = DataParallel(_network(sizes), P), _ddp(_network(sizes)), _network(sizes)
        ours, ddp, plain = interleaved(P, [_step(model, x) for model in models], seconds)
        rows.append(Row("step, other is DDP on gloo", size, BOTH, ours, ddp, times=bar))
        rows.append(Row("step, other is without sums", size, BOTH, ours, plain))
    return rows


class _Sleep(torch.autograd.Function):
    """An accelerator's computation: backward takes its time and no core."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(2e-3)
        return gradient


class _Sleeping(torch.nn.Module):
    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = _network(sizes)[::2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = _Sleep.apply(layer(x))
        return x


def _overlap(P: Partition, seconds: float) -> list[Row]:
    """Step minus step without sums, beside the sums alone, for each engine and DDP, on idle and on busy cores."""
    rows, size = [], "8 x 2 MiB"
    for core, build, batch in (("idle core", _Sleeping, 2), ("busy core", _network, 64)):
        x, is_idle = torch.rand(batch, _LARGE[0]), build is _Sleeping
        models: dict[str, Any] = {e: DataParallel(build(_LARGE), P, engine=e, bucket_mb=2.1) for e in ENGINES}
        inline, thread = interleaved(P, [_step(models[engine], x) for engine in ("inline", "thread")], seconds)
        sums = _sums_alone(models["thread"])
        for engine, model in {**models, "DDP on gloo": _ddp(build(_LARGE), bucket_cap_mb=2.1)}.items():
            step, alone, local = interleaved(P, [_step(model, x), sums, _without_sums(model, x)], seconds)
            what, bar = f"exposed: {engine}, {core}; other is sums alone", engine == "thread" and is_idle
            rows.append(Row(what, size, BOTH, step - local, alone, times=0.4 if bar else None))
        what = f"step: thread, {core}; other is inline"
        rows.append(Row(what, size, BOTH, thread, inline, times=None if is_idle else 1.05))
    return rows


def _sums_alone(dp: DataParallel) -> Call:
    sync = dp._sync
    flats = [torch.ones(bucket.nbytes // 4) for bucket in sync.buckets]

    def sums() -> None:
        for flat in flats:
            sync.team.world.start_sum(sync.team, flat, "inline", sync.lane).wait()

    return sums


def _overhead(P: Partition, seconds: float) -> list[Row]:
    """One rank alone: microseconds for each parameter."""
    size = "1.3 MB, 160 parameters"
    sizes, batch = _MODELS[size]
    x, n = torch.rand(batch, sizes[0]), 2 * len(sizes) - 2
    alone = DataParallel(_network(sizes), P.create_partition_inclusive([P.rank]))
    calls = [_step(alone, x), _without_sums(DataParallel(_network(sizes), P), x), _step(_network(sizes), x)]
    ours, inside, plain = interleaved(P, calls, seconds)
    return [
        Row(f"a parameter's share, {what}", size, BOTH, (taken - plain) / n, most=bar)
        for what, taken, bar in (("one rank", ours, 15), ("inside no_sync", inside, 5))
    ]


class _Skips(torch.nn.Module):
    """A deep network that leaves out every tenth of its layers."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = _network(sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number % 20 != 6:
                x = layer(x)
        return x


def _unused(P: Partition, seconds: float) -> list[Row]:
    sizes, batch = _MODELS["1.3 MB, 160 parameters"]
    x = torch.rand(batch, sizes[0])
    models = DataParallel(_Skips(sizes), P), _ddp(_Skips(sizes), find_unused_parameters=True)
    a, b = interleaved(P, [_step(model, x) for model in models], seconds)
    what = "step, a tenth unused; other is DDP, find_unused_parameters"
    return [Row(what, "160 parameters", BOTH, a, b, times=_BARS[is_over_torch(P)])]
