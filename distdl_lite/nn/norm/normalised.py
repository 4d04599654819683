"""Normalisation by statistics over all ranks, and its adjoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from distdl_lite.autograd import Node, check_unbatched, copy_to_team
from distdl_lite.layout import Shape
from distdl_lite.nn.blocks import wide
from distdl_lite.operator import Operator
from distdl_lite.transport import Team

_AT_ONCE = 2**18  # elements of a block in wide temporaries: 2 MiB of float64 stay in a cache
_AT_ONCE_ON_DEVICES = 2**24  # where a launch costs more than a cache would give


@dataclass(frozen=True)
class Rows:
    """Which values share a mean and a variance, and how the ranks that hold them add up; for one structure.

    A block is seen as ``(B, K, *S)``. Each of its K channels belongs to a row: the values, on any ranks, that are normalised
    together.
    """

    shape: Shape  # of this rank's rows
    numbers: int  # per row: two, or one where the rows are not centred but only divided by their root mean square
    count: int  # of values per row
    row_of: torch.Tensor | None  # the row of each channel, as int64; None where each is one
    add_up: Operator | None  # from numbers per row to their sums over the ranks that share it; None where nothing runs
    gather: Operator | None  # for float64 input: n, mean and variance of each row, from each of these ranks apart
    position: int  # of this rank among them
    team: Team | None  # who sums the gradients of the weights in the same collective; None where the reducer does that

    def fold(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the channels of each row, along the last dim."""
        if self.row_of is None:
            return values
        sums = values.new_zeros(*values.shape[:-1], math.prod(self.shape))
        return sums.index_add(-1, self.row_of.to(values.device), values)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The number of each channel's row, along the last dim."""
        return values if self.row_of is None else values.index_select(-1, self.row_of.to(values.device))

    def summed(self, values: torch.Tensor, differentiable: bool = False) -> torch.Tensor:
        """Numbers per row, added up over all ranks that share the row."""
        assert self.add_up is not None
        move = self.add_up if differentiable else self.add_up.apply
        return move(values.reshape(self.numbers, *self.shape)).view(values.shape)


