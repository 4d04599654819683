"""Attention whose tokens are cut: no rank holds all keys and values unless they are few.

The ways, of which the one of fewest bytes is taken: "gather" makes keys and values whole; "heads" cuts heads in place of
tokens; "sum" leaves keys where they are, and adds up what the ranks make of theirs for all queries; "ring" moves blocks of keys
and values past the queries, with a running maximum and sum (Liu, Zaharia and Abbeel, "Ring attention", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.autograd import Node, check_unbatched
from distdl_lite.factors import (
    Dims,
    Factors,
    all_axes,
    axes_of,
    cut,
    length_of,
    merged,
    range_at,
    refined,
    shape_of_dims,
    size_of,
    uncut,
)
from distdl_lite.grid import Grid, balanced, indices, ravel
from distdl_lite.layout import Dim, Layout, ranges_of
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.broadcasting import fit
from distdl_lite.nn.compiler import Compiler, NoRule, Value, rule
from distdl_lite.operator import Operator

FEW = 2**22  # bytes of keys and values that a rank may hold whole
_AT_ONCE = 2**24  # scores, of which backward holds four tensors
_UNEVEN = 1.25  # how much more than its share of the heads a rank may work on


@dataclass(frozen=True)
class Way:
    """A way to attend: how queries, keys and values are laid out for it, and about how many bytes it moves."""

    kind: str
    query: Dims
    key: Dims
    value: Dims
    nbytes: float


@rule("scaled_dot_product_attention")
def attention(
    c: Compiler,
    op: Any,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout_p or not query.ndim == key.ndim == value.ndim > 1 or op.dtype.is_complex or (mask and is_causal):
        raise NoRule
    tokens = Tokens(c, query, key, value, query.shape[-3] // key.shape[-3] if enable_gqa and key.shape[-3] else 1)
    way = min(tokens.ways(op.dtype), key=lambda w: w.nbytes)
    query, key, value = moved(c, [query, key, value], [way.query, way.key, way.value], way.kind)
    if mask is not None:
        mask = fit(c, mask, (*query.dims[:-1], key.dims[-2] if way.kind == "sum" else (uncut(key.shape[-2]),)))
    dims = (*query.dims[:-1], value.dims[-1])
    if way.kind in ("gather", "heads") and not (is_causal and axes_of(query.dims[-2])):
        y = c.call(F.scaled_dot_product_attention, query, key, value, mask, 0.0, is_causal, dims=dims, dtype=op.dtype,
                   scale=scale, enable_gqa=enable_gqa)  # fmt: skip
    else:
        ring = Ring.of(c, query, key, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)
        sums, top = blockwise(c, ring, query, key, value, mask, way.kind == "ring", tokens.groups)
        if way.kind == "sum":
            sums = summed(c, sums, top, key.axes(-2), tokens.kept)
        y = c.call(_normalised, sums, op.dtype, dims=(*sums.dims[:-1], value.dims[-1]), dtype=op.dtype)
    if way.kind == "heads" and set(tokens.axes) & set(axes_of(tokens.kept)):
        y = c.move(y, (*tokens.lead(tokens.found)[0], tokens.kept, y.dims[-1]), "heads")
    return y


class Tokens:
    """What the ways have in common: how the dims before the tokens are cut, and the tokens of queries and of keys.

    Parameters
    ----------
    groups : int
        How many heads of queries share one of keys.
    """

    def __init__(self, c: Compiler, query: Value, key: Value, value: Value, groups: int) -> None:
        self.c, self.tensors, self.groups = (
            c,
            (query, key, value),
            1 if query.ndim < 3 or key.shape[-3] == 1 else groups,
        )
        self.sizes = [max(t.shape[d] for t in self.tensors) for d in range(query.ndim - 2)]
        if self.groups > 1:
            self.sizes[-1] //= self.groups
        self.found: dict[int, Factors] = {}  # the cuts of the dims before the tokens, of heads of keys
        for tensor in sorted(self.tensors, key=lambda t: -math.prod(t.shape)):
            for d in range(query.ndim - 2):
                factors = self._of_keys(tensor, d)
                axes, used = set(axes_of(factors)), all_axes(tuple(self.found.values()))
                if axes and d not in self.found and not axes & used and size_of(factors) == self.sizes[d]:
                    self.found[d] = factors
        used = all_axes(tuple(self.found.values()))
        self.kept = without(query.dims[-2], used)
        self.queries = self._with(self.kept, query.axes(-1), used)
        loose = [a for a in (*key.axes(-1), *value.axes(-1)) if a not in value.axes(-2)]
        self.keys = self._with(without(max(key, value, key=lambda t: len(t.axes(-2))).dims[-2], used), loose, used)
        self.axes = axes_of(self.keys)

    def _of_keys(self, tensor: Value, d: int) -> Factors:
        """The cut of a dim, in heads of keys."""
        factors = tensor.dims[d]
        if self.groups == 1 or tensor is not self.tensors[0] or d != tensor.ndim - 3:
            return factors
        parts = refined(factors, (self.sizes[d], self.groups))
        if parts is not None:
            return parts[:1]
        axes = axes_of(factors)
        return (cut(self.sizes[d], axes, self.c.grid) if self.sizes[d] >= self.c.parts(axes) else uncut(self.sizes[d]),)

    def _with(self, factors: Factors, axes: Sequence[int], used: frozenset[int]) -> Factors:
        """Tokens cut along axes too, which cut features before."""
        for axis in axes:
            factors = factors if axis in used or axis in axes_of(factors) else cut_also(self.c, factors, axis)
        return factors

    def lead(self, found: Mapping[int, Factors]) -> list[Dims]:
        """The dims before the tokens, of each tensor."""
        made = []
        for t in self.tensors:
            dims = [found[d] if d in found and t.shape[d] != 1 else (uncut(t.shape[d]),) for d in range(t.ndim - 2)]
            if self.groups > 1 and t is self.tensors[0] and t.ndim - 3 in found:
                dims[-1] = merged((*dims[-1], uncut(self.groups)))
            made.append(tuple(dims))
        return made

    def ways(self, dtype: torch.dtype) -> Iterator[Way]:
        """The ways that there are."""
        c, axes, parts = self.c, self.axes, self.c.parts(self.axes)
        sliced = self.queries
        for axis in axes:
            sliced = sliced if axis in axes_of(sliced) else cut_also(c, sliced, axis)
        whole, rest = (uncut(size_of(self.keys)),), without(self.queries, axes)
        is_ring, passes = set(axes) <= set(axes_of(sliced)), 2 if any(t.grad for t in self.tensors) else 1
        _, key, value = self.tensors
        held = (key.nbytes + value.nbytes) / c.parts(all_axes(self.lead(self.found)[1]))
        if held <= FEW or not axes or not is_ring:
            yield self._way("gather", self.found, sliced, whole)
        if axes:
            found = self._over_heads()
            if found is not None:
                way = self._way("heads", found, rest, whole)
                y, home = (
                    (*lead[0], tokens, (uncut(self.tensors[2].shape[-1]),))
                    for lead, tokens in ((self.lead(found), rest), (self.lead(self.found), self.kept))
                )
                back = c.received(Value("", y, dtype), home) if set(axes) & set(axes_of(self.kept)) else 0
                yield replace(way, nbytes=way.nbytes + passes * back)
            times = 1 if set(axes) <= set(axes_of(self.kept)) else 2
            made = (*self.lead(self.found)[0], rest, (uncut(self.tensors[2].shape[-1] + 2),))
            added = (
                math.prod(shape_of_dims(made))
                / c.parts(all_axes(made))
                * wide(dtype).itemsize
                * times
                * (parts - 1)
                / parts
            )
            way = self._way("sum", self.found, rest, self.keys)
            yield replace(way, nbytes=way.nbytes + passes * added)
        if axes and is_ring:
            way = self._way("ring", self.found, sliced, self.keys)
            yield replace(way, nbytes=way.nbytes + (2 * passes - 1) * held * (parts - 1) / parts)

    def _way(self, kind: str, found: Mapping[int, Factors], queries: Factors, keys: Factors) -> Way:
        lead = self.lead(found)
        layouts = [
            (*dims, tokens, (uncut(t.shape[-1]),))
            for dims, tokens, t in zip(lead, (queries, keys, keys), self.tensors, strict=True)
        ]
        pairs = zip(self.tensors, layouts, strict=True)
        return Way(kind, *layouts, nbytes=sum(self.c.received(t, dims) * (1 + t.grad) for t, dims in pairs))

    def _over_heads(self) -> dict[int, Factors] | None:
        """The dims before the tokens cut along the tokens' axes too, None where they are too few or uneven."""
        dims = tuple(self.found.get(d, (uncut(n),)) for d, n in enumerate(self.sizes))
        for axis in self.axes:
            before, dims = dims, self.c.placed(dims, axis)
            if dims == before:
                return None
        (changed,) = ([d for d in dims if set(axes_of(d)) & set(self.axes)],)
        if any(max(b - a for a, b in d.ranges) * len(d.ranges) > _UNEVEN * length_of(d) for (d,) in changed):
            return None
        return {d: factors for d, factors in enumerate(dims) if axes_of(factors)}


