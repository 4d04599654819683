"""Normalisation per channel, over the batch or over each sample, with running statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout, Shape
from distdl_lite.nn.blocks import anchored
from distdl_lite.nn.draws import constant
from distdl_lite.nn.inputs import weight_dtype
from distdl_lite.nn.norm.base import Built, Norm, by_kernel
from distdl_lite.nn.options import integers, numbers
from distdl_lite.partition import Partition


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
        self.place_affine((num_features,), (1,), affine, bias, dtype, device)
        channels = self._held if track_running_stats else None
        self.place("running_mean", channels, constant(0.0), dtype, device, buffer=True)
        self.place("running_var", channels, constant(1.0), dtype, device, buffer=True)
        number = Layout(P_x.grid_of_ranks, ()) if track_running_stats else None
        self.place("num_batches_tracked", number, constant(0), torch.long, device, buffer=True)

    @property
    def uses_batch(self) -> bool:
        return self.training or self.held("running_mean") is None

    @property
    def tracks(self) -> bool:
        return self.track_running_stats and self.may_track

    @property
    def may_track(self) -> bool:
        return self.training and self.held("running_mean") is not None

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Take running statistics back to where they started, as torch's; on all ranks."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            held = self.held(name)
            if held is not None:
                held.fill_(value)

    def factor(self) -> float:
        """The weight of the newest statistics among the running ones."""
        raise NotImplementedError

    def running(self, built: Built) -> tuple[torch.Tensor | None, ...]:
        """Running statistics as the input is cut, None where they are neither used nor updated."""
        mean, var = self.held("running_mean"), self.held("running_var")
        if mean is None or (self.training and not self.track_running_stats):
            return None, None
        return (mean, var) if built.fit is None else (built.fit.apply(mean), built.fit.apply(var))

    @torch.no_grad()
    def track(self, built: Built, mean: torch.Tensor, var: torch.Tensor) -> None:
        assert built.rows is not None
        count, factor = built.rows.count, self.factor()
        latest = self.per_feature(mean, var * (count / (count - 1)), built)
        for running, new in zip((self.running_mean, self.running_var), latest, strict=True):
            new = new if built.fit is None else built.fit.adjoint.apply(new)
            running.copy_((1 - factor) * running.double() + factor * new)

    def per_feature(self, mean: torch.Tensor, var: torch.Tensor, built: Built) -> tuple[torch.Tensor, torch.Tensor]:
        """From statistics of the rows to those of the channels over the whole batch."""
        return mean, var

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
    weights_are_per_row = True
    least_dims = 2

    @property
    def gamma(self) -> torch.nn.Parameter | None:
        """DistDL's name of the weight."""
        return self.weight

    @property
    def beta(self) -> torch.nn.Parameter | None:
        """DistDL's name of the bias."""
        return self.bias

    def check_shape(self, shape: Shape) -> None:
        if self.uses_batch and self.eps == 0:
            raise self._refuse("eps=0 is refused in training, as by torch")
        if self.uses_batch and math.prod(shape) == shape[1]:
            size = torch.Size(shape)
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")

    def rows(self, X: Layout) -> tuple[tuple[Dim, ...], int]:
        batch, _, *space = lay.global_shape_of(X)
        return X.dims[1:2], math.prod((batch, *space))

    def as_channels(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def per_channel(self, parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return parameter

    def pivot(self, x: torch.Tensor, built: Built) -> torch.Tensor:
        mean, _ = self.running(built)
        return super().pivot(x, built) if mean is None else mean.double()

    def factor(self) -> float:
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _run(self, x: torch.Tensor, built: Built) -> torch.Tensor:
        if self.tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return super()._run(x, built)

    def saves_nothing(self) -> bool:
        """Of no values torch's returns a copy, times the weight if there is one."""
        return weight_dtype(self) is None and self._distdl_structure.is_empty

    def _distdl_recomputed(self, input: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.saves_nothing():
            return super()._distdl_recomputed(input)
        # What follows may save tensors, and so run the layer again: on all ranks or none, as all have a graph or none has.
        return (anchored(input[0], self._distdl_structure.requires_grad),)

    def alone(self, x: torch.Tensor, *held: torch.Tensor | None) -> torch.Tensor:
        weight, bias, mean, var = held
        factor = self.factor() if self.tracks else 0.0
        return by_kernel(F.batch_norm, x, mean, var, weight, bias, self.training or mean is None, factor, self.eps)


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
    tracks_early = False  # as torch's

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

    def check_shape(self, shape: Shape) -> None:
        if self.uses_batch and math.prod(shape[2:]) == 1:
            size = torch.Size(shape)
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {size}")

    def rows(self, X: Layout) -> tuple[tuple[Dim, ...], int]:
        return X.dims[:2], math.prod(lay.global_shape_of(X)[2:])

    def factor(self) -> float:
        return 0.0 if self.momentum is None else self.momentum

    def per_feature(self, mean: torch.Tensor, var: torch.Tensor, built: Built) -> tuple[torch.Tensor, torch.Tensor]:
        # All ranks with the channels take part, so that the replicas stay bitwise equal. Each sample is there once per
        # block of space, which the mean does not feel.
        assert built.rows is not None
        parts = torch.stack([mean, var, torch.ones_like(mean)]).view(3, *built.rows.shape).sum(1)
        mean, var, number = self._distdl_transport.all_reduce(built.team, parts)
        return mean / number, var / number

    def alone(self, x: torch.Tensor, *held: torch.Tensor | None) -> torch.Tensor:
        weight, bias, *running = held
        # As of a block with a dim of length one, see `by_kernel`: torch makes all channels those of one sample.
        y = F.instance_norm(x.flatten(2), *running, weight, bias, self.uses_batch, self.factor(), self.eps)
        return y.view(x.shape)
