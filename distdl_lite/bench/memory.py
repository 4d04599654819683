"""The most memory that a rank takes for two forwards and backwards of a U-Net on 4, 2 and 1 of the ranks."""

from __future__ import annotations

import gc
import resource
from functools import partial

import torch

from distdl_lite.bench.table import BOTH, Row
from distdl_lite.bench.unet import UNet, while_others_sleep
from distdl_lite.model.distributed import distribute
from distdl_lite.partition import Partition

RANKS = 1, 2, 4
_SIZE = 1744, 2000
_GRIDS = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
_BARS = {2: 0.53, 4: 0.29}


def rows(P: Partition, seconds: float) -> list[Row]:
    """The peak above what the program takes before; the fewer ranks, the higher it is, so one run shows all."""
    _two_passes(P.create_partition_inclusive([P.rank]).grid((1, 1, 1, 1)), (16, 16))  # what imports and captures take
    before = _peak()
    peaks: dict[int, float] = {}
    for ranks in sorted((n for n in RANKS if n <= P.size), reverse=True):
        part = P.grid((1, 1, *_GRIDS[ranks]))
        while_others_sleep(P, partial(_two_passes, part, _SIZE) if part.active else lambda: None)
        peaks[ranks] = max(P.allgather_data(_peak() - before if part.active else 0.0) or ())
    size = f"(1,3,{_SIZE[0]},{_SIZE[1]})"
    return [
        Row(f"U-Net on {n} ranks; other is one", size, BOTH, peak, peaks[1], "MiB", _BARS.get(n))
        for n, peak in sorted(peaks.items())
    ]


def _two_passes(P: Partition, size: tuple[int, int]) -> None:
    net, loss, shape = distribute(UNet(), P), distribute(torch.nn.MSELoss(), P), (1, 3, *size)
    x = P.cut(torch.rand(shape))
    for _ in range(2):
        net.zero_grad()
        loss(net(x), x).backward()
    del net, loss, x
    gc.collect()


def _peak() -> float:
    """In MiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
