"""Pools, cut along batch, channels and space.

A rank fetches what the windows of its outputs read and pads at the global edge alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Range
from distdl_lite.nn.blocks import Local, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.options import options_of
from distdl_lite.nn.pool.spatial import Spatial, SpatialFace, View, pooled
from distdl_lite.nn.value import Value, rule

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class _Sliding:
    """A kernel that slides along one dim."""

    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def reads(self, start: int, stop: int) -> Range:
        return lay.read_by_kernel((start, stop), self.kernel, self.stride, self.dilation, self.padding)[0]


@dataclass(frozen=True)
class SlidingKernel(Spatial):
    """The kernel of a pool: its options per spatial dim, as torch's."""

    dims: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def geometry(self, d: int, length: int, inputs: Inputs) -> _Sliding:
        k, s, p, dilation = self.kernel_size[d], self.stride[d], self.padding[d], self.dilation[d]
        room = length + 2 * p - dilation * (k - 1) - 1
        outputs = (-(-room // s) if self.ceil_mode else room // s) + 1
        if self.ceil_mode and (outputs - 1) * s >= length + p:  # a window starts inside, or in the padding on the left
            outputs -= 1
        return _Sliding(outputs, k, s, p, dilation)


def _padding(views: Sequence[View], left: bool) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The padding left to torch's pool, and in the order of F.pad what is done beforehand (None: nothing).

    A whole dim is left to torch; of a cut one the left edge is if `left` (torch's averages in three dims count no padding where
    they ask whether the kernel fits).
    """
    native, before = [], []
    for view in views:
        start, stop = view.geometry.reads(*view.block)
        pads = (0, 0) if view.is_whole else (max(-start, 0), max(stop - view.length, 0))
        native.append(view.geometry.padding if view.is_whole else pads[0] if left else 0)
        before.append((0, max(pads[1] - pads[0], 0)) if left else pads)
    flat = tuple(pad for pads in reversed(before) for pad in pads)
    return tuple(native), flat if any(flat) else None


def _cropped(y: torch.Tensor, views: Sequence[View]) -> torch.Tensor:
    """The first outputs of every spatial dim, as many as the rank has."""
    sizes = tuple(view.size for view in views)
    return y if y.shape[2:] == sizes else y[(..., *map(slice, sizes))]


@dataclass(frozen=True)
class MaxPool(SlidingKernel):
    """The kernel of a max pool."""

    return_indices: bool = False

    def geometry(self, d: int, length: int, inputs: Inputs) -> _Sliding:
        found = super().geometry(d, length, inputs)
        starts = range(-found.padding, min(found.outputs * found.stride - found.padding, 0), found.stride)
        if any(start % found.dilation >= length for start in starts):  # torch's backward writes out of bounds
            raise ValueError(
                f"dim {d + 2} of length {length} has windows of nothing but padding: padding={found.padding}, "
                f"dilation={found.dilation}"
            )
        return found

    def local(self, views: Sequence[View]) -> Local:
        pool = partial(
            MAX_POOLS[self.dims],
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )
        if all(view.is_whole for view in views):
            return partial(pool, padding=self.padding)
        # torch's own padding on the left never wins: a maximum of nothing but -inf has the serial gradient.
        native, before = _padding(views, left=True)

        def pool_of_part(z: torch.Tensor) -> Any:
            if before is not None:
                z = F.pad(z, before, value=float("-inf") if z.dtype.is_floating_point else torch.iinfo(z.dtype).min)
            y = pool(z, padding=native)
            if not self.return_indices:
                return _cropped(y, views)
            return _cropped(y[0], views), global_places(_cropped(y[1], views), [*map(torch.arange, z.shape[2:])], views)

        return pool_of_part


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(
    c: Compiler,
    op: Any,
    x: Value,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    options = options_of(x.ndim - 2, kernel_size, stride or kernel_size, padding, dilation)
    return pooled(c, MaxPool(x.ndim - 2, *options, ceil_mode, not op.is_one), x)


class _DistributedMaxPool(SpatialFace):
    """A max pool over the tensor that the blocks over `P_x` form, equal to torch's.

    Input ``(N, C, *space)`` in blocks of any sizes, cut along any dims; output in balanced blocks over `P_x`, whose ranks
    call it together. Ranks outside return what they pass. Gradients go to torch's choice among equal maxima. With
    `return_indices` the blocks of maxima and of their places are returned, as a pair; a place is torch's, the flat index
    into the spatial dims of the global tensor.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    kernel_size, stride, padding, dilation, return_indices, ceil_mode
        As in torch's layer.

    Raises
    ------
    ValueError, TypeError
        In the constructor if the partition does not fit the dims; at build if torch refuses the options or the input, with
        its words, or a window holds nothing but padding. On all ranks alike.

    Notes
    -----
    Output range [a, b) of a dim reads the inputs ``[s a - p, s (b - 1) - p + d (k - 1) + 1)`` inside the tensor.
    """

    operation = "max_pool2d"
    options = "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    for_one_point: ClassVar[Mapping[str, Any]] = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


def global_places(places: torch.Tensor, rows: Sequence[torch.Tensor], views: Sequence[View]) -> torch.Tensor:
    """Flat indices into a block that has these points of each dim, as flat indices into the global tensor."""
    found, stride = torch.zeros_like(places), 1
    for row, view in zip(reversed(rows), reversed(views), strict=True):
        found += (row.to(places.device)[places % len(row)] + view.held[0]) * stride
        places, stride = places // len(row), stride * view.length
    return found


class DistributedMaxPool1d(_DistributedMaxPool, serial=torch.nn.MaxPool1d): ...


class DistributedMaxPool2d(_DistributedMaxPool, serial=torch.nn.MaxPool2d): ...


class DistributedMaxPool3d(_DistributedMaxPool, serial=torch.nn.MaxPool3d): ...


@dataclass(frozen=True)
class AvgPool(SlidingKernel):
    """The kernel of an average pool."""

    count_include_pad: bool = True
    divisor_override: int | None = None

    def local(self, views: Sequence[View]) -> Local:
        if all(view.is_whole for view in views):
            options = [] if self.dims == 1 else [self.divisor_override]
            arguments = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, *options)
            return lambda z: _AVG_POOLS[self.dims](z, *arguments)
        native, before = _padding(views, left=False)
        counts = self._counts(views)

        def pool(z: torch.Tensor) -> torch.Tensor:
            if before is not None:
                z = F.pad(z, before)
            if isinstance(counts, int):
                return _cropped(self._sums(z, native, counts), views)
            sums = _cropped(self._sums(z.to(wide(z.dtype)), native, 1), views)
            return (sums / counts.to(sums)).to(z.dtype)

        return pool

    def _counts(self, views: Sequence[View]) -> int | torch.Tensor:
        """What the sum over each window is divided by."""
        if self.divisor_override is not None:
            return self.divisor_override
        per_dim = [self._widths(view) for view in views]
        if all(len(set(widths)) == 1 for widths in per_dim):
            return reduce(lambda count, widths: count * widths[0], per_dim, 1)
        tensors = [torch.tensor(widths) for widths in per_dim]
        return reduce(lambda counts, widths: counts[..., None] * widths, tensors)

    def _widths(self, view: View) -> list[int]:
        """The global number of points that each window of a dim counts."""
        low, high = (-view.geometry.padding, view.geometry.padding) if self.count_include_pad else (0, 0)
        reads = [view.geometry.reads(i, i + 1) for i in range(*view.block)]
        return [min(stop, view.length + high) - max(start, low) for start, stop in reads]

    def _sums(self, z: torch.Tensor, native: tuple[int, ...], divisor: int) -> torch.Tensor:
        if self.dims > 1:
            return _AVG_POOLS[self.dims](z, self.kernel_size, self.stride, native, self.ceil_mode, True, divisor)
        kernel, stride, padding = (1, *self.kernel_size), (1, *self.stride), (0, *native)
        return F.avg_pool2d(z.unsqueeze(-2), kernel, stride, padding, self.ceil_mode, True, divisor).squeeze(-2)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    c: Compiler,
    op: Any,
    x: Value,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    options = options_of(x.ndim - 2, kernel_size, stride or kernel_size, padding, 1)
    return pooled(c, AvgPool(x.ndim - 2, *options, ceil_mode, count_include_pad, divisor_override), x)


class _DistributedAvgPool(SpatialFace):
    """An average pool over the tensor that the blocks over `P_x` form, equal to torch's.

    As `DistributedMaxPool2d` but for the options, and the dtype of the input, which must be a floating one.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        As in torch's layer; that of one dim has no divisor_override.

    Raises
    ------
    ValueError
        As there.
    TypeError
        Also at build, if the input is of an integer dtype, or of half precision in three dims on a CPU.
    """

    operation = "avg_pool2d"
    options: tuple[str, ...] = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    for_one_point: ClassVar[Mapping[str, Any]] = {"kernel_size": 1, "stride": 1, "padding": 0}
    needs_floating = True


class DistributedAvgPool1d(_DistributedAvgPool, serial=torch.nn.AvgPool1d):
    options = _DistributedAvgPool.options[:-1]
    for_one_point: ClassVar[Mapping[str, Any]] = {"kernel_size": (1,), "stride": (1,), "padding": (0,)}


class DistributedAvgPool2d(_DistributedAvgPool, serial=torch.nn.AvgPool2d): ...


class DistributedAvgPool3d(_DistributedAvgPool, serial=torch.nn.AvgPool3d): ...
