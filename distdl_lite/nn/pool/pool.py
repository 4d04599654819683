"""Pools, cut along batch, channels and space.

A rank fetches what the windows of its outputs read and pads at the global edge alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Range
from distdl_lite.nn.blocks import Local, check_floating, torch_dtype, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.options import booleans, integers, listed, per_dim
from distdl_lite.nn.pool.spatial import Spatial, SpatialLayer, View, pooled
from distdl_lite.nn.value import Value, rule
from distdl_lite.partition import Partition

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
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
        if outputs < 1:
            raise ValueError(f"dim {d + 2} of length {length} is too short for kernel_size={k} with padding={p}")
        return _Sliding(outputs, k, s, p, dilation)


class _Pool(SpatialLayer):
    """Base of pools with a sliding kernel."""

    dims: int

    def __init__(self, P_x: Partition, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool):
        super().__init__(P_x, type(self).dims)
        self.kernel_size = per_dim(self, self.dims, "kernel_size", kernel_size)
        self.stride = self.kernel_size if stride is None else per_dim(self, self.dims, "stride", stride)
        self.padding = per_dim(self, self.dims, "padding", padding, least=0)
        self.dilation = per_dim(self, self.dims, "dilation", dilation)
        booleans(self, ceil_mode=ceil_mode)
        self.ceil_mode = ceil_mode
        if any(p > k // 2 for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise self._refuse(f"padding={self.padding} is more than half of kernel_size={self.kernel_size}")
        self._sliding = self.dims, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode

    def extra_repr(self) -> str:
        parts = [f"kernel_size={self.kernel_size}", f"stride={self.stride}", f"padding={self.padding}"]
        parts += [f"dilation={self.dilation}"] if max(self.dilation) > 1 else []
        parts += [f"ceil_mode={self.ceil_mode}", f"P_x={self.P_x.shape}"]
        return ", ".join([*parts, *(["return_indices=True"] if self.return_indices else [])])


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
            _MAX_POOLS[self.dims],
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
            return _cropped(y[0], views), _global_places(_cropped(y[1], views), z.shape[2:], views)

        return pool_of_part


def options_of(dims: int, *options: Any) -> tuple[tuple[int, ...], ...]:
    """torch's options of an operation, one for each spatial dim from one for all."""
    return tuple(tuple(listed(o, dims)) * (dims if len(listed(o, dims)) == 1 else 1) for o in options)


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


class _DistributedMaxPool(_Pool):
    """A max pool over the tensor that the blocks over `P_x` form, equal to torch's.

    Input ``(N, C, *space)`` in blocks of any sizes, cut along any dims; output in balanced blocks over `P_x`, whose ranks
    call it together. Ranks outside return what they pass. Gradients go to torch's choice among equal maxima.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    kernel_size, stride, padding, dilation, ceil_mode
        As in torch.nn.MaxPool1d/2d/3d.
    return_indices : bool
        Whether the blocks of maxima and of their places are returned, as a pair. A place is torch's: the flat index into the
        spatial dims of the global tensor.

    Raises
    ------
    ValueError
        In the constructor if the partition does not fit the dims, or an option is one torch refuses; at build if the
        input does not fit. On all ranks alike.

    Notes
    -----
    Output range [a, b) of a dim reads the inputs ``[s a - p, s (b - 1) - p + d (k - 1) + 1)`` inside the tensor.
    """

    def __init__(
        self,
        P_x: Partition,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(P_x, kernel_size, stride, padding, dilation, ceil_mode)
        self.return_indices = return_indices
        self.kernel = MaxPool(*self._sliding, return_indices)

    def result_dtype(self, inputs: Inputs) -> torch.dtype:
        return torch_dtype(
            self, inputs, self.dims + 2, lambda x: _MAX_POOLS[self.dims](x, 1, return_indices=self.return_indices)
        )


def _global_places(places: torch.Tensor, held: Sequence[int], views: Sequence[View]) -> torch.Tensor:
    """Flat indices into a held block of the given shape as flat indices into the global tensor."""
    found, stride = torch.zeros_like(places), 1
    for n, view in zip(reversed(held), reversed(views), strict=True):
        found += (places % n + view.held[0]) * stride
        places, stride = places // n, stride * view.length
    return found


class DistributedMaxPool1d(_DistributedMaxPool):
    dims = 1


class DistributedMaxPool2d(_DistributedMaxPool):
    dims = 2


class DistributedMaxPool3d(_DistributedMaxPool):
    dims = 3


@dataclass(frozen=True)
class AvgPool(SlidingKernel):
    """The kernel of an average pool."""

    count_include_pad: bool = True
    divisor_override: int | None = None

    def geometry(self, d: int, length: int, inputs: Inputs) -> _Sliding:
        if self.dims == 3 and length < self.kernel_size[d]:
            raise ValueError(f"dim {d + 2} of length {length} is shorter than kernel_size={self.kernel_size[d]}")
        return super().geometry(d, length, inputs)

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


class _DistributedAvgPool(_Pool):
    """An average pool over the tensor that the blocks over `P_x` form, equal to torch's.

    As `DistributedMaxPool2d` but for the options, and the dtype of the input, which must be a floating one.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        As in torch.nn.AvgPool1d/2d/3d; the first has no divisor_override.

    Raises
    ------
    ValueError
        As there.
    TypeError
        At build, if the input is of an integer dtype, or of half precision in three dims on a CPU.
    """

    def __init__(
        self,
        P_x: Partition,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__(P_x, kernel_size, stride, padding, 1, ceil_mode)
        booleans(self, count_include_pad=count_include_pad)
        if divisor_override is not None:
            integers(self, divisor_override=divisor_override)
        if divisor_override is not None and (self.dims == 1 or divisor_override == 0):
            raise self._refuse(f"divisor_override={divisor_override} is refused, as by torch")
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override
        self.kernel = AvgPool(*self._sliding, count_include_pad, divisor_override)

    def extra_repr(self) -> str:
        parts = [] if self.count_include_pad else ["count_include_pad=False"]
        parts += [] if self.divisor_override is None else [f"divisor_override={self.divisor_override}"]
        return ", ".join([super().extra_repr(), *parts])

    def result_dtype(self, inputs: Inputs) -> torch.dtype:
        check_floating(self, inputs)
        return torch_dtype(self, inputs, self.dims + 2, lambda x: _AVG_POOLS[self.dims](x, 1))


class DistributedAvgPool1d(_DistributedAvgPool):
    dims = 1


class DistributedAvgPool2d(_DistributedAvgPool):
    dims = 2


class DistributedAvgPool3d(_DistributedAvgPool):
    dims = 3
