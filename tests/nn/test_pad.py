"""Padding against torch's, with blocks of all sizes."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, assert_second_gradients, assert_twins, integers, uneven

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import adjoint_test, count, spmd

KINDS = ["ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"]
GRIDS = {
    1: [(1, 1, 4), (2, 1, 2), (1, 4), (1, 1, 1), (2, 2, 1), (1, 1, 3)],
    2: [(1, 1, 2, 2), (1, 1, 4, 1), (1, 2, 2), (1, 2, 1, 2), (2, 1, 1, 1), (1, 1, 1, 3)],
    3: [(1, 1, 2, 1, 2), (1, 1, 3, 1, 1), (1, 1, 2, 2), (2, 1, 1, 2, 1)],
}


def twin(name: str, P: dl.CartesianPartition, padding: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    options = (padding, 3.0) if name.startswith("Constant") else (padding,)
    return getattr(dnn, f"Distributed{name}")(P, *options), getattr(torch.nn, name)(*options)


def cropped_length(n: int, left: int, right: int) -> int:
    return n + min(left, 0) + min(right, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_random(kind: str) -> None:
    """What torch accepts comes out equal, cropped and padded by up to three times a block."""
    rng = random.Random(kind)
    accepted = 0
    while accepted < 60:
        dims = rng.choice([1, 1, 2, 2, 3])
        grid = rng.choice(GRIDS[dims])
        shape = tuple(rng.choice([1, 2, 3]) for _ in grid[:-dims]) + tuple(rng.choice([1, 3, 5, 8]) for _ in range(dims))
        padding = tuple(rng.choice([0, 1, 2, 3, 5, -1, -2]) for _ in range(2 * dims))
        sides = zip(padding[::2], padding[1::2], reversed(shape), strict=False)
        if kind == "CircularPad" and any(max(a, b) > cropped_length(n, a, b) for a, b, n in sides):
            continue
        x = integers(*shape)
        bounds = uneven(rng, shape, grid) if rng.random() < 0.5 else None
        try:
            twin(f"{kind}{dims}d", dl.Partition.world().grid((1,) * len(shape)), padding)[1](x)
        except RuntimeError:
            continue
        accepted += 1

        def body(world: dl.Partition, case: Any = (f"{kind}{dims}d", grid, padding, x, bounds)) -> None:
            name, grid, padding, x, bounds = case
            P = world.grid(grid)
            assert_twins(*twin(name, P, padding), x, P, bounds=bounds)

        spmd(math.prod(grid), body)
