"""Layers that take tensors of any number of dims, cut along any of them."""

from __future__ import annotations

import math

import torch
from generated import Draw, Function, Twins, block, even

import distdl_lite as dl
import distdl_lite.nn as dnn
from families.drawn import EPS, MOSTLY_DOUBLE, always, described, of_any_shape


def softmax(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 7)
    kind, dim, dtype = d.choice(("Softmax", "LogSoftmax")), d.randrange(-P.dim, P.dim), d.choice(MOSTLY_DOUBLE)
    x = d.normal(*shape) * d.choice((1, 10, 1e4)) + d.choice((0, 0, 1e5))
    x[d.normal(*shape) > d.choice((0.5, 9))] = -torch.inf
    x[d.normal(*shape) > d.choice((2, 9, 9))] = d.choice((torch.inf, torch.nan))
    x = x.to(dtype)
    return Twins(
        described(kind, dim, [x], cuts, P),
        lambda: getattr(dnn, f"Distributed{kind}")(P, dim),
        lambda: getattr(torch.nn, kind)(dim),
        [x],
        [block(P, cuts)],
        block(P, cuts),
        [P],
        10 * EPS[dtype],
    )


def dropout(d: Draw) -> Twins:
    """The mask does not depend on the partition: that of the layer on this rank alone."""
    name = d.choice(("Dropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"))
    dims = (int(name[-2]) + 2,) if name.endswith("d") else (1, 2, 3, 4)
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 7, dims=dims)
    p, inplace, dtype = d.choice((0.0, 0.1, 0.5, 0.9, 1.0)), d.chance(0.3), d.choice((*MOSTLY_DOUBLE, torch.complex128))
    x = d.integers(*shape, dtype=dtype)

    def made(P: dl.Partition) -> torch.nn.Module:
        layer = getattr(dnn, f"Distributed{name}")(P, p, inplace)
        return torch.nn.Sequential(Function(lambda x: x * 1), layer)  # which may then be overwritten

    return Twins(
        described(name, (p, inplace), [x], cuts, P),
        lambda: made(P),
        lambda: made(d.world.grid((1,) * P.dim, [d.world.rank])),
        [x],
        [block(P, cuts)],
        block(P, cuts),
        [P],
        modes=(True, False),
    )


def flatten(d: Draw) -> Twins:
    P_x, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 5)
    start, end = sorted(d.randrange(P_x.dim) for _ in range(2))
    is_needed = max((1, *P_x.shape[start + 1 : end + 1])) > 1
    P_y = d.partition(P_x.dim - (end - start)) if d.chance(0.95 if is_needed else 0.4) else None
    x = d.integers(*shape, dtype=d.choice((*MOSTLY_DOUBLE, torch.complex128, torch.int64, torch.bool)))
    row, kept = math.prod(shape[start + 1 : end + 1]), [*range(start + 1), *range(end + 1, P_x.dim)]
    if P_y is None:
        merged = [*cuts[:start], [c * row for c in cuts[start]], *cuts[end + 1 :]]
        give = block(P_x, dict(zip(kept, merged, strict=True)), kept)
    else:
        rows = list(P_y.bounds([shape[a] for a in kept]))
        give = block(P_y, [*rows[:start], [c * row for c in rows[start]], *rows[start + 1 :]])
    return Twins(
        described("Flatten", (start, end), [x], cuts, P_x, P_y),
        lambda: dnn.DistributedFlatten(P_x, start, end - P_x.dim, P_y),
        lambda: torch.nn.Flatten(start, end),
        [x],
        [block(P_x, cuts)],
        give,
        [P for P in (P_x, P_y) if P],
        refusals=("so that its blocks are no boxes",),
    )


def mean(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 7)
    dims = d.sample(range(P.dim), d.randint(0, P.dim))
    dim = d.choice((tuple(k - P.dim * d.randrange(2) for k in dims), None if not dims else dims[0]))
    keepdim, dtype = d.chance(0.5), d.choice((*MOSTLY_DOUBLE, torch.complex128, torch.complex64))
    x = d.integers(*shape, dtype=dtype)
    averaged = {k % P.dim for k in ((dim,) if isinstance(dim, int) else dim or range(P.dim))}
    slices = None
    if P.index is not None:
        every = [slice(None) if k in averaged else slice(cuts[k][i], cuts[k][i + 1]) for k, i in enumerate(P.index)]
        slices = tuple(every if keepdim else [s for k, s in enumerate(every) if k not in averaged])
    return Twins(
        described("Mean", (dim, keepdim), [x], cuts, P),
        lambda: dnn.DistributedMean(P, dim, keepdim),
        lambda: Function(lambda x: x.mean(dim, keepdim)),
        [x],
        [block(P, cuts)],
        always(slices),
        [P],
        EPS[dtype],
    )


def fft(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, *(2, 3, 4, 5, 8) * 2, 1, dims=(*(2, 3, 3, 4) * 3, 1))
    function = d.choice(("fft", "ifft", "rfft", "irfft"))
    most = min(3, P.dim - 1 if P.size > 1 and P.dim > 1 and d.chance(0.9) else P.dim)  # some dim must stay to be cut
    dim = tuple(k - P.dim * d.randrange(2) for k in d.sample(range(P.dim), d.randint(1, most)))
    s = tuple(d.choice((-1, 3, 4, 7)) for _ in dim) if d.chance(0.5) else None
    norm = d.choice((None, "forward", "backward", "ortho"))
    real, both = (torch.float64, torch.float32), (torch.complex128, torch.complex64)
    dtype = d.choice(real if function == "rfft" else both * 2 + real)
    x = d.normal(*shape, dtype=dtype)
    return Twins(
        described(function, (dim, s, norm), [x], cuts, P),
        lambda: dnn.DistributedFFT(P, function, dim, s, norm),
        lambda: Function(lambda x: getattr(torch.fft, f"{function}n")(x, s=s, dim=dim, norm=norm)),
        [x],
        [block(P, cuts)],
        even(P),
        [P],
        10 * EPS[dtype],
        refusals=("can be cut in place of", "has no points"),
    )
