"""What all families draw: batches, dtypes, lengths and grids, and how a case is described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from generated import Cuts, Draw, Part

import distdl_lite as dl

BATCHES = (0, 1, 1, 2, 2, 3, 5)
MOSTLY_DOUBLE = (torch.float64,) * 4 + (torch.float32,) * 2 + (torch.bfloat16,)
EPS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.complex128: 1e-13, torch.complex64: 1e-5}


def dims_drawn(d: Draw) -> int:
    return d.choice((1, 1, 2, 2, 2, 3))


def points(d: Draw, dims: int, least: Sequence[int] = ()) -> tuple[int, ...]:
    """Lengths of spatial dims, shorter ones where there are more; mostly enough for the layer."""
    lengths = d.each(dims, *range(1, {1: 14, 2: 10, 3: 7}[dims]))
    return tuple(max(n, k) for n, k in zip(lengths, least, strict=True)) if least and d.chance(0.96) else lengths


def of_any_shape(
    d: Draw, *sizes: int, dims: Sequence[int] = (1, 2, 3, 4)
) -> tuple[dl.CartesianPartition, list[int], Cuts]:
    """A grid, and a shape over it with its cuts; lengths are among `sizes`."""
    P = d.partition(d.choice(dims))
    shape = list(d.each(P.dim, *sizes))
    return P, shape, d.cuts(shape, P.shape)


def always(slices: tuple[slice, ...] | None) -> Part:
    """Slices that are known already."""
    return lambda shape: slices


def described(name: str, options: Any, tensors: Sequence[torch.Tensor], cuts: Any, *partitions: Any) -> str:
    shapes = [(tuple(x.shape), x.dtype) for x in tensors]
    grids = [P and (P.shape, list(P.ranks)) for P in partitions]
    return f"{name} {options} of {shapes} cut at {cuts} on grids and ranks {grids}"
