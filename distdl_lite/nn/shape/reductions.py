"""Sums and means over dims, cut or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from distdl_lite.factors import Dims, uncut
from distdl_lite.layout import Shape
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.options import booleans, different_dims
from distdl_lite.nn.rule_layer import RuleLayer
from distdl_lite.nn.value import Value, rule
from distdl_lite.partition import Partition


def dims_over(x: Value, dim: int | Sequence[int] | None) -> list[int]:
    """The dims that an operation runs over, all of them for None or none."""
    named = [dim] if isinstance(dim, int) else list(dim or ())
    return sorted({d % x.ndim for d in named}) if named else list(range(x.ndim))


def reduced(x: Value, over: Iterable[int], keepdim: bool) -> Dims:
    """The dims that are left."""
    if keepdim:
        return x.with_dims({d: uncut(1) for d in over})
    return tuple(f for d, f in enumerate(x.dims) if d not in set(over))


def _along(c: Compiler, function: Any, x: Value, over: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Value:
    """What torch's sum or mean over dims makes of each block."""
    dims = reduced(x, over, keepdim)
    return c.calls(function, x, list(over), keepdim, dims=[dims], dtypes=[dtype], one=True, dtype=dtype)[0]


def total(
    c: Compiler, x: Value, over: Sequence[int], keepdim: bool, dtype: torch.dtype, is_shown: bool = False
) -> Value:
    """The sum over dims, cut or not, in a dtype; sums of ranks' parts are in a wider one, and shown if `is_shown`."""
    axes = x.axes(*over)
    y = _along(c, torch.sum, x, over, keepdim, wide(dtype) if axes else dtype)
    return c.sum_over(y, axes, is_shown=is_shown)


def averaged(
    c: Compiler, x: Value, over: Sequence[int], keepdim: bool, dtype: torch.dtype, is_shown: bool = False
) -> Value:
    """The mean over dims in a dtype; one value shown on ranks that differ only along them if `is_shown`."""
    if not x.axes(*over):
        return _along(c, torch.mean, x, over, keepdim, dtype)
    y = total(c, x, over, keepdim, dtype, is_shown)
    count = math.prod(x.shape[d] for d in over)
    return c.cast(c.call(torch.div, y, count, dims=y.dims, dtype=y.dtype), dtype)


@rule("sum")
def sum_(c: Compiler, op: Any, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return c.cast(total(c, x, dims_over(x, dim), keepdim, op.dtype), op.dtype)


@rule("mean")
def mean(c: Compiler, op: Any, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return averaged(c, x, dims_over(x, dim), keepdim, op.dtype)


class DistributedMean(RuleLayer):
    """The mean over some dims of the tensor that the blocks over `P_x` form, as torch.mean.

    Input of a floating or complex dtype in blocks of any sizes. The output is cut as the other dims of the input are, and
    the same on all ranks that differ only along the averaged axes: one value shown on each of them, as a loss is. So each
    of them must go on to compute the same with it, and its gradient is the serial one, not their number times it. (Means
    per channel that go on into a layer over fewer ranks are `DistributedAdaptiveAvgPool2d`'s with output_size 1.)
    Ranks outside return what they pass.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input.
    dim : int, sequence of int or None
        The dims to average; None, or none, are all.
    keepdim : bool
        Whether they stay, with length 1.

    Raises
    ------
    ValueError
        In the constructor if a dim does not exist or is named twice; at build if the blocks form no tensor product.
    TypeError
        At build, if the input is of an integer dtype. On all ranks alike.

    Notes
    -----
    Sums of the blocks, in float32 for half precision, are added up by one Allreduce over the ranks that share the result
    and divided by the global number of points, 0 / 0 for none. Backward communicates nothing, double backward one Allreduce.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     return dl.nn.DistributedMean(P, dim=1)(P.cut(torch.tensor([[1.0, 2.0, 6.0]]))).tolist()
    >>> dl.testing.spmd(2, body)
    [[3.0], [3.0]]
    """

    keeps_blocks = True

    def __init__(self, P_x: Partition, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> None:
        super().__init__(P_x)
        self.P_x, self.dim, self.keepdim = P_x, dim, keepdim
        booleans(self, keepdim=keepdim)
        if dim is not None:
            different_dims(self, P_x.dim, dim)

    def result_dtype(self, inputs: Inputs, shape: Shape) -> torch.dtype:
        if not (inputs.dtype.is_floating_point or inputs.dtype.is_complex):
            raise self._refuse(f"the input has dtype {inputs.dtype}, which has no means", TypeError)
        return inputs.dtype

    def rule(self, c: Compiler, x: Value) -> Value:
        return averaged(c, x, dims_over(x, self.dim), self.keepdim, x.dtype, is_shown=True)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, keepdim={self.keepdim}, P_x={self.P_x.shape}"
