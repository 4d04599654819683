"""Operations on one point after the other, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite.factors import Dims, uncut
from distdl_lite.layout import Shape
from distdl_lite.nn.broadcasting import common_dims, fit
from distdl_lite.nn.compiler import Compiler, NoRule, Value, rule, values_in


def fitted(c: Compiler, args: Any, dims: Dims) -> Any:
    """All values among arguments, laid out so."""
    if isinstance(args, Value):
        return fit(c, args, dims)
    return [fitted(c, a, dims) for a in args] if isinstance(args, (list, tuple)) else args


@rule("pointwise", "hardswish", "hardsigmoid", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "relu6", "hardtanh", "gelu",
      "real", "imag", "view_as_real_copy", "rrelu_with_noise", "softplus", "where", "masked_fill", "_to_copy", "to", "nan_to_num",
      "lerp", "addcmul", "addcdiv", "clamp", "conj_physical", "_conj", "resolve_conj", "resolve_neg", "complex", "polar",
      "logaddexp", "maximum", "minimum", "fmod", "remainder", "isnan", "isfinite", "isinf")  # fmt: skip
def pointwise(c: Compiler, op: Any, *args: Any, **options: Any) -> Any:
    values = list(values_in((args, tuple(options.values()))))
    if not values or not op.is_one:
        raise NoRule
    for name in ("device", "layout", "pin_memory"):
        options.pop(name, None)
    dims = common_dims(c, values, op.shape)
    options = {k: fitted(c, v, dims) for k, v in options.items()}
    return c.call(op.function, *(fitted(c, a, dims) for a in args), dims=dims, dtype=op.dtype, **options)


@rule("alias", "contiguous", "lift_fresh", "lift_fresh_copy", "clone")
def same(c: Compiler, op: Any, x: Value, **options: Any) -> Value:
    return x


@rule("detach")
def detach(c: Compiler, op: Any, x: Value) -> Value:
    return c.calls(torch.detach, x, dims=[x.dims], dtypes=[x.dtype], one=True, grad=False)[0]


@rule("copy")
def copy(c: Compiler, op: Any, x: Value, source: Value, non_blocking: bool = False) -> Value:
    y = broadcast(c, source, x.shape)
    return y if y.dtype is x.dtype else c.call(torch.Tensor.to, y, x.dtype, dims=y.dims, dtype=x.dtype)


@rule("expand", "expand_as", "broadcast_to")
def expand(c: Compiler, op: Any, x: Value, *_: Any, **options: Any) -> Value:
    return broadcast(c, x, op.shape)


@rule("broadcast_tensors")
def broadcast_tensors(c: Compiler, op: Any, values: Sequence[Value]) -> list[Value]:
    return [broadcast(c, x, op.shape) for x in values]


def broadcast(c: Compiler, x: Value, shape: Shape) -> Value:
    """The value expanded to a shape."""
    lead = len(shape) - x.ndim
    own = [(uncut(n),) if d < lead or x.shape[d - lead] != n else x.dims[d - lead] for d, n in enumerate(shape)]
    dims = tuple(own)
    return x if dims == x.dims else c.call(torch.Tensor.expand, x, c.local(dims), dims=dims, dtype=x.dtype)


@rule("prelu", "_prelu_kernel")
def prelu(c: Compiler, op: Any, x: Value, weight: Value) -> Value:
    is_per_channel = weight.ndim == 1  # or one number for all
    channels = x.dims[1] if weight.shape[0] > 1 else (uncut(1),)
    weight = c.move(weight, (channels,)) if is_per_channel else fit(c, weight, x.dims)
    return c.call(op.function, x, weight, dims=x.dims, dtype=x.dtype)
