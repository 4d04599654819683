"""Windows of a dim or of an image as dims of their own, and the sums of such."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.factors import cut, uncut
from distdl_lite.layout import Shape, bounded, read_by_kernel, read_by_transposed_kernel
from distdl_lite.model.rules.dims import view_as
from distdl_lite.nn.blocks import connected_zeros
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import NoRule, Value, rule


@rule("unfold")
def unfold(c: Compiler, op: Any, x: Value, d: int, size: int, step: int) -> Value:
    """The windows of a dim: each rank's read what it has and a halo."""
    if not x.ndim:
        raise NoRule
    d %= x.ndim
    x = c.plain(x, [d])
    count = cut(op.shape[d], x.axes(d), c.grid)
    reads = tuple((step * a, step * (b - 1) + size) if a < b else (0, 0) for a, b in count.ranges)
    z = c.move(x, x.with_dims({d: replace(count, ranges=reads)}), "halo") if count.axes else x
    dims = (*x.with_dims({d: count}), (uncut(size),))
    return c.call(torch.Tensor.unfold, z, d, size, step, dims=dims, dtype=x.dtype, everywhere=False, linear=True)


@rule("im2col")
def im2col(c: Compiler, op: Any, x: Value, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Value:
    """Patches as columns: channels and the kernel's points are factors of one dim, rows and columns of the other."""
    x = c.plain(x, [x.ndim - 2, x.ndim - 1])
    reads, patches, left = {}, [], []
    for d, k, e, p, s in zip((x.ndim - 2, x.ndim - 1), kernel, dilation, padding, stride, strict=True):
        n = (x.shape[d] + 2 * p - e * (k - 1) - 1) // s + 1
        patches.append(cut(n, x.axes(d), c.grid))
        ranges = read_by_kernel([0, *(b for _, b in patches[-1].ranges)], k, s, e, p)  # zeros outside the tensor
        reads[d] = replace(patches[-1], ranges=ranges) if x.axes(d) else uncut(x.shape[d])
        left.append(0 if x.axes(d) else p)
    z = c.move(x, x.with_dims(reads), "halo")
    *lead, channels = x.dims[:-2]
    dims = (*lead, (*channels, uncut(math.prod(kernel))), tuple(patches))
    return c.call(
        op.function, z, kernel, dilation, left, stride, dims=dims, dtype=x.dtype, everywhere=False, linear=True
    )


@rule("col2im")
def col2im(c: Compiler, op: Any, x: Value, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Value:
    """The sums of patches where they overlap: each rank reads those that reach its points, and adds up alone."""
    options = list(zip(size, kernel, dilation, padding, stride, strict=True))
    *lead, columns, _ = x.shape
    first = len(lead) + 3  # the dim of the patches' rows
    patches = [(n + 2 * p - e * (k - 1) - 1) // s + 1 for n, k, e, p, s in options]
    x = view_as(c, x, (*lead, columns // math.prod(kernel), *kernel, *patches))
    x = c.wholly(c.plain(x), [first - 2, first - 1], "recut")
    reads, image, spans, pads = {}, [], [], []
    for d, (n, k, e, p, s) in enumerate(options, first):
        image.append(cut(n, x.axes(d), c.grid))
        ranges = read_by_transposed_kernel([0, *(b for _, b in image[-1].ranges)], k, s, e, p)
        read = bounded(replace(image[-1], ranges=ranges), x.shape[d], "none")
        reads[d] = read if x.axes(d) else uncut(x.shape[d])
        (low, high), (a, b) = c.range(reads[d]), c.range(image[-1])
        spans.append((high - low - 1) * s + e * (k - 1) + 1)
        pads.append((low * s - p - a, b - (low * s - p + spans[-1])))
    dims = (*x.dims[: first - 2], *((f,) for f in image))
    z = c.move(x, x.with_dims(reads), "halo")
    add_up = partial(_added_up, shape=c.local(dims), spans=spans, pads=(*pads[1], *pads[0]))
    return c.call(add_up, z, kernel, dilation, stride, dims=dims, dtype=x.dtype, everywhere=False, linear=True)


def _added_up(
    z: torch.Tensor, kernel: Any, dilation: Any, stride: Any, *, shape: Shape, spans: Any, pads: Any
) -> torch.Tensor:
    if not z.numel():
        return connected_zeros(shape, z, linear=True)
    columns = z.reshape(-1, math.prod(z.shape[-5:-2]), math.prod(z.shape[-2:]))
    image = F.fold(columns, spans, kernel, dilation, stride=stride)
    return F.pad(image, pads).reshape(shape)
