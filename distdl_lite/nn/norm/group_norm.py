"""Normalisation over groups of channels of each sample."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.norm.base import Kernel, Norm, by_kernel, normalised
from distdl_lite.nn.value import Value, rule


def grouped(c: Compiler, x: Value, num_groups: int, eps: float, *affine: Value | None) -> Value:
    """The rule of group norms; channels may be cut inside a group."""
    per_group = max(x.shape[1] // num_groups, 1)

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
    return grouped(c, x, num_groups, eps, weight, bias)


@rule("native_group_norm")
def native_group_norm(c: Compiler, op: Any, x: Value, weight: Any, bias: Any, *sizes: Any) -> list[Any]:
    return [group_norm(c, op, x, sizes[3], weight, bias, sizes[4]), None, None]


class DistributedGroupNorm(Norm, serial=torch.nn.GroupNorm):
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

    def rule(self, c: Compiler, x: Value, **held: Value) -> Value:
        return grouped(c, x, self.num_groups, self.eps, held.get("weight"), held.get("bias"))
