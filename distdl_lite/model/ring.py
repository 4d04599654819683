"""Attention of a rank's queries over blocks of keys and values, its own and those that others hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from distdl_lite.autograd import Node, check_unbatched
from distdl_lite.factors import Factors, all_axes, length_of, range_at, uncut
from distdl_lite.grid import Grid, indices, ravel
from distdl_lite.layout import Dim, Layout
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.dropout import mask_of
from distdl_lite.nn.value import Value
from distdl_lite.operator import Operator

_AT_ONCE = 2**24  # scores, of which backward holds a few tensors


def rotated(dim: Dim, turn: Mapping[int, int], grid: Grid) -> Dim:
    """A factor of which each rank holds what the rank so many steps on along each axis held."""
    shape = [grid.shape[a] for a in dim.axes]
    owners = ([(i + turn[a]) % n for i, a, n in zip(index, dim.axes, shape, strict=True)] for index in indices(shape))
    return replace(dim, ranges=tuple(dim.ranges[ravel(owner, shape)] for owner in owners)) if dim.axes else dim


@dataclass
class Block:
    """Some keys and values, joined: their points, their columns of the mask and where these are, the factors of dropout."""

    operator: Operator | None
    kv: torch.Tensor
    points: torch.Tensor
    columns: torch.Tensor
    mask: torch.Tensor | None
    kept: torch.Tensor | None


class Ring:
    """Attention of a rank's queries over its own keys, and if it `turns` over the others' blocks.

    Step i fetches the block that lies in the layout turned by i along the axes that cut the keys.
    """

    def __init__(
        self, c: Compiler, query: Value, key: Value, value: Value, turns: bool, causal: bool, scale: float, p: float,
        groups: int,
    ) -> None:  # fmt: skip
        self.c, self.turns, self.causal, self.scale, self.p, self.groups = c, turns, causal, scale, p, groups
        self.features, dims = key.shape[-1], (*key.dims[:-1], (uncut(key.shape[-1] + value.shape[-1]),))
        self.query, self.kv = query, c.call(torch.cat, [key, value], -1, dims=dims, dtype=key.dtype)
        self.dtype, self.rows = wide(query.dtype), self._points(query.dims[-2])
        self.steps: list[tuple[Operator | None, Factors]] = [(None, key.dims[-2])]
        axes, team = key.axes(-2) if turns else (), c.free_axes(all_axes(key.dims))
        for turn in list(indices([c.grid.shape[a] for a in axes]))[1:]:
            tokens = self._seen(tuple(rotated(d, dict(zip(axes, turn, strict=True)), c.grid) for d in key.dims[-2]))
            X, Y = (
                Layout(c.grid, tuple(dim for factors in d for dim in factors), team)
                for d in (dims, (*dims[:-2], tokens, dims[-1]))
            )
            self.steps.append((c.between(X, Y, self.kv, "ring"), tokens))

    def run(self, mask: Value | None, seed: Any) -> list[Value]:
        """The sums of values, weighted, and of weights; and the maxima that they are scaled by, which have no gradient."""
        dims = [(*self.query.dims[:-1], (uncut(n),)) for n in (self.kv.shape[-1] - self.features + 1, 1)]
        made = self.c.calls(self, self.query, self.kv, mask, seed, dims=dims, dtypes=[self.dtype] * 2)
        made[1].grad = False
        return made

    def _points(self, factors: Factors) -> torch.Tensor:
        """The points of a dim that this rank holds, in order."""
        found = torch.zeros(1, dtype=torch.int64)
        for dim in factors:
            points = torch.arange(*range_at(dim, self.c.grid, self.c.index))
            found = (found[:, None] * length_of(dim) + points).reshape(-1)
        return found

    def _seen(self, tokens: Factors) -> Factors:
        """The tokens without blocks that no query of a rank may look at; the choice is that of all ranks."""
        rows = self.query.dims[-2]
        if not self.causal or len(tokens) > 1 or len(rows) > 1 or tokens[0].axes != rows[0].axes:
            return tokens
        pairs = zip(tokens[0].ranges, rows[0].ranges, strict=True)
        return (replace(tokens[0], ranges=tuple(k if k[0] < q[1] else (k[0], k[0]) for k, q in pairs)),)

    def __call__(self, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, seed: Any) -> Any:
        if self.groups == 1:
            return _Attend.apply(q, kv, mask, self, seed)
        q = q.unflatten(-3, (q.shape[-3] // self.groups, self.groups))
        if mask is not None and mask.dim() > 2:
            n = self.groups if mask.shape[-3] > 1 else 1
            mask = mask.unflatten(-3, (mask.shape[-3] // n, n))
        return [t.flatten(-4, -3) for t in _Attend.apply(q, kv.unsqueeze(-3), mask, self, seed)]

    def blocks(self, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, seed: int | None) -> Iterator[Block]:
        """Each block; the next one is on its way meanwhile."""
        block, pending = kv.detach(), None
        for number, (operator, tokens) in enumerate(self.steps):
            points = self._points(tokens).to(kv.device)
            if operator is not None:
                block = operator.finish(pending).reshape(*kv.shape[:-2], len(points), kv.shape[-1])
                operator.release()  # the buffers of all steps would be as large as all keys
            after = self.steps[number + 1][0] if number + 1 < len(self.steps) else None
            if after is not None:
                pending = after.start(kv.detach().reshape(after.plan.shape_in))
            columns = points if self.turns else torch.arange(len(points), device=kv.device)
            part = mask.index_select(-1, columns) if mask is not None and mask.shape[-1] > 1 else mask
            yield Block(operator, block.to(self.dtype), points, columns, part, self._kept(q, tokens, len(points), seed))

    def _kept(self, q: torch.Tensor, tokens: Factors, count: int, seed: int | None) -> torch.Tensor | None:
        if seed is None:
            return None
        factors = [dim for f in (*self.query.dims[:-1], tokens) for dim in f]
        box, shape = tuple(range_at(d, self.c.grid, self.c.index) for d in factors), tuple(map(length_of, factors))
        return (mask_of(box, shape, seed, self.p, q.device).to(self.dtype) / (1 - self.p)).reshape(*q.shape[:-1], count)

    def pieces(self, q: torch.Tensor, block: Block) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Parts of a block, with a bounded number of scores: where they are, keys, values, and scores of scaled queries."""
        rows = q.shape[:-1].numel()
        size = max(_AT_ONCE // max(rows, 1), 1)
        for start in range(0, len(block.points) if rows else 0, size):
            at = slice(start, start + size)
            k, v = block.kv[..., at, : self.features], block.kv[..., at, self.features :]
            s, mask = q @ k.mT, block.mask
            if mask is not None:
                mask = mask if mask.shape[-1] == 1 else mask[..., at]
                s = s.masked_fill_(~mask, -math.inf) if mask.dtype is torch.bool else s.add_(mask)
            if self.causal:
                s.masked_fill_(block.points[at] > self.rows.to(q.device)[:, None], -math.inf)
            yield at, k, v, s


class _Attend(Node):
    """What `Ring` computes. Backward fetches the blocks again, and sends each its gradient home."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, kv: torch.Tensor, mask: Any, ring: Ring, seed: Any) -> Any:
        ctx.ring, ctx.seed = ring, None if seed is None else int(seed)
        scaled = q.to(ring.dtype) * ring.scale
        sums = scaled.new_zeros(*q.shape[:-1], kv.shape[-1] - ring.features + 1)
        top = scaled.new_full((*q.shape[:-1], 1), -math.inf)
        for block in ring.blocks(q, kv, mask, ctx.seed):
            for at, _, v, s in ring.pieces(scaled, block):
                higher = torch.maximum(top, s.amax(-1, keepdim=True))
                base = finite(higher)
                e = s.sub_(base).exp_()
                sums.mul_((top - base).exp_())
                sums[..., -1:].add_(e.sum(-1, keepdim=True))
                sums[..., :-1].add_((e if block.kept is None else e.mul_(block.kept[..., at])) @ v)
                top = higher
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
        scaled, base, returning = q.to(ring.dtype) * ring.scale, finite(top), list[tuple[Operator, Any]]()
        of_sums, of_weights = gradient[..., :-1], gradient[..., -1:]
        dq, dkv = torch.zeros_like(scaled), torch.zeros(kv.shape, dtype=ring.dtype, device=kv.device)
        dmask = torch.zeros_like(mask, dtype=ring.dtype) if ctx.needs_input_grad[2] else None
        for block in ring.blocks(q, kv, mask, ctx.seed):
            back = torch.zeros_like(block.kv)
            for at, k, v, s in ring.pieces(scaled, block):
                e = s.sub_(base).exp_()
                kept = 1 if block.kept is None else block.kept[..., at]
                back[..., at, ring.features :] = ((e * kept).mT @ of_sums).sum_to_size(v.shape)
                e.mul_((of_sums @ v.mT).mul_(kept).add_(of_weights))
                back[..., at, : ring.features] = (e.mT @ scaled).sum_to_size(k.shape)
                dq += e @ k
                if dmask is not None:
                    columns = block.columns[at] if mask.shape[-1] > 1 else block.columns[:1] * 0
                    dmask.index_add_(-1, columns, e.sum_to_size(*mask.shape[:-1], len(columns)))
            _land(dkv, returning)
            if block.operator is None:
                dkv += back
            elif ring.kv.grad:
                adjoint = block.operator.adjoint
                returning.append((adjoint, adjoint.start(back.to(kv.dtype).reshape(adjoint.plan.shape_in))))
        _land(dkv, returning)
        of_mask = None if dmask is None else dmask.to(mask.dtype)
        return dq.mul_(ring.scale).to(q.dtype), dkv.to(kv.dtype), of_mask, None, None


def _land(sums: torch.Tensor, returning: list[tuple[Operator, Any]]) -> None:
    """Add the gradients that are on their way home."""
    while returning:
        operator, pending = returning.pop()
        sums += operator.finish(pending).reshape(sums.shape)
        operator.release()


def finite(top: torch.Tensor) -> torch.Tensor:
    """Maxima, zero for queries that have seen no key."""
    return top.masked_fill(top == -math.inf, 0)
