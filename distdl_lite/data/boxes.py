"""Boxes of arrays that are stored in chunks: where to cut them, and which dim of an array an axis of a partition cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.grid import balanced
from distdl_lite.layout import Box, Range, Shape


@dataclass(frozen=True)
class Axes:
    """The dim of an array that each axis of a partition cuts; None where a tensor has a dim of length one for it."""

    dims: tuple[int | None, ...]

    def of(self, values: Sequence[int]) -> Shape:
        """By axis what an array has by dim; 1 without a dim."""
        return tuple(1 if d is None else values[d] for d in self.dims)

    def back(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """By dim of the array what is given by axis."""
        by_dim = {d: value for d, value in zip(self.dims, values, strict=True) if d is not None}
        return tuple(by_dim[d] for d in sorted(by_dim))

    def slices(self, box: Box) -> tuple[slice, ...]:
        """A box over the axes as slices of the array."""
        return self.back([slice(*side) for side in box])

    def tensor(self, x: torch.Tensor) -> torch.Tensor:
        """A slice of the array as a tensor with a dim for each axis."""
        x = x.permute([d for d in self.dims if d is not None])
        return x[tuple(None if d is None else slice(None) for d in self.dims)]

    def array(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor's elements as the array has them."""
        return x[tuple(0 if d is None else slice(None) for d in self.dims)].permute(
            self.back([sum(d is not None for d in self.dims[:axis]) for axis in range(len(self.dims))])
        )


def axes_of(dims: Sequence[int | str | None] | None, grid: Shape, shape: Shape, names: Sequence[str] | None) -> Axes:
    """The axes by the user's `dims` of an array; each dim of it is cut by one axis.

    Raises
    ------
    ValueError
        If a dim does not exist, is named twice or not at all, or there is not one entry for each axis.
    """
    known: Sequence[Any] = range(len(shape)) if names is None else names
    given = list(range(len(shape)) if dims is None else dims)
    numbers = [known.index(d) if d in known and isinstance(d, str) else d for d in given]
    numbers = [d + len(shape) if isinstance(d, int) and d < 0 else d for d in numbers]
    kept = [d for d in numbers if d is not None]
    if len(given) != len(grid) or len(kept) != len(shape) or set(kept) != set(range(len(shape))):
        asked = "one to one" if dims is None else f"as dims={given}"
        raise ValueError(
            f"an array of shape {shape} with dims {list(known)} cannot be cut {asked} over a grid of shape {grid}: dims has "
            "for each axis the dim that it cuts, or None, and each dim once"
        )
    return Axes(tuple(numbers))


def snapped(cuts: Sequence[int], chunk: int) -> tuple[int, ...]:
    """The chunk boundaries next to the cut points.

    >>> snapped((0, 5, 10), 4)
    (0, 4, 10)
    """
    length = cuts[-1]
    return tuple(
        min((cut // chunk * chunk, min(-(-cut // chunk) * chunk, length)), key=lambda c: abs(c - cut)) for cut in cuts
    )


def touched(wanted: Range, chunk: int, length: int) -> int:
    """How many points of a dim lie in the chunks that a range needs.

    >>> touched((3, 5), 4, 7)
    7
    """
    start, stop = wanted
    return 0 if start >= stop else min(-(-stop // chunk) * chunk, length) - start // chunk * chunk


def parts_of(shape: Shape, chunks: Sequence[int], most: int) -> tuple[int, ...]:
    """In how many parts to cut each dim, the first ones first, so that a part has about `most` points, and whole chunks.

    >>> parts_of((10, 8), (4, 1), 16)
    (3, 2)
    """
    left, parts = math.prod(shape), []
    for n, chunk in zip(shape, chunks, strict=True):
        parts.append(max(1, min(-(-n // chunk), -(-left // most))))
        left = -(-left // parts[-1])
    return tuple(parts)


def part(whole: Range, chunk: int, number: int, parts: int) -> Range:
    """One of so many parts of a range, cut where chunks begin.

    >>> [part((4, 11), 4, number, 2) for number in range(2)]
    [(4, 8), (8, 11)]
    """
    start, stop = whole
    first = start // chunk
    cuts = balanced(max(0, -(-stop // chunk) - first), parts)
    low, high = ((first + cut) * chunk for cut in cuts[number : number + 2])
    return max(low, start), max(low, start, min(high, stop))
