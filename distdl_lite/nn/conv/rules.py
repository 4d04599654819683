"""The rules of convolutions in graphs: cut along batch, space and channels, with weights that are cut along channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distdl_lite.factors import Dims, Factors, cut, is_inside, uncut
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, ranges_of
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.conv import overlap
from distdl_lite.nn.conv.geometry import ConvGeometry, Geometry, TransposedGeometry
from distdl_lite.nn.features import cut_features, finished
from distdl_lite.nn.options import options_of
from distdl_lite.nn.value import NoRule, Value, rule
from distdl_lite.reducer import reducer_of


@rule("conv1d", "conv2d", "conv3d")
def conv(
    c: Compiler,
    op: Any,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    size = weight.shape[2:]
    stride, dilation = options_of(len(size), stride, dilation)
    if isinstance(padding, str):
        total = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in options_of(len(size), padding)[0])
    return convolved(c, op, ConvGeometry(size, stride, dilation, pads, groups), x, weight, bias)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    c: Compiler,
    op: Any,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    size = weight.shape[2:]
    stride, padding, extra, dilation = options_of(len(size), stride, padding, output_padding, dilation)
    pads = tuple((p, p) for p in padding)
    return convolved(c, op, TransposedGeometry(size, stride, dilation, pads, groups, extra), x, weight, bias)


@rule("convolution")
def convolution(
    c: Compiler, op: Any, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    if transposed:
        return conv_transpose(c, op, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(c, op, x, weight, bias, stride, padding, dilation, groups)


def convolved(c: Compiler, op: Any, geometry: Geometry, x: Value, weight: Value, bias: Value | None) -> Value:
    """The rule of all of them: each rank fetches the inputs that its outputs read, and computes alone.

    Channels: where they are cut, either the weight is cut along its inputs and the ranks' products are added up, or they are
    gathered; where they are not, but an axis is free to cut them, the weight is cut along its outputs.
    """
    if x.ndim != weight.ndim:  # without a batch
        raise NoRule
    is_pointwise = isinstance(geometry, ConvGeometry)
    same = {d for d in range(2, x.ndim) if is_pointwise and geometry.is_pointwise(d - 2)}  # type: ignore[attr-defined]
    moved = [d for d in range(2, x.ndim) if d not in same]
    x, ins, outs, summed = _channels(c, op.shape[1], geometry.groups, c.spread_home(c.plain(x, moved), moved))
    outputs = geometry.outputs(x.shape[2:])
    batch = c.even(x.dims)[0]
    y_dims, z_dims, whole = (batch, outs), (batch, ins), list[bool]()
    for d in range(2, x.ndim):
        made = cut(outputs[d - 2], x.axes(d), c.grid)
        whole.append(d in same or geometry.stays_whole(d - 2, len(made.ranges)))
        if d in same:
            computed = read = x.dims[d]
        else:
            computed = (made,)
            read = (uncut(x.shape[d]) if whole[-1] else geometry.reads(d - 2, x.shape[d], made),)
        y_dims, z_dims = (*y_dims, computed), (*z_dims, read)
    first, second = (ins, outs) if isinstance(geometry, TransposedGeometry) else (outs, ins)
    if geometry.groups > 1:
        second = (uncut(weight.shape[1]),)
    weight = c.placed_at(weight, (first, second, *((uncut(n),) for n in weight.shape[2:])), c.feature_axes)
    bias = bias and c.placed_at(bias, (outs,), c.feature_axes)
    local_groups = 1 if geometry.groups == 1 else geometry.groups * c.local((outs,))[0] // op.shape[1]
    box, held = (_box(c, dims) for dims in (y_dims, z_dims))
    product = replace(geometry, groups=local_groups).product(box, held, x.shape, whole, op.dtype)
    added = None if summed else bias
    value = _fused(c, op, geometry, whole, product, x, z_dims, y_dims, weight, added)
    if value is None:
        moved_x = c.move(x, z_dims, "halo")
        value = c.call(product, moved_x, weight, added, dims=y_dims, dtype=op.dtype)
    return finished(c, value, summed, bias, geometry.dims)


def _box(c: Compiler, dims: Dims) -> Any:
    """This rank's box; of a dim of several factors, which stays as it is, its length."""
    lengths = c.local(dims)
    return tuple(c.range(f[0]) if len(f) == 1 else (0, n) for f, n in zip(dims, lengths, strict=True))


def _channels(c: Compiler, out: int, groups: int, x: Value) -> tuple[Value, Factors, Factors, tuple[int, ...]]:
    """The input, with the cuts of its channels and of the output's, and the axes over which products are added up."""
    x = c.plain(x, [1])
    if groups == 1:
        return cut_features(c, x, 1, out)
    axes, n = x.axes(1), x.shape[1]
    free = () if axes else c.free_features(x)
    parts = c.parts(axes or free)
    if parts == 1 or groups < parts:
        x = c.wholly(x, [1], "channels")
        return x, x.dims[1], (uncut(out),), ()
    points = balanced(groups, parts)
    if axes and all(a % (n // groups) == 0 for r in x.dims[1][0].ranges for a in r):
        points = tuple(a // (n // groups) for a in (0, *(stop for _, stop in x.dims[1][0].ranges)))
    ins, outs = (Dim(ranges_of([p * (m // groups) for p in points]), axes or free) for m in (n, out))
    return c.move(x, x.with_dims({1: ins}), "channels"), (ins,), (outs,), ()


def _fused(
    c: Compiler, op: Any, geometry: Geometry, whole: Sequence[bool], product: Any, x: Value, z: Dims, y: Dims, weight: Value,
    bias: Value | None,
) -> Value | None:  # fmt: skip
    """The convolution as one graph node that reads the parameters themselves, where that pays."""
    held = [v.parameter for v in (weight, bias) if v is not None]
    is_simple = all(len(f) == 1 for dims in (x.dims, z, y) for f in dims) and all(
        p is not None and not p.is_used for p in held
    )
    if not is_simple or not isinstance(product, overlap.Kernel) or not (weight.grad or x.grad):
        return None
    if any(v is not None and not v.grad for v in (weight, bias)):
        return None
    moves = not all(is_inside(h, w) for (h,), (w,) in zip(x.dims, z, strict=True))
    if not moves:
        x = c.move(x, z)
    X, Z = c.layouts(*(tuple(f for (f,) in dims) for dims in (x.dims, z)))
    Y = replace(X, dims=tuple(f for (f,) in y))
    replicas = tuple(v and v.parameter and v.parameter.replicas(v.dims) for v in (weight, bias))
    reducer = c.transport and reducer_of(c.transport)

    def between(X: Any, S: Any) -> Any:
        return c.between(X, S, x, "halo")

    mark = len(c.movements)
    fetch = between(X, Z) if moves else None
    made = overlap.fused(
        geometry, whole, (X, Z, Y), fetch, product, x.dtype, x.grad, c.rank, between, replicas, reducer, moves
    )
    if made is None:
        del c.movements[mark:]
        return None
    if made.slabs:
        del c.movements[mark]
    value = c.new(y, op.dtype, True)
    raw = [v.parameter.raw for v in (weight, bias) if v is not None and v.parameter is not None]
    words = ", ".join([x.name, *raw, *(["None"] if bias is None else [])])
    c.emit(f"{value.name} = {c.constant(made.of, op.name)}({words})", [x.name, *raw])
    return value
