"""Data parallelism beside torch's DistributedDataParallel on gloo, and what of the sums is hidden."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from distdl_lite.bench import gloo
from distdl_lite.bench.table import BOTH, Call, Row, interleaved
from distdl_lite.parallel.replicas.data_parallel import DataParallel
from distdl_lite.partition import Partition
from distdl_lite.testing import count

RANKS = 2, 3, 4
_MODELS = {
    "0.8 MB, 6 parameters": ((256, 512, 128, 10), 64),
    "17 MB, 10 parameters": ((1024, 1024, 1024, 1024, 1024, 256), 32),
    "105 MB, 8 parameters": ((2560, 2560, 2560, 2560, 2560), 16),
    "1.3 MB, 160 parameters": ((64,) * 81, 16),
}
_LARGE = (724,) * 9  # 8 buckets of 2 MiB


def rows(P: Partition, seconds: float) -> list[Row]:
    """Whole steps beside DDP's, then what overlap hides, overhead, accumulation, unused parameters and uneven steps."""
    reason = gloo.start(P)
    if reason:
        raise RuntimeError(f"torch's gloo cannot be had here: {reason}")
    return [
        *_steps(P, 2 * seconds),
        *_overlap(P, 2 * seconds),
        *_overhead(P, seconds),
        *_accumulation(P, seconds),
        *_unused(P, 2 * seconds),
        *_uneven(P, seconds),
    ]


