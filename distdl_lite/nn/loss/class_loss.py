"""Losses over classes, also where the class dim is cut: no rank then sees all logits of a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.factors import all_axes, uncut
from distdl_lite.layout import Layout, Range, Shape
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.loss.loss import REDUCTIONS, Function, _DistributedLoss, counted, reduced_loss
from distdl_lite.nn.norm.softmax import CutDim, log_softmax
from distdl_lite.nn.value import Value, rule


@rule("nll_loss_nd", "nll_loss", "nll_loss2d", "cross_entropy_loss")
def class_loss(
    c: Compiler,
    op: Any,
    x: Value,
    target: Value,
    weight: Value | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Value:
    kind = ClassLoss(op.name == "cross_entropy_loss", ignore_index, label_smoothing)
    return kind.of(c, x, target, weight, REDUCTIONS[reduction], op.dtype)


@dataclass(frozen=True)
class ClassLoss:
    """The negative log-likelihood of classes, or of probabilities of them, from logits or from their log-softmax."""

    has_logits: bool
    ignore_index: int
    label_smoothing: float = 0.0

    def of(
        self,
        c: Compiler,
        x: Value,
        target: Value,
        weight: Value | None,
        reduction: str,
        dtype: torch.dtype,
        is_shown: bool = False,
    ) -> Value:
        """The loss of a value ``(C,)`` or ``(N, C, *space)``, the classes of which may be cut too; see `reduced_loss`."""
        axis, has_classes = min(x.ndim - 1, 1), target.ndim == x.ndim
        x, weight = c.plain(x, [axis]), None if weight is None else c.whole(weight)
        if not all_axes(x.dims):  # cut as the target is
            x = c.move(x, target.dims if has_classes else (*target.dims[:axis], x.dims[axis], *target.dims[axis:]))
        rest, over = (*x.dims[:axis], *x.dims[axis + 1 :]), x.axes(axis)
        args = [x, c.move(target, x.dims if has_classes else rest), weight]
        counts = all(c.index[a] == 0 for a in over)  # of the ranks that hold the same points

        def weigh(terms: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: Any) -> torch.Tensor:
            if has_classes:
                return counted(terms) * counts
            is_counted = target != self.ignore_index
            return (is_counted if weight is None else weight[target[is_counted]]).sum(dtype=torch.float64) * counts

        terms = self._of_cut(c, x, axis) if over else None
        return reduced_loss(c, self.whole, args, rest, reduction, dtype, terms, weigh, self._mean, over, is_shown)

    def whole(
        self, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str = "none"
    ) -> torch.Tensor:
        """torch's loss of an input laid out as its backward needs it in four dims."""
        options: dict[str, Any] = {"weight": weight, "ignore_index": self.ignore_index, "reduction": reduction}
        if not self.has_logits:
            return F.nll_loss(x.contiguous(), target, **options)
        return F.cross_entropy(x.contiguous(), target, label_smoothing=self.label_smoothing, **options)

    def _mean(self, total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean = total / weight
        # torch divides the terms of the labels by themselves, which is 0 / 0 where all weights are 0.
        return mean + 0 / weight if self.label_smoothing else mean

    def _of_cut(self, c: Compiler, x: Value, axis: int) -> Function:
        """The terms as far as they come from this rank's classes, found in blocks with one dim for each factor."""
        factors, at = [f for of_dim in x.dims for f in of_dim], sum(map(len, x.dims[:axis]))
        S = Layout(c.grid, tuple(uncut(1) if i == at else f for i, f in enumerate(factors)), c.free_axes(x.axes(axis)))
        add_up = c.names[c.operator(S, S, replace(x, grad=True), "all_reduce")]
        along, held, classes = CutDim((at,), c.team(x.axes(axis)), add_up), c.range(factors[at]), x.shape[axis]
        shape, given = c.local(tuple((f,) for f in factors)), c.local((*x.dims[:axis], *x.dims[axis + 1 :]))

        def terms(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            log_p, smoothing = x.to(wide(x.dtype)).reshape(shape), self.label_smoothing
            log_p = log_softmax(log_p, along) if self.has_logits else log_p
            if weight is not None:
                log_p = log_p * weight[slice(*held)].view(-1, *(1,) * (len(shape) - at - 1))
            if target.dim() == x.dim():
                smooth = target.reshape(shape) * (1 - smoothing) + smoothing / classes
                return -(log_p * smooth).sum(at).reshape(given)
            target = target.reshape((*shape[:at], *shape[at + 1 :]))
            return self._picked(log_p, target, at, held, classes).reshape(given)

        return terms

    def _picked(self, log_p: torch.Tensor, target: torch.Tensor, dim: int, held: Range, classes: int) -> torch.Tensor:
        """The terms of class indices from the weighted log-probabilities of the classes held."""
        is_counted = target != self.ignore_index
        wrong = target[is_counted & ((target < 0) | (target >= classes))]
        if wrong.numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
        if not log_p.shape[dim]:
            return log_p.sum(dim)
        is_mine = is_counted & (target >= held[0]) & (target < held[1])
        index = torch.where(is_mine, target - held[0], 0)
        terms = -torch.where(is_mine, log_p.gather(dim, index.unsqueeze(dim)).squeeze(dim), 0)
        if self.label_smoothing:
            even = -log_p.sum(dim).masked_fill(~is_counted, 0)
            terms = (1 - self.label_smoothing) * terms + self.label_smoothing / classes * even
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
    """

    has_logits = False
    label_smoothing = 0.0

    def _target_dims(self, input: Shape, target: Shape, dtype: torch.dtype) -> Sequence[int]:
        axis = min(len(input) - 1, 1)
        return [d for d in range(len(input)) if d != axis]

    def _rule(self, c: Compiler, x: Value, t: Value, held: Mapping[str, Value], dtype: torch.dtype) -> Value:
        weight, classes = held.get("weight"), x.shape[min(x.ndim - 1, 1)]
        if weight is not None and weight.shape != (classes,):  # torch takes a column, too
            raise ValueError(f"weight of shape {weight.shape} does not fit {classes} classes")
        kind = ClassLoss(self.has_logits, self.ignore_index, self.label_smoothing)
        return kind.of(c, x, t, weight, self.reduction, dtype, is_shown=True)


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
    """

    has_logits = True

    def _target_dims(self, input: Shape, target: Shape, dtype: torch.dtype) -> Sequence[int]:
        has_classes = len(target) == len(input) and dtype.is_floating_point
        return range(len(input)) if has_classes else super()._target_dims(input, target, dtype)
