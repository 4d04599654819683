"""Operations that rearrange dims and points: views, slices, joins, shifts, pads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from distdl_lite.factors import Dims, Factors, all_axes, axes_of, boundaries, cut, reshaped, size_of, uncut
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, Range, Shape, ranges_of
from distdl_lite.nn.broadcasting import common_dims
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.features import wish
from distdl_lite.nn.value import NoRule, Value, rule


@rule("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def view(c: Compiler, op: Any, x: Value, *args: Any) -> Value:
    if args and isinstance(args[0], torch.dtype):
        raise NoRule
    return view_as(c, x, op.shape)


def view_as(c: Compiler, x: Value, shape: Shape) -> Value:
    """The value with another shape; it is moved first where its cuts do not fall on boundaries of the new dims."""
    if x.make is not None:
        return c.made_later(x.make, tuple((uncut(n),) for n in shape), x.dtype)
    if math.prod(shape) == 0:
        x = c.whole(x, "view")
        return c.call(torch.reshape, x, shape, dims=tuple((uncut(n),) for n in shape), dtype=x.dtype)
    if reshaped(x.dims, shape) is None and x.product:
        inner = next((i for i in range(len(shape)) if math.prod(shape[i:]) == x.shape[-1]), None)
        if inner is not None:
            wish(c, x, shape[inner:])
    x = c.move(x, _viewable(c, x.dims, shape))
    dims = reshaped(x.dims, shape)
    assert dims is not None
    local = c.local(dims)
    return c.renamed(x, dims) if local == c.local(x.dims) else c.call(torch.reshape, x, local, dims=dims, dtype=x.dtype)


def _viewable(c: Compiler, dims: Dims, shape: Shape) -> Dims:
    """Dims near to some that can be viewed as a shape: a cut that does not fit gets other points, or goes elsewhere."""
    tried: set[int] = set()
    while reshaped(dims, shape) is None:
        cuts = [d for d in reversed(range(len(dims))) if axes_of(dims[d])]
        d = next((d for d in cuts if reshaped(_only(dims, d), shape) is None), cuts[0])
        recut = None if d in tried else _recut(c, dims, d, shape)
        axes, dims = axes_of(dims[d]), tuple(recut or (uncut(size_of(f)),) if e == d else f for e, f in enumerate(dims))
        tried.add(d)
        for axis in () if recut else axes:
            dims = c.placed(dims, axis, tried)
    return dims


def _only(dims: Dims, d: int) -> Dims:
    """The dims, of which one alone is cut."""
    return tuple(f if e == d else (uncut(size_of(f)),) for e, f in enumerate(dims))


def _recut(c: Compiler, dims: Dims, d: int, shape: Shape) -> Factors | None:
    """A dim in balanced blocks of what the view leaves together, None if there are fewer of these than ranks."""
    axes, n = axes_of(dims[d]), size_of(dims[d])
    inner = math.prod(size_of(f) for f in dims[d + 1 :])
    unit = max((p for p in boundaries(shape) if inner < p < inner * n), default=inner) // inner
    if n % unit or n // unit < c.parts(axes):
        return None
    factor = Dim(ranges_of([q * unit for q in balanced(n // unit, c.parts(axes))]), axes)
    return (
        (factor,)
        if reshaped(tuple((factor,) if e == d else (uncut(size_of(f)),) for e, f in enumerate(dims)), shape)
        else None
    )


@rule("as_strided")
def as_strided(c: Compiler, op: Any, x: Value, *args: Any) -> Value:
    raise RuntimeError(f"{c.path or 'the model'}: as_strided reads memory in its order, which blocks do not have")


@rule("permute", "transpose", "t", "numpy_T")
def permute(c: Compiler, op: Any, x: Value, *args: Any) -> Value:
    order = list(range(x.ndim))
    if op.name == "permute":
        order = [d % x.ndim for d in args[0]]
    elif op.name != "transpose":
        order.reverse()
    elif x.ndim:
        a, b = (d % x.ndim for d in args)
        order[a], order[b] = b, a
    return permuted(c, x, order)


def permuted(c: Compiler, x: Value, order: Sequence[int]) -> Value:
    """The value with its dims in another order."""
    dims = tuple(x.dims[d] for d in order)
    if x.make is not None:
        return c.made_later(x.make, dims, x.dtype)
    return c.call(torch.Tensor.permute, x, list(order), dims=dims, dtype=x.dtype)


@rule("repeat")
def repeat(c: Compiler, op: Any, x: Value, times: Sequence[int]) -> Value:
    lead = len(op.shape) - x.ndim
    x = c.wholly(x, [d for d in range(x.ndim) if times[lead + d] != 1], "repeat")
    dims = tuple(x.dims[d - lead] if d >= lead and times[d] == 1 else (uncut(n),) for d, n in enumerate(op.shape))
    return c.call(torch.Tensor.repeat, x, times, dims=dims, dtype=x.dtype)


@rule("flip")
def flip(c: Compiler, op: Any, x: Value, over: Sequence[int]) -> Value:
    over = [d % x.ndim for d in over]
    x = c.plain(x, over)
    turned = {
        d: replace(f, ranges=tuple((x.shape[d] - b, x.shape[d] - a) for a, b in f.ranges))
        for d in over
        for f in x.dims[d]
    }
    z = c.move(x, x.with_dims(turned), "shift")
    return c.call(torch.flip, z, over, dims=x.dims, dtype=x.dtype)


@rule("tril", "triu")
def triangle(c: Compiler, op: Any, x: Value, diagonal: int = 0) -> Value:
    x = c.plain(x, [x.ndim - 2, x.ndim - 1])
    (row, _), (column, _) = (c.range(factor) for (factor,) in x.dims[-2:])
    return c.call(op.function, x, diagonal + row - column, dims=x.dims, dtype=x.dtype)


@rule("diagonal", "diagonal_copy")
def diagonal(c: Compiler, op: Any, x: Value, offset: int = 0, a: int = 0, b: int = 1) -> Value:
    a, b = a % x.ndim, b % x.ndim
    x = c.wholly(x, [a, b], "whole")
    dims = (*(f for d, f in enumerate(x.dims) if d not in (a, b)), (uncut(op.shape[-1]),))
    return c.call(torch.diagonal, x, offset, a, b, dims=dims, dtype=x.dtype)


@rule("diag_embed")
def diag_embed(c: Compiler, op: Any, x: Value, offset: int = 0, a: int = -2, b: int = -1) -> Value:
    a, b = a % (x.ndim + 1), b % (x.ndim + 1)
    x = c.wholly(x, [-1], "whole")
    rest = iter(x.dims)
    dims = tuple((uncut(n),) if d in (a, b) else next(rest) for d, n in enumerate(op.shape))
    return c.call(torch.diag_embed, x, offset, a, b, dims=dims, dtype=x.dtype)


# Slices


def _sliced(x: torch.Tensor, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


def taken(c: Compiler, x: Value, d: int, start: int, step: int, count: int) -> Value:
    """So many points of a dim, from one on in steps.

    Where every rank's own points make blocks that are even enough nothing moves.
    """
    if x.make is not None:
        return c.made_later(x.make, x.with_dims({d: uncut(count)}), x.dtype)
    x = c.plain(x, [d])
    (held,) = x.dims[d]
    if not held.axes:
        dims = x.with_dims({d: uncut(count)})
        return c.call(
            _sliced, x, d, start, start + step * (count - 1) + 1 if count else start, step, dims=dims, dtype=x.dtype
        )
    own = tuple(_own(r, start, step, count) for r in held.ranges)
    even = -(-count // len(own))
    if any(b - a > even for a, b in own) or (count >= len(own) and any(a == b for a, b in own)):
        own = cut(count, held.axes, c.grid).ranges
    wanted = Dim(tuple((start + step * a, start + step * (b - 1) + 1) if a < b else (0, 0) for a, b in own), held.axes)
    z, dims = c.move(x, x.with_dims({d: wanted}), "shift"), x.with_dims({d: Dim(own, held.axes)})
    return c.renamed(z, dims) if step == 1 else c.call(_sliced, z, d, 0, None, step, dims=dims, dtype=x.dtype)


def _own(held: Range, start: int, step: int, count: int) -> Range:
    """Which of the points that are taken a rank holds."""
    first, stop = (min(max(-(-(point - start) // step), 0), count) for point in held)
    return first, max(first, stop)


@rule("slice")
def slice_(c: Compiler, op: Any, x: Value, d: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    d %= x.ndim
    points = range(x.shape[d])[start:end:step]
    return x if len(points) == x.shape[d] else taken(c, x, d, points.start, step, len(points))


@rule("select")
def select(c: Compiler, op: Any, x: Value, d: int, i: int) -> Value:
    d %= x.ndim
    i %= x.shape[d]
    if x.make is not None:
        return c.made_later(x.make, (*x.dims[:d], *x.dims[d + 1 :]), x.dtype)
    x = c.plain(x, [d])
    dims = (*x.dims[:d], *x.dims[d + 1 :])
    if x.axes(d):
        x, i = c.move(x, x.with_dims({d: Dim(((i, i + 1),))}), "select"), 0
    return c.call(torch.select, x, d, i, dims=dims, dtype=x.dtype)


@rule("unbind")
def unbind(c: Compiler, op: Any, x: Value, d: int = 0) -> list[Value]:
    d %= x.ndim
    x = c.wholly(x, [d], "whole")
    n, dims = x.shape[d], (*x.dims[:d], *x.dims[d + 1 :])
    return c.calls(torch.unbind, x, d, dims=[dims] * n, dtypes=[x.dtype] * n)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split_(c: Compiler, op: Any, x: Value, how: Any, d: int = 0) -> list[Value]:
    d %= x.ndim
    sizes = [shape[d] for shape, *_ in op.outputs]
    if not x.axes(d):
        x = c.plain(x, [d])
        dims = [x.with_dims({d: uncut(n)}) for n in sizes]
        return c.calls(torch.split, x, sizes, d, dims=dims, dtypes=[x.dtype] * len(sizes))
    if d == x.ndim - 1 and len(set(sizes)) == 1:
        wish(c, x, [len(sizes), sizes[0]], 1)
        lengths = [f.ranges[-1][1] for f in x.dims[d]]
        if lengths[0] == len(sizes) and not x.dims[d][0].axes:  # as it was wished for
            y = view_as(c, x, (*x.shape[:-1], len(sizes), sizes[0]))
            dims = (*y.dims[:-2], y.dims[-1])
            return c.calls(torch.unbind, y, -2, dims=[dims] * len(sizes), dtypes=[x.dtype] * len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [taken(c, x, d, start, 1, n) for start, n in zip(starts, sizes, strict=True)]


# Joins and shifts


@rule("cat")
def cat(c: Compiler, op: Any, values: Sequence[Value], d: int = 0) -> Value:
    values = [c.cast(v, op.dtype) for v in values if v.shape != (0,) or len(op.shape) == 1]
    d %= values[0].ndim
    largest = max(values, key=lambda v: (bool(all_axes(v.dims)), math.prod(v.shape)))
    base = largest.dims
    if len({v.shape for v in values}) == 1:
        base = common_dims(c, values, values[0].shape)
    axes = axes_of(base[d])
    joined = cut(op.shape[d], axes, c.grid)
    pieces, start = [], 0
    for value in values:
        n = value.shape[d]
        mine = tuple((min(max(a - start, 0), n), min(max(b - start, 0), n)) for a, b in joined.ranges)
        piece = Dim(mine, axes) if axes else uncut(n)
        where = tuple((piece,) if e == d else f for e, f in enumerate(base))
        pieces.append(c.move(c.plain(value, [d]), where, "cat" if axes else ""))
        start += n
    dims = tuple((joined,) if e == d else f for e, f in enumerate(base))
    return c.call(torch.cat, pieces, d, dims=dims, dtype=op.dtype)


@rule("stack")
def stack(c: Compiler, op: Any, values: Sequence[Value], d: int = 0) -> Value:
    d %= values[0].ndim + 1
    dims = common_dims(c, values, values[0].shape)
    values = [c.move(v, dims) for v in values]
    return c.call(torch.stack, values, d, dims=(*dims[:d], (uncut(len(values)),), *dims[d:]), dtype=op.dtype)


@rule("roll")
def roll(c: Compiler, op: Any, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts, over = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    if not over:
        return view_as(c, rolled(c, view_as(c, x, (math.prod(x.shape),)), shifts[0], 0), x.shape)
    for shift, d in zip(shifts, over, strict=True):
        x = rolled(c, x, shift, d % x.ndim)
    return x


def rolled(c: Compiler, x: Value, shift: int, d: int) -> Value:
    """The value shifted along a dim, round its end."""
    n = x.shape[d]
    shift = shift % n if n else 0
    if not shift:
        return x
    x = c.plain(x, [d])
    (held,) = x.dims[d]
    if not held.axes:
        return c.call(torch.roll, x, shift, d, dims=x.dims, dtype=x.dtype)
    wanted = Dim(tuple((a - shift, b - shift) for a, b in held.ranges), held.axes, n)
    return c.renamed(c.move(x, x.with_dims({d: wanted}), "shift"), x.dims)


# Into a tensor


def _put(x: torch.Tensor, source: torch.Tensor, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    """torch's slice_scatter, which has no gradient for complex numbers."""
    x = x.clone()
    x[(slice(None),) * dim + (slice(start, stop, step),)] = source
    return x


