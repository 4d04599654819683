"""What convolutions share, transposed or not: they are cut along batch, space and features by one rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, Layout, Shape, balanced_blocks, ranges_of
from distdl_lite.nn.conv.geometry import Geometry
from distdl_lite.nn.draws import bias_bound, kaiming_bound, uniform
from distdl_lite.nn.inputs import whose_blocks
from distdl_lite.nn.options import integers, per_dim, spatial_axes
from distdl_lite.nn.work_grid import Product, WorkGridLayer
from distdl_lite.partition import Partition


class Convolution(WorkGridLayer):
    """Base of convolutions, transposed or not: the work grid, where weights live, fetch and deliver.

    A subclass sets its options before it calls `_place` with its geometry, and has `_weight_layout` and, for its part of
    `extra_repr`, `_own_repr`.
    """

    _geometry: Any

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

    def _place(self, geometry: Geometry, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Lay out the work grid and put the parameters on it."""
        self._geometry = geometry
        for name, P in (("P_x", self.P_x), ("P_y", self.P_y)):
            spatial_axes(self, name, P, self.dims)
        self._work = self._work_grid(1, "[P_b, P_out, P_in, *P_space]")
        self._whole = tuple(geometry.stays_whole(d, n) for d, n in enumerate(self._work.shape[3:]))
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

    def _outputs(self, space: Shape) -> Shape:
        """The numbers of outputs of the spatial dims. Raises ValueError if one is too short."""
        return self._geometry.outputs(space)  # type: ignore[no-any-return]

    def layouts(self, shapes: Mapping[int, Shape], *wanted: Any) -> tuple[Layout, Layout, Layout, Layout]:
        """X, Z, the work grid's partial outputs, and Y, for the output's lengths if they are wanted; pure."""
        X = lay.blocks_from_shapes(self.P_x.grid_of_ranks, shapes)
        batch, channels, *space = lay.global_shape_of(X)
        if channels != self.in_channels:
            found = f"the input has {channels} channels, in_channels={self.in_channels}"
            raise self._refuse(found + whose_blocks(self.P_x.shape[1]))
        out_space = self._outputs(space, *wanted)
        outs, ins, axis = self._channels
        batches = Dim(ranges_of(balanced(batch, self._work.shape[0])), (0,))
        lengths = zip(out_space, self._work.shape[3:], strict=True)
        writes = [Dim(ranges_of(balanced(m, parts)), (3 + d,)) for d, (m, parts) in enumerate(lengths)]
        reads = (
            Dim(((0, n),), (3 + d,)) if self._whole[d] else self._geometry.reads(d, n, writes[d])
            for d, n in enumerate(space)
        )
        Z = Layout(self._work, (batches, Dim(ins, (axis,)), *reads))
        partial = Layout(self._work, (batches, Dim(outs, (1,)), *writes))
        Y = balanced_blocks(self.P_y.grid_of_ranks, (batch, self.out_channels, *out_space))
        return X, Z, partial, Y

    def _product(self, box: lay.Box, held: lay.Box, global_shape: Shape, dtype: torch.dtype) -> Product:
        channels = lay.shape_of(box)[1]
        groups = 1 if self.groups == 1 else channels * self.groups // self.out_channels
        return replace(self._geometry, groups=groups).product(box, held, global_shape, self._whole, dtype)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += self._own_repr()
        parts += [f"dilation={self.dilation}"] if max(self.dilation) > 1 else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join([*parts, *self._partitions_repr()])
