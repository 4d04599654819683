"""Operations that change shapes, in graphs: padding, means, transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import distdl_lite as dl


class Of(torch.nn.Module):
    """Functions with a weight before and after them."""

    def __init__(self, functions: tuple[Callable[..., Any], ...]) -> None:
        super().__init__()
        self.weight, self.functions = torch.nn.Parameter(torch.tensor(0.7)), functions

    def forward(self, *args: Any) -> Any:
        x = args[0] * self.weight
        return [function(x, *args[1:]) * self.weight for function in self.functions]


def proved(grid: tuple[int, ...], x: Any, *functions: Callable[..., Any]) -> dl.Proof:
    """Prove functions on a grid; nothing is gathered."""
    proof = dl.prove(Of(functions), grid, x, tolerance=1e-12)
    assert not proof.program.gathered
    return proof


GRIDS = [(1, 1, 2, 2), (2, 1, 1, 2), (1, 4, 1, 1)]


def test_padding() -> None:
    """All modes, cropping too, wide and of one side; several hops; of a constant; of factored dims."""
    pads = [(1, 2, -1, 3), (4, -2, 0, 0), (0, 0, 2, 2), (0, 0, 0, 0)]
    modes = ["constant", "reflect", "replicate", "circular"]
    functions = [partial(F.pad, pad=pad, mode=mode) for pad in pads for mode in modes]
    functions += [
        lambda x: torch.cat([F.pad(x, (1, 1)), F.pad(x, (1, 1), value=2.0)], 1),
        lambda x: F.pad(x.new_ones(x.shape), (3, 1, 0, 2)) * F.pad(x, (3, 1, 0, 2)),
        lambda x: F.pad(x, (0, 1, 2, 2, 1, 0, 0, 3), value=-1.0),
        lambda x: F.pad(x.flatten(2), (1, 2), mode="circular"),
        lambda x: F.pad(x.flatten(2), (0, 0, 1, 2)),
    ]
    for grid in GRIDS:
        proved(grid, (2, 4, 5, 7), *functions)
    proved((1, 1, 4), (1, 2, 6), lambda x: F.pad(x, (20, 5)))  # blocks of nothing but padding


def test_transforms() -> None:
    """Of any dims, in steps where no layout leaves all of them whole, of copies and of a lone dim, which is gathered."""

    def spectral(x: torch.Tensor) -> torch.Tensor:
        z = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        z = torch.fft.ifft2(torch.fft.fft2(z) * (1 + 2j)) + torch.fft.fft(z, dim=1, n=z.shape[1])
        return torch.fft.irfftn(z, s=x.shape[-2:], dim=(-2, -1)) + torch.fft.hfft(torch.fft.ihfft(x, dim=0), 2, dim=0)

    functions = [
        spectral,
        lambda x: torch.fft.fftn(x, s=(3, 5, 4)).abs() + torch.fft.ifftn(x.flatten(1)).real.sum(),
        lambda x: torch.fft.irfft(torch.fft.rfft(x.mean((0, 1, 2)), n=9)),
    ]
    for grid in GRIDS:
        proved(grid, (2, 4, 6, 8), *functions)
    proof = proved((1, 1, 2, 2), (1, 1, 8, 9), lambda x: torch.fft.rfft2(x).real)
    assert "gather" not in [movement.kind for movement in proof.program.compiler.movements]


def test_sums() -> None:
    """Over dims that are cut and not, of one factor and of several."""
    functions = [
        lambda x, d=dim, k=keep: x.mean(d, k) + x.sum(d, k).cos()
        for dim, keep in ((None, False), ((2, 3), True), (0, False), ((-1, 1), False))
    ]
    functions.append(lambda x: x.flatten(2).mean(-1) * x.flatten(1).sum(-1, keepdim=True))
    for grid in GRIDS:
        proved(grid, (2, 4, 6, 8), *functions)
