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


def named(op: Any, args: Any, options: Any) -> dict[str, Any]:
    """The arguments of an operation by torch's names, of which overloads have others, with their defaults."""
    schema = op.function._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return defaults | dict(zip((a.name for a in schema), args, strict=False)) | options


@rule("var", "std", "var_mean", "std_mean")
def var(c: Compiler, op: Any, *args: Any, **options: Any) -> Any:
    given = named(op, args, options)
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
    y = total(c, terms, over, keepdim, wide(op.dtype))
    return c.cast(y if ord == 1 else c.call(_root, y, dims=y.dims, dtype=y.dtype), op.dtype)


@rule("amax", "amin", "argmax", "argmin", "max", "min", "prod", "any", "all", "median", "aminmax", "mode", "kthvalue",
      "count_nonzero", "nansum", "nanmean", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk", "cummax", "cummin",
      "glu", "renorm")  # fmt: skip
def along(c: Compiler, op: Any, x: Value, *args: Any, **options: Any) -> Any:
    """Operations along a dim, or dims, which they need whole, and which go or get the length that the output has."""
    given = named(op, (x, *args), options)
    if isinstance(given.get("other"), Value):
        return pointwise(c, op, x, *args)
    over = dims_over(x, given.get("dim")) if x.ndim else []
    if op.name == "renorm":  # the norms are over all dims but the one that is named
        over = [d for d in range(x.ndim) if d not in over]
    x = c.wholly(x, over, "whole")
    keeps = len(op.shape) == x.ndim
    dims = x.with_dims({d: uncut(op.shape[d]) for d in over}) if keeps else reduced(x, over, keepdim=False)
    is_extreme = op.name in ("cummax", "cummin")
    if is_extreme or op.name in ("cumprod", "logcumsumexp"):  # of empty blocks torch makes another graph
        options |= {"everywhere": False, "linear": is_extreme}
    return c.apply(op, x, *args, dims=dims, **options)
