"""What convolutions share, transposed or not: they are cut along batch, space and features by one rule."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, Layout, Shape, balanced_blocks, ranges_of
from distdl_lite.nn.blocks import connected_zeros
from distdl_lite.nn.draws import bias_bound, kaiming_bound, uniform
from distdl_lite.nn.inputs import whose_blocks
from distdl_lite.nn.options import integers, per_dim, spatial_axes
from distdl_lite.nn.work_grid import Product, WorkGridLayer, with_bias
from distdl_lite.partition import Partition


class Convolution(WorkGridLayer):
    """Base of convolutions, transposed or not: the work grid, where weights live, fetch and deliver.

    A subclass sets its options before it calls `_place`, and has `_weight_layout`, `_output_space`, `_reads`, `_convolution`
    and, for its part of `extra_repr`, `_own_repr`.
    """

    def __init__(
        self,
        partitions: tuple[Partition, Partition | None, Partition | None],
        in_channels: int,
        out_channels: int,
        groups: int,
        kernel_size: Any,
        stride: Any,
        dilation: Any,
    ) -> None:
        super().__init__(*partitions)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_dim(self, self.dims, "kernel_size", kernel_size)
        self.stride = per_dim(self, self.dims, "stride", stride)
        self.dilation = per_dim(self, self.dims, "dilation", dilation)
        integers(self, 1, out_channels=out_channels, groups=groups)
        integers(self, 0, in_channels=in_channels)
        if in_channels % groups or out_channels % groups:
            raise self._refuse(
                f"groups={groups} do not divide in_channels={in_channels} and out_channels={out_channels}"
            )

    def _place(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Lay out the work grid and put the parameters on it."""
        for name, P in (("P_x", self.P_x), ("P_y", self.P_y)):
            spatial_axes(self, name, P, self.dims)
        self._work = self._work_grid(1, "[P_b, P_out, P_in, *P_space]")
        self._channels = self._channel_cuts()
        weight = self._weight_layout(*self._channels)
        fan_in = torch.Size(lay.global_shape_of(weight)[1:]).numel()
        self.place("weight", weight, uniform(kaiming_bound(fan_in)), dtype, device)
        along = Layout(self.P_y.grid_of_ranks, (Dim(self._channels[0], (1,)),)) if bias else None
        self.place("bias", along, uniform(bias_bound(fan_in)), dtype, device)

    def _channel_cuts(self) -> tuple[tuple[lay.Range, ...], tuple[lay.Range, ...], int]:
        """Ranges of output and input channels of the work grid, and the axis that chooses the input's."""
        outs = ranges_of(balanced(self.out_channels, self._work.shape[1]))
        if self.groups == 1:
            return outs, ranges_of(balanced(self.in_channels, self._work.shape[2])), 2
        if self._work.shape[2] > 1:
            raise self._refuse(f"groups={self.groups} cannot be summed over the {self._work.shape[2]} parts of P_in")
        per_group = self.out_channels // self.groups
        if any(a % per_group or b % per_group for a, b in outs):
            raise self._refuse(
                f"output channels cut at {[a for a, _ in outs[1:]]} do not fall on the boundaries of "
                f"groups={self.groups} of {per_group} channels"
            )
        width = self.in_channels // self.groups
        return outs, tuple((a // per_group * width, b // per_group * width) for a, b in outs), 1

    def _weight_layout(self, outs: tuple[lay.Range, ...], ins: tuple[lay.Range, ...], axis: int) -> Layout:
        """The weight's blocks, for the ranges of output and input channels; `axis` of the work grid chooses the latter."""
        raise NotImplementedError

    def _output_space(self, space: Shape) -> Shape:
        """The numbers of outputs of the spatial dims. Raises ValueError if one is too short."""
        raise NotImplementedError

    def _reads(self, d: int, n: int, cuts: Sequence[int]) -> Dim:
        """What the output blocks of a spatial dim read."""
        raise NotImplementedError

    def _convolution(self, box: lay.Box, held: lay.Box, global_shape: Shape, groups: int) -> Product:
        """The local convolution from the inputs held to the outputs of the box; neither is empty."""
        raise NotImplementedError

    def layouts(self, shapes: Mapping[int, Shape], *wanted: Any) -> tuple[Layout, Layout, Layout, Layout]:
        """X, Z, the work grid's partial outputs, and Y, for the output's lengths if they are wanted; pure."""
        X = lay.blocks(self.P_x.grid_of_ranks, lay.cuts_from_shapes(self.P_x.grid_of_ranks, shapes))
        batch, channels, *space = lay.global_shape_of(X)
        if channels != self.in_channels:
            found = f"the input has {channels} channels, in_channels={self.in_channels}"
            raise self._refuse(found + whose_blocks(self.P_x.shape[1]))
        out_space = self._output_space(space, *wanted)
        outs, ins, axis = self._channels
        batches = Dim(ranges_of(balanced(batch, self._work.shape[0])), (0,))
        cuts = [balanced(m, self._work.shape[3 + d]) for d, m in enumerate(out_space)]
        Z = Layout(self._work, (batches, Dim(ins, (axis,)), *(self._reads(d, n, cuts[d]) for d, n in enumerate(space))))
        writes = (Dim(ranges_of(cut), (3 + d,)) for d, cut in enumerate(cuts))
        partial = Layout(self._work, (batches, Dim(outs, (1,)), *writes))
        Y = balanced_blocks(self.P_y.grid_of_ranks, (batch, self.out_channels, *out_space))
        return X, Z, partial, Y

    def _product(self, box: lay.Box, held: lay.Box, global_shape: Shape, dtype: torch.dtype) -> Product:
        shape = lay.shape_of(box)
        if 0 in shape or 0 in lay.shape_of(held):  # torch refuses to convolve nothing
            return functools.partial(_nothing, shape, dtype, self.dims)
        groups = 1 if self.groups == 1 else shape[1] * self.groups // self.out_channels
        return self._convolution(box, held, global_shape, groups)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += self._own_repr()
        parts += [f"dilation={self.dilation}"] if max(self.dilation) > 1 else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join([*parts, *self._partitions_repr()])


def _nothing(
    shape: Shape, dtype: torch.dtype, dims: int, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution of an empty block, or to one."""
    return with_bias(connected_zeros(shape, z, weight, added=bias).to(dtype), bias, dims)
