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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Dim, Layout, Shape, balanced_blocks, ranges_of
from distdl_lite.nn.kernel import connected_zeros, operator_between
from distdl_lite.nn.movement import Inputs, agreed_inputs, computing_dtype, into, rehearsal, weight_dtype, whose_blocks
from distdl_lite.nn.options import integers
from distdl_lite.nn.overlap import Fused
from distdl_lite.nn.parameter import Layer, bias_bound, kaiming_bound, uniform
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition

Convolve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class _Built:
    """What forward needs for one structure."""

    fetch: Operator | None
    deliver: Operator | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    shape: Shape | None  # of this rank's part of the convolution, None outside the work grid
    convolve: Convolve | None  # None where there is nothing to convolve
    fused: Fused | None = None  # in place of all these


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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let Python's errors about the arguments name the layer also where its constructor is a private base's."""
        super().__init_subclass__(**kwargs)
        base = next(kind for kind in cls.__mro__ if "__init__" in vars(kind))
        if base is not cls and base.__name__.startswith("_"):
            given = base.__init__
            made = FunctionType(given.__code__, given.__globals__, "__init__", given.__defaults__, given.__closure__)
            cls.__init__ = functools.update_wrapper(made, given)  # type: ignore[method-assign]
            made.__kwdefaults__, made.__qualname__ = given.__kwdefaults__, f"{cls.__name__}.__init__"

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

    def layouts(self, shapes: dict[int, Shape], *wanted: Any) -> tuple[Layout, Layout, Layout, Layout]:
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

    def _distdl_module_setup(self, input: tuple[Any, ...], *wanted: Any) -> _Built:
        inputs = agreed_inputs(type(self).__name__, self._distdl_structure, self.P_x)
        X, Z, partial, Y = self.layouts(inputs.shapes, *wanted)
        graph = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        fetch = operator_between(X, Z, self, inputs.requires_grad)
        deliver = operator_between(partial, Y, self, graph)
        weight = weight_dtype(self)
        out_dtype = computing_dtype(type(self).__name__, inputs, weight)
        box = partial.box(self._distdl_transport.rank)
        if box is None:
            return _Built(fetch, deliver, inputs.dtype, out_dtype, None, None)
        held = Z.box(self._distdl_transport.rank)
        assert held is not None
        shape = lay.shape_of(box)
        groups = 1 if self.groups == 1 else shape[1] * self.groups // self.out_channels
        is_empty = 0 in shape or 0 in lay.shape_of(held)
        convolve = None if is_empty else self._convolution(box, held, lay.global_shape_of(X), groups)
        built = _Built(fetch, deliver, inputs.dtype, out_dtype, shape, convolve)
        plain = deliver is None and X.grid == self.P_y.grid_of_ranks and inputs.dtype is out_dtype is weight
        if not (plain and out_dtype.is_floating_point) or any(a >= b for d in (*Z.dims, *Y.dims) for a, b in d.ranges):
            return built
        return replace(built, fused=self._fused(inputs, X, Z, groups, built))

    def _fused(self, inputs: Inputs, X: Layout, Z: Layout, groups: int, built: _Built) -> Fused | None:
        """The convolution as one graph node, None where that cannot be or does not pay.

        It is asked for where each rank computes its own outputs of its own dtype and none is empty.
        """
        return None

    def _distdl_rehearsal(self) -> Callable[[], None]:
        built: _Built = self._distdl_plan
        fetches = [built.fetch] if built.fused is None else built.fused.way.fetches
        return rehearsal(self, *((fetch, built.dtype) for fetch in fetches), (built.deliver, built.out_dtype))

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _distdl_serial(self) -> Callable[..., torch.Tensor] | None:
        built: _Built = self._distdl_plan
        convolve = built.convolve
        if built.fetch is not None or convolve is None:
            return None
        return lambda layer, x: convolve(x, layer.held("weight"), layer.held("bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._distdl_is_inside:
            return x
        built: _Built = self._distdl_plan
        if built.fused is not None:
            return built.fused(x, self.held("weight"), self.held("bias"))
        z = x if built.fetch is None else into(built.fetch, x, built.dtype)
        bias = self.use("bias") if self.P_y.active else None
        if built.deliver is None:
            return self._convolve(z, bias, built) if built.shape is not None else self.given(z)
        y = into(built.deliver, z if built.shape is None else self._convolve(z, None, built), built.out_dtype)
        return self.with_bias(y, bias)

    def _convolve(self, z: torch.Tensor, bias: torch.Tensor | None, built: _Built) -> torch.Tensor:
        weight = self.use("weight")
        assert built.shape is not None
        assert weight is not None
        if built.convolve is None:  # torch refuses to convolve nothing
            return self.with_bias(connected_zeros(built.shape, z, weight, added=bias).to(built.out_dtype), bias)
        return built.convolve(z, weight, bias)

    def with_bias(self, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The bias added to the channels of `y`, a tensor of our own, in place."""
        return y if bias is None else y.add_(self.per_channel(bias, y.dtype))

    def per_channel(self, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bias to be added to an output, of whose dtype it must be: autocast may have chosen that."""
        return bias.to(dtype).view(1, -1, *(1,) * self.dims)

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
