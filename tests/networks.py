"""Networks as users write them: one class makes torch's network and the one whose tensors are cut.

A class takes what makes its layers, `serial` or one of the functions beside it, which put the partition before torch's
arguments. A convolution before a norm has no bias, and neither have the keys of attention: its gradient is zero but for
rounding, which Adam divides by its own size, so that the bias walks at random, in serial training too. No pool takes a
maximum and only the ResNet has kinks, since two trainings part where rounding decides on which side of one they are; in as
few steps as here that does not happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite import layout as lay
from distdl_lite.grid import balanced
from distdl_lite.nn.inputs import agreed_inputs

Tensors = tuple[torch.Tensor, ...]

# ---- what makes layers -----------------------------------------------------------------------------------------------


def serial(dtype: torch.dtype) -> SimpleNamespace:
    """torch's own layers."""
    typed = partial(partial, dtype=dtype)
    return SimpleNamespace(
        conv=typed(nn.Conv2d),
        conv_transpose=typed(nn.ConvTranspose2d),
        norm=typed(nn.BatchNorm2d),
        pool=nn.AvgPool2d,
        grow=nn.Upsample,
        mean=Mean,
        spectral=partial(SpectralConv, dtype=dtype.to_complex()),
        column=typed(nn.Linear),
        row=typed(nn.Linear),
        layer_norm=typed(nn.LayerNorm),
        embedding=typed(nn.Embedding),
        dropout=nn.Dropout,
        to_heads=nn.Identity,
        from_heads=nn.Identity,
        mse=nn.MSELoss,
        cross_entropy=nn.CrossEntropyLoss,
        cut=lambda *tensors: tensors,
    )


def cut_in_space(world: dl.Partition, grid: tuple[int, int], dtype: torch.dtype) -> SimpleNamespace:
    """Images (N, C, H, W) cut in height and width; a head cuts classes over all ranks."""
    P, line = world.grid((1, 1, *grid)), world.grid((1, math.prod(grid)))
    return SimpleNamespace(
        conv=partial(dnn.DistributedConv2d, P, dtype=dtype),
        conv_transpose=partial(dnn.DistributedConvTranspose2d, P, dtype=dtype),
        norm=partial(dnn.DistributedBatchNorm, P, dtype=dtype),
        pool=partial(dnn.DistributedAvgPool2d, P),
        grow=partial(dnn.DistributedUpsample, P),
        mean=partial(dnn.DistributedMean, P),
        spectral=partial(DistributedSpectralConv, P, dtype=dtype.to_complex()),
        column=partial(dnn.DistributedColumnParallelLinear, line, dtype=dtype),
        mse=partial(dnn.DistributedMSELoss, P),
        cross_entropy=partial(dnn.DistributedCrossEntropyLoss, line),
        cut=lambda *tensors: tuple(x[P.block(x.shape)] if x.dim() == 4 else x for x in tensors),
    )


def cut_by_heads(world: dl.Partition, grid: tuple[int, int], dtype: torch.dtype) -> SimpleNamespace:
    """Texts (N, T): the batch cut along the first axis; along the second, by turns, the positions and the features."""
    rows, line = grid
    P, P_line = world.grid((rows, line, 1)), world.grid((rows, 1, line))
    return SimpleNamespace(
        embedding=partial(dnn.DistributedEmbedding, P, dtype=dtype),
        layer_norm=partial(dnn.DistributedLayerNorm, P, dtype=dtype),
        column=partial(dnn.DistributedColumnParallelLinear, P_line, sequence_parallel=True, dtype=dtype),
        row=partial(dnn.DistributedRowParallelLinear, P_line, scatter_output=True, dtype=dtype),
        dropout=partial(dnn.DistributedDropout, P),
        to_heads=nn.Identity,
        from_heads=nn.Identity,
        cross_entropy=partial(dnn.DistributedCrossEntropyLoss, P),  # of (N, classes, T): the line cuts the classes
        cut=partial(_cut_texts, P, P_line),
    )


