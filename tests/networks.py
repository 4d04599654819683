"""Networks as users write them, in plain torch, and how their tensors are cut; a U-Net of layers by hand, too.

A convolution before a norm has no bias, and neither have the keys of attention: its gradient is zero but for rounding,
which Adam divides by its own size, so that the bias walks at random, in serial training too. No pool takes a maximum and only
the ResNet has kinks, since two trainings part where rounding decides on which side of one they are; in as few steps as here
that does not happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.model.dry import DryTransport, Meter

Tensors = tuple[torch.Tensor, ...]
Grid = tuple[int, int]

# ---- convolutions ----------------------------------------------------------------------------------------------------


def convolution(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    activation: type[nn.Module] = nn.SiLU,
    conv: Callable[..., nn.Module] = nn.Conv2d,
    norm: Callable[..., nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution of kernel 3, norm and activation."""
    first = conv(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(first, norm(out_channels), activation())


class UNet(nn.Module):
    """Halves 11 x 9 points by a stride and by a pool, and doubles them by interpolation and a transposed convolution.

    Smooth, with SiLU and average pools: where rounding decides which of two inputs is the maximum, training parts ways.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.strided = convolution(2, 4), convolution(4, 6, 2)
        self.pooled = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), convolution(6, 8))
        self.grow, self.after_grow = nn.Upsample(size=(6, 5), mode="bilinear"), convolution(6 + 8, 6)
        self.transposed, self.after = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), convolution(4 + 4, 4)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = self.stem(x)
        half = self.strided(full)
        y = self.after_grow(torch.cat([half, self.grow(self.pooled(half))], dim=1))
        return self.last(self.after(torch.cat([full, self.transposed(y)], dim=1)))


class UNetByHand(dnn.Module):
    """The same network of distributed layers, which take the partition before torch's arguments."""

    def __init__(self, P: dl.CartesianPartition, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm = (partial(layer, P, dtype=dtype) for layer in (dnn.DistributedConv2d, dnn.DistributedBatchNorm))
        block = partial(convolution, conv=conv, norm=norm)
        self.stem, self.strided = block(2, 4), block(4, 6, 2)
        self.pooled = nn.Sequential(dnn.DistributedAvgPool2d(P, 2, ceil_mode=True), block(6, 8))
        self.grow, self.after_grow = dnn.DistributedUpsample(P, size=(6, 5), mode="bilinear"), block(6 + 8, 6)
        self.transposed = dnn.DistributedConvTranspose2d(P, 6, 4, 3, stride=2, padding=1, dtype=dtype)
        self.after, self.last = block(4 + 4, 4), conv(4, 1, 1)

    forward = UNet.forward


class Residual(nn.Module):
    """Two convolutions beside a skip, which projects where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(in_channels, out_channels, stride, nn.ReLU)
        self.second = convolution(out_channels, out_channels, activation=nn.Identity)
        self.skip = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


class ResNet(nn.Module):
    """A stem, two residual blocks, the global mean and five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 4, activation=nn.ReLU)
        self.blocks = nn.Sequential(Residual(4, 4, 1), Residual(4, 6, 2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# ---- the Fourier neural operator -------------------------------------------------------------------------------------


class SpectralConv(nn.Module):
    """Multiplies the lowest modes of images (N, C, H, W) by a matrix each and drops the others; Li et al. 2021, figure 2.

    Along the height the lowest modes are `modes[0]` from zero on and as many negative ones, at the end of the spectrum.
    """

    def __init__(self, channels: int, modes: tuple[int, int]) -> None:
        super().__init__()
        self.modes = modes
        shape, dtype = (channels, channels, *modes), torch.get_default_dtype().to_complex()
        self.low, self.high = (nn.Parameter(torch.rand(shape, dtype=dtype) / channels) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.modes
        spectrum = torch.fft.rfft2(x)
        kept = torch.zeros_like(spectrum)
        kept[:, :, :rows, :columns] = mixed(spectrum[:, :, :rows, :columns], self.low)
        kept[:, :, -rows:, :columns] = mixed(spectrum[:, :, -rows:, :columns], self.high)
        return torch.fft.irfft2(kept, s=x.shape[2:])


def mixed(modes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each mode's channels times its matrix."""
    return torch.einsum("nihw,iohw->nohw", modes, weight)


class FNO(nn.Module):
    """A Fourier neural operator: lift, two times spectral plus pointwise convolution, project."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv2d(1, channels, 1), nn.Conv2d(channels, 1, 1)
        self.spectral = nn.ModuleList(SpectralConv(channels, (3, 3)) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = nn.functional.gelu(spectral(x) + pointwise(x))
        return self.project(x)


# ---- the transformer -------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """One block of causal attention and a perceptron, which predicts the next word; logits (N, words, T).

    Tied, the table of words is the weight of the logits too.
    """

    def __init__(self, heads: int, is_tied: bool = False) -> None:
        super().__init__()
        words, length, self.head_size = 11, 7, 2
        size = heads * self.head_size
        self.words, self.places = nn.Embedding(words, size), nn.Embedding(length, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.queries_keys_values, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.dropout = nn.Dropout(0.0)
        self.logits = nn.Linear(size, words)
        if is_tied:
            self.logits.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.words(words) + self.places(torch.arange(words.shape[1])))
        x = x + self.attended(self.norms[0](x))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.logits(self.norms[2](x)).transpose(1, 2)

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of each position to itself and those before it."""
        q, k, v = (
            self.queries_keys_values(x).unflatten(-1, (-1, 3, self.head_size)).unbind(3)
        )  # (N, T, heads, head_size)
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(self.head_size)
        y = torch.einsum("nhqk,nkhd->nqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return self.out(y.flatten(2))


# ---- what is learned -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network, its loss, how its next batch is drawn, and how all are cut.

    Attributes
    ----------
    net, loss : callable
        Make them in plain torch.
    draw : callable
        Inputs and target for a dtype, and the number of samples.
    dims, axes : int, tuple of int
        The number of axes of the partition, and those along which the two numbers of a grid lie.
    cuts : tuple of axes
        For each of the inputs and the target the axis of the partition that cuts each dim.
    by_hand : callable, optional
        Makes the network of distributed layers for a partition and a dtype.
    """

    net: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    draw: Callable[[torch.dtype, int], Tensors]
    dims: int
    axes: tuple[int, int]
    cuts: Sequence[Sequence[int]]
    by_hand: Callable[[dl.CartesianPartition, torch.dtype], nn.Module] | None = None

    def partition(self, world: dl.Partition, grid: Grid) -> dl.CartesianPartition:
        where = dict(zip(self.axes, grid, strict=True))
        return world.grid([where.get(axis, 1) for axis in range(self.dims)])

    def blocks(self, batch: Tensors, P: dl.CartesianPartition | None) -> Tensors:
        """This rank's blocks of a batch, all of it without a partition."""
        return tuple(x if P is None else x[P.block(x.shape, axes)] for x, axes in zip(batch, self.cuts, strict=True))

    def made(self, P: dl.CartesianPartition | None, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Network and loss: distributed, so that nothing is gathered, or without a partition serial."""
        if P is not None and self.by_hand is not None:
            return self.by_hand(P, dtype), dnn.DistributedMSELoss(P)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(
            dtype
        )  # which also the threads find that take turns with this one, but not before the end
        try:
            net, loss = self.net(), self.loss()
        finally:
            torch.set_default_dtype(usual)
        return (net, loss) if P is None else (dl.distribute(net, P, strict=True), dl.distribute(loss, P, strict=True))


def _images(channels: int, dtype: torch.dtype, n: int) -> Tensors:
    """Noise, and what a fixed filter makes of it."""
    x = torch.randn(n, channels, 11, 9, dtype=dtype)
    return x, (x + x.roll(1, 2) * x.roll(2, 3)).mean(1, keepdim=True)


def _classes(dtype: torch.dtype, n: int) -> Tensors:
    return torch.randn(n, 1, 9, 7, dtype=dtype), torch.randint(5, (n,))


def _texts(dtype: torch.dtype, n: int) -> Tensors:
    words = torch.randint(11, (n, 8))
    return words[:, :-1], words[:, 1:]


MSE, CROSS_ENTROPY = nn.MSELoss, nn.CrossEntropyLoss
IMAGE, WORDS = (0, 1, 2, 3), (0, 2)  # the axes that cut pictures (N, C, H, W), and texts (N, T) where P is (N, C, T)
TASKS: dict[str, Any] = {
    "unet": Task(UNet, MSE, partial(_images, 2), 4, (2, 3), (IMAGE, IMAGE)),
    "by hand": Task(UNet, MSE, partial(_images, 2), 4, (2, 3), (IMAGE, IMAGE), UNetByHand),
    "resnet": Task(ResNet, CROSS_ENTROPY, _classes, 4, (2, 3), (IMAGE, (0,))),
    "channels": Task(ResNet, CROSS_ENTROPY, _classes, 4, (1, 2), (IMAGE, (0,))),
    "fno": Task(FNO, MSE, partial(_images, 1), 4, (2, 3), (IMAGE, IMAGE)),
    "heads": Task(partial(Transformer, 4), CROSS_ENTROPY, _texts, 3, (0, 1), (WORDS, WORDS)),
    "positions": Task(partial(Transformer, 3, is_tied=True), CROSS_ENTROPY, _texts, 3, (2, 0), (WORDS, WORDS)),
}


# ---- what they hold --------------------------------------------------------------------------------------------------


def held_in_a_step(net: nn.Module, P: dl.Partition, shape: Sequence[int]) -> tuple[int, int]:
    """The bytes that a second forward keeps, and the most that lives in it and its backward, on this rank without weights."""
    for _ in range(2):
        x = P.cut(torch.randn(*shape))
        net.zero_grad()
        meter = Meter(DryTransport(0, 1))
        for tensor in (*net.parameters(), *net.buffers()):
            meter.hold(tensor, "", counts=False)
        meter.hold(x, "")
        with meter:
            y = net(x)
            kept = meter.live
            y.sum().backward()
        del y
    return kept, meter.peak
