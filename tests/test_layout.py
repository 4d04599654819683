"""Layouts: boxes, which of them meet, boundaries, and what a kernel reads."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, indices
from distdl_lite.layout import Dim, Layout

CUTS = st.lists(st.integers(0, 9), min_size=2, max_size=5).map(lambda cuts: tuple(sorted(cuts)))
WANTED = st.tuples(st.integers(-6, 14), st.integers(0, 9)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Two dims over two axes: cut, perhaps with halos, in reverse, or whole; perhaps with teams."""
    cuts = [draw(CUTS), draw(CUTS)]
    shape = tuple(len(cut) - 1 for cut in cuts)
    count = shape[0] * shape[1]
    grid = Grid(shape, tuple(draw(st.permutations(range(count)))))
    axes = draw(st.sampled_from([(0, 1), (1, 0)]))
    layout = lay.blocks(grid, cuts)
    layout = lay.haloed(layout, [draw(st.sampled_from([(0, 0), (1, 2), (0, 3)])) for _ in cuts], "zeros")
    dims = [layout.dims[axis] for axis in axes]
    if draw(st.booleans()):
        dims[0] = Dim(((0, 9),))
    return Layout(grid, tuple(dims), draw(st.sampled_from([(), (0,), (1,)])))


@given(layouts(), WANTED, WANTED, st.sampled_from([None, 9, 10]), st.data())
def test_meeting_is_brute_force(
    layout: Layout, rows: lay.Range, columns: lay.Range, n: int | None, data: st.DataObject
) -> None:
    rank = data.draw(st.sampled_from(layout.grid.ranks))
    key, wanted, periods = layout.key(rank), (rows, columns), (n, None)
    found = list(layout.meeting(wanted, key, periods))
    brute = []
    for other in layout.grid.ranks:
        for shift in product(*[(0,) if n is None else (-n, 0, n) for n in periods]):
            box = tuple((a + s, b + s) for (a, b), s in zip(layout.box(other), shift, strict=True))
            piece = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, wanted, strict=True))
            if layout.key(other) == key and all(a < b for a, b in piece):
                brute.append((other, piece, shift))
    assert sorted(found) == sorted(brute)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("boundary", lay.BOUNDARIES)
def test_a_dim_without_points_needs_none(boundary: str) -> None:
    X = lay.blocks(Grid((1, 2), range(2)), [(0, 0), (0, 2, 4)])
    assert lay.haloed(X, [(0, 0), (0, 1)], boundary).box(0)[0] == (0, 0)


def test_an_empty_block_stands_between_halos() -> None:
    """Its start is greater than that of the next block with its halo."""
    X = lay.haloed(lay.blocks(Grid((4,), range(4)), [(0, 0, 1, 1, 2)]), [(1, 2)], "none")
    assert [X.box(rank) for rank in range(4)] == [((0, 0),), ((0, 2),), ((1, 1),), ((0, 2),)]
    assert [rank for rank, _, _ in X.meeting(((0, 1),), (), (None,))] == [1, 3]


@given(layouts())
def test_overlaps_is_brute_force(layout: Layout) -> None:
    """`overlaps` may be pessimistic, but never misses a point held twice; on plain blocks it is exact."""
    seen: set[tuple] = set()
    twice = False
    for rank in layout.grid.ranks:
        for point in product(*(range(*r) for r in layout.box(rank))):
            twice = twice or (layout.key(rank), point) in seen
            seen.add((layout.key(rank), point))
    assert layout.overlaps or not twice


def test_boxes_keys_and_replicas() -> None:
    grid = Grid((2, 2), (3, 1, 0, 2))
    layout = Layout(grid, (Dim(((0, 4), (4, 7)), (1,)), Dim(((0, 5),))), ())
    assert layout.box(1) == ((4, 7), (0, 5))
    assert layout.box(9) is layout.key(9) is None
    assert (layout.free_axes, layout.cut_axes, layout.overlaps) == ((0, 1), (1,), True)
    assert layout.replicas(1) == layout.replicas(2) == (1, 2)
    assert layout.replicas(9) == ()
    first = layout.first_holders()
    assert [first.box(rank) for rank in range(4)] == [None, ((4, 7), (0, 5)), None, ((0, 4), (0, 5))]
    assert not first.overlaps
    teams = Layout(grid, layout.dims, (0,))
    assert (teams.key(2), list(teams.members((1,))), teams.overlaps) == ((1,), [0, 2], False)
    assert teams.replicas(2) == (2,)
    assert lay.global_shape_of(layout) == (7, 5)


