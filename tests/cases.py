"""One table of operators, shared by the tests of plans, of the threads and of MPI; and their dense matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import Grid
from distdl_lite.layout import Box, Dim, Layout, shape_of
from distdl_lite.plan import Pattern

SIZE = 4  # ranks of the world of every case
ROW, COLUMN, SQUARE = Grid((1, 4), range(4)), Grid((4, 1), range(4)), Grid((2, 2), range(4))


@dataclass(frozen=True)
class Case:
    """An operator, and the collective it should run as."""

    name: str
    X: Layout
    Y: Layout
    pattern: Pattern

    def __str__(self) -> str:
        return self.name

    @property
    def sums(self) -> bool:
        """Whether it adds or, as a collective, could."""
        return self.X.overlaps or self.pattern.sums

    def swapped(self) -> Case:
        return Case(f"{self.name}, adjoint", self.Y, self.X, self.pattern.adjoint)


def line(*ranks: int) -> Grid:
    return Grid((len(ranks),), ranks)


def cut(grid: Grid, *cuts: Sequence[int]) -> Layout:
    return lay.blocks(grid, cuts)


def even(grid: Grid, *shape: int) -> Layout:
    return lay.balanced_blocks(grid, shape)


def kernel(grid: Grid, n: int, outputs: Sequence[int], boundary: str, **of_kernel: int) -> Layout:
    """What a sliding kernel reads of a 1-d tensor."""
    return Layout(grid, (lay.bounded(Dim(lay.read_by_kernel(outputs, **of_kernel), (0,)), n, boundary),))


def _broadcasts() -> list[Case]:
    one, pair, four = line(2), Grid((2, 1), (1, 0)), line(3, 1, 0, 2)
    rows = {(i,): (i, 2) for i in range(2)}
    columns = {(i,): (2 + i,) for i in range(2)}

    def of(
        name: str, source: Grid, target: Grid, axes: tuple[int, ...], shapes: dict, pattern: Pattern = Pattern.BROADCAST
    ) -> Case:
        return Case(name, lay.copies(source, axes, shapes), lay.copies(target, axes, shapes), pattern)

    return [
        of("broadcast to all", one, four, (), {(): (2, 3)}),
        of("broadcast of a scalar", one, four, (), {(): ()}),
        of("broadcast of nothing", one, four, (), {(): (0, 3)}, Pattern.EXCHANGE),
        of("broadcast to ranks without the source", line(0), line(3, 1), (), {(): (5,)}),
        of("broadcast along rows, a rank in two teams", pair, SQUARE, (0,), rows),
        of("broadcast along columns", Grid((1, 2), (2, 0)), SQUARE, (1,), columns),
        of("transposed broadcast", Grid((1, 2), (3, 0)).transposed(), SQUARE, (0,), rows),
        of("broadcast to a transposed grid", Grid((2, 1), (2, 3)), SQUARE.transposed(), (0,), rows),
    ]


def _all_reduces() -> list[Case]:
    def of(name: str, grid: Grid, axes: tuple[int, ...], shapes: dict) -> Case:
        return Case(name, *[lay.copies(grid, axes, shapes)] * 2, Pattern.ALL_REDUCE)

    return [
        of("all-reduce over all", SQUARE, (), {(): (2, 2)}),
        of("all-reduce over unsorted ranks", line(2, 0, 3), (), {(): (7,)}),
        of("all-reduce of a scalar", line(2, 0, 3), (), {(): ()}),
        of("all-reduce along rows", SQUARE, (0,), {(0,): (3,), (1,): (5,)}),
        of("all-reduce along columns, one team empty", Grid((2, 2), (3, 1, 0, 2)), (1,), {(0,): (0, 2), (1,): (2, 2)}),
    ]


def _gathers() -> list[Case]:
    def of(name: str, X: Layout, kept: tuple[int, ...], pattern: Pattern = Pattern.ALL_GATHER) -> Case:
        X = Layout(X.grid, X.dims, kept)
        return Case(name, X, lay.gathered(X, [a for a in range(X.grid.dim) if a not in kept]), pattern)

    return [
        of("all-gather of a line", even(line(*range(4)), 7), ()),
        of("all-gather over unsorted ranks", even(line(3, 0, 2), 7), ()),
        of("all-gather with empty blocks", even(line(*range(4)), 2), ()),
        of("all-gather of nothing", even(line(*range(4)), 0), (), Pattern.EXCHANGE),
        of("all-gather along columns", even(SQUARE, 3, 5), (0,)),
        of("all-gather along rows", even(SQUARE, 3, 5), (1,)),
        of("all-gather along both", even(SQUARE, 3, 5), ()),
        of("all-gather of uneven blocks", cut(ROW, (0, 2), (0, 1, 1, 6, 7)), (0,)),
    ]


def _repartitions() -> list[Case]:
    def of(name: str, X: Layout, Y: Layout) -> Case:
        return Case(name, X, Y, Pattern.EXCHANGE)

    return [
        of("scatter", even(Grid((1, 1), (2,)), 5, 4), even(SQUARE, 5, 4)),
        of("gather", even(SQUARE, 5, 4), even(Grid((1, 1), (1,)), 5, 4)),
        of("move to another rank", even(line(3), 4), even(line(1), 4)),
        of("move of a scalar", Layout(Grid((), (0,)), ()), Layout(Grid((), (3,)), ())),
        of("move to the same blocks", even(SQUARE, 5, 4), even(SQUARE, 5, 4)),
        of("rows to columns", even(COLUMN, 7, 5), even(ROW, 7, 5)),
        of("disjoint", even(line(0, 1), 7), even(line(2, 3), 7)),
        of("overlapping", even(line(0, 1, 2), 8), even(line(1, 2, 3), 8)),
        of("unsorted", even(line(2, 0), 7), even(line(3, 1, 0), 7)),
        of("uneven to balanced", cut(line(0, 1), (0, 7, 10)), even(line(*range(4)), 10)),
        of("fewer points than ranks", even(line(*range(4)), 2), even(line(3, 2, 1, 0), 2)),
        of(
            "empty blocks between full ones",
            cut(line(*range(4)), (0, 3, 3, 3, 5)),
            cut(line(*range(4)), (0, 0, 4, 4, 5)),
        ),
        of("of nothing", even(SQUARE, 0, 4), even(COLUMN, 0, 4)),
        of("three dims", even(Grid((2, 1, 2), (1, 3, 0, 2)), 3, 2, 5), even(Grid((1, 2, 2), range(4)), 3, 2, 5)),
        of("four dims", even(Grid((1, 1, 2, 2), range(4)), 2, 3, 5, 4), even(Grid((2, 2, 1, 1), range(4)), 2, 3, 5, 4)),
        of("copies, first holders", lay.copies(SQUARE, (), {(): (6,)}).first_holders(), even(line(*range(4)), 6)),
        of("copies added up and cut", lay.copies(line(0, 1, 2), (), {(): (6,)}), even(line(1, 3), 6)),
    ]


def _halos() -> list[Case]:
    def of(name: str, X: Layout, *halo: tuple[int, int], boundary: str, pattern: Pattern = Pattern.EXCHANGE) -> Case:
        return Case(f"halo: {name}, {boundary}", X, lay.haloed(X, halo, boundary), pattern)

    def read(name: str, n: int, outputs: Sequence[int], boundary: str = "zeros", **of_kernel: int) -> Case:
        grid = line(*range(4))
        return Case(f"kernel: {name}", even(grid, n), kernel(grid, n, outputs, boundary, **of_kernel), Pattern.EXCHANGE)

    four, square = even(line(*range(4)), 10), even(SQUARE, 5, 4)
    return [
        *(of("asymmetric", four, (1, 2), boundary=boundary) for boundary in lay.BOUNDARIES),
        *(of("with corners", square, (1, 1), (2, 1), boundary=boundary) for boundary in lay.BOUNDARIES),
        *(of("wider than a block", four, (4, 7), boundary=boundary) for boundary in lay.BOUNDARIES),
        *(
            of("as wide as the tensor", even(line(0, 1), 4), (4, 4), boundary=boundary)
            for boundary in ("zeros", "circular")
        ),
        of("as wide as the tensor", even(line(0, 1), 4), (4, 4), boundary="none", pattern=Pattern.ALL_GATHER),
        *(of("empty blocks", even(line(*range(4)), 3), (1, 1), boundary=boundary) for boundary in lay.BOUNDARIES),
        of("unsorted", even(line(3, 0, 2), 8), (2, 1), boundary="circular"),
        read("k3 p1", 9, (0, 3, 5, 7, 9), kernel=3, padding=1),
        read("k1 s2", 9, (0, 2, 3, 4, 5), kernel=1, stride=2),
        read("k2 s2 p1", 8, (0, 2, 3, 4, 5), kernel=2, stride=2, padding=1),
        read("k3 s3, fewer outputs than ranks", 9, (0, 1, 2, 3, 3), kernel=3, stride=3),
        read("k3 d2 p2, circular", 9, (0, 3, 5, 7, 9), "circular", kernel=3, dilation=2, padding=2),
    ]


def cases() -> list[Case]:
    """All operators and their adjoints, which covers SumReduce and ReduceScatter."""
    forward = [*_broadcasts(), *_all_reduces(), *_gathers(), *_repartitions(), *_halos()]
    return [*forward, *(case.swapped() for case in forward)]


# ---- the definition --------------------------------------------------------------------------------------------------


def dense(X: Layout, Y: Layout, source: int, target: int) -> torch.Tensor | None:
    """The matrix from `source`'s flattened block to `target`'s by brute force, None where one of them holds nothing.

    y_s[g] = sum of x_r[g] over the ranks r of the same key; a periodic dim also meets itself one period away.
    """
    box_x, box_y = X.box(source), Y.box(target)
    if box_x is None or box_y is None:
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for x, y, a, b in zip(box_x, box_y, X.dims, Y.dims, strict=True):
        period = a.period or b.period
        shifts = (0,) if period is None else (-period, 0, period)
        rows = [[float(sum(g == h + shift for shift in shifts)) for h in range(*x)] for g in range(*y)]
        matrix = torch.kron(matrix, torch.tensor(rows, dtype=torch.float64).reshape(len(range(*y)), len(range(*x))))
    return matrix * (X.key(source) == Y.key(target))


def integers(shape: Sequence[int], seed: int = 0, low: int = -3, high: int = 4) -> torch.Tensor:
    """Random integers in float64, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, tuple(shape), generator=generator).double()


def random_blocks(layout: Layout, seed: int = 0, low: int = -3, high: int = 4) -> dict[int, torch.Tensor]:
    """A block for each rank that holds one."""
    held = {rank: layout.box(rank) for rank in range(SIZE)}
    return {r: integers(shape_of(box), seed + r, low, high) for r, box in held.items() if box is not None}


def applied(X: Layout, Y: Layout, blocks: dict[int, torch.Tensor], rank: int) -> torch.Tensor | None:
    """What the dense matrix gives `rank`, None where it holds nothing."""
    box: Box | None = Y.box(rank)
    if box is None:
        return None
    y = torch.zeros(math.prod(shape_of(box)), dtype=torch.float64)
    for source, x in blocks.items():
        matrix = dense(X, Y, source, rank)
        assert matrix is not None
        y += matrix @ x.reshape(-1)
    return y.reshape(shape_of(box))
