"""Batch normalisation with global statistics: one all-reduce forward, one backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, Layout, ranges_of
from distdl_lite.nn.batch_norm import HALVES, Built, normalised
from distdl_lite.nn.kernel import connected_zeros
from distdl_lite.nn.movement import Inputs, agreed_inputs
from distdl_lite.nn.parameter import Layer, constant
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan


class DistributedBatchNorm(Layer):
    """Batch normalisation over the tensor that the blocks over `P_x` form, equal to torch's for every option.

    Input and output ``(N, C, *space)`` with any number of spatial dims, in blocks of any sizes, the channels balanced.
    Ranks outside `P_x` pass and get zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``. Parameters and buffers are cut along ``P_c`` and replicated over the other axes.
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in torch.nn.BatchNorm1d/2d/3d.

    Raises
    ------
    ValueError
        On all ranks: in the constructor if `P_x` has less than two axes; at build if the channels are not `num_features` in
        balanced blocks, or there is one value per channel to train with (torch's text).
    TypeError
        At build, if the dtypes of input and weight do not go together.

    Notes
    -----
    Each rank finds mean and sum of squared deviations of its block in float64. Float32 ranks add up ``(n, sum(x - c),
    sum((x - c)^2))`` about a common pivot c, the running mean; float64 ranks gather theirs and merge them exactly (Chan,
    Golub and LeVeque 1979). The gradients of weight and bias come out of the all-reduce in backward, already
    summed over the replicas. With running statistics in use nothing is communicated forward.
    """

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
    ) -> None:
        super().__init__(P_x)
        if P_x.dim < 2:
            raise self._refuse(f"P_x of shape {P_x.shape} has {P_x.dim} axes, a tensor (N, C, *space) has two or more")
        self.P_x, self.num_features, self.eps, self.momentum = P_x, num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        grid = P_x.grid_of_ranks
        self._cuts = balanced(num_features, P_x.shape[1])
        channels = Layout(grid, (Dim(ranges_of(self._cuts), (1,)),))
        weights, statistics = channels if affine else None, channels if track_running_stats else None
        self.place("weight", weights, constant(1.0), dtype, device)
        self.place("bias", weights, constant(0.0), dtype, device)
        self.place("running_mean", statistics, constant(0.0), dtype, device, buffer=True)
        self.place("running_var", statistics, constant(1.0), dtype, device, buffer=True)
        number = Layout(grid, ()) if track_running_stats else None
        self.place("num_batches_tracked", number, constant(0), torch.long, device, buffer=True)

    @property
    def gamma(self) -> torch.nn.Parameter | None:
        """DistDL's name of the weight."""
        return self.weight

    @property
    def beta(self) -> torch.nn.Parameter | None:
        """DistDL's name of the bias."""
        return self.bias

    def _refuse(self, why: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {why}")

    # ---- set-up ------------------------------------------------------------------------------------------------------

    @property
    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Built:
        inputs = agreed_inputs(type(self).__name__, self._distdl_structure, self.P_x)
        grid = self.P_x.grid_of_ranks
        cuts = lay.cuts_from_shapes(grid, inputs.shapes)
        if cuts[1] != self._cuts:
            raise self._refuse(
                f"the input's channels are cut at {cuts[1]}, those of num_features={self.num_features} at {self._cuts}"
            )
        self._check_dtype(inputs)
        batch, _, *space = (cut[-1] for cut in cuts)
        count = batch * math.prod(space)
        if count == 1 and self._uses_batch:
            size = torch.Size((batch, self.num_features, *space))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        index = grid.index(self._distdl_transport.rank)
        assert index is not None
        team = tuple(sorted(grid.members({1: index[1]})))
        counts = tuple(math.prod((n, *space)) for n, _, *space in (inputs.shapes[r] for r in team))
        gather = self._sum_over_team((len(team),)) if inputs.dtype is torch.float64 else None
        graph = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        return Built(self._sum_over_team(()), gather, team, counts, count, graph)

    def _sum_over_team(self, lead: tuple[int, ...]) -> Operator:
        """The sum of two numbers per channel over the ranks that share the channels."""
        shapes = {(i,): (*lead, 2 * (b - a)) for i, (a, b) in enumerate(ranges_of(self._cuts))}
        X = lay.copies(self.P_x.grid_of_ranks, (1,), shapes)
        return Operator(
            plan(X, X, self._distdl_transport.rank), self._distdl_transport, type(self).__name__, graph=True
        )

    def _check_dtype(self, inputs: Inputs) -> None:
        held = self.weight if self.weight is not None else self.running_mean
        if held is None or held.dtype is inputs.dtype:
            return
        if not (inputs.dtype in HALVES and held.dtype is torch.float32):
            name = type(self).__name__
            raise TypeError(f"{name}: the input has dtype {inputs.dtype}, weights and statistics {held.dtype}")

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._distdl_is_inside:
            return x
        built: Built = self._distdl_plan
        tracks = self.training and self.track_running_stats
        if tracks:
            self.num_batches_tracked.add_(1)
        if built.count == 0 or not self._uses_batch or len(built.counts) == 1:
            return self._local(x, tracks)
        pivot = self.running_mean.double() if tracks else torch.zeros((), dtype=torch.float64, device=x.device)
        y, mean, var = normalised(x, self.weight, self.bias, pivot, self.eps, built)
        if tracks:
            self._track(mean, var, built.count)
        return y

    def _factor(self) -> float:
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _local(self, x: torch.Tensor, tracks: bool) -> torch.Tensor:
        """torch's own, where no other rank's values count."""
        used = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        factor = self._factor() if tracks else 0.0
        if not x.shape[1]:
            return connected_zeros(x.shape, x, self.use("weight"), self.use("bias"))
        return F.batch_norm(x, *used, self.use("weight"), self.use("bias"), self._uses_batch, factor, self.eps)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        factor = self._factor()
        for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            running.copy_((1 - factor) * running.double() + factor * new)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, P_x={self.P_x.shape}"
        )
