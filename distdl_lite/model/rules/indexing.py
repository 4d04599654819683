"""Look-ups by integer tensors, and what puts numbers where they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from distdl_lite.factors import Dims, Factors, all_axes, axes_of, cut, size_of, uncut
from distdl_lite.model.rules.dims import taken, view_as
from distdl_lite.model.rules.elementwise import pointwise
from distdl_lite.nn.broadcasting import common_dims, fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import NoRule, Value, rule


def without(factors: Factors, axes: set[int]) -> Factors:
    """The factors of a dim, whole if one of these axes cuts it."""
    return (uncut(size_of(factors)),) if axes & set(axes_of(factors)) else factors


def looked_up(x: Value, indices: Sequence[Value | None], found: Dims) -> Dims:
    """The dims of what indices, which broadcast to some dims, look up in a value."""
    places = [d for d, i in enumerate(indices) if i is not None]
    is_run = places == list(range(places[0], places[0] + len(places)))
    first = places[0] if is_run else 0
    rest = [f for d, f in enumerate(x.dims) if d not in places]
    return (*rest[:first], *found, *rest[first:])


def whole_at(c: Compiler, x: Value, indices: Sequence[Value | None]) -> Value:
    """The value whole in the dims that have indices."""
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        raise NoRule
    return c.wholly(x, [d for d, i in enumerate(indices) if i is not None], "whole")


def broadcast_shape(indices: Sequence[Value | None]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(i.shape for i in indices if i is not None)))


@rule("index")
def index(c: Compiler, op: Any, x: Value, indices: list[Value | None]) -> Value:
    x = whole_at(c, x, indices)
    given = [i for i in indices if i is not None]
    found = common_dims(c, given, broadcast_shape(indices))
    found = tuple(without(f, set(all_axes(x.dims))) for f in found)
    laid = [i if i is None else fit(c, i, found) for i in indices]
    return c.call(op.function, x, laid, dims=looked_up(x, indices, found), dtype=x.dtype)


@rule("index_put", "_unsafe_index_put")
def index_put(
    c: Compiler, op: Any, x: Value, indices: list[Value | None], values: Value, accumulate: bool = False
) -> Value:
    (mask, *more) = indices
    if mask is not None and mask.dtype is torch.bool and not more and math.prod(values.shape) == 1 and not accumulate:
        mask = view_as(c, mask, (*mask.shape, *[1] * (x.ndim - mask.ndim)))
        return pointwise(c, replace(op, function=torch.where), mask, view_as(c, values, ()), x)
    x = whole_at(c, x, indices)
    laid = [i if i is None else c.whole(i) for i in indices]
    put = looked_up(x, indices, tuple((uncut(n),) for n in broadcast_shape(indices)))
    return c.call(op.function, x, laid, fit(c, values, put), accumulate, dims=x.dims, dtype=x.dtype)


def beside(c: Compiler, values: Sequence[Value], d: int) -> list[Value]:
    """Values of equal shapes but for one dim: whole in that one, and alike in the others."""
    if not values[0].ndim or len({(*v.shape[:d], *v.shape[d + 1 :]) for v in values}) > 1:
        raise NoRule
    values = [c.wholly(v, [d], "whole") for v in values]
    dims = common_dims(c, values, values[0].shape)
    return [c.move(v, (*dims[:d], (uncut(v.shape[d]),), *dims[d + 1 :])) for v in values]


def within(c: Compiler, x: Value, shape: Sequence[int]) -> Value:
    """The first points of each dim, as many as a shape says."""
    for d, n in enumerate(shape):
        x = x if x.shape[d] == n else taken(c, x, d, 0, 1, n)
    return x


@rule("gather")
def gather(c: Compiler, op: Any, x: Value, d: int, indices: Value, *, sparse_grad: bool = False) -> Value:
    if not x.ndim or x.ndim != indices.ndim:
        raise NoRule
    d %= x.ndim
    x = within(c, x, (*indices.shape[:d], x.shape[d], *indices.shape[d + 1 :]))
    x, indices = beside(c, [x, indices], d)
    return c.call(torch.gather, x, d, indices, dims=indices.dims, dtype=x.dtype)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(c: Compiler, op: Any, x: Value, d: int, indices: Value, source: Any, *args: Any, **options: Any) -> Value:
    if not x.ndim or x.ndim != indices.ndim:
        raise NoRule
    d %= x.ndim
    if any(n != m for e, (n, m) in enumerate(zip(x.shape, indices.shape, strict=True)) if e != d):
        raise NoRule
    if not isinstance(source, Value):
        x, indices = beside(c, [x, indices], d)
    else:
        x, indices, source = beside(c, [x, indices, within(c, source, indices.shape)], d)
    return c.call(op.function, x, d, indices, source, *args, dims=x.dims, dtype=x.dtype, **options)


@rule("index_select", "index_add", "index_copy", "index_fill", "index_reduce")
def along_indices(c: Compiler, op: Any, x: Value, d: int, indices: Value, *args: Any, **options: Any) -> Value:
    """Operations on the slices of a dim that are named by number."""
    if not x.ndim:
        raise NoRule
    d %= x.ndim
    sources = [a for a in args if isinstance(a, Value) and a.ndim]
    x, *laid = beside(c, [x, *sources], d)
    given = [laid.pop(0) if isinstance(a, Value) and a.ndim else a for a in args]
    dims = x.with_dims({d: uncut(op.shape[d])})
    return c.call(op.function, x, d, c.whole(indices), *given, dims=dims, dtype=x.dtype, **options)


@rule("take")
def take(c: Compiler, op: Any, x: Value, indices: Value) -> Value:
    return c.call(torch.take, c.whole(x), indices, dims=indices.dims, dtype=x.dtype)


@rule("bucketize", "isin")
def looked_up_in(c: Compiler, op: Any, x: Value, table: Value, **options: Any) -> Value:
    if not isinstance(x, Value) or not isinstance(table, Value):
        raise NoRule
    return c.call(op.function, _dense(c, x), c.whole(table), dims=x.dims, dtype=op.dtype, **options)


@rule("searchsorted")
def searchsorted(c: Compiler, op: Any, table: Value, x: Value, **options: Any) -> Value:
    if table.ndim != 1 or not isinstance(x, Value) or options.get("sorter") is not None:
        raise NoRule
    return c.call(op.function, c.whole(table), _dense(c, x), dims=x.dims, dtype=op.dtype, **options)


def _dense(c: Compiler, x: Value) -> Value:
    """The value in its order in memory, without which torch warns."""
    return c.call(torch.Tensor.contiguous, x, dims=x.dims, dtype=x.dtype)


@rule("linalg_cross")
def cross(c: Compiler, op: Any, x: Value, y: Value, *, dim: int = -1) -> Value:
    x, y = beside(c, [x, y], dim % max(x.ndim, 1))
    return c.call(op.function, x, y, dims=x.dims, dtype=op.dtype, dim=dim)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(c: Compiler, op: Any, x: Value, points: Value, *options: Any) -> Value:
    """Reads anywhere: the image is whole, the points and so the outputs are cut, by default as the image was."""
    space = range(2, x.ndim)
    if not all_axes(points.dims):
        cuts = {
            d - 1: cut(points.shape[d - 1], x.axes(d), c.grid)
            for d in space
            if points.shape[d - 1] >= c.parts(x.axes(d))
        }
        points = c.move(points, points.with_dims(cuts), "slice")
    x, points = c.wholly(x, space, "whole", spread=False), c.wholly(points, [-1], "whole", spread=False)
    batch = common_dims(c, [x], x.shape)[0] if x.axes(0) else without(points.dims[0], set(x.axes(1)))
    x = c.move(x, x.with_dims({0: batch}))
    used = set(all_axes(x.dims))
    read = tuple(without(f, used) for f in points.dims[1:-1])
    points = c.move(points, (batch, *read, points.dims[-1]))
    return c.call(op.function, x, points, *options, dims=(*x.dims[:2], *read), dtype=op.dtype)


@rule("affine_grid_generator")
def affine_grid(c: Compiler, op: Any, theta: Value, size: Sequence[int], align_corners: bool) -> Value:
    theta = c.wholly(theta, [1, 2], "whole", spread=False)
    dims = (theta.dims[0], *((uncut(n),) for n in op.shape[1:]))
    return c.call(op.function, theta, [*c.local(theta.dims)[:1], *size[1:]], align_corners, dims=dims, dtype=op.dtype)
