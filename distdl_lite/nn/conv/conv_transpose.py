"""Transposed convolutions, cut along batch, space and features."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout, Shape
from distdl_lite.nn.conv.convolution import Convolution
from distdl_lite.nn.module import Call
from distdl_lite.nn.options import listed, per_dim
from distdl_lite.nn.work_grid import Product, with_bias
from distdl_lite.partition import Partition

_CONVOLUTIONS: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _DistributedConvTranspose(Convolution):
    """A transposed convolution over the tensor that the blocks over `P_x` form, equal to torch's for every option.

    As `DistributedConv2d` but for these points.

    Parameters
    ----------
    P_x, P_y, P_w : Partition
        As there.
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype
        As in torch.nn.ConvTranspose1d/2d/3d.

    Raises
    ------
    ValueError
        As there; also at build if `output_size` does not fit, or the output has no points (torch refuses that too, but for a
        batch of none and where oneDNN computes).

    Notes
    -----
    The weight is ``(C_in, C_out / groups, *kernel)``. Output j of a dim gathers the inputs i with
    ``i s - p <= j <= i s - p + d (k - 1)``, wherever their owners are.
    """

    def __init__(
        self,
        P_x: Partition,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        P_y: Partition | None = None,
        P_w: Partition | None = None,
    ) -> None:
        super().__init__((P_x, P_y, P_w), in_channels, out_channels, groups, kernel_size, stride, dilation)
        self.padding = per_dim(self, self.dims, "padding", padding, least=0)
        self.output_padding = per_dim(self, self.dims, "output_padding", output_padding, least=0)
        self.padding_mode = padding_mode
        if padding_mode != "zeros":
            raise self._refuse(f"padding_mode {padding_mode!r} is not 'zeros', the only one there is")
        limits = zip(self.output_padding, self.stride, self.dilation, strict=True)
        if any(o >= max(s, d) for o, s, d in limits):
            raise self._refuse(
                f"output_padding={self.output_padding} must be below stride={self.stride} or dilation={self.dilation}"
            )
        self._place(bias, device, dtype)
        self._whole = tuple(n == 1 for n in self._work.shape[3:])

    def _weight_layout(self, outs: tuple[lay.Range, ...], ins: tuple[lay.Range, ...], axis: int) -> Layout:
        out_dim = Dim(outs, (1,)) if axis == 2 else Dim(((0, self.out_channels // self.groups),))
        return Layout(self._work, (Dim(ins, (axis,)), out_dim, *(Dim(((0, k),)) for k in self.kernel_size)))

    def _output_space(self, space: Shape, output_size: Sequence[int] | None = None) -> Shape:
        least = [self._least(d, n) for d, n in enumerate(space)]
        if output_size is None:
            lengths = [n + extra for n, extra in zip(least, self.output_padding, strict=True)]
        else:
            lengths = self._requested(output_size, space, least)
        for d, (n, length) in enumerate(zip(space, lengths, strict=True)):
            if n < 1 or length < 1:
                raise self._refuse(
                    f"dim {d + 2} of length {n} has no output with kernel_size={self.kernel_size[d]}, "
                    f"stride={self.stride[d]}, padding={self.padding[d]}: calculated output size {length}. Output size is "
                    f"too small"
                )
        return tuple(lengths)

    def _least(self, d: int, n: int) -> int:
        """The number of outputs of n inputs of a dim without output padding."""
        return self._reach(d, n) - 2 * self.padding[d]

    def _requested(self, output_size: Sequence[int], space: Shape, least: Sequence[int]) -> list[int]:
        """The lengths that forward was asked for. Raises ValueError, in torch's words, unless they can be had."""
        lengths, dims = list(output_size), self.dims
        if len(lengths) == dims + 2:
            lengths = lengths[2:]
        if len(lengths) != dims:
            raise self._refuse(
                f"for {dims + 2}D input, output_size must have {dims} or {dims + 2} elements (got {len(lengths)})"
            )
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        if any(not a <= n <= b for a, n, b in zip(least, lengths, most, strict=True)):
            raise self._refuse(
                f"requested an output size of {lengths}, but valid sizes range from {list(least)} to {most} "
                f"(for an input of {torch.Size(space)})"
            )
        return lengths

    def _distdl_same(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        size = listed(input[1] if len(input) > 1 else None)  # the same in a list and in a tuple
        return {**super()._distdl_same(input, kwargs), "output_size": str(size)}

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        if len(input) == 1 or input[1] is None:
            return super()._distdl_module_setup(input)
        size = input[1]
        if not isinstance(size, (list, tuple)) or not all(hasattr(n, "__index__") for n in size):
            raise self._refuse("output_size is neither a list nor a tuple of integers", TypeError)
        return super()._distdl_module_setup(input, tuple(map(operator.index, size)))

    def _reads(self, d: int, n: int, cuts: Sequence[int]) -> Dim:
        if self._whole[d]:
            return Dim(((0, n),), (3 + d,))
        ranges = lay.read_by_transposed_kernel(
            cuts, self.kernel_size[d], self.stride[d], self.dilation[d], self.padding[d]
        )
        return lay.bounded(Dim(ranges, (3 + d,)), n, "none")

    def _convolution(self, box: lay.Box, held: lay.Box, global_shape: Shape, groups: int) -> Product:
        cut = [d for d, whole in enumerate(self._whole) if not whole]
        padding = [0 if d in cut else p for d, p in enumerate(self.padding)]
        extra = [
            0 if d in cut else stop - self._least(d, n)
            for d, ((_, stop), n) in enumerate(zip(box[2:], global_shape[2:], strict=True))
        ]
        # Where this rank's outputs stand among those that the held inputs reach, and how far they go beyond.
        window: list[slice] = [slice(None)] * (2 + self.dims)
        beyond = [0, 0] * self.dims  # of the last dim first, as torch wants it
        is_all = True
        for d in cut:
            (low, high), first = held[2 + d], held[2 + d][0] * self.stride[d] - self.padding[d]
            start, stop, reach = box[2 + d][0] - first, box[2 + d][1] - first, self._reach(d, high - low)
            window[2 + d] = slice(max(start, 0), min(stop, reach))
            right = 2 * (self.dims - d) - 1
            beyond[right - 1], beyond[right] = max(-start, 0), max(stop - reach, 0)
            is_all = is_all and (start, stop) == (0, reach)

        function, stride, dilation, dims = _CONVOLUTIONS[self.dims], self.stride, self.dilation, self.dims

        def convolve(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            y = function(z, weight, bias if is_all else None, stride, padding, extra, groups, dilation)
            return y if is_all else with_bias(F.pad(y[tuple(window)], beyond), bias, dims)

        return convolve

    def _reach(self, d: int, n: int) -> int:
        """How many outputs n inputs of a dim reach, padding among them."""
        return (n - 1) * self.stride[d] + self.dilation[d] * (self.kernel_size[d] - 1) + 1

    def forward(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """The output, of the lengths asked for; set-up has looked at them.

        Parameters
        ----------
        x : torch.Tensor
            This rank's block.
        output_size : list or tuple of int, optional
            Of the whole output, the same on all ranks: a length per spatial dim, which may follow those of batch and
            channels, as in torch; in place of `output_padding`.
        """
        return self._distdl_run(x)

    def _own_repr(self) -> list[str]:
        parts = [f"padding={self.padding}"] if any(self.padding) else []
        return parts + ([f"output_padding={self.output_padding}"] if any(self.output_padding) else [])


class DistributedConvTranspose1d(_DistributedConvTranspose):
    dims = 1


class DistributedConvTranspose2d(_DistributedConvTranspose):
    dims = 2


class DistributedConvTranspose3d(_DistributedConvTranspose):
    dims = 3
