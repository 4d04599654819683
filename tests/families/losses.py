"""Losses, of elements and of classes."""

from __future__ import annotations

from typing import Any

import torch
from generated import Cuts, Draw, Twins, block

import distdl_lite as dl
import distdl_lite.nn as dnn
from families.drawn import described, of_any_shape


def elementwise_loss(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 5)
    name = d.choice(("MSE", "L1", "SmoothL1", "Huber", "BCE", "BCEWithLogits", "KLDiv", "PoissonNLL"))
    x, t = d.normal(*shape) * 2, d.normal(*shape).sigmoid()
    trailing = shape[d.randrange(P.dim) :]
    weight = d.normal(*(d.choice((1, n)) for n in trailing)).abs()
    options: dict[str, Any] = {}
    if name == "SmoothL1":
        options["beta"] = d.choice((0.5, 1.0, 0.0))
    elif name == "Huber":
        options["delta"] = d.choice((0.7, 1.0))
    elif name == "BCE":
        x, options = x.sigmoid(), d.choice(({}, {"weight": weight}))
    elif name == "BCEWithLogits":
        options = d.choice(
            ({}, {"weight": weight}, {"pos_weight": weight}, {"weight": weight, "pos_weight": weight + 1})
        )
    elif name == "KLDiv":
        options = {"log_target": d.chance(0.5)}
        x, t = -x.abs(), t.log() if options["log_target"] else t
    elif name == "PoissonNLL":
        options = {"log_input": d.chance(0.5), "full": d.chance(0.5), "eps": d.choice((1e-8, 1e-3))}
        x, t = (x if options["log_input"] else x.abs() + 0.1), (t * 5).round()
    dtype = d.choice((torch.float64, torch.float64, torch.float32))
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return loss(d, P, name, options, x.to(dtype), t.to(dtype), cuts)


def class_loss(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 1, 2, 3, 5, dims=(1, 2, 3, 4))
    if P.dim > 1 and d.chance(0.1):
        shape[0] = 0
        cuts = d.cuts(shape, P.shape)
    axis = min(1, P.dim - 1)
    name, classes = d.choice(("NLL", "CrossEntropy", "CrossEntropy")), shape[axis]
    dtype = d.choice((torch.float64, torch.float64, torch.float32))
    x = d.normal(*shape, dtype=dtype) * d.choice((1, 10))
    x = x.log_softmax(axis) if name == "NLL" else x
    weight = d.normal(classes, dtype=dtype).abs()
    options: dict[str, Any] = {"weight": d.choice((None, weight, weight.where(weight > 0.7, 0)))}
    if name == "CrossEntropy":
        options["label_smoothing"] = d.choice((0.0, 0.0, 0.2, 1.0))
    without = [n for a, n in enumerate(shape) if a != axis]
    if name == "CrossEntropy" and d.chance(0.3):
        t = d.normal(*shape, dtype=dtype).softmax(axis)
    else:
        t = d.integers(*without, dtype=torch.long, low=0, high=classes)
        options["ignore_index"] = d.choice((-100, -100, 0, 1, 2))
        t[d.normal(*without) > d.choice((0, 1, 9))] = (
            options["ignore_index"] if options["ignore_index"] < classes else 0
        )
    return loss(d, P, name, options, x, t, cuts)


def loss(
    d: Draw, P: dl.CartesianPartition, name: str, options: dict, x: torch.Tensor, t: torch.Tensor, cuts: Cuts
) -> Twins:
    """Input and target; the target, and the terms, may lack the class dim."""
    axes = [a for a in range(P.dim) if t.dim() == x.dim() or a != min(1, P.dim - 1)]
    options["reduction"] = d.choice(("mean", "sum", "none", *(["batchmean"] if name == "KLDiv" else [])))
    over_classes = name in ("NLL", "CrossEntropy")
    terms = [a for a in range(P.dim) if not over_classes or a != min(1, P.dim - 1)]
    give = block(P, cuts, terms if options["reduction"] == "none" else ())
    return Twins(
        described(f"{name}Loss", options, [x, t], cuts, P),
        lambda: getattr(dnn, f"Distributed{name}Loss")(P, **options),
        lambda: getattr(torch.nn, f"{name}Loss")(**options),
        [x, t],
        [block(P, cuts), block(P, cuts, axes)],
        give,
        [P],
        {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2}[x.dtype],
    )
