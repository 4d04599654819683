"""Means over cut dims: sums divided by global counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.autograd import reduce_from_team
from distdl_lite.nn.blocks import anchored, wide
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import booleans, different_dims
from distdl_lite.partition import Partition


class DistributedMean(Module):
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
    """

    def __init__(self, P_x: Partition, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> None:
        super().__init__(P_x)
        self.P_x, self.dim, self.keepdim = P_x, dim, keepdim
        booleans(self, keepdim=keepdim)
        named = () if dim is None else different_dims(self, P_x.dim, dim)
        self._dims = tuple(sorted(named)) or tuple(range(P_x.dim))

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        if not (inputs.dtype.is_floating_point or inputs.dtype.is_complex):
            raise TypeError(f"{type(self).__name__}: the input has dtype {inputs.dtype}, which has no means")
        grid = self.P_x.grid_of_ranks
        n = lay.global_shape_of(lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes)))
        index = grid.index(self._distdl_transport.rank)
        assert index is not None
        ranks = grid.members({axis: i for axis, i in enumerate(index) if axis not in self._dims})
        team, dims, keepdim = self._distdl_transport.team(ranks), self._dims, self.keepdim
        if team.size == 1:
            return lambda layer, x: x.mean(dims, keepdim)
        count, graph = math.prod(n[d] for d in dims), inputs.requires_grad

        def run(layer: DistributedMean, x: torch.Tensor) -> torch.Tensor:
            part = anchored(x, graph).sum(dims, keepdim, dtype=wide(x.dtype))  # anchored for double backward
            return (reduce_from_team(part, team) / count).to(x.dtype)

        return run

    def extra_repr(self) -> str:
        return f"dim={self.dim}, keepdim={self.keepdim}, P_x={self.P_x.shape}"
