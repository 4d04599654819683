"""Losses over classes, also where the class dim is cut: no rank then sees all logits of a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.factors import all_axes
from distdl_lite.layout import Range, Shape
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.loss.loss import MEAN, _DistributedLoss, counted, reduced_loss
from distdl_lite.nn.norm.softmax import along, log_softmax
from distdl_lite.nn.value import Value, rule


@rule("nll_loss_nd", "nll_loss", "nll_loss2d", "cross_entropy_loss")
def class_loss(
    c: Compiler,
    op: Any,
    x: Value,
    target: Value,
    weight: Value | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    is_shown: bool = False,
) -> Value:
    """The negative log-likelihood of classes, or of probabilities of them, from logits or from their log-softmax.

    Of a value ``(C,)`` or ``(N, C, *space)``, the classes of which may be cut too; see `reduced_loss`.
    """
    axis, has_classes, has_logits = min(x.ndim - 1, 1), target.ndim == x.ndim, op.name == "cross_entropy_loss"
    x, weight = c.plain(x, [axis]), None if weight is None else c.whole(weight)
    if not all_axes(x.dims):  # cut as the target is
        x = c.move(x, target.dims if has_classes else (*target.dims[:axis], x.dims[axis], *target.dims[axis:]))
    rest, over = (*x.dims[:axis], *x.dims[axis + 1 :]), x.axes(axis)
    target = c.move(target, x.dims if has_classes else rest)
    last = (ignore_index, label_smoothing) if has_logits else (ignore_index,)
    counts = all(c.index[a] == 0 for a in over)  # of the ranks that hold the same points

    def whole(x: torch.Tensor, target: torch.Tensor, weight: Any, reduction: int) -> torch.Tensor:
        """torch's loss of an input laid out as its backward needs it in four dims."""
        return op.function(x.contiguous(), target, weight, reduction, *last)  # type: ignore[no-any-return]

    def weigh(terms: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: Any) -> torch.Tensor:
        if has_classes:
            return counted(terms) * counts
        is_counted = target != ignore_index
        return (is_counted if weight is None else weight[target[is_counted]]).sum(dtype=torch.float64) * counts

    def mean(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean = total / weight
        # torch divides the terms of the labels by themselves, which is 0 / 0 where all weights are 0.
        return mean + 0 / weight if label_smoothing else mean

    terms = None
    if over:
        x = c.cast(x, wide(x.dtype))
        x = along(c, torch.log_softmax, log_softmax, x, axis, x.dims) if has_logits else x
        terms = Terms(axis, c.range(x.dims[axis][0]), x.shape[axis], ignore_index, label_smoothing)
    return reduced_loss(c, whole, [x, target, weight], rest, reduction, op.dtype, terms, weigh, mean, over, is_shown)


@dataclass(frozen=True)
class Terms:
    """The terms as far as they come from this rank's classes, from log-probabilities."""

    dim: int
    held: Range  # the classes
    classes: int  # of all ranks
    ignore_index: int
    label_smoothing: float

    def __call__(self, log_p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            log_p = log_p * weight[slice(*self.held)].view(-1, *(1,) * (log_p.dim() - self.dim - 1))
        if target.dim() < log_p.dim():
            return self._picked(log_p, target)
        smooth = target * (1 - self.label_smoothing) + self.label_smoothing / self.classes
        return -(log_p * smooth).sum(self.dim)

    def _picked(self, log_p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The terms of class indices from the weighted log-probabilities."""
        is_counted = target != self.ignore_index
        wrong = target[is_counted & ((target < 0) | (target >= self.classes))]
        if wrong.numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
        if not log_p.shape[self.dim]:
            return log_p.sum(self.dim)
        is_mine = is_counted & (target >= self.held[0]) & (target < self.held[1])
        index = torch.where(is_mine, target - self.held[0], 0).unsqueeze(self.dim)
        terms = -torch.where(is_mine, log_p.gather(self.dim, index).squeeze(self.dim), 0)
        if self.label_smoothing:
            even = -log_p.sum(self.dim).masked_fill(~is_counted, 0)
            terms = (1 - self.label_smoothing) * terms + self.label_smoothing / self.classes * even
        return terms


class DistributedNLLLoss(_DistributedLoss, serial=torch.nn.NLLLoss):
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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((2, 1))
    ...     logs = P.cut(torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]))
    ...     return round(dl.nn.DistributedNLLLoss(P)(logs, P.cut(torch.tensor([0, 1, 0]), (0,))).item(), 4)
    >>> dl.testing.spmd(2, body)
    [3.3333, 3.3333]
    """

    operation = "nll_loss_nd"

    def _target_dims(self, input: Shape, target: Shape, dtype: torch.dtype) -> Sequence[int]:
        axis = min(len(input) - 1, 1)
        return [d for d in range(len(input)) if d != axis]

    def rule(self, c: Compiler, x: Value, t: Value, **held: Value) -> Value:
        if "weight" in held and held["weight"].ndim != 1:  # torch takes a column, too
            raise ValueError(f"weight of shape {held['weight'].shape} is not one number for each class")
        return super().rule(c, x, t, **held)


class DistributedCrossEntropyLoss(DistributedNLLLoss, serial=torch.nn.CrossEntropyLoss):
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
        As in `DistributedNLLLoss`.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))  # the classes are cut
    ...     return round(dl.nn.DistributedCrossEntropyLoss(P)(P.cut(torch.zeros(3, 5)), torch.tensor([0, 1, 4])).item(), 4)
    >>> dl.testing.spmd(2, body)
    [1.6094, 1.6094]
    """

    operation = "cross_entropy_loss"

    def _target_dims(self, input: Shape, target: Shape, dtype: torch.dtype) -> Sequence[int]:
        has_classes = len(target) == len(input) and dtype.is_floating_point
        return range(len(input)) if has_classes else super()._target_dims(input, target, dtype)
