"""Attention whose tokens are cut: no rank holds all keys and values unless they are few.

The ways, of which the one of fewest bytes is taken: "gather" makes keys and values whole; "heads" cuts heads in place of
tokens; "sum" leaves keys where they are, and adds up what the ranks make of theirs for all queries; "ring" moves blocks of keys
and values past the queries, with a running maximum and sum (Liu, Zaharia and Abbeel, "Ring attention", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.factors import Dims, Factors, all_axes, axes_of, cut, length_of, merged, refined, size_of, uncut
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, ranges_of
from distdl_lite.model.ring import Ring, finite
from distdl_lite.nn.broadcasting import fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.dropout import seed_of
from distdl_lite.nn.value import NoRule, Value, rule

FEW = 2**22  # bytes of keys and values that a rank may hold whole
_UNEVEN = 1.25  # how much more than its share of the heads a rank may work on


@dataclass(frozen=True)
class Way:
    """A way to attend: how queries, keys and values are laid out for it, and about how many bytes it moves."""

    kind: str
    layouts: tuple[Dims, ...]
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
    if not query.ndim == key.ndim == value.ndim > 1 or query.shape[:-2] != op.shape[:-2] or op.dtype.is_complex:
        raise NoRule
    if (mask is not None and is_causal) or dropout_p == 1:
        raise NoRule
    seed = seed_of(c) if dropout_p else None
    tokens = Tokens(c, query, key, value, query.shape[-3] // key.shape[-3] if enable_gqa and key.shape[-3] else 1)
    way = min(tokens.ways(op.dtype), key=lambda w: w.nbytes)
    query, key, value = moved(c, tokens.tensors, way.layouts, way.kind)
    scores = (*query.dims[:-1], key.dims[-2] if way.kind == "sum" else (uncut(key.shape[-2]),))
    mask = None if mask is None else fit(c, mask, scores)
    dims = (*query.dims[:-1], value.dims[-1])
    if way.kind in ("gather", "heads") and not dropout_p and not (is_causal and axes_of(query.dims[-2])):
        # Of empty blocks torch makes zeros without a graph.
        y = c.call(F.scaled_dot_product_attention, query, key, value, mask, 0.0, is_causal, dims=dims, dtype=op.dtype,
                   scale=scale, enable_gqa=enable_gqa, everywhere=False)  # fmt: skip
    else:
        turns, scale = way.kind == "ring", query.shape[-1] ** -0.5 if scale is None else scale
        sums, top = Ring(c, query, key, value, turns, is_causal, scale, dropout_p, tokens.groups).run(mask, seed)
        if way.kind == "sum":
            sums = summed(c, sums, top, key.axes(-2), tokens.queries)
        y = c.call(_normalised, sums, op.dtype, dims=(*sums.dims[:-1], value.dims[-1]), dtype=op.dtype)
    return c.move(y, tokens.output(y.dims), "heads") if way.kind == "heads" else y


class Tokens:
    """What the ways have in common: how the dims before the tokens are cut, and the tokens of queries and of keys.

    `groups` heads of queries share one of keys, in which heads are counted here.
    """

    def __init__(self, c: Compiler, query: Value, key: Value, value: Value, groups: int) -> None:
        self.c, self.tensors = c, (query, key, value)
        self.groups = 1 if query.ndim < 3 or key.shape[-3] == 1 else groups
        self.sizes = list(query.shape[:-2])
        if self.groups > 1:
            self.sizes[-1] //= self.groups
        self.cuts: dict[int, Factors] = {}  # of the dims before the tokens
        for tensor in sorted(self.tensors, key=lambda t: -math.prod(t.shape)):
            for d, n in enumerate(self.sizes):
                factors = tensor.dims[d] if tensor.shape[d] in (1, n) else self._in_groups(tensor.dims[d], n)
                if axes_of(factors) and d not in self.cuts and not self._used & set(axes_of(factors)):
                    self.cuts[d] = factors
        used = self._used
        self.kept = without(query.dims[-2], used)
        self.queries = cut_also(c, self.kept, [a for a in query.axes(-1) if a not in used])
        longest = max(key, value, key=lambda t: len(t.axes(-2))).dims[-2]
        self.keys = cut_also(c, without(longest, used), [a for a in (*key.axes(-1), *value.axes(-1)) if a not in used])
        self.axes = axes_of(self.keys)

    @property
    def _used(self) -> frozenset[int]:
        return all_axes(tuple(self.cuts.values()))

    def _in_groups(self, factors: Factors, heads: int) -> Factors:
        """The cut of the heads of queries, in heads of keys."""
        parts, axes = refined(factors, (heads, self.groups)), axes_of(factors)
        if parts is not None:
            return parts[:1]
        return (cut(heads, axes, self.c.grid) if heads >= self.c.parts(axes) else uncut(heads),)

    def layouts(self, cuts: Mapping[int, Factors], queries: Factors, keys: Factors) -> tuple[Dims, ...]:
        """Those of queries, keys and values, by the cuts of the dims before the tokens, and of the tokens."""
        made = []
        for t, tokens in zip(self.tensors, (queries, keys, keys), strict=True):
            dims = [cuts[d] if d in cuts and t.shape[d] != 1 else (uncut(t.shape[d]),) for d in range(t.ndim - 2)]
            if self.groups > 1 and t is self.tensors[0] and t.ndim - 3 in cuts:
                dims[-1] = merged((*dims[-1], uncut(self.groups)))
            made.append((*dims, tokens, (uncut(t.shape[-1]),)))
        return tuple(made)

    def output(self, dims: Dims) -> Dims:
        """The layout of the output of heads: cut by tokens if the queries were, else as it is."""
        home = self.layouts(self.cuts, self.queries, self.keys)[0]
        return (*home[:-1], dims[-1]) if set(self.axes) & set(axes_of(self.kept)) else dims

    def ways(self, dtype: torch.dtype) -> Iterator[Way]:
        """The ways that there are; bytes count forward, and backward if there is one."""
        c, axes, whole, (query, key, value) = self.c, self.axes, (uncut(size_of(self.keys)),), self.tensors
        share, passes = (c.parts(axes) - 1) / c.parts(axes), 2 if any(t.grad for t in self.tensors) else 1
        sliced, rest = cut_also(c, self.queries, axes), without(self.queries, axes)
        is_ring = set(axes) <= set(axes_of(sliced))
        held = (key.nbytes + value.nbytes) / c.parts(self._used)
        if held <= FEW or not (axes and is_ring):
            yield self._way("gather", self.layouts(self.cuts, sliced, whole))
        if axes and (cuts := self._over_heads()) is not None:
            layouts = self.layouts(cuts, rest, whole)
            y = Value("", (*layouts[0][:-1], (uncut(value.shape[-1]),)), dtype)
            yield self._way("heads", layouts, passes * c.received(y, self.output(y.dims)))
        made = query.nbytes / query.shape[-1] * (value.shape[-1] + 2) / c.parts((*self._used, *axes_of(rest)))
        if axes and (made <= FEW or not is_ring):
            times = 1 if set(axes) <= set(axes_of(self.queries)) else 2  # a reduce-scatter, or an all-reduce
            yield self._way("sum", self.layouts(self.cuts, rest, self.keys), passes * times * made * share)
        if axes and is_ring:  # backward moves blocks, and their gradients
            yield self._way("ring", self.layouts(self.cuts, sliced, self.keys), (2 * passes - 1) * held * share)

    def _way(self, kind: str, layouts: tuple[Dims, ...], more: float = 0) -> Way:
        pairs = zip(self.tensors, layouts, strict=True)
        return Way(kind, layouts, more + sum(self.c.received(t, dims) * (1 + t.grad) for t, dims in pairs))

    def _over_heads(self) -> dict[int, Factors] | None:
        """The dims before the tokens cut along the tokens' axes too, None where they are too few or uneven."""
        dims = tuple(self.cuts.get(d, (uncut(n),)) for d, n in enumerate(self.sizes))
        for axis in self.axes:
            before, dims = dims, self.c.placed(dims, axis)
            if dims == before:
                return None
        for (dim,) in (factors for factors in dims if set(axes_of(factors)) & set(self.axes)):
            if max(b - a for a, b in dim.ranges) * len(dim.ranges) > _UNEVEN * length_of(dim):
                return None
        return {d: factors for d, factors in enumerate(dims) if axes_of(factors)}


