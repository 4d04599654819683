"""What convolutions share, transposed or not: they are cut along batch, space and features by one rule.

The weight lives on a work grid with the axes [batch, out, in, *space]. Three layouts make a convolution:

    X   the input blocks over P_x
    Z   over the work grid: the input channels of `in` and the points that the outputs of `space` read
    Y   the output blocks over P_y; the work grid's partial outputs are added up over `in`

so broadcasting over `out`, halos, all-gathers of channels and the sum over `in` are the two operators X -> Z and
work -> Y, each left out where its two layouts are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Dim, Layout, Shape, balanced_blocks, ranges_of
from distdl_lite.nn.blocks import connected_zeros, operator_between
from distdl_lite.nn.conv.overlap import Fused
from distdl_lite.nn.draws import bias_bound, kaiming_bound, uniform
from distdl_lite.nn.inputs import Inputs, agreed_inputs, computing_dtype, weight_dtype, whose_blocks
from distdl_lite.nn.module import Call
from distdl_lite.nn.movement import into
from distdl_lite.nn.options import integers
from distdl_lite.nn.parameter import Layer
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition

Convolve = Callable[..., torch.Tensor]  # of the inputs held, weight and bias


class Convolution(Layer):
    """Base of convolutions, transposed or not: the work grid, where weights live, fetch and deliver.

    A subclass sets its options before it calls `_place`, and overrides `_weight_layout`, `_output_space`, `_reads` and
    `_convolution`.
    """

    dims: int
    P_x: Partition
    P_y: Partition
    P_w: Partition | None
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    # ---- the constructor's parts -------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        integers(self, 1, out_channels=self.out_channels, groups=self.groups)
        integers(self, 0, in_channels=self.in_channels)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise self._refuse(
                f"groups={self.groups} do not divide in_channels={self.in_channels} and out_channels={self.out_channels}"
            )

    def _place(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Lay out the work grid and put the parameters on it."""
        self._work = self._work_grid()
        self._channels = self._channel_cuts()
        weight = self._weight_layout(*self._channels)
        fan_in = torch.Size(lay.global_shape_of(weight)[1:]).numel()
        self.place("weight", weight, uniform(kaiming_bound(fan_in)), dtype, device)
        along = Layout(self.P_y.grid_of_ranks, (Dim(self._channels[0], (1,)),)) if bias else None
        self.place("bias", along, uniform(bias_bound(fan_in)), dtype, device)

    def _work_grid(self) -> Grid:
        """The grid [batch, out, in, *space] on which the convolution is computed."""
        n = self.dims + 2
        for name, P in (("P_x", self.P_x), ("P_y", self.P_y)):
            if P is None:
                raise self._refuse(f"{name}: a Partition is needed, not None", TypeError)
            if P.dim != n:
                raise self._refuse(f"{name} of shape {P.shape} has {P.dim} axes, a tensor (N, C, *space) has {n} dims")
        x, y = self.P_x.shape, self.P_y.shape
        if self.P_w is None:
            return Grid((y[0], y[1], 1, *y[2:]), self.P_y.ranks)
        shape = self.P_w.shape if self.P_w.dim == n + 1 else (1, *self.P_w.shape)
        wanted = (y[0], y[1], x[1], *y[2:])
        if shape != wanted:
            raise self._refuse(
                f"P_w of shape {self.P_w.shape} does not fit P_x of shape {x} and P_y of shape {y}: "
                f"[P_b, P_out, P_in, *P_space] must be {wanted} (P_b may be left out where it is 1)"
            )
        return Grid(shape, self.P_w.ranks)

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

    # ---- what a subclass decides -------------------------------------------------------------------------------------

    def _weight_layout(self, outs: tuple[lay.Range, ...], ins: tuple[lay.Range, ...], axis: int) -> Layout:
        """The weight's blocks, for the ranges of output and input channels; `axis` of the work grid chooses the latter."""
        raise NotImplementedError

    def _output_space(self, space: Shape) -> Shape:
        """The numbers of outputs of the spatial dims. Raises ValueError if one is too short."""
        raise NotImplementedError

    def _reads(self, d: int, n: int, cuts: Sequence[int]) -> Dim:
        """What the output blocks of a spatial dim read."""
        raise NotImplementedError

    def _convolution(self, box: lay.Box, held: lay.Box, global_shape: Shape, groups: int) -> Convolve:
        """The local convolution from the inputs held to the outputs of the box; neither is empty."""
        raise NotImplementedError

    # ---- set-up ------------------------------------------------------------------------------------------------------

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

    def _distdl_module_setup(self, input: tuple[Any, ...], *wanted: Any) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        X, Z, partial, Y = self.layouts(inputs.shapes, *wanted)
        graph, rank = (
            inputs.requires_grad or any(p.requires_grad for p in self.parameters()),
            self._distdl_transport.rank,
        )
        fetch = operator_between(X, Z, self, inputs.requires_grad)
        deliver = operator_between(partial, Y, self, graph)
        weight = weight_dtype(self)
        dtype, out_dtype = inputs.dtype, computing_dtype(type(self).__name__, inputs, weight)
        box, held, adds_bias = partial.box(rank), Z.box(rank), Y.box(rank) is not None
        work: Convolve | None = None
        if box is not None and held is not None:
            shape = lay.shape_of(box)
            groups = 1 if self.groups == 1 else shape[1] * self.groups // self.out_channels
            if 0 in shape or 0 in lay.shape_of(held):  # torch refuses to convolve nothing
                work = functools.partial(_nothing, shape, out_dtype)
            else:
                work = self._convolution(box, held, lay.global_shape_of(X), groups)
                plain = deliver is None and X.grid == self.P_y.grid_of_ranks and dtype is out_dtype is weight
                is_full = all(a < b for d in (*Z.dims, *Y.dims) for a, b in d.ranges)
                if plain and out_dtype.is_floating_point and is_full:
                    fused = self._fused(inputs, X, Z, groups, fetch, work)
                    if fused is not None:
                        return fused

        def run(layer: Convolution, x: torch.Tensor) -> torch.Tensor:
            z = x if fetch is None else into(fetch, x, dtype)
            bias = layer.use("bias") if adds_bias else None
            if deliver is None:
                return layer.given(z) if work is None else work(z, layer.use("weight"), bias)
            return with_bias(into(deliver, z if work is None else work(z, layer.use("weight"), None), out_dtype), bias)

        return run

    def _fused(
        self, inputs: Inputs, X: Layout, Z: Layout, groups: int, fetch: Operator | None, convolve: Convolve
    ) -> Fused | None:
        """The convolution as one graph node, None where that cannot be or does not pay.

        It is asked for where each rank computes its own outputs of its own dtype and none is empty.
        """
        return None

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += self._own_repr()
        parts += [f"dilation={self.dilation}"] if max(self.dilation) > 1 else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += ["bias=False"] if self.bias is None else []
        parts += [f"P_x={self.P_x.shape}"]
        parts += [f"P_y={self.P_y.shape}"] if self.P_y is not self.P_x else []
        parts += [f"P_w={self.P_w.shape}"] if self.P_w is not None else []
        return ", ".join(parts)

    def _own_repr(self) -> list[str]:
        """What a subclass adds to `extra_repr`."""
        return []


def _nothing(
    shape: Shape, dtype: torch.dtype, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution of an empty block, or to one."""
    return with_bias(connected_zeros(shape, z, weight, added=bias).to(dtype), bias)


def with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The bias added to the channels of `y`, a tensor of our own, in place."""
    return y if bias is None else y.add_(per_channel(bias, y))


def per_channel(bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The bias to be added to an output, of whose dtype it must be: autocast may have chosen that."""
    return bias.to(y.dtype).view(1, -1, *(1,) * (y.dim() - 2))
