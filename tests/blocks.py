"""Blocks of whole tensors, even and uneven, and the parts of a serial layer that a rank should hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from distdl_lite.grid import balanced
from distdl_lite.partition import Partition

Cuts = Sequence[Sequence[int]]
NOTHING = torch.empty(0, dtype=torch.float64)
PADDED: dict[str, Callable[..., torch.Tensor]] = {
    "zeros": lambda x, pad: F.pad(x, pad),
    **{mode: lambda x, pad, mode=mode: F.pad(x[None], pad, mode)[0] for mode in ("circular", "reflect", "replicate")},
}


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


def grown(P: Partition, x: torch.Tensor, halo: tuple, boundary: str) -> torch.Tensor:
    """This rank's block with its halo, cut out of the padded whole tensor."""
    box = [(s.start, s.stop) for s in P.block(x.shape)]
    wanted = [(a - left, b + right) if a < b else (a, b) for (a, b), (left, right) in zip(box, halo, strict=True)]
    if boundary == "none":
        return x[tuple(slice(max(a, 0), b) for a, b in wanted)]
    (top, bottom), (left, right) = halo
    padded = PADDED[boundary](x, (left, right, top, bottom))
    return padded[tuple(slice(a + before, b + before) for (a, b), before in zip(wanted, (top, left), strict=True))]
