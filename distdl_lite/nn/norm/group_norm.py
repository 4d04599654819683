"""Normalisation over groups of channels of each sample."""

from __future__ import annotations

import math

import torch

from distdl_lite import layout as lay
from distdl_lite.layout import Box, Dim, Layout, Shape
from distdl_lite.nn.norm.base import Norm, by_kernel
from distdl_lite.nn.options import integers
from distdl_lite.partition import Partition


class DistributedGroupNorm(Norm):
    """Group normalisation over the tensor that the blocks over `P_x` form, equal to torch's.

    As `DistributedBatchNorm`, but for these points. The channels may be cut inside a group.

    Parameters
    ----------
    P_x : Partition
        As there.
    num_groups, num_channels, eps, affine, device, dtype, bias
        As in torch.nn.GroupNorm. A ValueError in the constructor says if `num_groups` does not divide `num_channels`; one at
        build tells of one value per group.

    Notes
    -----
    Where space is cut, or a group is, two float64 numbers per group and sample (for float64 input, three from each rank) are
    added up forward and two backward over the ranks that share the group; else nothing is communicated. The sum is one
    all-reduce, or one exchange of messages where groups lie across some cuts of the channels. Gradients of weight and bias are
    summed by the reducer when backward ends.
    """

    reaches_bias = True
    least_dims = 2

    def __init__(
        self,
        P_x: Partition,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(P_x, eps)
        integers(self, 1, num_groups=num_groups)
        integers(self, 0, num_channels=num_channels)
        if num_channels % num_groups:
            raise self._refuse(f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})")
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine
        self._size = max(num_channels // num_groups, 1)
        self.place_affine((num_channels,), (1,), affine, bias, dtype, device)

    def check_shape(self, shape: Shape) -> None:
        batch, channels, *space = shape
        if channels != self.num_channels:
            raise self._refuse(f"the input of shape {shape} has {channels} channels, num_channels={self.num_channels}")
        size = [batch * channels // self.num_groups, self.num_groups, *space]
        if size[0] * math.prod(space) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")

    def rows(self, X: Layout) -> tuple[tuple[Dim, ...], int]:
        channels = X.dims[1]
        groups = tuple((a // self._size, -(-b // self._size) if a < b else a // self._size) for a, b in channels.ranges)
        return (X.dims[0], Dim(groups, channels.axes)), self._size * math.prod(lay.global_shape_of(X)[2:])

    def row_of(self, box: Box, device: torch.device) -> torch.Tensor:
        (first, last), (start, stop) = box[:2]
        groups = torch.arange(start, stop, device=device) // self._size
        groups = groups - groups[:1]
        samples = torch.arange(last - first, device=device).unsqueeze(1)
        return (samples * (groups[-1:] + 1) + groups).view(-1)

    def alone(self, x: torch.Tensor, *held: torch.Tensor | None) -> torch.Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.contiguous()  # in channels_last memory torch's backward to the weight alone ends the process
        return by_kernel(torch.group_norm, x, x.shape[1] // self._size, *held, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, P_x={self.P_x.shape}"
