"""The algebra of factored dims against the points that each rank holds, one by one."""

from __future__ import annotations

import math
from itertools import pairwise, product
from random import Random

import torch
from executed import block_of, random_cuts, random_dims, random_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl_lite.factors import (
    Dims,
    Factors,
    all_axes,
    axes_of,
    blocks,
    boundaries,
    common_lengths,
    cut,
    is_inside,
    length_of,
    local_shape,
    merged,
    range_at,
    refined,
    reshaped,
    shape_of_dims,
    size_of,
    split,
    uncut,
)
from distdl_lite.grid import Grid, indices
from distdl_lite.layout import Dim, ranges_of

randoms = given(st.randoms(use_true_random=True))
many = settings(max_examples=150, deadline=None, database=None, derandomize=True)
LENGTHS = (1, 1, 2, 3, 4, 6, 8, 12)


def points(dims: Dims, grid: Grid, index: tuple[int, ...]) -> list[int]:
    """The points that a rank holds, numbered in row-major order of the whole tensor, in the order of its block."""
    whole = torch.arange(math.prod(shape_of_dims(dims))).view(shape_of_dims(dims))
    return block_of(whole, dims, grid, index).flatten().tolist()


def assert_same(a: Dims, b: Dims, grid: Grid) -> None:
    for index in indices(grid.shape):
        assert points(a, grid, index) == points(b, grid, index)


def random_factors(rng: Random, grid: Grid) -> Factors:
    """A dim of several factors, some of them cut."""
    axes = [a for a, n in enumerate(grid.shape) if n > 1]
    found = []
    for _ in range(rng.randint(1, 4)):
        own = [axes.pop() for _ in range(rng.randint(0, len(axes)))]
        n, parts = rng.choice(LENGTHS), math.prod(grid.shape[a] for a in own)
        found.append(Dim(ranges_of(random_cuts(rng, n, parts)), tuple(own)) if own else uncut(n))
    return tuple(found)


def random_product(rng: Random, n: int) -> list[int]:
    """Lengths whose product is a length."""
    found = []
    while n > 1 or rng.random() < 0.2:
        found.append(rng.choice([m for m in range(1, n + 1) if n % m == 0]))
        n //= found[-1]
    return found


@many
@randoms
def test_merged(rng: Random) -> None:
    grid = random_grid(rng)
    factors = random_factors(rng, grid)
    found = merged(factors)
    assert_same((found,), (factors,), grid)
    assert merged(found) == found
    assert size_of(found) == size_of(factors)
    assert axes_of(found) == axes_of(factors)
    assert all(dim.axes for dim in found[1:])


@many
@randoms
def test_split_and_refined(rng: Random) -> None:
    grid = random_grid(rng)
    factors = random_factors(rng, grid)
    lengths = [n for dim in factors for n in random_product(rng, length_of(dim))]
    found = refined(factors, lengths)
    parts = [split(dim, random_product(rng, length_of(dim))) for dim in factors]
    for dim, part in zip(factors, parts, strict=True):
        if part is not None:
            assert_same((part,), ((dim,),), grid)
    if found is None:
        assert axes_of(factors)
        return
    assert [length_of(dim) for dim in found if length_of(dim) > 1] == [n for n in lengths if n > 1]
    assert_same((found,), (factors,), grid)


@many
@randoms
def test_cut_points_on_boundaries_can_be_split(rng: Random) -> None:
    outer, inner, parts = rng.randint(2, 6), rng.randint(1, 4), rng.randint(2, 4)
    grid = Grid((parts,), tuple(range(parts)))
    dim = Dim(ranges_of([p * inner for p in random_cuts(rng, outer, parts)]), (0,))
    found = split(dim, (outer, inner))
    assert found is not None
    assert_same((found,), ((dim,),), grid)


@many
@randoms
def test_reshaped(rng: Random) -> None:
    grid = random_grid(rng)
    dims = random_dims(rng, grid, tuple(rng.choice(LENGTHS) for _ in range(rng.randint(0, 4))))
    shape = tuple(random_product(rng, math.prod(shape_of_dims(dims))))
    found = reshaped(dims, shape)
    if found is None:
        assert all_axes(dims)
        return
    assert shape_of_dims(found) == shape
    assert all_axes(found) == all_axes(dims)
    assert_same(found, dims, grid)
    back = reshaped(found, shape_of_dims(dims))
    assert back is not None
    assert_same(back, dims, grid)


@many
@randoms
def test_common_lengths(rng: Random) -> None:
    n = rng.choice([1, 6, 12, 24, 36, 60])
    given_lengths = [random_product(rng, n) for _ in range(rng.randint(1, 3))]
    found = common_lengths(*given_lengths)
    wanted = sorted({point for lengths in given_lengths for point in boundaries(lengths)})
    is_chain = all(b % a == 0 for a, b in pairwise(wanted))
    assert (found is not None) == is_chain
    assert found is None or sorted(set(boundaries(found))) == wanted


@many
@randoms
def test_is_inside(rng: Random) -> None:
    grid = random_grid(rng)
    n = rng.randint(1, 9)
    axes = [a for a, m in enumerate(grid.shape) if m > 1]

    def dim() -> Dim:
        own = tuple(axes[: rng.randint(0, len(axes))])
        if not own:
            return rng.choice([uncut(n), Dim((tuple(sorted(rng.randint(0, n) for _ in range(2))),))])  # type: ignore[arg-type]
        return Dim(ranges_of(random_cuts(rng, n, math.prod(grid.shape[a] for a in own))), own)

    held, wanted = dim(), dim()
    pairs = [(range_at(held, grid, i), range_at(wanted, grid, i)) for i in indices(grid.shape)]
    contains = all(set(range(*w)) <= set(range(*h)) for h, w in pairs)
    found = is_inside(held, wanted)
    assert contains or not found
    if held.axes == wanted.axes or not held.axes:
        assert found == contains
    assert not is_inside(Dim(held.ranges, held.axes, n), wanted)


@many
@randoms
def test_blocks(rng: Random) -> None:
    """Balanced blocks hold every point once, those of several axes too."""
    grid = random_grid(rng)
    shape = [rng.randint(0, 7) for _ in range(grid.dim)]
    dims = blocks(shape, range(grid.dim), grid)
    held = [p for i in indices(grid.shape) for p in points(dims, grid, i)]
    assert sorted(held) == list(range(math.prod(shape)))
    both = ((cut(shape[0], range(grid.dim), grid),),)
    assert sorted(p for i in indices(grid.shape) for p in points(both, grid, i)) == list(range(shape[0]))
    for index in indices(grid.shape):
        sizes = [b - a for (f,) in dims for a, b in [range_at(f, grid, index)]]
        assert local_shape(dims, grid, index) == tuple(sizes)
        assert all(n // p <= m <= -(-n // p) for n, p, m in zip(shape, grid.shape, sizes, strict=True))


def test_one_point_that_one_rank_holds() -> None:
    """It is a factor of length one, which no other factor can stand for."""
    grid = Grid((2,), (0, 1))
    dim = Dim(((0, 1), (1, 1)), (0,))
    assert merged([dim]) == (dim,)
    assert split(dim, ()) is None
    assert refined([dim, uncut(4)], [4]) is None
    assert reshaped(((dim,), (uncut(4),)), (4,)) == (merged([dim, uncut(4)]),)
    for shape in ((1,), (1, 1), ()):
        found = reshaped(((dim,),), shape)
        assert found is None or list(product(*[points(found, grid, (i,)) for i in (0, 1)])) == []