def test_nothing_overlaps_in_an_empty_tensor() -> None:
    grid = Grid((4,), range(4))
    assert lay.whole(grid, (3,)).overlaps
    assert not lay.whole(grid, (0,)).overlaps
    assert not lay.balanced_blocks(grid, (0,)).overlaps


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_cuts_from_shapes(rows: list[int], columns: list[int]) -> None:
    grid = Grid((len(rows), len(columns)), tuple(reversed(range(len(rows) * len(columns)))))
    shapes = {grid.rank((i, j)): (rows[i], columns[j]) for i, j in indices(grid.shape)}
    layout = lay.blocks(grid, lay.cuts_from_shapes(grid, shapes))
    assert all(lay.shape_of(layout.box(rank)) == shape for rank, shape in shapes.items())
    assert lay.global_shape_of(layout) == (sum(rows), sum(columns))


def test_refusals() -> None:
    grid = Grid((2, 2), range(4))
    with pytest.raises(
        ValueError, match=r"rank 3 has shape .3, 8., rank 1 has .2, 9.; both stand at index 1 of axis 1"
    ):
        lay.cuts_from_shapes(grid, {0: (2, 4), 1: (2, 9), 2: (3, 4), 3: (3, 8)})
    with pytest.raises(ValueError, match=r"rank 0: a tensor of shape .2,. has 1 dims"):
        lay.cuts_from_shapes(grid, dict.fromkeys(range(4), (2,)))
    for cuts in ([(0, 1), (0, 1, 2)], [(0, 2, 1), (0, 1, 2)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match="cut"):
            lay.blocks(grid, cuts)
    with pytest.raises(ValueError, match="cannot be cut over a grid"):
        lay.balanced_blocks(grid, (3,))
    for mode, n, out in (
        ("circular", 3, 4),
        ("reflect", 3, 3),
        ("replicate", 0, 1),
        ("circular", 0, 1),
        ("reflect", 0, 1),
    ):
        with pytest.raises(ValueError, match=f"a {mode} boundary of {out} needs more than the {n} points"):
            lay.bounded(Dim(((-out, n + 1),)), n, mode)


@given(st.integers(1, 8), st.integers(-7, 14), st.integers(0, 9), st.sampled_from(lay.BOUNDARIES))
def test_boundaries_hold_what_is_read(n: int, start: int, size: int, boundary: str) -> None:
    """Of a range that leaves the dim, what each rule reads: compare with the points of torch's padding."""
    stop = start + size
    out = max(-start, stop - n, 0) if size else 0
    if out > {"circular": n, "reflect": n - 1}.get(boundary, out):
        return
    dim = lay.bounded(Dim(((start, stop),)), n, boundary)
    (held,) = dim.ranges
    if boundary in ("zeros", "circular"):
        assert held == (start, stop)
        assert dim.period == n or boundary == "zeros" or not out
        return
    line = torch.arange(n, dtype=torch.float64)[None]
    padded = line if boundary == "none" else F.pad(line, (out, out), boundary)
    offset = 0 if boundary == "none" else out
    read = padded[0, max(start + offset, 0) : max(stop + offset, 0)].long().tolist()
    assert held[0] <= held[1]
    assert held[0] >= 0
    assert held[1] <= n
    if not read:
        assert held[0] == held[1]
    elif stop <= 0 or n <= start:  # all of it repeats: reading up to the edge as well does no harm
        assert held[0] <= min(read)
        assert max(read) < held[1]
    else:
        assert held == (min(read), max(read) + 1)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 4), st.integers(3, 14)
)
def test_read_by_kernel(kernel: int, stride: int, dilation: int, padding: int, parts: int, n: int) -> None:
    """The points that the gradient of a block of outputs reaches."""
    if n + 2 * padding < dilation * (kernel - 1) + 1:
        return
    x = torch.zeros(1, 1, n + 2 * padding, dtype=torch.float64, requires_grad=True)
    y = F.conv1d(x, torch.ones(1, 1, kernel, dtype=torch.float64), stride=stride, dilation=dilation)[0, 0]
    cuts = lay.balanced(len(y), parts)
    ranges = lay.read_by_kernel(cuts, kernel, stride, dilation, padding)
    for (a, b), (low, high) in zip(lay.ranges_of(cuts), ranges, strict=True):
        if a == b:
            assert low == high
            continue
        (g,) = torch.autograd.grad(y[a:b].sum(), x, retain_graph=True)
        reached = g[0, 0].nonzero().reshape(-1) - padding
        assert (low, high) == (int(reached.min()), int(reached.max()) + 1)
