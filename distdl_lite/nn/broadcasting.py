"""The layout in which values of several shapes meet point by point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distdl_lite.factors import Dims, all_axes, axes_of, size_of, uncut
from distdl_lite.layout import Shape
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import Value


def common_dims(c: Compiler, values: Sequence[Value], shape: Shape) -> Dims:
    """The layout of what values broadcast to: cut where the largest is, then where others are."""
    found: list[Any] = [None] * len(shape)
    used: set[int] = set()

    def rank_of(v: Value) -> tuple[float, bool]:
        is_home = v.ndim == c.grid.dim and all(axes_of(f) in ((), (d,)) for d, f in enumerate(v.dims))
        return -math.prod(v.shape) * (1 + bool(all_axes(v.dims))), not is_home

    for is_cut in (True, False):
        for value in sorted(values, key=rank_of):
            for d, factors in enumerate(value.dims, len(shape) - value.ndim):
                axes = set(axes_of(factors))
                if found[d] is None and size_of(factors) == shape[d] and bool(axes) == is_cut and not axes & used:
                    found[d] = factors
                    used |= axes
    return tuple((uncut(n),) if f is None else f for f, n in zip(found, shape, strict=True))


def fit(c: Compiler, value: Value, dims: Dims) -> Value:
    """A value laid out so that it broadcasts to a layout."""
    own = dims[len(dims) - value.ndim :] if value.ndim else ()
    wanted = ((uncut(1),) if size_of(f) == 1 != size_of(o) else o for f, o in zip(value.dims, own, strict=True))
    return c.move(value, tuple(wanted))
