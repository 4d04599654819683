"""What convolutions read and compute: their geometry per spatial dim, and the local convolution of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Box, Dim, Range, Shape
from distdl_lite.nn.blocks import connected_zeros, edge_pad
from distdl_lite.nn.conv.overlap import Kernel
from distdl_lite.nn.work_grid import Product, with_bias

_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Geometry:
    """torch's options of a convolution per spatial dim.

    Attributes
    ----------
    size, stride, dilation : tuple of int
    pads : tuple of (left, right)
    groups : int
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    groups: int = 1

    @property
    def dims(self) -> int:
        return len(self.size)

    def outputs(self, space: Shape) -> Shape:
        """The numbers of outputs of the spatial dims. Raises ValueError if one is too short."""
        raise NotImplementedError

    def stays_whole(self, d: int, parts: int) -> bool:
        """Whether a spatial dim in so many parts is left to the local convolution, which pads it without a copy."""
        return parts == 1

    def reads(self, d: int, length: int, outputs: Dim) -> Dim:
        """What blocks of outputs of a spatial dim read of its inputs."""
        raise NotImplementedError

    def local(self, box: Box, held: Box, shape: Shape, whole: Sequence[bool]) -> Product:
        """The convolution from the inputs held, of a tensor of this shape, to the outputs of the box; neither is empty.

        `whole` says which spatial dims are left to it.
        """
        raise NotImplementedError

    def product(self, box: Box, held: Box, shape: Shape, whole: Sequence[bool], dtype: torch.dtype) -> Product:
        """`local`, or what stands for it where a block is empty: torch refuses to convolve nothing."""
        if 0 in lay.shape_of(box) or 0 in lay.shape_of(held):
            return partial(_nothing, lay.shape_of(box), dtype, self.dims)
        return self.local(box, held, shape, whole)