def _network(sizes: tuple[int, ...]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def _ddp(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, **options)


def _step(model: Callable[[torch.Tensor], torch.Tensor], parameters: Any, x: torch.Tensor) -> Call:
    parameters = list(parameters)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(x).square().mean().backward()

    return step


def _of(model: torch.nn.Module, x: torch.Tensor) -> Call:
    return _step(model, model.parameters(), x)


def _steps(P: Partition, seconds: float) -> list[Row]:
    made = []
    for size, (sizes, batch) in _MODELS.items():
        x = torch.rand(batch, sizes[0])
        calls = [_of(DataParallel(_network(sizes), P), x), _of(_ddp(_network(sizes)), x), _of(_network(sizes), x)]
        ours, ddp, plain = interleaved(P.comm, calls, seconds)
        made.append(Row("step, other is DDP on gloo", size, BOTH, ours, ddp, bar="0.9 x", holds=ours <= 0.9 * ddp))
        made.append(Row("step, other is without sums", size, BOTH, ours, plain))
    return made


class _Sleep(torch.autograd.Function):
    """An accelerator's computation: backward takes its time and no core."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(2e-3)
        return gradient


def _sleeping(sizes: tuple[int, ...]) -> torch.nn.Module:
    class Sleep(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Sleep.apply(x)

    return torch.nn.Sequential(*(layer for linear in _network(sizes)[::2] for layer in (linear, Sleep())))


def _overlap(P: Partition, seconds: float) -> list[Row]:
    """Step minus step without sums, beside the sums alone, for each engine and DDP, on idle and on busy cores."""
    made = []
    for core, build, batch in (("idle core", _sleeping, 2), ("busy core", _network, 64)):
        x = torch.rand(batch, _LARGE[0])
        engines = "inline", "thread", "poll"
        models = {engine: DataParallel(build(_LARGE), P, engine=engine, bucket_mb=2.1) for engine in engines}
        inline, thread = interleaved(P.comm, [_of(models["inline"], x), _of(models["thread"], x)], seconds)
        sums = _sums_alone(models["thread"])
        for engine, model in {**models, "DDP on gloo": _ddp(build(_LARGE), bucket_cap_mb=2.1)}.items():
            step, alone, local = interleaved(P.comm, [_of(model, x), sums, _without_sums(model, x)], seconds)
            has_bar = engine == "thread" and core == "idle core"
            bar = ("0.4 x", step - local <= 0.4 * alone) if has_bar else ("", None)
            what = f"exposed: {engine}, {core}; other is sums alone"
            made.append(Row(what, "8 x 2 MiB", BOTH, step - local, alone, bar=bar[0], holds=bar[1]))
        what = f"step: thread, {core}; other is inline"
        bar = ("1.05 x", thread <= 1.05 * inline) if core == "busy core" else ("", None)
        made.append(Row(what, "8 x 2 MiB", BOTH, thread, inline, bar=bar[0], holds=bar[1]))
    return made


def _without_sums(model: Any, x: torch.Tensor) -> Call:
    step = _of(model, x)

    def local() -> None:
        with model.no_sync():
            step()

    return local


def _sums_alone(dp: DataParallel) -> Call:
    sync = dp._sync
    flats = [torch.ones(bucket.nbytes // 4) for bucket in sync.buckets]

    def sums() -> None:
        for flat in flats:
            sync.transport.start_sum(sync.team, flat, "inline", sync.lane).wait()

    return sums


def _overhead(P: Partition, seconds: float) -> list[Row]:
    """One rank alone: microseconds for each parameter."""
    sizes, batch = _MODELS["1.3 MB, 160 parameters"]
    x = torch.rand(batch, sizes[0])
    alone = P.create_partition_inclusive([P.rank])
    one = DataParallel(_network(sizes), alone)
    held = DataParallel(_network(sizes), P)

    calls = [_of(one, x), _without_sums(held, x), _of(_network(sizes), x)]
    ours, inside, plain = interleaved(P.comm, calls, seconds)
    n = len(sizes) * 2 - 2
    return [
        Row(
            f"a parameter's share, {what}",
            f"{n} parameters",
            BOTH,
            (t - plain) / n,
            0,
            bar=f"{bar} us",
            holds=t - plain <= bar * n,
        )
        for what, t, bar in (("one rank", ours, 15), ("inside no_sync", inside, 5))
    ]


def _accumulation(P: Partition, seconds: float) -> list[Row]:
    sizes, batch = _MODELS["17 MB, 10 parameters"]
    x = torch.rand(batch, sizes[0])
    dp = DataParallel(_network(sizes), P)
    step = _of(dp, x)

    def eight(syncs: bool) -> None:
        for _ in range(7):
            if syncs:
                dp(x).square().mean().backward()
            else:
                with dp.no_sync():
                    dp(x).square().mean().backward()
        dp(x).square().mean().backward()

    step()
    messages = []
    for syncs in (False, True):
        with count() as counted:
            eight(syncs)
        messages.append(counted.messages)
        dp.zero_grad()
    few, many = interleaved(P.comm, [lambda: eight(False), lambda: eight(True)], seconds)
    return [
        Row("8 backwards, 7 in no_sync; other is 8 sums", "17 MB", BOTH, few, many),
        Row("their messages", "17 MB", BOTH, *messages, unit="", bar="1/8", holds=8 * messages[0] == messages[1]),
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
    ours, ddp = DataParallel(_Skips(sizes), P), _ddp(_Skips(sizes), find_unused_parameters=True)
    a, b = interleaved(P.comm, [_of(ours, x), _of(ddp, x)], seconds)
    what = "step, a tenth unused; other is DDP, find_unused_parameters"
    return [Row(what, "160 parameters", BOTH, a, b, bar="0.9 x", holds=a <= 0.9 * b)]


def _uneven(P: Partition, seconds: float) -> list[Row]:
    """A loop of 10 steps inside `join`, beside one without and DDP's."""
    from torch.distributed.algorithms.join import Join

    sizes, batch = _MODELS["0.8 MB, 6 parameters"]
    x = torch.rand(batch, sizes[0])
    dp, ddp = DataParallel(_network(sizes), P), _ddp(_network(sizes))
    step, their = _of(dp, x), _of(ddp, x)

    def loop() -> None:
        for _ in range(10):
            step()

    def joined() -> None:
        with dp.join():
            loop()

    def theirs() -> None:
        with Join([ddp]):
            for _ in range(10):
                their()

    messages = []
    loop()
    for call in (joined, loop):
        with count() as counted:
            call()
        messages.append(counted.messages)
    # At its end each rank takes part once more, and the parameters are sent around.
    at_end = messages[0] - messages[1]
    a, b, c = interleaved(P.comm, [joined, loop, theirs], seconds)
    return [
        Row("10 steps in join; other is without", "0.8 MB", BOTH, a, b),
        Row("10 steps in join; other is DDP's join", "0.8 MB", BOTH, a, c),
        Row("messages of join for 10 steps, beside those at its end", "0.8 MB", BOTH, 0, at_end, unit=""),
    ]
