"""Sums, means and the like over cut dims, and what needs a dim whole."""

from __future__ import annotations

import math
from typing import Any

import torch

from distdl_lite.factors import uncut
from distdl_lite.model.rules.elementwise import pointwise
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.shape.reductions import dims_over, reduced, total
from distdl_lite.nn.value import NoRule, Value, rule


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root, whose gradient at zero is zero, as that of torch's norms and deviations."""
    is_zero = x == 0
    return x.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


@rule("var", "std", "var_mean", "std_mean")
def var(c: Compiler, op: Any, *args: Any, **options: Any) -> Any:
    # Of several overloads, with `unbiased` or `correction`, of which the first takes no dim.
    given = {**dict(zip([a.name for a in op.function._schema.arguments], args, strict=False)), **options}
    x, keepdim = given["self"], bool(given.get("keepdim"))
    if x.dtype.is_complex:
        raise NoRule
    over, has_mean, is_root = dims_over(x, given.get("dim")), "mean" in op.name, "std" in op.name
    correction = given.get("correction", int(given.get("unbiased", True)))
    correction = 1 if correction is None else correction
    count, dims = math.prod(x.shape[d] for d in over), reduced(x, over, keepdim)
    if not x.axes(*over):
        return c.apply(op, *args, dims=dims, **options)
    if x.dtype is not wide(x.dtype):
        raise NoRule
    mean = total(c, x, over, True, x.dtype)
    mean = c.call(torch.div, mean, count, dims=mean.dims, dtype=x.dtype)
    apart = c.call(lambda t, m: (t - m).square(), x, mean, dims=x.dims, dtype=x.dtype)
    y = total(c, apart, over, keepdim, x.dtype)
    y = c.call(torch.div, y, max(count - correction, 0), dims=y.dims, dtype=x.dtype)
    y = c.call(_root, y, dims=y.dims, dtype=x.dtype) if is_root else y
    if not has_mean:
        return y
    return [y, mean if keepdim else c.call(torch.reshape, mean, c.local(dims), dims=dims, dtype=x.dtype)]


@rule("linalg_vector_norm", "norm")
def vector_norm(
    c: Compiler, op: Any, x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    over = dims_over(x, dim)
    if not x.axes(*over):
        return c.apply(op, x, 2 if ord is None else ord, over, keepdim, dims=reduced(x, over, keepdim))
    if ord not in (None, 1, 2) or x.dtype.is_complex:
        raise NoRule
    terms = c.call(torch.abs if ord == 1 else torch.square, x, dims=x.dims, dtype=x.dtype)
    y = total(c, terms, over, keepdim, op.dtype)
    return y if ord == 1 else c.call(_root, y, dims=y.dims, dtype=op.dtype)


@rule("amax", "amin", "argmax", "argmin", "max", "min", "prod", "any", "all", "median", "aminmax", "mode",
      "kthvalue", "count_nonzero", "nansum", "nanmean")  # fmt: skip
def along_dims(c: Compiler, op: Any, x: Value, *args: Any, **options: Any) -> Any:
    """Operations that take a dim, or dims, and need them whole."""
    if op.name in ("max", "min") and args and isinstance(args[0], Value):
        return pointwise(c, op, x, *args)
    at = 1 if op.name == "kthvalue" else 0
    dim = options.get("dim", args[at] if len(args) > at else None)
    keepdim = options.get("keepdim", args[at + 1] if len(args) > at + 1 else False)
    over = dims_over(x, dim)
    x = c.wholly(x, over, "whole")
    dims = reduced(x, over, bool(keepdim))
    return c.apply(op, x, *args, dims=dims, **options)


@rule("cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk", "cummax", "cummin", "glu", "renorm")
def along(c: Compiler, op: Any, x: Value, *args: Any, **options: Any) -> Any:
    """Operations along one dim, which they need whole."""
    at = {"topk": 1, "renorm": 1}.get(op.name, 0)
    last = op.name in ("sort", "argsort", "topk", "glu")
    dim = options.get("dim", args[at] if len(args) > at else -1 if last else None)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise NoRule
    x = c.wholly(x, [dim], "whole")
    dims = x.with_dims({dim: uncut(op.shape[dim])})
    return c.apply(op, x, *args, dims=dims, **options)
