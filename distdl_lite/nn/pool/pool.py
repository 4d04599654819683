"""Pools, cut along batch, channels and space.

A rank fetches what the windows of its outputs read and pads at the global edge alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Range
from distdl_lite.nn.blocks import Local, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.options import options_of
from distdl_lite.nn.pool.spatial import SpatialFace, View, check_batch, pooled
from distdl_lite.nn.value import Operation, Value, rule

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


def _sliding(op: Operation, x: Value, *options: Any) -> list[_Sliding]:
    """How a kernel slides along each spatial dim, by torch's options: its size, stride, padding and dilation."""
    check_batch(op, x)
    return [_Sliding(*of_dim) for of_dim in zip(op.shape[2:], *options_of(x.ndim - 2, *options), strict=True)]


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


def maxima(pool: Callable[..., Any], views: Sequence[View]) -> Local:
    """What a max pool of torch, but for its padding, makes of the inputs held."""
    # torch's own padding on the left never wins: a maximum of nothing but -inf has the serial gradient.
    native, before = _padding(views, left=True)

    def pool_of_part(z: torch.Tensor) -> Any:
        if before is not None:
            z = F.pad(z, before, value=float("-inf") if z.dtype.is_floating_point else torch.iinfo(z.dtype).min)
        y = pool(z, padding=native)
        if isinstance(y, torch.Tensor):
            return _cropped(y, views)
        rows = [*map(torch.arange, z.shape[2:])]
        return _cropped(y[0], views), global_places(_cropped(y[1], views), rows, views)

    return pool_of_part


@rule("max_pool", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")
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
    geometries = _sliding(op, x, kernel_size, stride or kernel_size, padding, dilation)
    for d, g in enumerate(geometries, 2):
        starts = range(-g.padding, min(g.outputs * g.stride - g.padding, 0), g.stride)
        if any(start % g.dilation >= x.shape[d] for start in starts):  # torch's backward writes out of bounds
            raise ValueError(
                f"dim {d} of length {x.shape[d]} has windows of nothing but padding: padding={g.padding}, "
                f"dilation={g.dilation}"
            )
    pool = partial(
        MAX_POOLS[x.ndim - 2],
        kernel_size=kernel_size,
        stride=stride or kernel_size,
        dilation=dilation,
        ceil_mode=ceil_mode,
        return_indices=not op.is_one,
    )
    return pooled(c, x, geometries, partial(pool, padding=padding), partial(maxima, pool), len(op.outputs))


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 1, 2))
    ...     return dl.nn.DistributedMaxPool2d(P, 2)(P.cut(torch.arange(20.0).view(1, 1, 2, 10))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[[11.0, 13.0, 15.0]]]], [[[[17.0, 19.0]]]]]
    """

    operation = "max_pool"
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


def averages(views: Sequence[View], ceil_mode: bool, counts_padding: bool, divisor: int | None) -> Local:
    """What an average pool makes of the inputs held."""
    native, before = _padding(views, left=False)
    counts = _counts(views, counts_padding) if divisor is None else divisor
    kernel, stride = tuple(v.geometry.kernel for v in views), tuple(v.geometry.stride for v in views)

    def sums(z: torch.Tensor, divisor: int) -> torch.Tensor:
        if len(views) > 1:
            return _AVG_POOLS[len(views)](z, kernel, stride, native, ceil_mode, True, divisor)
        y = F.avg_pool2d(z.unsqueeze(-2), (1, *kernel), (1, *stride), (0, *native), ceil_mode, True, divisor)
        return y.squeeze(-2)

    def pool(z: torch.Tensor) -> torch.Tensor:
        if before is not None:
            z = F.pad(z, before)
        if isinstance(counts, int):
            return _cropped(sums(z, counts), views)
        y = _cropped(sums(z.to(wide(z.dtype)), 1), views)
        return (y / counts.to(y)).to(z.dtype)

    return pool


def _counts(views: Sequence[View], counts_padding: bool) -> int | torch.Tensor:
    """What the sum over each window is divided by: its global number of points."""
    per_dim: list[list[int]] = []
    for view in views:
        padding = view.geometry.padding if counts_padding else 0
        reads = [view.geometry.reads(i, i + 1) for i in range(*view.block)]
        per_dim.append([min(stop, view.length + padding) - max(start, -padding) for start, stop in reads])
    if all(len(set(widths)) == 1 for widths in per_dim):
        return math.prod(widths[0] for widths in per_dim)
    return reduce(lambda counts, widths: counts[..., None] * widths, map(torch.tensor, per_dim))


@rule("avg_pool", "avg_pool1d", "avg_pool2d", "avg_pool3d")
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
    geometries = _sliding(op, x, kernel_size, stride or kernel_size, padding, 1)
    options = ceil_mode, count_include_pad, divisor_override

    def whole(z: torch.Tensor) -> torch.Tensor:
        own = options if z.dim() > 3 else options[:-1]
        return _AVG_POOLS[z.dim() - 2](z, kernel_size, stride or kernel_size, padding, *own)

    return pooled(c, x, geometries, whole, lambda views: averages(views, *options))


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 1, 2))
    ...     return dl.nn.DistributedAvgPool2d(P, 2)(P.cut(torch.arange(20.0).view(1, 1, 2, 10))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[[5.5, 7.5, 9.5]]]], [[[[11.5, 13.5]]]]]
    """

    operation = "avg_pool"
    options = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    divisor_override: int | None = None  # which torch's layer of one dim has not
    for_one_point: ClassVar[Mapping[str, Any]] = {"kernel_size": 1, "stride": 1, "padding": 0}
    needs_floating = True


class DistributedAvgPool1d(_DistributedAvgPool, serial=torch.nn.AvgPool1d): ...


class DistributedAvgPool2d(_DistributedAvgPool, serial=torch.nn.AvgPool2d): ...


class DistributedAvgPool3d(_DistributedAvgPool, serial=torch.nn.AvgPool3d): ...
