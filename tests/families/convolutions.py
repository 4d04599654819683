"""Convolutions and transposed ones, among them those whose halo travels while they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from generated import Draw, Twins, block, even

import distdl_lite.nn as dnn
from families.drawn import BATCHES, EPS, MOSTLY_DOUBLE, described, dims_drawn, points


def convolution(d: Draw, kind: str) -> Twins:
    dims = dims_drawn(d)
    partitions = P_x, P_y, P_w = partitions_of_convolution(d, dims)
    parts = (P_y or P_x).shape[1]
    groups = 1 if P_w is not None and P_x.shape[1] > 1 else d.choice((1, 1, parts, 2 * parts, 3))
    kernel, dilation = d.each(dims, 1, 2, 3, 3, 4, 5), d.each(dims, 1, 1, 2, 3)
    own, least = (of_convolution if kind == "Conv" else of_transposed)(d, dims, kernel, dilation)
    options: dict[str, Any] = {
        "kernel_size": kernel[0] if len(set(kernel)) == 1 else kernel,
        "dilation": dilation[0] if len(set(dilation)) == 1 else dilation,
        "groups": groups,
        **own,
    }
    return convolved(d, f"{kind}{dims}d", partitions, options, points(d, dims, least), d.choice(BATCHES), 0.5)


def overlapping(d: Draw) -> Twins:
    """Convolutions whose halo can travel while they compute: cut along batch and space in even blocks, of odd kernels."""
    dims = dims_drawn(d)
    P = d.over(d.grid(dims + 2, {0: d.choice((1, 1, 1, 2)), 1: 1}))
    kernel, dilation = d.each(dims, 1, 3, 3, 3, 5), d.each(dims, 1, 1, 1, 2)
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": d.choice((1, 1, 2, 3)),
        "stride": tuple(1 if p > 1 else d.choice((1, 1, 2)) for p in P.shape[2:]),
        "padding": tuple(gap * (k - 1) // 2 for gap, k in zip(dilation, kernel, strict=True)),
        "padding_mode": d.choice(("zeros", "zeros", "circular")),
    }
    space = tuple(max(p * d.choice((1, 2, 3, 4, 5)), 4) + d.choice((0, 1)) for p in P.shape[2:])
    return convolved(d, f"Conv{dims}d", (P, None, None), options, space, d.choice((2, 2, 3, 4, 1, 0)), 0.1)


def convolved(
    d: Draw,
    name: str,
    partitions: Sequence[Any],
    options: dict[str, Any],
    space: Sequence[int],
    batch: int,
    uneven: float,
) -> Twins:
    """A convolution over a tensor of the given lengths."""
    P_x, P_y, P_w = partitions
    ins, outs = options["groups"] * d.choice((1, 1, 2, 3)), options["groups"] * d.choice((1, 2, 3))
    dtype = d.choice((*MOSTLY_DOUBLE, torch.complex128))
    if dtype is torch.bfloat16 and options.get("stride", 1) not in (1, (1,) * len(space)):
        dtype = torch.float32  # some CPUs' kernel of strided bfloat16 convolutions gives wrong numbers
    options.update(bias=d.chance(0.7), dtype=dtype)
    x = d.integers(batch, ins, *space, dtype=dtype)
    cuts = d.cuts(x.shape, P_x.shape, uneven)
    asks = d.chance(0.3) and "Transpose" in name
    size = requested(d, space, options) if asks else None
    return Twins(
        described(name, (ins, outs, options, size), [x], cuts, *partitions),
        lambda: asked(getattr(dnn, f"Distributed{name}")(P_x, ins, outs, P_y=P_y, P_w=P_w, **options), size),
        lambda: asked(getattr(torch.nn, name)(ins, outs, **options), size),
        [x],
        [block(P_x, cuts)],
        even(P_y or P_x),
        [P for P in partitions if P],
        EPS[dtype] if dtype is torch.bfloat16 else 0.0,
        refusals=("do not fall on the boundaries of groups", "has no output"),
    )


def asked(layer: torch.nn.Module, size: Sequence[int] | None) -> torch.nn.Module:
    """A transposed convolution that is asked for outputs of some size, if one is given."""
    if size is not None:
        forward = layer.forward
        layer.forward = lambda x: forward(x, size)
    return layer


def requested(d: Draw, space: Sequence[int], options: dict[str, Any]) -> tuple[int, ...]:
    """Output lengths that the options mostly allow; those of batch and channels, which may come first, do not count."""
    names = ("kernel_size", "stride", "padding", "dilation")
    each = ([n] * len(space) if isinstance(n, int) else n for n in map(options.__getitem__, names))
    least = [(n - 1) * s - 2 * p + gap * (k - 1) + 1 for n, k, s, p, gap in zip(space, *each, strict=True)]
    wrong = d.chance(0.1)
    lengths = [n + d.randrange(-wrong, s + wrong) for n, s in zip(least, options["stride"], strict=True)]
    return d.each(d.choice((0, 0, 2)), 1, 5) + tuple(lengths)


def partitions_of_convolution(d: Draw, dims: int) -> tuple[Any, Any, Any]:
    """P_x, P_y and P_w, of which the last or both may be left out."""
    kind = d.choice(("alone", "alone", "target", "work", "work"))
    if kind == "alone":
        return d.partition(dims + 2), None, None
    if kind == "target":
        return d.partition(dims + 2), d.partition(dims + 2), None
    batch, out, ins, *space = work = d.grid(dims + 3)
    P_x, P_y = d.over(d.grid(dims + 2, {1: ins})), d.over((batch, out, *space))
    return P_x, P_y, d.over(work[1:] if batch == 1 and d.chance(0.5) else work)


Options = tuple[dict[str, Any], Sequence[int]]  # and the least lengths that they fit


def of_convolution(d: Draw, dims: int, kernel: Sequence[int], dilation: Sequence[int]) -> Options:
    padding = d.choice((0, 1, 2, "same", "same", "valid", d.each(dims, 0, 1, 2, 3), d.each(dims, 1, 2)))
    mode = d.choice(("zeros", "zeros", "zeros", "circular", "circular", "reflect", "replicate"))
    stride = 1 if padding == "same" else d.choice((1, d.each(dims, 1, 1, 2, 3, 4)))
    reach = [gap * (k - 1) for gap, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        pads = [n // 2 + n % 2 if padding == "same" else 0 for n in reach]
    else:
        pads = [padding] * dims if isinstance(padding, int) else list(padding)
    least = [max(n + 1 - 2 * p, p + 1 if mode != "zeros" else 1) for n, p in zip(reach, pads, strict=True)]
    return {"padding": padding, "stride": stride, "padding_mode": mode}, least


def of_transposed(d: Draw, dims: int, kernel: Sequence[int], dilation: Sequence[int]) -> Options:
    stride = d.each(dims, 1, 2, 2, 3, 4)
    extra = tuple(d.randrange(max(s, k)) for s, k in zip(stride, dilation, strict=True))
    padding = d.choice((0, 1, d.each(dims, 0, 1, 2)))
    return {"stride": stride, "padding": padding, "output_padding": d.choice((0, extra))}, ()
