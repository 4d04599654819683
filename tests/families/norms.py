"""Norms, in training and in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from generated import Draw, Twins, block

import distdl_lite.nn as dnn
from families.drawn import MOSTLY_DOUBLE, described


def norm(d: Draw, kind: str) -> Twins:
    """Values about some mean; of few equal ones little but rounding errors would be left."""
    dims = d.randint(*{"Batch": (2, 5), "Instance": (3, 5), "Group": (2, 4)}.get(kind, (1, 4)))
    dtype = d.choice(MOSTLY_DOUBLE)
    shape = [d.choice((1, 2, 3, 4, 5)) for _ in range(dims)]
    if d.chance(0.1) and kind != "Instance":  # torch's running statistics do not take it
        shape[0] = 0
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {"eps": d.choice((1e-5, 0.1))}
    ours, theirs = f"{kind}Norm", f"{kind}Norm"
    if kind in ("Layer", "RMS"):
        arguments = (tuple(shape[d.randrange(dims) :]),)
        options["elementwise_affine"] = d.chance(0.8)
    elif kind == "Group":
        groups = d.choice((1, 2, 3))
        shape[1] = groups * d.choice((1, 2, 3))
        arguments = (groups, shape[1])
        options["affine"] = d.chance(0.8)
    else:
        arguments = (shape[1],)
        options.update(affine=d.chance(0.8), track_running_stats=d.chance(0.6), momentum=d.choice((None, 0.1, 0.4)))
        theirs = f"{kind}Norm{max(dims - 2, 1)}d"
    if kind == "RMS":
        options["eps"] = d.choice((None, 1e-5, 0.1))
    else:
        options["bias"] = d.chance(0.8)
    is_half = dtype is torch.bfloat16
    held = torch.float32 if is_half else dtype

    def serial() -> torch.nn.Module:
        made = getattr(torch.nn, theirs)(*arguments, dtype=held, **options)
        if is_half:  # torch rounds on the way, ours computes in float32
            made.register_forward_pre_hook(lambda module, given: given[0].float())
            made.register_forward_hook(lambda module, given, y: y.to(dtype))
        return made

    P = d.partition(dims)
    cuts = d.cuts(shape, P.shape)
    x = (d.normal(*shape) * d.choice((1, 3)) + (0 if is_half else d.choice((0, 1, 50)))).to(dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.15}[dtype]
    if dtype is not torch.float64:
        tolerance = max(tolerance, amplified(x, ours, arguments, options["eps"] or 1e-7))
    return Twins(
        described(theirs, (arguments, options), [x], cuts, P),
        lambda: getattr(dnn, f"Distributed{ours}")(P, *arguments, dtype=held, **options),
        serial,
        [x],
        [block(P, cuts)],
        block(P, cuts),
        [P],
        tolerance,
        modes=(True, True, False),
        expands=False,  # the variance of equal values is 0
    )


def amplified(x: torch.Tensor, name: str, arguments: tuple[Any, ...], eps: float) -> float:
    """What becomes of a rounding error of the largest value where it is divided by the smallest root of a variance.

    In a gradient that is twice, unless all values of a row are equal, and times a gradient and a weight of up to 4; the parts
    that cancel are not there to compare it with. torch's own errors are of that size: 2e-3 in the gradient of a layer norm of
    single values about 50, 1.4e-2 in that of a group norm of pairs.
    """
    rows = {
        "LayerNorm": lambda x: x.flatten(x.dim() - len(arguments[0])),
        "GroupNorm": lambda x: x.reshape(x.shape[0] * arguments[0], -1),
        "InstanceNorm": lambda x: x.flatten(2),
        "BatchNorm": lambda x: x.transpose(0, 1).flatten(1),
    }
    if name not in rows or not x.numel():  # a root mean square is not near 0 where values are not
        return 0.0
    var = rows[name](x.double()).var(-1, correction=0)
    count = rows[name](x).shape[-1]  # torch's gradient of a weight is the difference of two sums of so many
    once, twice = max(8, 4 * count) * (var + eps).rsqrt().max(), 16 * (1 / (var + eps)).where(var > 0, 0).max()
    rounding = (
        2.0**-8 if x.dtype is torch.bfloat16 else 2.0**-24
    )  # torch's kernel keeps mean and deviation as the input is
    return rounding * x.abs().max().item() * max(once, twice).item()
