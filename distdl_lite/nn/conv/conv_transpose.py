"""Transposed convolutions, cut along batch, space and features."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout, Shape
from distdl_lite.nn.conv.convolution import Convolution
from distdl_lite.nn.conv.geometry import TransposedGeometry
from distdl_lite.nn.module import Call
from distdl_lite.nn.options import listed, per_dim
from distdl_lite.partition import Partition


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2, 1))
    ...     conv = dl.nn.DistributedConvTranspose2d(P, 8, 3, 2, stride=2)
    ...     return tuple(conv(P.cut(torch.zeros(2, 8, 9, 7))).shape)
    >>> dl.testing.spmd(2, body)
    [(2, 3, 9, 14), (2, 3, 9, 14)]
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
        pads = tuple((p, p) for p in self.padding)
        options = self.kernel_size, self.stride, self.dilation, pads, groups, self.output_padding
        self._place(TransposedGeometry(*options), bias, device, dtype)

    def _weight_layout(self, outs: tuple[lay.Range, ...], ins: tuple[lay.Range, ...], axis: int) -> Layout:
        out_dim = Dim(outs, (1,)) if axis == 2 else Dim(((0, self.out_channels // self.groups),))
        return Layout(self._work, (Dim(ins, (axis,)), out_dim, *(Dim(((0, k),)) for k in self.kernel_size)))

    def _outputs(self, space: Shape, output_size: Sequence[int] | None = None) -> Shape:
        if output_size is None:
            return super()._outputs(space)
        least = [self._geometry.least(d, n) for d, n in enumerate(space)]
        return self._geometry.checked(space, tuple(self._requested(output_size, space, least)))

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