@rule("slice_scatter")
def slice_scatter(
    c: Compiler, op: Any, x: Value, source: Value, d: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    d %= x.ndim
    points = range(x.shape[d])[start:end:step]
    start, stop, m = points.start, points.stop, len(points)
    if not all_axes(x.dims) and all_axes(source.dims):  # cut as what comes in, whose cut of this dim goes elsewhere
        source = c.wholly(source, [d], "whole")
        x = c.move(x, source.with_dims({d: uncut(x.shape[d])}), "slice")
    x, source = c.plain(x, [d]), c.plain(source, [d])
    if step != 1 and x.axes(d):
        x = c.wholly(x, [d], "whole")
    (held,) = x.dims[d]
    if not held.axes:
        source = c.move(source, x.with_dims({d: uncut(m)}))
        return c.call(_put, x, source, d, start, stop, step, dims=x.dims, dtype=x.dtype)
    piece = Dim(tuple(_own(r, start, 1, m) for r in held.ranges), held.axes)
    source = c.move(source, x.with_dims({d: piece}), "shift")
    first, (a, b) = c.range(held)[0], c.range(piece)
    return c.call(_put, x, source, d, a + start - first, b + start - first, 1, dims=x.dims, dtype=x.dtype)


@rule("select_scatter")
def select_scatter(c: Compiler, op: Any, x: Value, source: Value, d: int, i: int) -> Value:
    d, i = d % x.ndim, i % x.shape[d % x.ndim]
    source = view_as(c, source, (*source.shape[:d], 1, *source.shape[d:]))
    return slice_scatter(c, op, x, source, d, i, i + 1)


@rule("view_as_complex")
def view_as_complex(c: Compiler, op: Any, x: Value) -> Value:
    x = c.wholly(x, [-1], "whole")
    return c.call(_as_complex, x, dims=x.dims[:-1], dtype=op.dtype)


def _as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.contiguous())


@rule("view_as_real")
def view_as_real(c: Compiler, op: Any, x: Value) -> Value:
    return c.call(torch.view_as_real, x, dims=(*x.dims, (uncut(2),)), dtype=op.dtype)
