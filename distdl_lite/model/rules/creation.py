"""Tensors made from numbers: constants late, where and in the layout in which they are needed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from distdl_lite.factors import Dims, size_of, uncut
from distdl_lite.model.rules.elementwise import broadcast
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import Value, rule


@rule("zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "ones", "new_ones", "ones_like", "full", "new_full",
      "full_like", "scalar_tensor", "empty_permuted", "empty_strided", "new_empty_strided")  # fmt: skip
def filled(c: Compiler, op: Any, *args: Any, **options: Any) -> Value:
    number = args[-1] if "full" in op.name else args[0] if op.name == "scalar_tensor" else int("ones" in op.name)
    dims = args[0].dims if op.name.endswith("_like") else tuple((uncut(n),) for n in op.shape)
    return _of_number(c, dims, op.dtype, number)


@rule("fill")
def fill(c: Compiler, op: Any, x: Value, number: Any) -> Value:
    return _of_number(c, x.dims, x.dtype, number)


def _of_number(c: Compiler, dims: Dims, dtype: torch.dtype, number: Any) -> Value:
    """A tensor of one number, which may be a value."""
    if isinstance(number, Value):
        return c.move(broadcast(c, c.cast(number, dtype), tuple(map(size_of, dims))), dims)
    return c.made_later(partial(torch.full, fill_value=number, dtype=dtype, device=c.device), dims, dtype)


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices")
def made(c: Compiler, op: Any, *args: Any, **options: Any) -> Value:
    """Those that every rank makes whole."""
    for name in ("device", "layout", "pin_memory"):
        options.pop(name, None)
    dims = tuple((uncut(n),) for n in op.shape)
    return c.calls(op.function, *args, dims=[dims], dtypes=[op.dtype], one=True, device=c.device, **options)[0]
