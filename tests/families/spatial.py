"""Pools, pads and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from generated import Draw, Twins, block, even

import distdl_lite.nn as dnn
from families.drawn import BATCHES, EPS, MOSTLY_DOUBLE, described, dims_drawn, points


def max_pool(d: Draw) -> Twins:
    dims = dims_drawn(d)
    options = {**sliding(d, dims), "dilation": d.each(dims, 1, 1, 2, 3), "return_indices": d.chance(0.3)}
    least = [gap * (k - 1) + 1 for gap, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    x = image(d, dims, d.choice(MOSTLY_DOUBLE), least)
    return spatial(d, f"MaxPool{dims}d", options, with_holes(d, x), refusals=["has windows of nothing but padding"])


def avg_pool(d: Draw) -> Twins:
    dims, dtype = dims_drawn(d), d.choice(MOSTLY_DOUBLE)
    options = {**sliding(d, dims), "count_include_pad": d.chance(0.5)}
    if dims > 1:
        options["divisor_override"] = d.choice((None, None, 3, -2))
    x = image(d, dims, dtype, options["kernel_size"])
    return spatial(d, f"AvgPool{dims}d", options, x, EPS[dtype], ["no average in three dims"])


def adaptive_pool(d: Draw) -> Twins:
    dims, kind, dtype = dims_drawn(d), d.choice(("Max", "Avg")), d.choice(MOSTLY_DOUBLE)
    sizes = d.each(dims, 1, 2, 3, 5, 7, *([None] if dims > 1 else []))
    options, x = {"output_size": d.choice((sizes, d.choice((1, 2, 4))))}, image(d, dims, dtype)
    if kind == "Avg":
        return spatial(d, f"AdaptiveAvgPool{dims}d", options, x, EPS[dtype])
    options["return_indices"] = d.chance(0.3)
    return spatial(d, f"AdaptiveMaxPool{dims}d", options, with_holes(d, x))


def pad(d: Draw) -> Twins:
    kind = d.choice(("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"))
    dims, dtype = dims_drawn(d), d.choice((*MOSTLY_DOUBLE, torch.complex128, torch.int64))
    some = tuple(d.choice((0, 0, 1, 2, 3, 5, -1, -2)) for _ in range(2 * dims))
    options: dict[str, Any] = {"padding": d.choice((some, some, some, 1, 2))}
    leading = d.each(d.choice((1, 2)) if kind != "ConstantPad" else d.choice((0, 1, 2)), 0, 1, 2, 3)
    if kind == "ConstantPad":
        options["value"] = d.choice((0.0, 3.0, -2.0))
    pads = [options["padding"]] * 2 * dims if isinstance(options["padding"], int) else list(options["padding"])
    least = [1 + max(a, b, 0) - min(a, 0) - min(b, 0) for a, b in zip(pads[::2], pads[1::2], strict=True)][::-1]
    x = d.integers(*leading, *points(d, dims, least), dtype=dtype)
    return spatial(d, f"{kind}{dims}d", options, x, refusals=["reads more than what it leaves"])


def upsample(d: Draw) -> Twins:
    dims, dtype = dims_drawn(d), d.choice(MOSTLY_DOUBLE)
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    mode = d.choice(("nearest", "nearest-exact", linear, linear, "area", *(["bicubic"] if dims == 2 else [])))
    options: dict[str, Any] = {"mode": mode}
    if d.chance(0.5):
        options["size"] = d.choice((d.each(dims, 1, 2, 3, 5, 7, 8, 13, 22), d.choice((1, 4, 6))))
    else:
        factors = d.each(dims, 0.5, 2.0, 2.0, 3.0, 1.7, 0.3, 1.0, 4.0, 2.05)
        options["scale_factor"] = d.choice((factors, d.choice((2, 2.0, 1.5))))
        options["recompute_scale_factor"] = d.choice((None, True, False))
    if mode in (linear, "bicubic"):
        options["align_corners"] = d.choice((None, True, False))
    x = image(d, dims, dtype)
    if "scale_factor" in options and min(x.shape[2:]) < 4:  # an output without points has no gradient in torch
        x = x.repeat(1, 1, *(4,) * dims)
    tolerance = 0.0 if mode.startswith("nearest") and dtype is not torch.bfloat16 else 10 * EPS[dtype]
    return spatial(d, "Upsample", options, x, tolerance, ["torch's gradient is not that of"])


def spatial(
    d: Draw, name: str, options: dict[str, Any], x: torch.Tensor, tolerance: float = 0.0, refusals: Sequence[str] = ()
) -> Twins:
    """A layer without weights over a tensor with an axis per dim."""
    P = d.partition(x.dim())
    cuts = d.cuts(x.shape, P.shape)
    return Twins(
        described(name, options, [x], cuts, P),
        lambda: getattr(dnn, f"Distributed{name}")(P, **options),
        lambda: getattr(torch.nn, name)(**options),
        [x],
        [block(P, cuts)],
        even(P),
        [P],
        tolerance,
        refusals=tuple(refusals),
    )


def image(d: Draw, dims: int, dtype: torch.dtype, least: Sequence[int] = ()) -> torch.Tensor:
    shape = d.choice(BATCHES), d.choice((1, 2, 3, 4)), *points(d, dims, least)
    return d.integers(*shape, dtype=dtype) if d.chance(0.5) else d.normal(*shape, dtype=dtype)


def with_holes(d: Draw, x: torch.Tensor) -> torch.Tensor:
    """Now and then infinite, or no numbers, in some places."""
    if d.chance(0.2):
        x[x > 0.5] = d.choice((-torch.inf, torch.inf, torch.nan))
    return x


def sliding(d: Draw, dims: int) -> dict[str, Any]:
    kernel = d.each(dims, 1, 2, 2, 3, 3, 4)
    return {
        "kernel_size": kernel,
        "stride": d.choice((None, d.each(dims, 1, 2, 3), 2)),
        "padding": d.choice((0, tuple(d.randint(0, k // 2) for k in kernel))),
        "ceil_mode": d.chance(0.5),
    }