def without(factors: Factors, axes: Sequence[int] | frozenset[int]) -> Factors:
    """A dim that some axes no longer cut."""
    return merged(uncut(length_of(dim)) if set(dim.axes) & set(axes) else dim for dim in factors)


def cut_also(c: Compiler, factors: Factors, axis: int) -> Factors:
    """A dim whose blocks are cut along an axis too, so that each rank keeps a part of its own; as it is where it is too short."""
    best = max(range(len(factors)), key=lambda i: length_of(factors[i]) / c.parts(factors[i].axes))
    dim, n = factors[best], c.grid.shape[axis]
    if length_of(dim) < len(dim.ranges) * n:
        return factors
    ranges = tuple((a + start, a + stop) for a, b in dim.ranges for start, stop in ranges_of(balanced(b - a, n)))
    return (*factors[:best], Dim(ranges, (*dim.axes, axis)), *factors[best + 1 :])


def moved(c: Compiler, values: Sequence[Value], layouts: Sequence[Dims], kind: str) -> list[Value]:
    """Values in their layouts; those that lie alike travel as one."""
    first, dims = values[0], layouts[0]
    alike = [v.dims[:-1] == first.dims[:-1] and d[:-1] == dims[:-1] and not v.axes(-1) and (v.dtype, v.grad) ==
             (first.dtype, first.grad) for v, d in zip(values, layouts, strict=True)]  # fmt: skip
    if len(values) == 1 or (all(alike) and not c.received(first, dims)):
        return [c.move(v, d, kind) for v, d in zip(values, layouts, strict=True)]
    if not all(alike):
        return [*moved(c, values[:1], layouts[:1], kind), *moved(c, values[1:], layouts[1:], kind)]
    sizes = [v.shape[-1] for v in values]
    joined = c.call(torch.cat, list(values), -1, dims=first.with_dims({-1: uncut(sum(sizes))}), dtype=first.dtype)
    joined = c.move(joined, (*dims[:-1], joined.dims[-1]), kind)
    return c.calls(torch.split, joined, sizes, -1, dims=layouts, dtypes=[first.dtype] * len(sizes), linear=True)


