"""Tensors made from numbers: late, where and in the layout in which they are needed; and random ones."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.factors import uncut
from distdl_lite.layout import Shape
from distdl_lite.nn.compiler import Compiler, Value, rule


@rule("zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "ones", "new_ones", "ones_like", "full", "new_full",
      "full_like", "scalar_tensor", "empty_permuted", "empty_strided", "new_empty_strided")  # fmt: skip
def filled(c: Compiler, op: Any, *args: Any, **options: Any) -> Value:
    number = args[-1] if "full" in op.name else args[0] if op.name == "scalar_tensor" else 1 if "ones" in op.name else 0
    dims = args[0].dims if op.name.endswith("_like") else tuple((uncut(n),) for n in op.shape)
    if isinstance(number, Value):
        return c.call(
            lambda t, shape, d: t.to(d).expand(shape), number, c.local(dims), op.dtype, dims=dims, dtype=op.dtype
        )
    return constant(c, dims, op.dtype, number)


def constant(c: Compiler, dims: Any, dtype: torch.dtype, number: Any) -> Value:
    """A tensor of one number, made where it is needed."""

    def full(shape: Shape) -> torch.Tensor:
        return torch.full(shape, number, dtype=dtype)

    value = c.new(dims, dtype, False)
    value.make = full
    return value


@rule("fill")
def fill(c: Compiler, op: Any, x: Value, number: Any) -> Value:
    if isinstance(number, Value):
        return c.call(
            lambda t, shape, d: t.to(d).expand(shape), number, c.local(x.dims), x.dtype, dims=x.dims, dtype=x.dtype
        )
    return constant(c, x.dims, x.dtype, number)


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices")
def made(c: Compiler, op: Any, *args: Any, **options: Any) -> Value:
    for name in ("device", "layout", "pin_memory"):
        options.pop(name, None)
    return c.apply(op, *args, dims=tuple((uncut(n),) for n in op.shape), **options)
