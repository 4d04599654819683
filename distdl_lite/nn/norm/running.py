"""Normalisation per channel, over the batch or over each sample, with running statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.factors import uncut
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import anchored
from distdl_lite.nn.compiler import Compiler, Value, rule
from distdl_lite.nn.draws import constant
from distdl_lite.nn.inputs import weight_dtype
from distdl_lite.nn.norm.base import Kernel, Norm, by_kernel, normalised
from distdl_lite.nn.options import integers, numbers
from distdl_lite.partition import Partition
from distdl_lite.transport import Team


@dataclass(frozen=True)
class BatchKernel(Kernel):
    """Each channel is normalised over all samples."""

    saves_empty = False
    tracks_early = True

    def over(self, ndim: int) -> Sequence[int]:
        return 0, *range(2, ndim)

    def check(self, shape: Shape, batch: bool) -> None:
        if batch and self.eps == 0:
            raise ValueError("eps=0 is refused in training, as by torch")
        if batch and math.prod(shape) == shape[1]:
            size = torch.Size(shape)
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")

    def channels(self, c: Compiler, x: Value) -> Value:
        return x

    def per_channel(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return weight

    def alone(self, x: torch.Tensor, batch: bool, factor: float, *held: torch.Tensor | None) -> torch.Tensor:
        weight, bias, *running = held
        return by_kernel(F.batch_norm, x, *running, weight, bias, batch, factor, self.eps)


@dataclass(frozen=True)
class InstanceKernel(Kernel):
    """Each channel of each sample is normalised over its space."""

    def check(self, shape: Shape, batch: bool) -> None:
        if batch and math.prod(shape[2:]) == 1:
            size = torch.Size(shape)
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {size}")

    def per_feature(self, c: Compiler, x: Value, found: Sequence[Value]) -> Sequence[Value]:
        # All ranks with the channels take part, so that the copies stay bitwise equal. Each sample is there once per
        # block of space, which the mean does not feel.
        dims = (uncut(3),), x.dims[1]
        parts = c.call(_over_samples, *found, c.local(x.dims)[:2], dims=dims, dtype=torch.float64)
        parts = c.sum_over(parts, x.axes(0, *range(2, x.ndim)))
        return c.calls(_averages, parts, dims=[(x.dims[1],)] * 2, dtypes=[torch.float64] * 2)

    def alone(self, x: torch.Tensor, batch: bool, factor: float, *held: torch.Tensor | None) -> torch.Tensor:
        weight, bias, *running = held
        # As of a block with a dim of length one, see `by_kernel`: torch makes all channels those of one sample.
        y = F.instance_norm(x.flatten(2), *running, weight, bias, batch, factor, self.eps)
        return y.view(x.shape)


def _over_samples(mean: torch.Tensor, var: torch.Tensor, shape: Shape) -> torch.Tensor:
    return torch.stack([mean, var, torch.ones_like(mean)]).view(3, *shape).sum(1)


def _averages(parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(parts[:2] / parts[2])


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_native_batch_norm_legit_functional")  # fmt: skip
def batch_norm(c: Compiler, op: Any, x: Value, weight: Value | None, bias: Value | None, *rest: Any) -> Any:
    """Of torch's results, those that only its own backward reads are None."""
    batch = any(v for v in rest[:3] if isinstance(v, bool))
    *running, momentum, eps = (v for v in rest if not isinstance(v, bool))
    running = running or [None, None]
    is_functional = op.name.endswith("_functional")
    if is_functional and batch:
        running = [c.call(torch.clone, c.move(v, (x.dims[1],)), dims=(x.dims[1],), dtype=v.dtype) for v in running]
    y = normalised(c, BatchKernel(eps), x, weight, bias, running, momentum if batch else None, batch)
    return y if op.is_one else [y, None, None, *(running if is_functional else ())]