# Blocks of keys, one after the other


def positions(factors: Factors, grid: Grid, index: Sequence[int]) -> torch.Tensor:
    """The points of a dim that the rank at an index holds, in its order."""
    found = torch.zeros(1, dtype=torch.int64)
    for dim in factors:
        start, stop = range_at(dim, grid, index)
        found = (found[:, None] * length_of(dim) + torch.arange(start, max(start, stop))).reshape(-1)
    return found


def rotated(dim: Dim, steps: Mapping[int, int], grid: Grid) -> Dim:
    """A factor of which each rank holds what the rank so many steps on along each axis held."""
    shape = [grid.shape[a] for a in dim.axes]
    owners = ([(i + steps[a]) % n for i, a, n in zip(index, dim.axes, shape, strict=True)] for index in indices(shape))
    return replace(dim, ranges=tuple(dim.ranges[ravel(owner, shape)] for owner in owners)) if dim.axes else dim


@dataclass(eq=False)
class Ring:
    """The blocks of keys that one rank sees.

    Attributes
    ----------
    rows : torch.Tensor
        The points of this rank's queries.
    steps : list of (operator or None, torch.Tensor)
        What brings each block, and its points; the first is this rank's own.
    """

    rows: torch.Tensor
    steps: list[tuple[Operator | None, torch.Tensor]]
    causal: bool
    scale: float
    features: int
    dtype: torch.dtype
    returns: bool = False  # whether keys and values have a gradient

    @staticmethod
    def of(c: Compiler, query: Value, key: Value, causal: bool, scale: float) -> Ring:
        """That of the rank's own block alone."""
        rows, columns = (positions(v.dims[-2], c.grid, c.index) for v in (query, key))
        return Ring(rows, [(None, columns)], causal, scale, query.shape[-1], wide(query.dtype))

    def join(self, c: Compiler, query: Value, keys: Value) -> None:
        """Add the blocks of the others: step i is the layout turned by i along the axes that cut the keys."""
        axes = keys.axes(-2)
        held = tuple(dim for factors in keys.dims for dim in factors)
        team = c.free_axes(all_axes(keys.dims))
        for turn in list(indices([c.grid.shape[a] for a in axes]))[1:]:
            tokens = tuple(rotated(dim, dict(zip(axes, turn, strict=True)), c.grid) for dim in keys.dims[-2])
            if self.causal and len(tokens) == len(query.dims[-2]) == 1 and tokens[0].axes == query.dims[-2][0].axes:
                pairs = zip(tokens[0].ranges, query.dims[-2][0].ranges, strict=True)  # no query may look at later keys
                tokens = (replace(tokens[0], ranges=tuple(k if k[0] < q[1] else (k[0], k[0]) for k, q in pairs)),)
            lead = tuple(dim for factors in keys.dims[:-2] for dim in factors)
            X, Y = Layout(c.grid, held, team), Layout(c.grid, (*lead, *tokens, *keys.dims[-1]), team)
            operator = c.between(X, Y, keys, "ring")
            self.steps.append((operator, positions(tokens, c.grid, c.index)))

    def blocks(self, own: torch.Tensor) -> Iterator[tuple[Operator | None, torch.Tensor, torch.Tensor]]:
        """Each block with its points; the next one is on its way meanwhile."""
        source, pending = own.detach(), None
        for number, (operator, columns) in enumerate(self.steps):
            block = source
            if operator is not None:
                block = operator.finish(pending).reshape(*own.shape[:-2], len(columns), own.shape[-1])
            after = self.steps[number + 1][0] if number + 1 < len(self.steps) else None
            if after is not None:
                pending = after.start(source.reshape(after.plan.shape_in))
            yield operator, block.to(self.dtype), columns.to(own.device)

    def pieces(self, q: torch.Tensor, block: torch.Tensor, columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """A block in parts, of keys, values and points, with a bounded number of scores."""
        rows = math.prod(torch.broadcast_shapes(q.shape[:-2], block.shape[:-2])) * q.shape[-2]
        size = max(_AT_ONCE // max(rows, 1), 1)
        for points, part in zip(columns.split(size), block.split(size, -2), strict=True):
            if len(points) and rows:
                yield part[..., : self.features], part[..., self.features :], points

    def scores(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, points: torch.Tensor) -> torch.Tensor:
        """The scores of the rank's queries, scaled already, for some keys; minus infinity where these do not count."""
        s = q @ k.mT
        if mask is not None:
            part = mask if mask.shape[-1] == 1 else mask.index_select(-1, self.places(points))
            s = s.masked_fill_(~part, -math.inf) if part.dtype is torch.bool else s + part
        if self.causal:
            s = s.masked_fill_(points > self.rows.to(points.device)[:, None], -math.inf)
        return s

    def places(self, points: torch.Tensor) -> torch.Tensor:
        """Where in the rank's part of the mask points are: it holds all columns, or those of its own keys."""
        return points if len(self.steps) > 1 else torch.searchsorted(self.steps[0][1].to(points.device), points)


class _Attend(Node):
    """The sums of a rank's queries over blocks of keys: of values weighted, and of weights; and the maxima they are scaled by.

    Backward fetches the blocks again, and sends each its gradient home.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, ring: Ring) -> Any:
        scaled = q.to(ring.dtype) * ring.scale
        lead = torch.broadcast_shapes(q.shape[:-2], kv.shape[:-2])
        sums = scaled.new_zeros(*lead, q.shape[-2], kv.shape[-1] - ring.features + 1)
        top = scaled.new_full((*lead, q.shape[-2], 1), -math.inf)
        for _, block, columns in ring.blocks(kv):
            for k, v, points in ring.pieces(scaled, block, columns):
                s = ring.scores(scaled, k, mask, points)
                higher = torch.maximum(top, s.amax(-1, keepdim=True))
                base = _finite(higher)
                s, factor = s.sub_(base).exp_(), (top - base).exp_()
                sums[..., :-1].mul_(factor).add_(s @ v)
                sums[..., -1:].mul_(factor).add_(s.sum(-1, keepdim=True))
                top = higher
        ctx.ring = ring
        ctx.save_for_backward(q, kv, mask, top)
        ctx.mark_non_differentiable(top)
        return sums, top

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
        q, kv, mask, top = ctx.saved_tensors
        check_unbatched(gradient)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention over cut tokens has no second derivatives: call backward without create_graph"
            )
        ring: Ring = ctx.ring
        scaled, base = q.to(ring.dtype) * ring.scale, _finite(top)
        of_sums, of_weights = gradient[..., :-1], gradient[..., -1:]
        dq, dkv = torch.zeros_like(scaled), torch.zeros(kv.shape, dtype=ring.dtype, device=kv.device)
        dmask = None if mask is None or not ctx.needs_input_grad[2] else torch.zeros_like(mask, dtype=ring.dtype)
        returning: tuple[Operator, Any] | None = None
        for operator, block, columns in ring.blocks(kv):
            back = torch.zeros_like(block)
            for (k, v, points), part in zip(
                ring.pieces(scaled, block, columns), ring.pieces(scaled, back, columns), strict=True
            ):
                e = ring.scores(scaled, k, mask, points).sub_(base).exp_()
                part[1].copy_((e.mT @ of_sums).sum_to_size(v.shape))
                e.mul_(of_sums @ v.mT + of_weights)
                part[0].copy_((e.mT @ scaled).sum_to_size(k.shape))
                dq += (e @ k).sum_to_size(q.shape)
                if dmask is not None:
                    few = e.sum_to_size(*mask.shape[:-1], 1 if mask.shape[-1] == 1 else len(points))
                    dmask = dmask + few if few.shape == dmask.shape else dmask.index_add(-1, ring.places(points), few)
            if returning is not None:
                dkv += returning[0].finish(returning[1]).reshape(kv.shape)
                returning = None
            if operator is None:
                dkv += back
            elif ring.returns:
                adjoint = operator.adjoint
                returning = adjoint, adjoint.start(back.to(kv.dtype).reshape(adjoint.plan.shape_in))
        if returning is not None:
            dkv += returning[0].finish(returning[1]).reshape(kv.shape)
        return dq.mul_(ring.scale).to(q.dtype), dkv.to(kv.dtype), None if dmask is None else dmask.to(mask.dtype), None


def _finite(top: torch.Tensor) -> torch.Tensor:
    """Maxima, zero for queries that have seen no key."""
    return top.masked_fill(top == -math.inf, 0)


def blockwise(
    c: Compiler, ring: Ring, query: Value, key: Value, value: Value, mask: Value | None, turns: bool, groups: int
) -> tuple[Value, Value]:
    """The sums and maxima over blocks of keys: all of them, or each rank's own. Also ranks without queries take part."""
    kv_dims = (*key.dims[:-1], (uncut(key.shape[-1] + value.shape[-1]),))
    keys = c.call(torch.cat, [key, value], -1, dims=kv_dims, dtype=key.dtype)
    if turns:
        ring.join(c, query, keys)
    ring.returns = keys.grad

    def attend(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> Any:
        if groups == 1:
            return _Attend.apply(q, kv, mask, ring)
        q = q.unflatten(-3, (q.shape[-3] // groups, groups))
        if mask is not None and mask.dim() > 2:
            mask = mask.unflatten(-3, (mask.shape[-3] // groups, groups)) if mask.shape[-3] > 1 else mask.unsqueeze(-3)
        return [t.flatten(-4, -3) for t in _Attend.apply(q, kv.unsqueeze(-3), mask, ring)]

    dims = [(*query.dims[:-1], (uncut(n),)) for n in (value.shape[-1] + 1, 1)]
    sums, top = c.calls(attend, query, keys, mask, dims=dims, dtypes=[ring.dtype] * 2, everywhere=True)
    top.grad = False
    return sums, top


def summed(c: Compiler, sums: Value, top: Value, axes: Sequence[int], tokens: Factors) -> Value:
    """The sums of each rank's keys added up, scaled by the same maxima; cut as the queries were."""
    parts = c.parts(axes)
    each = c.renamed(top, top.with_dims({-1: Dim(tuple((i, i + 1) for i in range(parts)), tuple(axes))}))
    tops = c.move(each, top.with_dims({-1: uncut(parts)}), "sum")
    sums = c.call(_rescaled, sums, top, tops, dims=sums.dims, dtype=sums.dtype)
    return c.sum_over(sums, axes, sums.with_dims({-2: tokens}))


def _rescaled(sums: torch.Tensor, top: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    return sums * (top - _finite(tops.amax(-1, keepdim=True))).exp()


def _normalised(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weighted means; zero for a query that no key counts for, as torch's."""
    weights = sums[..., -1:]
    return (sums[..., :-1] / (weights + (weights == 0))).to(dtype)
