"""Normalisation per channel, over the batch or over each sample, with running statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.nn.blocks import anchored
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import weight_dtype
from distdl_lite.nn.norm.base import Kernel, Norm, by_kernel, normalised
from distdl_lite.nn.value import Value, rule


def by_channel(c: Compiler, x: Value, over_samples: bool, batch: bool, eps: float, *held: Any, **options: Any) -> Value:
    """The rule of batch norms or, if not `over_samples`, of instance norms; the rest is as of `normalised`."""
    if over_samples and batch and eps == 0:
        raise ValueError("eps=0 is refused in training, as by torch")
    over = (0,) * over_samples + tuple(range(2, x.ndim))

    def alone(x: torch.Tensor, factor: float, weight: Any, bias: Any, *running: Any) -> torch.Tensor:
        if over_samples:
            return by_kernel(F.batch_norm, x, *running, weight, bias, batch, factor, eps)
        # As of a block with a dim of length one, see `by_kernel`: torch makes all channels those of one sample.
        return F.instance_norm(x.flatten(2), *running, weight, bias, batch, factor, eps).view(x.shape)

    return normalised(c, Kernel(alone, eps, over), x, *held, batch=batch, **options)


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_native_batch_norm_legit_functional")  # fmt: skip
def batch_norm(c: Compiler, op: Any, x: Value, weight: Value | None, bias: Value | None, *rest: Any) -> Any:
    """Of torch's results, those that only its own backward reads are None."""
    batch = next((v for v in rest if isinstance(v, bool)), False)
    *running, momentum, eps = (v for v in rest if not isinstance(v, bool))
    running, is_functional = running or [None, None], op.name.endswith("_functional")
    if is_functional and batch:
        dims = (x.dims[1],)
        running = [c.call(torch.clone, c.move(v, dims), dims=dims, dtype=v.dtype) for v in running]
    y = by_channel(c, x, True, batch, eps, weight, bias, running, momentum if batch else None)
    return y if op.is_one else [y, None, None, *(running if is_functional else ())]


@rule("instance_norm")
def instance_norm(c: Compiler, op: Any, x: Value, *rest: Any) -> Value:
    """Changes running statistics where they are: torch's record does not say that they are changed."""
    weight, bias, mean, var, batch, momentum, eps, _ = rest
    return by_channel(c, x, False, batch, eps, weight, bias, (mean, var), momentum if batch else None)


class _RunningNorm(Norm):
    """Base of both: weights and running statistics per channel."""

    _distdl_free = frozenset({"eps", "momentum"})
    # Whether a row is a channel of all samples; the gradients of the weights are then summed with its statistics'.
    over_samples = False

    def _held(self, device: str) -> dict[str, Any]:
        held = super()._held(device)
        return held if self.momentum is not None else {**held, "momentum": 0.1}  # the number of batches has no value

    reset_running_stats = torch.nn.BatchNorm1d.reset_running_stats

    def factor(self, c: Compiler, number: Value | None) -> Any:
        """The weight of the newest statistics among the running ones, after so many."""
        return 0.0 if self.momentum is None else self.momentum

    def rule(self, c: Compiler, x: Value, **held: Value) -> Value:
        names = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
        weight, bias, *running, number = map(held.get, names)
        batch = self.training or running[0] is None
        tracks = self.training and self.track_running_stats and running[0] is not None
        factor = self.factor(c, number) if tracks else None
        running = [None, None] if batch and factor is None else running
        team = self._distdl_transport.team(c.grid.members({1: c.index[1]}))
        team = team if self.over_samples and team.size > 1 else None
        return by_channel(c, x, self.over_samples, batch, self.eps, weight, bias, running, factor, team=team)


class _BatchNorm(torch.nn.BatchNorm1d):
    """torch's, of any number of dims."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


class _InstanceNorm(torch.nn.InstanceNorm1d):
    """torch's, of any number of dims."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.affine and input.shape[1] != self.num_features:  # else any number goes
            raise ValueError(f"expected num_features={self.num_features} channels, got {input.shape[1]}")
        sample = input if len(input) else input.new_empty(1, *input.shape[1:])  # with none torch's takes no weights
        return self._apply_instance_norm(sample)  # type: ignore[no-any-return]


class DistributedBatchNorm(_RunningNorm, serial=_BatchNorm):
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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2))
    ...     norm = dl.nn.DistributedBatchNorm(P, 1, momentum=1.0)
    ...     norm(P.cut(torch.arange(7.0).view(1, 1, 7)))
    ...     return norm.running_mean.tolist()
    >>> dl.testing.spmd(2, body)
    [[3.0], [3.0]]
    """

    _distdl_free = frozenset({"eps", "momentum", "track_running_stats"})
    over_samples = True

    @property
    def gamma(self) -> torch.nn.Parameter | None:
        """DistDL's name of the weight."""
        return self.weight

    @property
    def beta(self) -> torch.nn.Parameter | None:
        """DistDL's name of the bias."""
        return self.bias

    def factor(self, c: Compiler, number: Value | None) -> Any:
        if number is not None:
            number = c.call(torch.Tensor.add_, number, 1, dims=(), dtype=number.dtype)
        if number is None or self.momentum is not None:
            return self.momentum
        return c.call(lambda n: 1.0 / n.double(), number, dims=(), dtype=torch.float64)

    def _distdl_recomputed(self, input: tuple[Any, ...]) -> tuple[Any, ...]:
        if weight_dtype(self) is not None or not self._distdl_structure.is_empty:
            return super()._distdl_recomputed(input)
        # Of no values torch's returns a copy, times the weight if there is one, and a checkpoint does not run it again. What
        # follows may save tensors, and so run it again: on all ranks or none, as all have a graph or none has.
        return (anchored(input[0], self._distdl_structure.requires_grad),)


class DistributedInstanceNorm(_RunningNorm, serial=_InstanceNorm):
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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2))
    ...     y = dl.nn.DistributedInstanceNorm(P, 1)(P.cut(torch.tensor([[[0.0, 2.0, 0.0, 2.0]]])))
    ...     return y.round(decimals=3).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[-1.0, 1.0]]], [[[-1.0, 1.0]]]]
    """

    least_dims = 3