@dataclass(frozen=True)
class ConvGeometry(Geometry):
    """That of a convolution. Output range [a, b) reads ``[s a - p, s (b - 1) - p + d (k - 1) + 1)``."""

    mode: str = "zeros"

    def outputs(self, space: Shape) -> Shape:
        lengths = []
        for d, (n, k, dilation) in enumerate(zip(space, self.size, self.dilation, strict=True)):
            room = n + sum(self.pads[d]) - dilation * (k - 1) - 1
            if room < 0:
                raise ValueError(
                    f"dim {d + 2} of length {n} with padding {self.pads[d]} is shorter than the kernel of {k} with "
                    f"dilation {dilation}"
                )
            lengths.append(room // self.stride[d] + 1)
        return tuple(lengths)

    def stays_whole(self, d: int, parts: int) -> bool:
        left, right = self.pads[d]
        return parts == 1 and left == right and (self.mode == "zeros" or left == 0)

    def is_pointwise(self, d: int) -> bool:
        """Whether each output of a spatial dim reads the input at its own place alone."""
        return (self.size[d], self.stride[d], self.pads[d]) == (1, 1, (0, 0))

    def reads(self, d: int, length: int, outputs: Dim) -> Dim:
        try:
            return lay.bounded(Dim(self._wanted(d, outputs.ranges), outputs.axes), length, self.mode)
        except ValueError as error:
            raise ValueError(f"dim {d + 2}: {error}") from error

    def _wanted(self, d: int, outputs: Sequence[Range]) -> tuple[Range, ...]:
        """The inputs that output blocks read, also beyond the edge."""
        options = self.size[d], self.stride[d], self.dilation[d], self.pads[d][0]
        return tuple(lay.read_by_kernel(block, *options)[0] for block in outputs)

    def local(self, box: Box, held: Box, shape: Shape, whole: Sequence[bool]) -> Product:
        padding = tuple(left if is_whole else 0 for (left, _), is_whole in zip(self.pads, whole, strict=True))
        kernel = Kernel(self.size, self.stride, padding, self.dilation, self.groups)
        if self.mode not in ("reflect", "replicate"):
            return kernel
        blocks = enumerate(zip(box[2:], held[2:], strict=True))
        wanted = (mine if whole[d] else self._wanted(d, [block])[0] for d, (block, mine) in blocks)
        edge = edge_pad((*held[:2], *wanted), held, shape, self.mode)
        return kernel if edge is None else lambda z, weight, bias: kernel(edge(z), weight, bias)


@dataclass(frozen=True)
class TransposedGeometry(Geometry):
    """That of a transposed convolution. Output j gathers the inputs i with ``i s - p <= j <= i s - p + d (k - 1)``."""

    extra: tuple[int, ...] = ()  # output_padding

    def outputs(self, space: Shape) -> Shape:
        lengths = tuple(self.least(d, n) + extra for d, (n, extra) in enumerate(zip(space, self.extra, strict=True)))
        return self.checked(space, lengths)

    def checked(self, space: Shape, lengths: Shape) -> Shape:
        """The numbers of outputs, if there are any."""
        for d, (n, length) in enumerate(zip(space, lengths, strict=True)):
            if n < 1 or length < 1:
                raise ValueError(
                    f"dim {d + 2} of length {n} has no output with kernel_size={self.size[d]}, stride={self.stride[d]}, "
                    f"padding={self.pads[d][0]}: calculated output size {length}. Output size is too small"
                )
        return lengths

    def least(self, d: int, n: int) -> int:
        """The number of outputs of n inputs of a dim without output padding."""
        return self._reach(d, n) - 2 * self.pads[d][0]

    def _reach(self, d: int, n: int) -> int:
        """How many outputs n inputs of a dim reach, padding among them."""
        return (n - 1) * self.stride[d] + self.dilation[d] * (self.size[d] - 1) + 1

    def reads(self, d: int, length: int, outputs: Dim) -> Dim:
        options = self.size[d], self.stride[d], self.dilation[d], self.pads[d][0]
        ranges = tuple(lay.read_by_transposed_kernel(block, *options)[0] for block in outputs.ranges)
        return lay.bounded(Dim(ranges, outputs.axes), length, "none")

    def local(self, box: Box, held: Box, shape: Shape, whole: Sequence[bool]) -> Product:
        padding = [left if is_whole else 0 for (left, _), is_whole in zip(self.pads, whole, strict=True)]
        extra = [
            stop - self.least(d, n) if whole[d] else 0
            for d, ((_, stop), n) in enumerate(zip(box[2:], shape[2:], strict=True))
        ]
        # Where this rank's outputs stand among those that the held inputs reach, and how far they go beyond.
        window: list[slice] = [slice(None)] * (2 + self.dims)
        beyond = [0, 0] * self.dims  # of the last dim first, as torch wants it
        is_all = True
        for d in (d for d in range(self.dims) if not whole[d]):
            (low, high), first = held[2 + d], held[2 + d][0] * self.stride[d] - self.pads[d][0]
            start, stop, reach = box[2 + d][0] - first, box[2 + d][1] - first, self._reach(d, high - low)
            window[2 + d] = slice(max(start, 0), min(stop, reach))
            right = 2 * (self.dims - d) - 1
            beyond[right - 1], beyond[right] = max(-start, 0), max(stop - reach, 0)
            is_all = is_all and (start, stop) == (0, reach)
        convolve, options = _TRANSPOSED[self.dims], (self.stride, padding, extra, self.groups, self.dilation)

        def transposed(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            y = convolve(z, weight, bias if is_all else None, *options)
            return y if is_all else with_bias(F.pad(y[tuple(window)], beyond), bias, self.dims)

        return transposed


def _nothing(
    shape: Shape, dtype: torch.dtype, dims: int, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution of an empty block, or to one."""
    return with_bias(connected_zeros(shape, z, weight, added=bias).to(dtype), bias, dims)
