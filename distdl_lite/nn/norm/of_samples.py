"""Normalisation of each sample: layer norm, its kind without centring, and group norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from distdl_lite.layout import Shape
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.norm.base import Kernel, Norm, by_kernel, normalised
from distdl_lite.nn.value import Value, rule


@rule("layer_norm", "native_layer_norm")
def layer_norm(
    c: Compiler, op: Any, x: Value, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    y = _over_last(c, torch.layer_norm, x, tuple(shape), eps, weight, bias)
    return y if op.is_one else [y, None, None]


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(c: Compiler, op: Any, x: Value, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    y = _over_last(c, torch.rms_norm, x, tuple(shape), eps, weight)
    return y if op.is_one else [y, None]


def _over_last(
    c: Compiler, alone: Callable[..., torch.Tensor], x: Value, shape: Shape, eps: float | None, *affine: Value | None
) -> Value:
    """The rule of norms over the last dims, for which weights are, too; `alone` is torch's."""
    over, is_centred = tuple(range(x.ndim - len(shape), x.ndim)), alone is torch.layer_norm

    def of_block(x: torch.Tensor, factor: float, weight: Any, bias: Any, *running: None) -> torch.Tensor:
        return alone(x, shape, *((weight, bias) if is_centred else (weight,)), eps)

    added = torch.finfo(wide(x.dtype)).eps if eps is None else eps
    kernel = Kernel(of_block, added, over, over, numbers=1 + is_centred, reaches_bias=is_centred)
    return normalised(c, kernel, x, *affine)


@rule("group_norm")
def group_norm(
    c: Compiler, op: Any, x: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Value:
    """Channels may be cut inside a group."""
    per_group = max(x.shape[1] // num_groups, 1)

    def alone(x: torch.Tensor, factor: float, weight: Any, bias: Any, *running: None) -> torch.Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.contiguous()  # in channels_last memory torch's backward to the weight alone ends the process
        return by_kernel(torch.group_norm, x, x.shape[1] // per_group, weight, bias, eps)

    kernel = Kernel(alone, eps, tuple(range(2, x.ndim)), size=per_group, reaches_bias=True)
    return normalised(c, kernel, c.plain(x, [1]), weight, bias)


@rule("native_group_norm")
def native_group_norm(c: Compiler, op: Any, x: Value, weight: Any, bias: Any, *sizes: Any) -> list[Any]:
    return [group_norm(c, op, x, sizes[3], weight, bias, sizes[4]), None, None]


class _LastDimsNorm(Norm):
    """Base of both."""

    least_dims = 0

    def weighted(self) -> Sequence[int]:
        return range(self.P_x.dim - len(self.normalized_shape), self.P_x.dim)


class DistributedLayerNorm(_LastDimsNorm, serial=torch.nn.LayerNorm):
    """Layer normalisation over the tensor that the blocks over `P_x` form, equal to torch's.

    Input and output ``(*lead, *normalized_shape)``, any dims of which may be cut in blocks of any sizes. Ranks outside `P_x`
    pass and get zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P_x : Partition
        ``[*P_lead, *P_normalized]``. Parameters are in balanced blocks along the latter axes, replicated over the former.
    normalized_shape, eps, elementwise_affine, bias, device, dtype
        As in torch.nn.LayerNorm.

    Raises
    ------
    ValueError
        On all ranks: in the constructor if `P_x` has fewer axes than `normalized_shape` dims; at build if the input does not
        end in `normalized_shape`.
    TypeError
        At build, if the dtypes of input and weight do not go together.

    Notes
    -----
    Where a normalised dim is cut, one all-reduce forward of two float64 numbers per row (for float64 input, three from each
    rank) and one of two backward, among the ranks that share rows; else none. Gradients of weight and bias are summed by the
    reducer when backward ends. Blocks that are not balanced, and statistics, are as in `DistributedBatchNorm`.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     y = dl.nn.DistributedLayerNorm(P, 4)(P.cut(torch.tensor([[0.0, 2.0, 0.0, 2.0]])))
    ...     return y.round(decimals=3).tolist()
    >>> dl.testing.spmd(2, body)
    [[[-1.0, 1.0]], [[-1.0, 1.0]]]
    """

    operation = "layer_norm"
    options = ("normalized_shape", "weight", "bias", "eps")


class DistributedRMSNorm(_LastDimsNorm, serial=torch.nn.RMSNorm):
    """Division by the root mean square over the last dims of the tensor that the blocks over `P_x` form, as torch's.

    As `DistributedLayerNorm`, with one number per row in each all-reduce, whatever the dtype.

    Parameters
    ----------
    P_x : Partition
        ``[*P_lead, *P_normalized]``. The weight is in balanced blocks along the latter axes, replicated over the former.
    normalized_shape, eps, elementwise_affine, device, dtype
        As in torch.nn.RMSNorm: `eps` None is that of the dtype it is computed in, float32 or float64.

    Raises
    ------
    ValueError, TypeError
        As `DistributedLayerNorm`. torch's promotion of an input and a weight of different dtypes is not offered.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     y = dl.nn.DistributedRMSNorm(P, 4)(P.cut(torch.tensor([[2.0, 2.0, -2.0, -2.0]])))
    ...     return y.round(decimals=3).tolist()
    >>> dl.testing.spmd(2, body)
    [[[1.0, 1.0]], [[-1.0, -1.0]]]
    """

    operation = "rms_norm"
    options = ("normalized_shape", "weight", "eps")


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2, 1))
    ...     y = dl.nn.DistributedGroupNorm(P, 1, 4)(P.cut(torch.tensor([[[0.0], [2.0], [0.0], [2.0]]])))
    ...     return y.round(decimals=3).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[-1.0], [1.0]]], [[[-1.0], [1.0]]]]
    """

    operation = "group_norm"
    options = ("num_groups", "weight", "bias", "eps")
