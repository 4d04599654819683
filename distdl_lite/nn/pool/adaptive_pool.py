"""Adaptive pools, cut along batch, channels and space: output i of m reads ``[floor(i n / m), ceil((i + 1) n / m))``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distdl_lite.layout import Range
from distdl_lite.nn.blocks import Local, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.pool.pool import MAX_POOLS, global_places
from distdl_lite.nn.pool.spatial import SpatialFace, View, check_batch, pooled, windows
from distdl_lite.nn.value import Operation, Value, rule

_MAX_POOLS = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_AVG_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Adaptive:
    """Windows of nearly equal length that cover a dim.

    >>> Adaptive(7, 3).reads(1, 2), Adaptive(7, 3).meets(0, 3)
    ((2, 5), (0, 2))
    """

    length: int
    outputs: int

    def reads(self, start: int, stop: int) -> Range:
        return start * self.length // self.outputs, -(-stop * self.length // self.outputs)

    def meets(self, start: int, stop: int) -> Range:
        """The outputs that read any of the inputs [start, stop)."""
        first = start * self.outputs // self.length
        return (first, -(-stop * self.outputs // self.length)) if start < stop else (first, first)


def _windows(view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index (outputs, taps) of what a dim's windows have among the inputs held, the short ones repeating their last point.

    Then how many points that is, and the windows' global lengths.
    """
    windows = torch.tensor([view.geometry.reads(i, i + 1) for i in range(*view.block)]).unsqueeze(-1)
    starts, stops = windows.clamp(*view.held).unbind(1)
    taps = starts + torch.arange(int((stops - starts).max()))
    return torch.minimum(taps, stops - 1) - view.held[0], stops - starts, windows[:, 1] - windows[:, 0]


def largest(views: Sequence[View], return_indices: bool) -> Local:
    """The maxima over this rank's windows and, if wanted, their places as flat indices into the global tensor's space.

    Windows that are all of one length, one after the other, are those of torch's pool, which takes the first of equal points, and
    the last nan, as its adaptive one does; a point that stands there several times does so in the same place of the order.
    """
    indices = [_windows(view)[0] for view in views]
    taps = [index.shape[1] for index in indices]
    rows = [index.flatten() for index in indices]

    def pool(z: torch.Tensor) -> Any:
        for dim, row in enumerate(rows, 2):
            z = z.index_select(dim, row.to(z.device))
        y = MAX_POOLS[len(views)](z, taps, taps, return_indices=return_indices)
        return (y[0], global_places(y[1], rows, views)) if return_indices else y

    return pool


def averaged(views: Sequence[View]) -> Local:
    """What the inputs held give to the averages, in a dtype that they can be added up in."""
    dims = [_windows(view) for view in views]

    def pool(z: torch.Tensor) -> torch.Tensor:
        y = z.to(wide(z.dtype))
        for dim in range(z.dim() - 1, 1, -1):
            index, held, length = dims[dim - 2]
            shape = (1,) * (z.dim() - dim - 1)
            repeated = (torch.arange(index.shape[1]) >= held).to(z.device).view(*index.shape, *shape)
            y = windows(y, dim, index).masked_fill(repeated, 0).sum(dim + 1) / length.to(y).view(-1, *shape)
        return y

    return pool


@rule("adaptive_max_pool", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(c: Compiler, op: Any, x: Value, output_size: Any) -> Any:
    geometries = _geometries(op, x)
    options: dict[str, Any] = {"return_indices": not op.is_one}
    whole = partial(_MAX_POOLS[x.ndim - 2], output_size=op.shape[2:], **options)
    return pooled(c, x, geometries, whole, partial(largest, **options), len(op.outputs))


@rule(
    "adaptive_avg_pool",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def adaptive_avg_pool(c: Compiler, op: Any, x: Value, output_size: Any) -> Any:
    geometries = _geometries(op, x)
    whole = partial(_AVG_POOLS[x.ndim - 2], output_size=op.shape[2:])
    return pooled(c, x, geometries, whole, averaged, shares=True)


def _geometries(op: Operation, x: Value) -> list[Adaptive]:
    check_batch(op, x)
    if 0 in op.shape[2:]:
        raise ValueError(f"output_size={op.shape[2:]} leaves nothing")
    return [Adaptive(*lengths) for lengths in zip(x.shape[2:], op.shape[2:], strict=True)]


class _DistributedAdaptivePool(SpatialFace):
    """A pool to a given number of outputs over the tensor that the blocks over `P_x` form, equal to torch's.

    Input, output, ranks, the places of maxima, and errors are as for `DistributedMaxPool2d`. Integers are not averaged: a
    TypeError at build.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    output_size, return_indices
        As in torch's layer: the global number of outputs per dim, of which None keeps the input's.

    Notes
    -----
    For averages each rank adds up what it holds of every window that meets its block, and the owner of an output adds these
    shares: a global average moves one number per channel, not the tensor.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 1, 2))
    ...     pool = dl.nn.DistributedAdaptiveAvgPool2d(P, (1, 2))
    ...     return pool(P.cut(torch.arange(7.0).view(1, 1, 1, 7))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[[1.5]]]], [[[[4.5]]]]]
    """

    operation = "adaptive_max_pool"
    options = ("output_size",)
    for_one_point: ClassVar[Mapping[str, Any]] = {"output_size": 2}


class _DistributedAdaptiveAvgPool(_DistributedAdaptivePool):
    operation = "adaptive_avg_pool"
    needs_floating = True


class DistributedAdaptiveMaxPool1d(_DistributedAdaptivePool, serial=torch.nn.AdaptiveMaxPool1d): ...


class DistributedAdaptiveMaxPool2d(_DistributedAdaptivePool, serial=torch.nn.AdaptiveMaxPool2d): ...


class DistributedAdaptiveMaxPool3d(_DistributedAdaptivePool, serial=torch.nn.AdaptiveMaxPool3d): ...


class DistributedAdaptiveAvgPool1d(_DistributedAdaptiveAvgPool, serial=torch.nn.AdaptiveAvgPool1d): ...


class DistributedAdaptiveAvgPool2d(_DistributedAdaptiveAvgPool, serial=torch.nn.AdaptiveAvgPool2d): ...


class DistributedAdaptiveAvgPool3d(_DistributedAdaptiveAvgPool, serial=torch.nn.AdaptiveAvgPool3d): ...
