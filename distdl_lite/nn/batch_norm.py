"""Normalisation by statistics over all ranks, and its adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.operator import Operator
from distdl_lite.shown import shown, used

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Built:
    """What forward needs for one structure."""

    add_up: Operator  # two float64 numbers per channel, over the ranks that share the channels
    gather: Operator | None  # for float64 input: the same, a row for each of these ranks
    team: tuple[int, ...]  # these ranks
    counts: tuple[int, ...]  # their values per channel
    count: int
    graph: bool


def normalised(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    pivot: torch.Tensor,
    eps: float,
    built: Built,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised block, and mean and biased variance of each channel over all ranks in float64.

    The gradients of weight and bias are already summed over the ranks.
    """
    anchor = torch.empty(0, requires_grad=True) if built.graph else None
    return _BatchNorm.apply(x, weight, bias, anchor, pivot, eps, built)


def _statistics(x: torch.Tensor, pivot: torch.Tensor, built: Built) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel over all ranks, in float64."""
    row, channels = built.team.index(built.add_up.plan.rank), x.shape[1]
    n = built.counts[row]
    if x.numel():
        mean, var = torch.batch_norm_update_stats(x.double(), None, None, 0.0)
    else:
        mean = var = torch.zeros(channels, dtype=torch.float64, device=x.device)
    if built.gather is None:
        apart = (mean - pivot) * n
        sums = built.add_up.apply(torch.cat([apart, var * n + (mean - pivot) * apart]))
        shift, square = (sums / built.count).view(2, channels)
        return pivot + shift, (square - shift * shift).clamp_(min=0)
    rows = x.new_zeros(len(built.counts), 2 * channels)
    rows[row] = torch.cat([mean, var])
    means, variances = built.gather.apply(rows).view(len(built.team), 2, channels).unbind(1)
    shares = torch.tensor(built.counts, dtype=x.dtype, device=x.device).unsqueeze(1) / built.count
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)


class _BatchNorm(torch.autograd.Function):
    """Normalisation by the batch's statistics; `_composed` is the same in plain operations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        anchor: torch.Tensor | None,
        pivot: torch.Tensor,
        eps: float,
        built: Built,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, var = _statistics(x, pivot, built)
        ctx.built, ctx.eps = built, eps
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.mark_non_differentiable(mean, var)
        if not x.numel():
            return torch.empty_like(x), mean, var
        kind = torch.float32 if x.dtype in HALVES else x.dtype
        channelwise = [None if t is None else t.to(kind) for t in (mean, var, weight, bias)]
        return F.batch_norm(x, *channelwise, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiable_backward(gradient, x, weight, bias, mean, ctx.eps, ctx.built)
        else:
            found = _backward(gradient, x, weight, mean, var, ctx.eps, ctx.built)
        wanted = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None, None)


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    built: Built,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; the latter two are sums over all ranks, and the input's needs them."""
    dtype, kind = x.dtype, torch.float32 if x.dtype in HALVES else x.dtype
    x, gradient = x.to(kind), gradient.to(kind)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    sums = mean.new_zeros(2 * x.shape[1])
    gx = gradient
    if x.numel():
        w, m, v = (None if t is None else t.to(kind) for t in (weight, mean, var))
        # As with fixed statistics, in torch's one pass; what the statistics add to gx follows.
        gx, *parts = torch.ops.aten.native_batch_norm_backward(
            gradient, x, w, m, v, None, None, False, eps, [True, True, True]
        )
        sums = torch.cat(parts).double()
    gw, gb = built.add_up.apply(sums).view(2, x.shape[1])
    if x.numel():
        shape = (1, -1, *(1,) * (x.dim() - 2))
        slope, offset = ((t / built.count * scale).to(kind).view(shape) for t in (gw * (var + eps).rsqrt(), gb))
        gx = gx.sub_((x - mean.to(kind).view(shape)).mul_(slope).add_(offset))
    held = kind if weight is None else weight.dtype
    return gx.to(dtype), gw.to(held), gb.to(held)


def _composed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    pivot: torch.Tensor,
    eps: float,
    built: Built,
) -> torch.Tensor:
    """The normalised tensor by differentiable operations, in float64 about a pivot near the mean."""
    shape, over = (1, -1, *(1,) * (x.dim() - 2)), (0, *range(2, x.dim()))
    apart = x.double() - pivot.view(shape)
    sums = built.add_up(torch.cat([apart.sum(over), (apart * apart).sum(over)])) / built.count
    mean, square = sums.view(2, x.shape[1])
    y = (apart - mean.view(shape)) * (square - mean * mean + eps).rsqrt().view(shape)
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def _differentiable_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    eps: float,
    built: Built,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`_backward` through `_composed`, for gradients of gradients."""
    held = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias)]
    x_used, *held_used = (t if t is None else t.view_as(t) for t in held)
    team, transport = built.team, built.add_up.transport
    held_used = [t if t is None else used(t, team, transport) for t in held_used]
    y = _composed(x_used, *held_used, mean, eps, built)
    gx, *rest = torch.autograd.grad(y, [x_used, *(t for t in held_used if t is not None)], gradient, create_graph=True)
    if not rest:
        return gx, None, None
    gw, gb = shown(torch.stack(rest), team, transport)
    return gx, gw, gb