@torch.no_grad()
def statistics(x: torch.Tensor, pivot: torch.Tensor | None, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each row over all ranks, in float64; zero and mean square if it is not centred.

    The pivot is near the mean of each row, and the same on all ranks of it; None is zero.
    """
    n, mean, var = _moments(x, rows)
    if rows.gather is not None:  # parts are taken together (Chan, Golub and LeVeque 1979)
        apart = mean.new_zeros(rows.gather.plan.returned_shape)
        apart[rows.position] = torch.stack([n, mean, var]).view(apart.shape[1:])
        n, means, variances = rows.gather.apply(apart).view(len(apart), 3, len(mean)).unbind(1)
        shares = n / rows.count
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean) ** 2)).sum(0)
    pivot = mean.new_zeros(()) if pivot is None else pivot.double()
    shift = mean - pivot
    sums = torch.stack([n * shift, n * (var + shift * shift)])[-rows.numbers :]
    *shifts, square = rows.summed(sums) / rows.count
    if not shifts:
        return torch.zeros_like(square), square
    return pivot + shifts[0], (square - shifts[0] * shifts[0]).clamp_(min=0)


def _moments(x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number, mean and biased variance of this rank's values of each row in float64, by sums about some of these."""
    if not x.numel():
        nothing = torch.zeros(math.prod(rows.shape), dtype=torch.float64, device=x.device)
        return nothing, nothing, nothing
    over, ones = (0, *range(2, x.dim())), (1,) * (x.dim() - 2)
    first = x[(slice(1), slice(None), *map(slice, ones))].double().view(-1)
    n = rows.fold(torch.full_like(first, x.numel() // x.shape[1]))
    pivot = rows.fold(first) / rows.fold(torch.ones_like(first))
    pivots, sums = rows.spread(pivot).view(1, -1, *ones), first.new_zeros(2, x.shape[1])
    for part in _parts(x):
        apart = x[part].to(torch.float64, copy=True).sub_(pivots[:, part[1]])
        sums[:, part[1]] += torch.stack([apart.sum(over), apart.square_().sum(over)])
    shift, square = rows.fold(sums) / n
    return n, pivot + shift, (square - shift * shift).clamp_(min=0)


def _parts(x: torch.Tensor) -> Iterable[tuple[slice, ...]]:
    """Where the parts of a block are of which wide copies may be made; it is cut along its outermost dims in memory."""
    limit = _AT_ONCE if x.device.type == "cpu" else _AT_ONCE_ON_DEVICES
    size, lengths = x.numel(), list(x.shape)
    if hasattr(x, "fake_mode"):  # a tensor without numbers, of a run that only counts
        limit = max(limit, size // 8)
    for dim in sorted(range(x.dim()), key=x.stride, reverse=True):
        if size > limit:
            n = lengths[dim]
            lengths[dim] = max(1, n * limit // size)
            size = size // n * lengths[dim]
    steps = (range(0, n, max(step, 1)) for n, step in zip(x.shape, lengths, strict=True))
    return product(*([slice(start, start + r.step) for start in r] for r in steps))


class Normalise(Node):
    """Normalisation of a block as ``(B, K, *S)`` by the statistics of its rows; `_composed` is the same in plain operations.

    Weight and bias have one number per channel, or one per element of the channels of ``(B, K, S)`` as ``(1, 1, S)``. The
    result has the given shape. (Were it a view, a Function's output could not be changed in place but by three copies.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
        rows: Rows,
        eps: float,
        shape: Shape,
    ) -> torch.Tensor:
        ctx.rows, ctx.eps = rows, eps
        ctx.save_for_backward(x, weight, bias, mean, var)
        mean, scale = rows.spread(mean), (rows.spread(var) + eps).rsqrt()
        by_element, offset, y = weight is not None and weight.dim() > 1, torch.zeros_like(mean), torch.empty_like(x)
        if weight is not None and not by_element:
            scale, offset = scale * weight, offset if bias is None else bias
        for part, z in _scaled(x, mean, scale, offset, y):
            if by_element:
                z.mul_(weight[..., part[2]])
                z = z if bias is None else z.add_(bias[..., part[2]])
        return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        check_unbatched(gradient)
        gradient = gradient.reshape(x.shape)
        if torch.is_grad_enabled():
            found = _differentiable_backward(gradient, x, weight, bias, mean, ctx.eps, ctx.rows)
        else:
            found = _backward(gradient, x, weight, mean, var, ctx.eps, ctx.rows)
        wanted = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False))
        return (*wanted, *(None,) * 5)


def _scaled(
    x: torch.Tensor, mean: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, out: torch.Tensor
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Fill `out` part by part with (x - mean) slope + offset, for numbers per channel in float64.

    Each part is first shown, with its place, in the dtype that is computed in, to be changed in place. The rounded mean is
    taken off before all, so that nothing is lost far from zero; the rest of the mean joins the offset.
    """
    rounded = mean.to(wide(x.dtype))
    numbers = _beside(x, rounded, slope, offset - (mean - rounded) * slope)
    for part in _parts(x):
        m, k, rest = numbers[:, :, part[1]]
        into = out[part]
        z = torch.sub(x[part], m, out=into if into.dtype is m.dtype else None).mul_(k).add_(rest)
        yield part, z
        if z is not into:
            into.copy_(z)


def _beside(x: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
    """Numbers per channel in the dtype that a block is computed in, in shapes that go with it."""
    return torch.stack(numbers).to(wide(x.dtype)).view(len(numbers), 1, x.shape[1], *(1,) * (x.dim() - 2))


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias."""
    kind, by_element = wide(x.dtype), weight is not None and weight.dim() > 1
    mean, scale = rows.spread(mean), (rows.spread(var) + eps).rsqrt()
    sums, of_elements = _sums(gradient, x, weight if by_element else None, mean, scale)
    # The statistics take (x - mean) slope + offset from the input's gradient, by sums over the row.
    factor = scale.new_ones(()) if weight is None or by_element else weight.double()
    if rows.team is not None:
        sums = of_weights = rows.summed(sums)
        sums = sums * factor
    else:
        of_weights = of_elements if by_element else sums
        sums = rows.spread(rows.summed(rows.fold(sums * factor)[-rows.numbers :]))
    *offset, slope = sums / rows.count * scale
    gb, gw = of_weights.to(kind if weight is None else weight.dtype)
    gx, (factor,) = torch.empty_like(x), _beside(x, scale * factor)
    for part, z in _scaled(x, mean, -slope * scale, -offset[0] if offset else torch.zeros_like(slope), gx):
        given = gradient[part].to(kind)
        z.addcmul_(given * weight[..., part[2]] if by_element else given, factor[:, part[1]])
    return gx, gw, gb


def _sums(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, mean: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Per channel the sums of the gradient, and of it times the normalised value, in float64.

    With a weight per element of a channel, which the gradient is multiplied by, also those sums per element, of the
    gradient itself.
    """
    over, kind = (0, *range(2, x.dim())), wide(x.dtype)
    sums, of_elements = mean.new_zeros(2, x.shape[1]), None if weight is None else mean.new_zeros(2, *weight.shape)
    rest = mean - mean.to(kind)
    numbers = _beside(x, mean, scale, -rest * scale)
    for part in _parts(x):
        m, k, o = numbers[:, :, part[1]]
        g = gradient[part].to(kind)
        z = (x[part] - m).mul_(g)
        if weight is not None:  # the parts are of shape (1, channels, elements)
            w = weight[..., part[2]]
            of_elements[..., part[2]] += torch.stack([g.sum(1, True), k.mT @ z + o.mT @ g])
            g, z = g * w, z.mul_(w)
        sums[:, part[1]] += torch.stack([g.sum(over), z.sum(over)])
    sums[1] = (sums[1] - rest * sums[0]) * scale
    return sums, of_elements


def _composed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    pivot: torch.Tensor,
    eps: float,
    rows: Rows,
) -> torch.Tensor:
    """The normalised tensor by differentiable operations, in float64 about a pivot near the mean."""
    shape, over = (1, -1, *(1,) * (x.dim() - 2)), (0, *range(2, x.dim()))
    apart = x.double() - rows.spread(pivot).view(shape)
    sums = rows.fold(torch.stack([apart.sum(over), (apart * apart).sum(over)])[-rows.numbers :])
    *means, var = rows.spread(rows.summed(sums, differentiable=True) / rows.count)
    for mean in means:
        apart, var = apart - mean.view(shape), var - mean * mean
    y = apart * (var + eps).rsqrt().view(shape)
    weight, bias = (t if t is None or t.dim() > 1 else t.view(shape) for t in (weight, bias))
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _differentiable_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    eps: float,
    rows: Rows,
) -> tuple[torch.Tensor | None, ...]:
    """`_backward` through `_composed`, for gradients of gradients."""
    held = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias)]
    used = x_used, *weights_used = [None if t is None else t.view_as(t) for t in held]
    if rows.team is not None:
        weights_used = [None if t is None else copy_to_team(t, rows.team) for t in weights_used]
    y = _composed(x_used, *weights_used, mean, eps, rows)
    found = iter(torch.autograd.grad(y, [t for t in used if t is not None], gradient, create_graph=True))
    return tuple(None if t is None else next(found) for t in used)