def without(factors: Factors, axes: Iterable[int]) -> Factors:
    """A dim that some axes no longer cut."""
    return merged(uncut(length_of(dim)) if set(dim.axes) & set(axes) else dim for dim in factors)


def cut_also(c: Compiler, factors: Factors, axes: Iterable[int]) -> Factors:
    """A dim cut along axes too, of which each rank keeps a part of its block; not along those for which it is too short."""
    for axis in axes:
        best = max(range(len(factors)), key=lambda i: length_of(factors[i]) / c.parts(factors[i].axes))
        dim, n = factors[best], c.grid.shape[axis]
        if axis not in axes_of(factors) and length_of(dim) >= len(dim.ranges) * n:
            parts = (((a + i, a + j) for i, j in ranges_of(balanced(b - a, n))) for a, b in dim.ranges)
            made = Dim(tuple(chain.from_iterable(parts)), (*dim.axes, axis))
            factors = (*factors[:best], made, *factors[best + 1 :])
    return factors


def moved(c: Compiler, values: Sequence[Value], layouts: Sequence[Dims], kind: str) -> list[Value]:
    """Values in their layouts; those that lie alike travel as one."""
    pairs = list(zip(values, layouts, strict=True))
    kinds = {(v.dims[:-1], d[:-1], v.axes(-1), v.dtype, v.grad) for v, d in pairs}
    if len(values) > 1 and len(kinds) > 1:
        return [*moved(c, values[:1], layouts[:1], kind), *moved(c, values[1:], layouts[1:], kind)]
    if len(values) == 1 or values[0].axes(-1) or not c.received(*pairs[0]):
        return [c.move(v, d, kind) for v, d in pairs]
    first, sizes = values[0], [v.shape[-1] for v in values]
    joined = c.call(torch.cat, list(values), -1, dims=first.with_dims({-1: uncut(sum(sizes))}), dtype=first.dtype)
    joined = c.move(joined, (*layouts[0][:-1], joined.dims[-1]), kind)
    return c.calls(torch.split, joined, sizes, -1, dims=layouts, dtypes=[first.dtype] * len(sizes))


def summed(c: Compiler, sums: Value, top: Value, axes: Sequence[int], tokens: Factors) -> Value:
    """The sums of each rank's keys added up, scaled by the same maxima; cut as the queries were."""
    parts = c.parts(axes)
    each = c.renamed(top, top.with_dims({-1: Dim(tuple((i, i + 1) for i in range(parts)), tuple(axes))}))
    tops = c.move(each, top.with_dims({-1: uncut(parts)}), "sum")
    sums = c.call(_rescaled, sums, top, tops, dims=sums.dims, dtype=sums.dtype)
    return c.sum_over(sums, axes, sums.with_dims({-2: tokens}))


def _rescaled(sums: torch.Tensor, top: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    return sums * (top - finite(tops.amax(-1, keepdim=True))).exp()


def _normalised(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weighted means; zero for a query that no key counts for, as torch's."""
    weights = sums[..., -1:]
    return (sums[..., :-1] / (weights + (weights == 0))).to(dtype)
