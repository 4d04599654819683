"""Convolutions, cut along batch, space and features by one rule.

The weight lives on a work grid with the axes [batch, out, in, *space]. Three layouts make a convolution:

    X   the input blocks over P_x
    Z   over the work grid: the input channels of `in` and the points that the outputs of `space` read
    Y   the output blocks over P_y; the work grid's partial outputs are added up over `in`

so broadcasting over `out`, halos, all-gathers of channels and the sum over `in` are the two operators X -> Z and
work -> Y, each left out where its two layouts are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout, Shape, balanced_blocks, ranges_of
from distdl_lite.nn.kernel import connected_zeros, operator_between, per_dim
from distdl_lite.nn.movement import agreed_inputs, computing_dtype, edge_pad, into
from distdl_lite.nn.parameter import Layer, bias_bound, kaiming_bound, uniform
from distdl_lite.operator import Operator
from distdl_lite.partition import Grid, Partition, balanced

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class _Built:
    """What forward needs for one structure."""

    fetch: Operator | None
    deliver: Operator | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    shape: Shape | None  # of this rank's part of the convolution, None outside the work grid
    edge: Callable[[torch.Tensor], torch.Tensor] | None
    padding: tuple[int, ...]
    groups: int


class _DistributedConv(Layer):
    """A convolution over the tensor that the blocks over `P_x` form, equal to torch's for every option.

    Input ``(N, C_in, *space)`` in blocks of any sizes over `P_x`; output ``(N, C_out, *space)`` in balanced blocks over
    `P_y`. Ranks outside all partitions pass and get zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P_x : Partition
        Of the input: ``[P_b, P_in, *P_space]``.
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As in torch.nn.Conv1d/2d/3d.
    P_y : Partition, optional
        Of the output: ``[P_b, P_out, *P_space]``; None is `P_x`.
    P_w : Partition, optional
        Of the weight: ``[P_out, P_in, *P_space]``, or ``[P_b, P_out, P_in, *P_space]`` with the batch cut too. Without
        it each rank of `P_y` fetches all input channels it needs and computes its output channels.

    Raises
    ------
    ValueError
        In the constructor if partitions do not fit each other or the dims, an option is one torch refuses, or a cut of
        the features does not fall on group boundaries; at build if the input does not fit. On all ranks alike.

    Notes
    -----
    Parameters start from the serial layer's values for the same seed. A weight block is replicated over the batch and
    space axes and its gradient summed over them, a bias over those of `P_y`. Output range [a, b) of a dim reads the
    input range ``[s a - p, s (b - 1) - p + d (k - 1) + 1)``, wherever its owners are.
    """

    dims: int

    def __init__(
        self,
        P_x: Partition,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        P_y: Partition | None = None,
        P_w: Partition | None = None,
    ) -> None:
        P_y = P_x if P_y is None else P_y
        super().__init__(P_x, P_y, P_w)
        self.P_x, self.P_y, self.P_w = P_x, P_y, P_w
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_dim("kernel_size", kernel_size, self.dims)
        self.stride = per_dim("stride", stride, self.dims)
        self.dilation = per_dim("dilation", dilation, self.dims)
        self.padding, self.padding_mode = padding, padding_mode
        self._check_options()
        self.pads = self._pads()
        self._work = self._work_grid()
        self._channels = self._channel_cuts()
        self._place_parameters(bias, device, dtype)

    # ---- the constructor's parts -------------------------------------------------------------------------------------

    def _refuse(self, why: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {why}")

    def _check_options(self) -> None:
        if self.padding_mode not in _PADDING_MODES:
            raise self._refuse(f"padding_mode {self.padding_mode!r} is none of {', '.join(_PADDING_MODES)}")
        if isinstance(self.padding, str) and self.padding not in ("same", "valid"):
            raise self._refuse(f"padding {self.padding!r} is neither 'same' nor 'valid'")
        if self.padding == "same" and any(s != 1 for s in self.stride):
            raise self._refuse(f"padding='same' needs stride 1, not {self.stride}")
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise self._refuse(
                f"groups={self.groups} do not divide in_channels={self.in_channels} and out_channels={self.out_channels}"
            )
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise self._refuse(f"{name}={getattr(self, name)} must be positive")

    def _pads(self) -> tuple[tuple[int, int], ...]:
        """Points of padding to the left and right of each spatial dim."""
        if self.padding == "valid":
            return ((0, 0),) * self.dims
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((t // 2, t - t // 2) for t in total)
        assert not isinstance(self.padding, str)
        pads = per_dim("padding", self.padding, self.dims)
        if min(pads) < 0:
            raise self._refuse(f"padding={pads} must not be negative")
        return tuple((p, p) for p in pads)

    def _work_grid(self) -> Grid:
        """The grid [batch, out, in, *space] on which the convolution is computed."""
        x, y, n = self.P_x.shape, self.P_y.shape, self.dims + 2
        for name, P in (("P_x", self.P_x), ("P_y", self.P_y)):
            if P.dim != n:
                raise self._refuse(f"{name} of shape {P.shape} has {P.dim} axes, a tensor (N, C, *space) has {n} dims")
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

    def _place_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        outs, ins, axis = self._channels
        width = self.in_channels // self.groups
        in_dim = Dim(ins, (2,)) if axis == 2 else Dim(((0, width),))
        kernel = tuple(Dim(((0, k),)) for k in self.kernel_size)
        fan_in = width * torch.Size(self.kernel_size).numel()
        weight = Layout(self._work, (Dim(outs, (1,)), in_dim, *kernel))
        self.place("weight", weight, uniform(kaiming_bound(fan_in)), dtype, device)
        along = Layout(self.P_y.grid_of_ranks, (Dim(outs, (1,)),)) if bias else None
        self.place("bias", along, uniform(bias_bound(fan_in)), dtype, device)

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def layouts(self, shapes: dict[int, Shape]) -> tuple[Layout, Layout, Layout, Layout, tuple[int, ...]]:
        """X, Z, the work grid's partial outputs, Y, and the padding left to the local convolution; pure."""
        X = lay.blocks(self.P_x.grid_of_ranks, lay.cuts_from_shapes(self.P_x.grid_of_ranks, shapes))
        batch, channels, *space = lay.global_shape_of(X)
        if channels != self.in_channels:
            raise self._refuse(f"the input has {channels} channels, in_channels={self.in_channels}")
        out_space = tuple(self._output_length(d, n) for d, n in enumerate(space))
        outs, ins, axis = self._channels
        batches = Dim(ranges_of(balanced(batch, self._work.shape[0])), (0,))
        reads, native = zip(*(self._reads(d, n, out_space[d]) for d, n in enumerate(space)), strict=True)
        Z = Layout(self._work, (batches, Dim(ins, (axis,)), *reads))
        writes = (Dim(ranges_of(self._cuts(d, m)), (3 + d,)) for d, m in enumerate(out_space))
        partial = Layout(self._work, (batches, Dim(outs, (1,)), *writes))
        Y = balanced_blocks(self.P_y.grid_of_ranks, (batch, self.out_channels, *out_space))
        return X, Z, partial, Y, native

    def _output_length(self, d: int, n: int) -> int:
        length = n + sum(self.pads[d]) - self.dilation[d] * (self.kernel_size[d] - 1) - 1
        if length < 0:
            raise self._refuse(
                f"dim {d + 2} of length {n} with padding {self.pads[d]} is shorter than the kernel of "
                f"{self.kernel_size[d]} with dilation {self.dilation[d]}"
            )
        return length // self.stride[d] + 1

    def _cuts(self, d: int, m: int) -> tuple[int, ...]:
        return balanced(m, self._work.shape[3 + d])

    def _reads(self, d: int, n: int, m: int) -> tuple[Dim, int]:
        """What the output blocks of a spatial dim read, and the padding left to the local convolution.

        An uncut dim with zeros around it is left whole: the local convolution pads it without a copy.
        """
        left, right = self.pads[d]
        if self._work.shape[3 + d] == 1 and left == right and (self.padding_mode == "zeros" or left == 0):
            return Dim(((0, n),), (3 + d,)), left
        ranges = lay.read_by_kernel(self._cuts(d, m), self.kernel_size[d], self.stride[d], self.dilation[d], left)
        try:
            return lay.bounded(Dim(ranges, (3 + d,)), n, self.padding_mode), 0
        except ValueError as error:
            raise self._refuse(f"dim {d + 2}: {error}") from error

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> _Built:
        inputs = agreed_inputs(type(self).__name__, self._distdl_structure, self.P_x)
        X, Z, partial, Y, native = self.layouts(inputs.shapes)
        graph = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        fetch = operator_between(X, Z, self, inputs.requires_grad)
        deliver = operator_between(partial, Y, self, graph)
        out_dtype = computing_dtype(type(self).__name__, inputs, self.weight.dtype)
        box = partial.box(self._distdl_transport.rank)
        if box is None:
            return _Built(fetch, deliver, inputs.dtype, out_dtype, None, None, native, 1)
        held = Z.box(self._distdl_transport.rank)
        assert held is not None
        edge = self._edge(box, held, X)
        channels = box[1][1] - box[1][0]
        groups = 1 if self.groups == 1 else channels * self.groups // self.out_channels
        return _Built(fetch, deliver, inputs.dtype, out_dtype, lay.shape_of(box), edge, native, groups)

    def _edge(self, box: lay.Box, held: lay.Box, X: Layout) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The local step at the global edge for reflection and replication."""
        if self.padding_mode not in ("reflect", "replicate"):
            return None
        wanted = list(held)
        for d, (a, b) in enumerate(box[2:]):
            if a < b and (self._work.shape[3 + d] > 1 or any(self.pads[d])):
                wanted[2 + d] = lay.read_by_kernel(
                    (a, b), self.kernel_size[d], self.stride[d], self.dilation[d], self.pads[d][0]
                )[0]
        return edge_pad(tuple(wanted), held, lay.global_shape_of(X), self.padding_mode)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._distdl_is_inside:
            return x
        built: _Built = self._distdl_plan
        z = x if built.fetch is None else into(built.fetch, x, built.dtype)
        bias = self.use("bias") if self.P_y.active else None
        if built.deliver is None:
            return self._convolve(z, bias, built) if built.shape is not None else z
        y = into(built.deliver, z if built.shape is None else self._convolve(z, None, built), built.out_dtype)
        if bias is not None:
            y = y + bias.view(1, -1, *(1,) * self.dims)
        return y

    def _convolve(self, z: torch.Tensor, bias: torch.Tensor | None, built: _Built) -> torch.Tensor:
        weight = self.use("weight")
        assert built.shape is not None
        assert weight is not None
        if built.edge is not None:
            z = built.edge(z)
        if 0 in built.shape or 0 in z.shape:  # torch refuses to convolve nothing
            y = connected_zeros(built.shape, z, weight, bias)
            return y if bias is None else y + bias.view(1, -1, *(1,) * self.dims)
        convolve = _CONVOLUTIONS[self.dims]
        return convolve(z, weight, bias, self.stride, built.padding, self.dilation, built.groups)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += [f"padding={self.padding}"] if self.padding else []
        parts += [f"dilation={self.dilation}"] if max(self.dilation) > 1 else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"padding_mode={self.padding_mode}"] if self.padding_mode != "zeros" else []
        parts += [f"P_x={self.P_x.shape}"]
        parts += [f"P_y={self.P_y.shape}"] if self.P_y is not self.P_x else []
        parts += [f"P_w={self.P_w.shape}"] if self.P_w is not None else []
        return ", ".join(parts)


class DistributedConv1d(_DistributedConv):
    __doc__ = _DistributedConv.__doc__
    dims = 1


class DistributedConv2d(_DistributedConv):
    __doc__ = _DistributedConv.__doc__
    dims = 2


class DistributedConv3d(_DistributedConv):
    __doc__ = _DistributedConv.__doc__
    dims = 3
