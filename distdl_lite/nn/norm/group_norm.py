"""Normalisation over groups of channels of each sample."""

from __future__ import annotations

import math
from typing import Any

import torch

from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.norm.base import Kernel, Norm, by_kernel, normalised
from distdl_lite.nn.options import integers
from distdl_lite.nn.value import Value, rule
from distdl_lite.partition import Partition


def grouped(c: Compiler, x: Value, num_groups: int, num_channels: int, eps: float, *affine: Value | None) -> Value:
    """The rule of group norms; channels may be cut inside a group."""
    batch, channels, *space = x.shape
    if channels != num_channels:
        raise ValueError(f"the input of shape {x.shape} has {channels} channels, num_channels={num_channels}")
    size = [batch * channels // num_groups, num_groups, *space]
    if size[0] * math.prod(space) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    per_group = max(channels // num_groups, 1)

    def alone(x: torch.Tensor, factor: float, weight: Any, bias: Any, *running: None) -> torch.Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.contiguous()  # in channels_last memory torch's backward to the weight alone ends the process
        return by_kernel(torch.group_norm, x, x.shape[1] // per_group, weight, bias, eps)

    kernel = Kernel(alone, eps, tuple(range(2, x.ndim)), size=per_group, reaches_bias=True)
    return normalised(c, kernel, c.plain(x, [1]), *affine)


@rule("group_norm")
def group_norm(
    c: Compiler, op: Any, x: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Value:
    return grouped(c, x, num_groups, x.shape[1], eps, weight, bias)


@rule("native_group_norm")
def native_group_norm(c: Compiler, op: Any, x: Value, weight: Any, bias: Any, *sizes: Any) -> list[Any]:
    return [group_norm(c, op, x, sizes[3], weight, bias, sizes[4]), None, None]


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
        self.place_affine((num_channels,), (1,), affine, bias, dtype, device)

    def rule(self, c: Compiler, x: Value, **held: Value) -> Value:
        return grouped(c, x, self.num_groups, self.num_channels, self.eps, *self.weights(c, **held))

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, P_x={self.P_x.shape}"
