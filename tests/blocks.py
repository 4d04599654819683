"""Blocks of whole tensors, even and uneven, and the parts of a serial layer that a rank should hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from distdl_lite.grid import balanced
from distdl_lite.partition import Partition

Cuts = Sequence[Sequence[int]]


def cuts_of(shape: Sequence[int], grid: Sequence[int], rng: random.Random | None = None, keep: int = -1) -> Cuts:
    """Cut points per dim: balanced, or anywhere with `rng`, except along dim `keep`."""
    cuts = []
    for dim, (n, p) in enumerate(zip(shape, grid, strict=True)):
        wild = rng is not None and dim != keep
        cuts.append((0, *sorted(rng.randrange(n + 1) for _ in range(p - 1)), n) if wild else balanced(n, p))
    return cuts


def block(x: torch.Tensor, P: Partition, cuts: Cuts, dims: Sequence[int] | None = None) -> torch.Tensor:
    """This rank's block of a whole tensor whose dims are `dims` of the grid's; zero-volume outside `P`."""
    if not P.active:
        return x.new_empty(0)
    dims = range(len(cuts)) if dims is None else dims
    return x[tuple(slice(cuts[d][P.index[d]], cuts[d][P.index[d] + 1]) for d in dims)].clone()


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def held(layer: torch.nn.Module, name: str, serial: torch.Tensor, rank: int) -> torch.Tensor | None:
    """The part of a serial layer's tensor that this rank holds, None if it holds nothing."""
    box = layer._distdl_places[name].layout.box(rank)
    return None if box is None else serial[tuple(slice(*r) for r in box)]


def check_held(
    layer: torch.nn.Module, serial: torch.nn.Module, rank: int, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Assert that parameters, their gradients and buffers are the serial layer's."""
    for name in (*layer._parameters, *layer._buffers):
        mine, wanted = getattr(layer, name), getattr(serial, name)
        if mine is None or wanted is None:
            assert mine is wanted, name
            continue
        part = held(layer, name, wanted, rank)
        if part is None:
            assert mine.numel() == 0, name
            continue
        torch.testing.assert_close(mine, part, rtol=rtol, atol=atol)
        if wanted.grad is not None:
            torch.testing.assert_close(mine.grad, held(layer, name, wanted.grad, rank), rtol=rtol, atol=atol)
