"""Operations that change shapes, in graphs: padding, means, transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import distdl_lite as dl


class Of(torch.nn.Module):
    """A function with a weight before and after it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight, self.function = torch.nn.Parameter(torch.tensor(0.7)), function

    def forward(self, *args: Any) -> Any:
        y = self.function(args[0] * self.weight, *args[1:])
        return y * self.weight


def proved(function: Callable[..., Any], grid: tuple[int, ...], *inputs: Any, gathered: int = 0, **options: Any) -> Any:
    """Prove a function on a grid; nothing is gathered."""
    proof = dl.prove(Of(function), grid, *inputs, tolerance=1e-12, **options)
    assert len(proof.program.gathered) == gathered, proof.program.gathered
    return proof


GRIDS = [(1, 1, 2, 2), (2, 1, 1, 2), (1, 4, 1, 1)]


def test_padding() -> None:
    """All modes, cropping too, wide and of one side; several hops; of a constant."""
    for grid in GRIDS:
        for mode in ("constant", "reflect", "replicate", "circular"):
            for padding in ((1, 2, -1, 3), (4, -2, 0, 0), (0, 0, 2, 2), (0, 0, 0, 0)):
                proved(lambda x, p=padding, m=mode: F.pad(x, p, mode=m), grid, (2, 4, 5, 7))
        proved(lambda x: torch.cat([F.pad(x, (1, 1)), F.pad(x, (1, 1), value=2.0)], 1), grid, (2, 4, 5, 7))
        proved(lambda x: F.pad(x.new_ones(x.shape), (3, 1, 0, 2)) * F.pad(x, (3, 1, 0, 2)), grid, (2, 4, 5, 7))
        proved(lambda x: F.pad(x, (0, 1, 2, 2, 1, 0, 0, 3), value=-1.0), grid, (2, 4, 5, 7))
    proved(lambda x: F.pad(x, (20, 5)), (1, 1, 4), (1, 2, 6))  # blocks of nothing but padding
    proved(lambda x: F.pad(x.flatten(2), (1, 2), mode="circular"), (1, 1, 2, 2), (2, 4, 5, 7))  # factored dims
    proved(lambda x: F.pad(x.flatten(2), (0, 0, 1, 2)), (1, 1, 2, 2), (2, 4, 5, 7))
