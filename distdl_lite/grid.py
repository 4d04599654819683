"""Ranks on a Cartesian grid: pure arithmetic. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product


def balanced(length: int, parts: int) -> tuple[int, ...]:
    """Cut points of a balanced split: the first ``length % parts`` parts get one element more.

    >>> balanced(7, 2)
    (0, 4, 7)
    >>> balanced(2, 4)
    (0, 1, 2, 2, 2)
    """
    size, more = divmod(length, parts)
    return tuple(part * size + min(part, more) for part in range(parts + 1))


def compact(ranks: Iterable[int]) -> Sequence[int]:
    """A range where the ranks are consecutive, else a tuple: 65,536 ranks then cost nothing.

    >>> compact([3, 4, 5])
    range(3, 6)
    """
    if isinstance(ranks, range) and ranks.step == 1:
        return ranks
    ranks = tuple(ranks)
    if ranks and ranks == tuple(range(ranks[0], ranks[0] + len(ranks))):
        return range(ranks[0], ranks[0] + len(ranks))
    return ranks


@dataclass(frozen=True)
class Grid:
    """Ranks laid over a shape in row-major order.

    >>> Grid((2, 3), range(6)).index(4)
    (1, 1)
    """

    shape: tuple[int, ...]
    ranks: Sequence[int]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dim(self) -> int:
        return len(self.shape)

    def position(self, rank: int) -> int | None:
        """Where `rank` stands in row-major order, None if the grid does not hold it."""
        try:
            return self.ranks.index(rank)
        except ValueError:
            return None

    def index(self, rank: int) -> tuple[int, ...] | None:
        """Cartesian index of `rank`, None if the grid does not hold it."""
        position = self.position(rank)
        return None if position is None else unravel(position, self.shape)

    def rank(self, index: Sequence[int]) -> int:
        """The rank at a Cartesian index."""
        return self.ranks[ravel(index, self.shape)]

    def padded(self, dim: int) -> Grid:
        """The same ranks with axes of length one put in front, up to `dim` axes."""
        return Grid((1,) * (dim - self.dim) + self.shape, self.ranks)

    def transposed(self) -> Grid:
        """The grid with its axes in reverse order."""
        shape = self.shape[::-1]
        return Grid(shape, tuple(self.rank(index[::-1]) for index in indices(shape)))

    def members(self, fixed: dict[int, int]) -> Iterator[int]:
        """The ranks whose index has the given values on the given axes, in row-major order."""
        if not fixed:
            return iter(self.ranks)
        choices = [(fixed[a],) if a in fixed else range(n) for a, n in enumerate(self.shape)]
        return (self.rank(index) for index in product(*choices))


def ravel(index: Sequence[int], shape: Sequence[int]) -> int:
    """Row-major position of an index."""
    position = 0
    for i, n in zip(index, shape, strict=True):
        position = position * n + i
    return position


def unravel(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Index of a row-major position."""
    index = []
    for n in reversed(shape):
        position, i = divmod(position, n)
        index.append(i)
    return tuple(reversed(index))


def indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices of a shape in row-major order."""
    return product(*map(range, shape))
