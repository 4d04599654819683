"""Operations on one point after the other, with broadcasting."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from distdl_lite.factors import uncut
from distdl_lite.layout import Shape
from distdl_lite.nn.broadcasting import common_dims, fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import NoRule, Value, rule, values_in


@rule("pointwise", "hardswish", "_to_copy", "_conj", "complex", "polar", "floor_divide", "rsub", "_prelu_kernel")
def pointwise(c: Compiler, op: Any, *args: Any, **options: Any) -> Any:
    """Those that torch calls pointwise, and some that it forgets."""
    values = list(values_in((args, tuple(options.values()))))
    if not values or not op.is_one:
        raise NoRule
    for name in ("device", "layout", "pin_memory"):
        options.pop(name, None)
    dims = common_dims(c, values, op.shape)
    if len(values) == 1 and values[0] is args[0] and values[0].make is not None:
        return c.made_later(partial(_of_made, values[0].make, op.function, args[1:], options), dims, op.dtype)
    args, options = pytree.tree_map_only(Value, lambda v: fit(c, v, dims), (args, options))
    return c.calls(op.function, *args, dims=[dims], dtypes=[op.dtype], one=True, **options)[0]


def _of_made(make: Any, function: Any, args: Any, options: Any, shape: Shape) -> torch.Tensor:
    """A function of a constant's block."""
    return function(make(shape), *args, **options)  # type: ignore[no-any-return]


@rule("log_sigmoid_forward")
def log_sigmoid(c: Compiler, op: Any, x: Value) -> list[Value | None]:
    return [c.call(F.logsigmoid, x, dims=x.dims, dtype=op.dtype), None]  # the other output is for torch's backward


@rule("alias", "lift_fresh_copy", "clone", "resolve_conj", "resolve_neg")
def same(c: Compiler, op: Any, x: Value, **options: Any) -> Value:
    return x


@rule("detach")
def detach(c: Compiler, op: Any, x: Value) -> Value:
    return c.calls(torch.detach, x, dims=[x.dims], dtypes=[x.dtype], one=True, grad=False)[0] if x.grad else x


@rule("copy")
def copy(c: Compiler, op: Any, x: Value, source: Value, non_blocking: bool = False) -> Value:
    y = broadcast(c, source, x.shape)
    return c.cast(y, x.dtype)


@rule("expand")
def expand(c: Compiler, op: Any, x: Value, *_: Any, **options: Any) -> Value:
    return broadcast(c, x, op.shape)


def broadcast(c: Compiler, x: Value, shape: Shape) -> Value:
    """The value expanded to a shape."""
    lead = len(shape) - x.ndim
    longer = [d for d in range(x.ndim) if x.shape[d] != shape[lead + d]]
    x = c.wholly(x, longer, spread=False)
    own = [(uncut(n),) if d < lead or d - lead in longer else x.dims[d - lead] for d, n in enumerate(shape)]
    dims = tuple(own)
    if dims == x.dims:
        return x
    if x.make is not None:
        return c.made_later(x.make, dims, x.dtype)
    return c.call(torch.Tensor.expand, x, c.local(dims), dims=dims, dtype=x.dtype)