@rule("instance_norm")
def instance_norm(
    c: Compiler,
    op: Any,
    x: Value,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    batch: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Value:
    """torch's record does not say that it changes running statistics, which are changed where they are."""
    return normalised(c, InstanceKernel(eps), x, weight, bias, (mean, var), momentum if batch else None, batch)


class _RunningNorm(Norm):
    """Base of both: weights and running statistics per channel."""

    _distdl_free = frozenset({"eps", "momentum"})

    def __init__(
        self,
        P_x: Partition,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(P_x, eps)
        integers(self, 0, num_features=num_features)
        numbers(self, momentum=0.0 if momentum is None else momentum)
        self.num_features, self.momentum = num_features, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        held = self.place_affine((num_features,), (1,), affine, bias, dtype, device)
        channels = held if track_running_stats else None
        self.place("running_mean", channels, constant(0.0), dtype, device, buffer=True)
        self.place("running_var", channels, constant(1.0), dtype, device, buffer=True)
        number = Layout(P_x.grid_of_ranks, ()) if track_running_stats else None
        self.place("num_batches_tracked", number, constant(0), torch.long, device, buffer=True)

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Take running statistics back to where they started, as torch's; on all ranks."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            held = self.held(name)
            if held is not None:
                held.fill_(value)

    def factor(self, c: Compiler, number: Value | None) -> Any:
        """The weight of the newest statistics among the running ones, after so many."""
        return 0.0 if self.momentum is None else self.momentum

    def team(self, c: Compiler) -> Team | None:
        """The ranks that the gradients of the weights are summed over with the statistics'."""
        return None

    def rule(
        self,
        c: Compiler,
        x: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        running_mean: Value | None = None,
        running_var: Value | None = None,
        num_batches_tracked: Value | None = None,
    ) -> Value:
        batch, factor, running = self.training or running_mean is None, None, (running_mean, running_var)
        if self.training and not self.track_running_stats:
            running = None, None
        elif self.training and running_mean is not None:
            factor = self.factor(c, num_batches_tracked)
        used = partial(self.used, c)
        return normalised(c, self.kernel, x, weight, bias, running, factor, batch, used, self.team(c))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, P_x={self.P_x.shape}"
        )


class DistributedBatchNorm(_RunningNorm):
    """Batch normalisation over the tensor that the blocks over `P_x` form, equal to torch's for every option.

    Input and output ``(N, C, *space)`` with any number of spatial dims, in blocks of any sizes. Ranks outside `P_x` pass and
    get zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``. Parameters and buffers are in balanced blocks along ``P_c`` and replicated over the other
        axes.
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in torch.nn.BatchNorm1d/2d/3d.

    Raises
    ------
    ValueError
        On all ranks: in the constructor if `P_x` has less than two axes; at build if the input does not have the channels
        that the layer has weights or statistics for, or there is one value per channel to train with (torch's text).
    TypeError
        At build, if the dtypes of input and weight do not go together.

    Notes
    -----
    Each rank finds mean and sum of squared deviations of its block in float64, without a copy of it: peak extra memory is that
    of 2^18 elements in float64, here and in backward. Float32 ranks add up ``(sum(x - c),
    sum((x - c)^2))`` about a common pivot c, the running mean; float64 ranks gather theirs and merge them exactly (Chan,
    Golub and LeVeque 1979). The gradients of weight and bias come out of the all-reduce in backward, already
    summed over the replicas. With running statistics in use nothing is communicated forward. An input whose channels are
    not in balanced blocks costs one more exchange for each parameter and buffer, which it moves to the input's blocks.
    """

    _distdl_free = frozenset({"eps", "momentum", "track_running_stats"})
    least_dims = 2

    @property
    def gamma(self) -> torch.nn.Parameter | None:
        """DistDL's name of the weight."""
        return self.weight

    @property
    def beta(self) -> torch.nn.Parameter | None:
        """DistDL's name of the bias."""
        return self.bias

    @property
    def kernel(self) -> BatchKernel:
        return BatchKernel(self.eps)

    def factor(self, c: Compiler, number: Value | None) -> Any:
        if number is not None:
            number = c.call(torch.Tensor.add_, number, 1, dims=(), dtype=number.dtype)
        if number is None or self.momentum is not None:
            return self.momentum
        return c.call(lambda n: 1.0 / n.double(), number, dims=(), dtype=torch.float64)

    def team(self, c: Compiler) -> Team | None:
        team = self._distdl_transport.team(c.grid.members({1: c.index[1]}))
        return team if team.size > 1 else None

    def _distdl_recomputed(self, input: tuple[Any, ...]) -> tuple[Any, ...]:
        if weight_dtype(self) is not None or not self._distdl_structure.is_empty:
            return super()._distdl_recomputed(input)
        # Of no values torch's returns a copy, times the weight if there is one, and a checkpoint does not run it again. What
        # follows may save tensors, and so run it again: on all ranks or none, as all have a graph or none has.
        return (anchored(input[0], self._distdl_structure.requires_grad),)


class DistributedInstanceNorm(_RunningNorm):
    """Instance normalisation over the tensor that the blocks over `P_x` form, equal to torch's for every option.

    As `DistributedBatchNorm`, but for these points. Each channel of each sample is normalised over its space, so `P_x` and the
    tensors ``(N, C, *space)`` have three dims or more; a ValueError at build tells of one spatial point to train with.

    Parameters
    ----------
    P_x : Partition
        As there.
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in torch.nn.InstanceNorm1d/2d/3d, with whom a momentum of None keeps the running statistics.

    Notes
    -----
    Where space is cut, one all-reduce forward and one backward; else none, nor with running statistics in use. Where these are
    updated and batch or space are cut, one more all-reduce averages the statistics over the batch. Gradients of weight and
    bias are summed by the reducer when backward ends.
    """

    least_dims = 3

    def __init__(
        self,
        P_x: Partition,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(P_x, num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)

    @property
    def kernel(self) -> InstanceKernel:
        return InstanceKernel(self.eps)
