"""Training steps of a U-Net cut along the height beside those of the same network on one rank."""

from __future__ import annotations

from functools import partial
from time import sleep

import torch
from torch import nn

from distdl_lite.bench.table import Call, Row, interleaved, is_over_torch
from distdl_lite.model.distributed import distribute
from distdl_lite.partition import Partition

RANKS = 2, 4
_SIZE, _LEVELS, _CHANNELS = (872, 1000), 3, 8


def rows(P: Partition, seconds: float) -> list[Row]:
    """A step over all ranks beside one on rank 0 alone, with the same number of threads, while the others sleep."""
    ours = step_of(P.grid((1, 1, P.size, 1)))
    alone = step_of(P.grid((1, 1, 1, 1), (0,))) if P.rank == 0 else lambda: None
    cut, whole = interleaved(P, [ours, partial(while_others_sleep, P, alone)], 20 * seconds)
    what, size = f"U-Net on {P.size} ranks; other is one", f"(1,3,{_SIZE[0]},{_SIZE[1]})"
    return [Row(what, size, "training step", cut, whole, times=0.556 if P.size == 2 else None)]


def while_others_sleep(P: Partition, call: Call) -> None:
    """MPI's own waiting would keep the other cores busy; that at a socket does not."""
    call()
    if is_over_torch(P):
        P.world_transport.agree(P.team, 0)
        return
    request = P.comm.Ibarrier()
    while not request.Test():
        sleep(2e-3)


def step_of(P: Partition, size: tuple[int, int] = _SIZE) -> Call:
    """A training step on this rank's block of a picture."""
    torch.manual_seed(0)
    net, loss = distribute(UNet(), P), distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    shape = 1, 3, *size
    x = torch.rand(shape)[P.block(shape)]

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), x).backward()
        optimizer.step()

    return step


class UNet(nn.Module):
    """That of docs/examples/denoise.py."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_CHANNELS * 2**level for level in range(_LEVELS + 1)]
        self.down = nn.ModuleList(_convolution(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_convolution(3 * a, a) for a in reversed(widths[:-1]))
        self.pool, self.grow = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(_CHANNELS, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, skips = self.down[0](x), []
        for down in self.down[1:]:
            skips.append(y)
            y = down(self.pool(y))
        for up in self.up:
            y = up(torch.cat([skips.pop(), self.grow(y)], dim=1))
        return self.last(y)


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.SiLU(inplace=True))
