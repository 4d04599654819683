"""Convolutions, cut along batch, space and features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout
from distdl_lite.nn.conv import overlap
from distdl_lite.nn.conv.convolution import Convolution
from distdl_lite.nn.conv.geometry import ConvGeometry
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.options import per_dim, plain
from distdl_lite.nn.work_grid import Product
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.reducer import reducer_of

_PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


class _DistributedConv(Convolution):
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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2, 1))
    ...     conv = dl.nn.DistributedConv2d(P, 3, 8, 3, padding=1, stride=2)
    ...     return tuple(conv(P.cut(torch.zeros(2, 3, 37, 29))).shape)
    >>> dl.testing.spmd(2, body)
    [(2, 8, 10, 15), (2, 8, 9, 15)]
    """

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
        super().__init__((P_x, P_y, P_w), in_channels, out_channels, groups, kernel_size, stride, dilation)
        self.padding, self.padding_mode = plain(padding), padding_mode
        options = self.kernel_size, self.stride, self.dilation, self._pads(), groups, padding_mode
        self._place(ConvGeometry(*options), bias, device, dtype)

    def _pads(self) -> tuple[tuple[int, int], ...]:
        """Points of padding to the left and right of each spatial dim. Raises ValueError if torch refuses the options."""
        if self.padding_mode not in _PADDING_MODES:
            raise self._refuse(f"padding_mode {self.padding_mode!r} is none of {', '.join(_PADDING_MODES)}")
        if not isinstance(self.padding, str):
            return tuple((p, p) for p in per_dim(self, self.dims, "padding", self.padding, least=0))
        if self.padding == "valid":
            return ((0, 0),) * self.dims
        if self.padding != "same":
            raise self._refuse(f"padding {self.padding!r} is neither 'same' nor 'valid'")
        if any(s != 1 for s in self.stride):
            raise self._refuse(f"padding='same' needs stride 1, not {self.stride}")
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)

    def _weight_layout(self, outs: tuple[lay.Range, ...], ins: tuple[lay.Range, ...], axis: int) -> Layout:
        in_dim = Dim(ins, (2,)) if axis == 2 else Dim(((0, self.in_channels // self.groups),))
        return Layout(self._work, (Dim(outs, (1,)), in_dim, *(Dim(((0, k),)) for k in self.kernel_size)))

    def _fused(
        self, inputs: Inputs, X: Layout, Z: Layout, Y: Layout, fetch: Operator | None, product: Product | None
    ) -> overlap.Fused | None:
        weight, bias, transport = (
            self._distdl_places["weight"].replicas,
            self._distdl_places.get("bias"),
            self._distdl_transport,
        )
        is_alone = fetch is None and weight.team.size == 1
        if X.grid != Y.grid or is_alone or not isinstance(product, overlap.Kernel):
            return None

        def between(X: Layout, S: Layout) -> Operator:
            return Operator(plan(X, S, transport.rank), transport, type(self).__name__)

        return overlap.fused(
            self._geometry, self._whole, (X, Z, Y), fetch, product, inputs.dtype, inputs.requires_grad, transport.rank, between,
            (weight, bias and bias.replicas), reducer_of(transport),
        )  # fmt: skip

    def _own_repr(self) -> list[str]:
        padding = [f"padding={self.padding}"] if self.padding else []
        return padding + ([f"padding_mode={self.padding_mode}"] if self.padding_mode != "zeros" else [])


class DistributedConv1d(_DistributedConv):
    dims = 1


class DistributedConv2d(_DistributedConv):
    dims = 2


class DistributedConv3d(_DistributedConv):
    dims = 3
