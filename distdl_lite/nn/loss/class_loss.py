"""Losses over classes, also where the class dim is cut: no rank then sees all logits of a point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import own_box, wide
from distdl_lite.nn.loss.loss import Block, _DistributedLoss
from distdl_lite.nn.norm.softmax import CutDim, cut_dim, log_softmax
from distdl_lite.nn.options import integers, numbers
from distdl_lite.partition import Partition


def _readable(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's function of an input laid out as its backward needs it in four dims."""
    return lambda input, target, **options: function(input.contiguous(), target, **options)


@dataclass(frozen=True)
class _ClassBlock(Block):
    """Also the class dim if it is cut."""

    over_classes: CutDim | None
    counts: bool  # whether this rank, of those that hold the same points, counts their weights


class DistributedNLLLoss(_DistributedLoss):
    """torch's NLLLoss over the tensor that the blocks over `P_x` form, any axis of which may be cut.

    Input of log-probabilities ``(C,)`` or ``(N, C, *space)``, target of class indices without the class dim, in blocks
    that match. Ranks that differ only along the class axis pass the same target block.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input.
    weight : torch.Tensor, optional
        Of all ``C`` classes, the same on all ranks.
    ignore_index, reduction
        As in torch; a mean divides by the global sum of the targets' weights. With "none" the terms of the target's block,
        the same on ranks that differ only along the class axis, and so is the gradient that each of them takes.

    Raises
    ------
    ValueError
        At build, on all ranks, if input, target and weight do not fit.
    IndexError
        If a target is no class: on all ranks, with reduction "none" on those that hold this target.

    Notes
    -----
    The value is one number shown on every rank, and its gradient the serial one, as for the other losses. With reduction
    "none" and cut classes the terms are summed in one all-reduce among the ranks that hold classes of the same points.
    """

    function = _readable(F.nll_loss)

    def __init__(
        self,
        P_x: Partition,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        integers(self, ignore_index=ignore_index)
        super().__init__(P_x, reduction, weight=weight, ignore_index=ignore_index, **options)
        self._axis = 0 if P_x.dim == 1 else 1

    def _target_shape(self, input: Shape, target: Shape, dtype: torch.dtype) -> Shape:
        return self._without_classes(input)

    def _without_classes(self, input: Shape) -> Shape:
        return (*input[: self._axis], *input[self._axis + 1 :])

    def _local_options(self, box: lay.Box) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._options}

    def _block(self, X: Layout, graph: bool) -> _ClassBlock:
        counts = X.grid.index(self._distdl_transport.rank)[self._axis] == 0
        over_classes = cut_dim(self, X, self._axis, graph)
        return _ClassBlock(own_box(self, X), lay.global_shape_of(X), graph, over_classes, counts)

    def _check_weight(self, name: str, weight: torch.Tensor, shape: Shape) -> None:
        if weight.shape != (shape[self._axis],):
            raise self._refuse(f"{name} of shape {tuple(weight.shape)} does not fit {shape[self._axis]} classes")

    def _terms(self, input: torch.Tensor, target: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        if block.over_classes is None:
            return super()._terms(input, target, block)
        log_p = self._log_probabilities(input, block)
        terms = partial(self._partial, log_p, target, block)
        if self.reduction == "none":  # shown on all ranks that hold classes of these points
            nothing = log_p.new_zeros(self._without_classes(log_p.shape))
            found = self._added_up(terms, nothing, block.over_classes.team)
        else:
            found = terms()
        return found if torch.is_autocast_enabled(input.device.type) else found.to(input.dtype)

    def _log_probabilities(self, input: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        """The input; autocast has torch's loss compute in single precision."""
        return input.to(wide(input.dtype)) if torch.is_autocast_enabled(input.device.type) else input

    def _partial(self, log_p: torch.Tensor, target: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        """The terms as far as they come from this rank's classes."""
        start, stop = block.box[self._axis]
        classes = block.global_shape[self._axis]
        is_counted = target != self.ignore_index
        wrong = target[is_counted & ((target < 0) | (target >= classes))]
        if wrong.numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
        if start == stop:
            return self._weighted(log_p, block).sum(self._axis)
        is_mine = is_counted & (target >= start) & (target < stop)
        index = torch.where(is_mine, target - start, 0)
        picked = self._weighted(log_p, block).gather(self._axis, index.unsqueeze(self._axis)).squeeze(self._axis)
        return -torch.where(is_mine, picked, 0)

    def _weighted(self, log_p: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        if self.weight is None:
            return log_p
        shape = [-1 if a == self._axis else 1 for a in range(log_p.dim())]
        return log_p * self.weight[slice(*block.box[self._axis])].view(shape)

    def _weight(self, terms: torch.Tensor, target: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        is_counted = target != self.ignore_index
        weights = is_counted if self.weight is None else self.weight[target[is_counted]]
        return weights.sum(dtype=torch.float64) * block.counts


class DistributedCrossEntropyLoss(DistributedNLLLoss):
    """torch's CrossEntropyLoss over the tensor that the blocks over `P_x` form, any axis of which may be cut.

    Input of logits ``(C,)`` or ``(N, C, *space)``; the target holds class indices and has no class dim, or probabilities
    in the input's blocks. Where the classes are cut, their ranks share maxima and sums of exponentials, no logits.

    Parameters
    ----------
    P_x, weight, ignore_index, reduction
        As in `DistributedNLLLoss`.
    label_smoothing : float
        As in torch.

    Raises
    ------
    ValueError, IndexError
        As in `DistributedNLLLoss`; also in the constructor if `label_smoothing` is not in [0, 1].
    """

    function = _readable(F.cross_entropy)

    def __init__(
        self,
        P_x: Partition,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        numbers(self, label_smoothing=label_smoothing)
        if not 0.0 <= label_smoothing <= 1.0:
            raise self._refuse(f"label_smoothing={label_smoothing} is not in [0, 1]")
        super().__init__(
            P_x, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    def _target_shape(self, input: Shape, target: Shape, dtype: torch.dtype) -> Shape:
        if len(target) != len(input) or not dtype.is_floating_point:
            return self._without_classes(input)
        if self.ignore_index >= 0:
            raise self._refuse(f"ignore_index={self.ignore_index} with a target of probabilities")
        return input

    def _log_probabilities(self, input: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        """log_softmax over the cut class dim."""
        assert block.over_classes is not None
        return log_softmax(input.to(wide(input.dtype)), block.over_classes)

    def _partial(self, log_p: torch.Tensor, target: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        classes, smoothing = block.global_shape[self._axis], self.label_smoothing
        if target.dim() == log_p.dim():
            smooth = target * (1 - smoothing) + smoothing / classes
            return -(self._weighted(log_p, block) * smooth).sum(self._axis)
        terms = super()._partial(log_p, target, block)
        if smoothing:
            even = -self._weighted(log_p, block).sum(self._axis).masked_fill(target == self.ignore_index, 0)
            terms = (1 - smoothing) * terms + smoothing / classes * even
        return terms

    def _weight(self, terms: torch.Tensor, target: torch.Tensor, block: _ClassBlock) -> torch.Tensor:
        if target.dim() == terms.dim():
            return super()._weight(terms, target, block)
        return torch.full_like(terms.sum(), terms.numel() * block.counts, dtype=torch.float64, requires_grad=False)

    def _mean(self, total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean = super()._mean(total, weight)
        # torch divides the terms of the labels by themselves, which is 0 / 0 where all weights are 0.
        return mean + 0 / weight if self.label_smoothing else mean