def cut_by_positions(world: dl.Partition, grid: tuple[int, int], dtype: torch.dtype) -> SimpleNamespace:
    """Texts (N, T): positions cut along the first axis, which attention changes for heads, the batch along the second."""
    parts, rows = grid
    P = world.grid((rows, parts, 1))
    by_position, by_head = world.grid((rows, parts, 1, 1, 1)), world.grid((rows, 1, parts, 1, 1))
    return SimpleNamespace(
        embedding=partial(dnn.DistributedEmbedding, P, dtype=dtype),
        layer_norm=partial(dnn.DistributedLayerNorm, P, dtype=dtype),
        column=partial(dnn.DistributedLinear, P, P, None, dtype=dtype),
        row=partial(dnn.DistributedLinear, P, P, None, dtype=dtype),
        dropout=partial(dnn.DistributedDropout, P),
        to_heads=partial(dnn.Repartition, by_position, by_head),
        from_heads=partial(dnn.Repartition, world.grid((rows, 1, parts, 1)), world.grid((rows, parts, 1, 1))),
        cross_entropy=partial(dnn.DistributedCrossEntropyLoss, world.grid((rows, 1, parts))),
        cut=partial(_cut_texts, P, P),
    )


def _cut_texts(
    P: dl.CartesianPartition,
    P_target: dl.CartesianPartition,
    words: torch.Tensor,
    places: torch.Tensor,
    target: torch.Tensor,
) -> Tensors:
    """Blocks of what goes in and of the target, (N, T) each; the partitions have a third axis, for features."""
    cuts = ((words, P), (places, P), (target, P_target))
    return tuple(x[Q.block((*x.shape, 1))[:2]] for x, Q in cuts)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def convolution(make: SimpleNamespace, *arguments: int, activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Convolution of kernel 3, norm and activation."""
    conv = make.conv(*arguments[:2], 3, *arguments[2:], padding=1, bias=False)
    return nn.Sequential(conv, make.norm(arguments[1]), activation())


class UNet(dnn.Module):
    """Halves 11 x 9 points by a stride and by a pool, and doubles them by interpolation and a transposed convolution.

    Smooth, with SiLU and average pools: where rounding decides which of two inputs is the maximum, training parts ways.
    """

    def __init__(self, make: SimpleNamespace) -> None:
        super().__init__()
        self.stem, self.strided = convolution(make, 2, 4), convolution(make, 4, 6, 2)
        self.pooled = nn.Sequential(make.pool(2, ceil_mode=True), convolution(make, 6, 8))
        self.grow, self.after_grow = make.grow(size=(6, 5), mode="bilinear"), convolution(make, 6 + 8, 6)
        self.transposed, self.after = make.conv_transpose(6, 4, 3, stride=2, padding=1), convolution(make, 4 + 4, 4)
        self.last = make.conv(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = self.stem(x)
        half = self.strided(full)
        y = self.after_grow(torch.cat([half, self.grow(self.pooled(half))], dim=1))
        return self.last(self.after(torch.cat([full, self.transposed(y)], dim=1)))


class Residual(nn.Module):
    """Two convolutions beside a skip, which projects where the shape changes."""

    def __init__(self, make: SimpleNamespace, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(make, in_channels, out_channels, stride, activation=nn.ReLU)
        self.second = convolution(make, out_channels, out_channels, activation=nn.Identity)
        self.skip = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            conv = make.conv(in_channels, out_channels, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, make.norm(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


class ResNet(dnn.Module):
    """A stem, two residual blocks, the global mean and five classes."""

    def __init__(self, make: SimpleNamespace) -> None:
        super().__init__()
        self.stem = convolution(make, 1, 4, activation=nn.ReLU)
        self.blocks = nn.Sequential(Residual(make, 4, 4, 1), Residual(make, 4, 6, 2))
        self.mean, self.head = make.mean((2, 3)), make.column(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mean(self.blocks(self.stem(x))))


class Mean(nn.Module):
    """torch.mean as a layer."""

    def __init__(self, dim: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(self.dim)


# ---- the Fourier neural operator -------------------------------------------------------------------------------------


def complex_uniform(channels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Start values of spectral weights."""
    return lambda weight: weight.copy_(torch.rand(weight.shape, dtype=weight.dtype) / channels)


class SpectralConv(nn.Module):
    """Multiplies the lowest modes of images (N, C, H, W) by a matrix each and drops the others; Li et al. 2021, figure 2.

    Along the height the lowest modes are `modes[0]` from zero on and as many negative ones, at the end of the spectrum.
    """

    def __init__(self, channels: int, modes: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.modes, self.size = modes, size
        for name in ("low", "high"):
            weight = torch.empty((channels, channels, *modes), dtype=dtype)
            self.register_parameter(name, nn.Parameter(complex_uniform(channels)(weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.modes
        spectrum = torch.fft.rfft2(x)
        kept = torch.zeros_like(spectrum)
        kept[:, :, :rows, :columns] = mixed(spectrum[:, :, :rows, :columns], self.low)
        kept[:, :, -rows:, :columns] = mixed(spectrum[:, :, -rows:, :columns], self.high)
        return torch.fft.irfft2(kept, s=self.size)


def mixed(modes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each mode's channels times its matrix."""
    return torch.einsum("nihw,iohw->nohw", modes, weight)


class DistributedSpectralConv(dnn.Layer):
    """`SpectralConv` of images cut in height and width.

    To crop the spectrum is an operator: from its blocks to balanced blocks of the lowest modes. Its adjoint puts them back
    among zeros. Each rank holds the weights of its share of the modes, so that none is replicated unless the batch is cut.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, 1, P_h, P_w]``.
    channels, modes, size, dtype
        As of the serial layer; `size` is global.
    """

    def __init__(
        self,
        P_x: dl.CartesianPartition,
        channels: int,
        modes: tuple[int, int],
        size: tuple[int, int],
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        super().__init__(P_x)
        self.P_x, self.modes = P_x, modes
        self.transform = dnn.DistributedFFT(P_x, "rfft", (2, 3))
        self.inverse = dnn.DistributedFFT(P_x, "irfft", (2, 3), s=size)
        whole = lay.Dim(((0, channels),))
        own = lay.Layout(P_x.grid_of_ranks, (whole, whole, *self._kept(0)))
        for name in ("low", "high"):
            self.place(name, own, complex_uniform(channels), dtype)

    def _kept(self, first_row: int) -> tuple[lay.Dim, ...]:
        """Balanced blocks of the modes from a row of the spectrum on."""
        cuts = (balanced(n, p) for n, p in zip(self.modes, self.P_x.shape[2:], strict=True))
        return tuple(
            lay.Dim(lay.ranges_of([first + c for c in cut]), (axis,))
            for axis, first, cut in zip((2, 3), (first_row, 0), cuts, strict=True)
        )

    def _distdl_module_setup(self, input: Tensors) -> dict[str, dl.Operator]:
        inputs = agreed_inputs(self, self.P_x)
        grid = self.P_x.grid_of_ranks
        *lead, height, width = lay.global_shape_of(lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes)))
        X = lay.balanced_blocks(grid, (*lead, height, width // 2 + 1))
        world = self.P_x.world_transport
        corners = {"low": 0, "high": height - self.modes[0]}
        layouts = {name: lay.Layout(grid, (*X.dims[:2], *self._kept(row))) for name, row in corners.items()}
        return {name: dl.Operator(dl.plan(X, Y, world.rank), world, name, graph=True) for name, Y in layouts.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.P_x.active:
            return x
        spectrum = self.transform(x)
        return self.inverse(
            sum(crop.adjoint(mixed(crop(spectrum), self.use(name))) for name, crop in self._distdl_plan.items())
        )


class FNO(dnn.Module):
    """A Fourier neural operator: lift, two times spectral plus pointwise convolution, project."""

    def __init__(self, make: SimpleNamespace, size: tuple[int, int] = (11, 9), channels: int = 4) -> None:
        super().__init__()
        self.lift, self.project = make.conv(1, channels, 1), make.conv(channels, 1, 1)
        self.spectral = nn.ModuleList(make.spectral(channels, (3, 3), size) for _ in range(2))
        self.pointwise = nn.ModuleList(make.conv(channels, channels, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = nn.functional.gelu(spectral(x) + pointwise(x))
        return self.project(x)


# ---- the transformer -------------------------------------------------------------------------------------------------


class Transformer(dnn.Module):
    """One block of causal attention and a perceptron, which predicts the next word; logits (N, words, T).

    Tied, the table of words is the weight of the logits too, which takes layers that cut neither.
    """

    def __init__(self, make: SimpleNamespace, heads: int, is_tied: bool = False) -> None:
        super().__init__()
        words, length, self.head_size = 11, 7, 2
        size = heads * self.head_size
        self.words, self.places = make.embedding(words, size), make.embedding(length, size)
        self.norms = nn.ModuleList(make.layer_norm(size) for _ in range(3))
        self.queries_keys_values, self.out = make.column(size, 3 * size, bias=False), make.row(size, size)
        self.up, self.down = make.column(size, 2 * size), make.row(2 * size, size)
        self.to_heads, self.from_heads, self.dropout = make.to_heads(), make.from_heads(), make.dropout(0.0)
        self.logits = make.column(size, words)
        if is_tied:
            self.logits.weight = self.words.weight

    def forward(self, words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.words(words) + self.places(places))
        x = x + self.attended(self.norms[0](x))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.logits(self.norms[2](x)).transpose(1, 2)

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over all positions, of the heads that are here."""
        parts = self.queries_keys_values(x).unflatten(-1, (-1, 3, self.head_size))
        q, k, v = self.to_heads(parts).unbind(3)  # (N, T, heads, head_size)
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(self.head_size)
        y = torch.einsum("nhqk,nkhd->nqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return self.out(self.from_heads(y).flatten(2))


# ---- what is learned -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network, how it is cut, its loss, and how its next batch is drawn.

    Attributes
    ----------
    net : callable
        Takes what makes layers.
    cut : callable
        What makes layers for a world, a grid and a dtype.
    loss : str
        The name of what makes the loss.
    draw : callable
        Inputs and target for a dtype, and the number of samples.
    """

    net: Callable[[SimpleNamespace], nn.Module]
    cut: Callable[[dl.Partition, tuple[int, int], torch.dtype], SimpleNamespace]
    loss: str
    draw: Callable[[torch.dtype, int], Tensors]


def _images(channels: int, dtype: torch.dtype, n: int) -> Tensors:
    """Noise, and what a fixed filter makes of it."""
    x = torch.randn(n, channels, 11, 9, dtype=dtype)
    return x, (x + x.roll(1, 2) * x.roll(2, 3)).mean(1, keepdim=True)


def _classes(dtype: torch.dtype, n: int) -> Tensors:
    return torch.randn(n, 1, 9, 7, dtype=dtype), torch.randint(5, (n,))


def _texts(dtype: torch.dtype, n: int) -> Tensors:
    words = torch.randint(11, (n, 8))
    return words[:, :-1], torch.arange(7).expand(n, 7), words[:, 1:]


TASKS: dict[str, Any] = {
    "unet": Task(UNet, cut_in_space, "mse", partial(_images, 2)),
    "resnet": Task(ResNet, cut_in_space, "cross_entropy", _classes),
    "fno": Task(FNO, cut_in_space, "mse", partial(_images, 1)),
    "heads": Task(partial(Transformer, heads=4), cut_by_heads, "cross_entropy", _texts),
    "positions": Task(partial(Transformer, heads=3, is_tied=True), cut_by_positions, "cross_entropy", _texts),
}
