"""Drawings as text, and pictures: what is drawn is what layouts, plans and reports say."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, Rectangle

import distdl_lite as dl
from distdl_lite import layout as lay
from distdl_lite.grid import Grid
from distdl_lite.layout import Layout
from distdl_lite.nn import HaloExchange
from distdl_lite.operator import Operator
from distdl_lite.plan import plan
from distdl_lite.show import text
from distdl_lite.testing import spmd

matplotlib.use("agg")
ROWS, COLUMNS = Grid((2, 1), (0, 1)), Grid((1, 2), (0, 1))


@pytest.fixture(autouse=True)
def _no_figure_stays() -> Iterator[None]:
    yield
    plt.close("all")


def grid(*shape: int) -> Grid:
    return Grid(shape, range(math.prod(shape)))


def blocks(shape: tuple[int, ...], *of_grid: int) -> Layout:
    return lay.balanced_blocks(grid(*of_grid), shape)


def sides(patch: Rectangle) -> tuple[float, ...]:
    """Top, left, height and width."""
    return patch.get_y(), patch.get_x(), patch.get_height(), patch.get_width()


def drawn(ax: Any, kind: str) -> list[tuple[int, Any]]:
    """The patches of a kind with the rank that each is of."""
    named = [(str(patch.get_gid()).split("-"), patch) for patch in ax.patches]
    return [(int(words[1]), patch) for words, patch in named if words[0] == kind]


def ranks_of(ax: Any) -> list[str]:
    """The texts in a picture that are ranks."""
    return sorted(word.get_text() for word in ax.texts if word.get_text().isdigit())


# As text


def test_a_grid_is_written_as_its_ranks_stand() -> None:
    assert text.grid_text(Grid((2, 2), (3, 1, 10, 0))) == " 3  1\n10  0"
    assert text.grid_text(Grid((2, 1, 2), range(4))) == "0 1\n\n2 3"
    assert text.grid_text(Grid((3,), range(3))) == "0 1 2"


def test_a_layout_is_written_box_by_box() -> None:
    layout = lay.balanced_blocks(ROWS, (7, 5))
    assert text.layout_text(layout) == "rank 0  at 0,0  holds [0:4, 0:5]\nrank 1  at 1,0  holds [4:7, 0:5]"
    assert text.layout_text(layout, [1, 9]) == "rank 1  at 1,0  holds [4:7, 0:5]"


def test_a_plan_names_peers_bytes_and_global_boxes() -> None:
    X, Y = lay.balanced_blocks(ROWS, (7, 5)), lay.balanced_blocks(COLUMNS, (7, 5))
    built = plan(X, Y, 1)
    assert text.plan_text(built, X, Y, 4).splitlines() == [
        "rank 1  sends to       rank 0  36 bytes  [4:7, 0:3]",
        "rank 1  sends to       itself  24 bytes  [4:7, 3:5]",
        "rank 1  receives from  rank 0  32 bytes  [0:4, 3:5]",
        "rank 1  receives from  itself  24 bytes  [4:7, 3:5]",
    ]
    assert text.traffic(built, 4) == (1, 36)
    assert text.plan_text(plan(X, Y, 5), X, Y, 4) == "rank 5  takes no part"


def test_a_collective_is_named_with_its_team() -> None:
    X = lay.copies(Grid((2,), (0, 1)), (), {(): (3,)})
    built = plan(X, X, 0)
    assert "by Allreduce of ranks 0,1" in text.plan_text(built, X, X, 8)
    assert text.traffic(built, 8) == (1, 24)


# Colours


def test_the_ranks_have_colours_of_their_own() -> None:
    colours = [dl.show.colour(rank) for rank in range(32)]
    assert len(set(colours)) == 32
    assert all(0 <= part <= 1 for found in colours for part in found)
    assert dl.show.colour(32) == colours[0]
    with pytest.raises(ValueError, match="a rank is not negative, -1 has no colour"):
        dl.show.colour(-1)


def test_neighbours_on_a_grid_have_colours_that_differ() -> None:
    for columns in range(1, 17):
        for rank in range(4 * columns):
            for other in (rank + 1, rank + columns):
                gap = zip(dl.show.colour(rank), dl.show.colour(other), strict=True)
                assert max(abs(a - b) for a, b in gap) > 0.1, (columns, rank, other)


# Partitions


@pytest.mark.parametrize(
    ("shape", "of_grid"),
    [((7,), (2,)), ((7, 5), (2, 2)), ((8, 53), (1, 4)), ((31, 47), (3, 5)), ((100, 100), (8, 8)), ((2, 5), (4, 2))],
)
def test_blocks_are_drawn_where_they_lie(shape: tuple[int, ...], of_grid: tuple[int, ...]) -> None:
    layout = blocks(shape, *of_grid)
    ax = dl.show.partition(of_grid, shape)
    wanted = {rank: layout.box(rank) for rank in layout.grid.ranks}
    full = {rank: box for rank, box in wanted.items() if box and 0 not in lay.shape_of(box)}
    found = dict(drawn(ax, "rank"))
    assert found.keys() == full.keys()
    for rank, patch in found.items():
        box = [*full[rank]] if len(shape) > 1 else [(0, patch.get_height()), *full[rank]]
        (top, bottom), (left, right) = box
        assert sides(patch) == (top, left, bottom - top, right - left)
        assert to_rgb(patch.get_facecolor()) == pytest.approx(dl.show.colour(rank))
    assert ranks_of(ax) == sorted(map(str, full))
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert (left, right, top) == (0, shape[-1], 0)
    assert bottom == (shape[0] if len(shape) > 1 else found[0].get_height())


def test_a_partition_a_grid_a_shape_and_a_layout_are_drawn_alike() -> None:
    P = spmd(4, lambda world: world.grid((2, 2)))[0]
    layout = blocks((7, 5), 2, 2)
    pictures = [dl.show.partition(x, (7, 5)) for x in (P, layout.grid, (2, 2), [2, 2])] + [dl.show.partition(layout)]
    assert len({tuple(map(sides, ax.patches)) for ax in pictures}) == 1


def test_ranks_are_those_of_the_grid() -> None:
    ax = dl.show.partition(Grid((2,), (7, 3)), (5,))
    assert [(rank, patch.get_width()) for rank, patch in drawn(ax, "rank")] == [(7, 3), (3, 2)]


def test_what_holds_nothing_is_named() -> None:
    assert dl.show.partition((4, 2), (2, 5)).get_title(loc="left") == "ranks 4\N{EN DASH}7: nothing"
    assert dl.show.partition((3,), (2,)).get_title(loc="left") == "rank 2: nothing"
    assert not dl.show.partition((2,), (2,)).get_title(loc="left")
    nothing = dl.show.partition((2, 2), (0, 3))
    assert not nothing.patches
    assert nothing.get_title(loc="left") == "ranks 0\N{EN DASH}3: nothing"


def test_copies_have_pictures_of_their_own() -> None:
    ax = dl.show.partition((2, 2, 3), (9, 12), axes=(1, -1))
    found = dict(drawn(ax, "rank"))
    assert sorted(found) == list(range(12))
    assert {(rank, sides(found[rank])[2:]) for rank in found} == {
        (rank, sides(found[rank % 6])[2:]) for rank in found
    }  # of the same sizes
    assert max(sum(sides(found[rank])[::2]) for rank in range(6)) == 9
    assert min(sides(found[rank])[0] for rank in range(6, 12)) > 9


def test_boxes_that_overlap_stand_apart_with_what_they_share_hatched() -> None:
    layout = lay.haloed(blocks((9, 12), 1, 2), [(0, 0), (2, 1)])
    ax = dl.show.partition(layout)
    (_, one), (_, other) = drawn(ax, "rank")
    assert (one.get_width(), other.get_width()) == (7, 8)
    assert one.get_x() + one.get_width() < other.get_x()
    shared = [(rank, patch.get_width(), bool(patch.get_hatch())) for rank, patch in drawn(ax, "shared")]
    assert shared == [(0, 3, True), (1, 3, True)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "7", "4", "12"]


def corners(solid: Any) -> list[tuple[float, float]]:
    """From where to where the faces of a box reach, to the right, to the back and down."""
    points = [point for face in solid._faces for point in face]
    return [(min(p[d] for p in points), max(p[d] for p in points)) for d in range(3)]


@pytest.mark.parametrize(
    ("shape", "of_grid", "dims"),
    [((7, 5, 9), (2, 2, 2), (0, 1, 2)), ((4, 3, 37, 29), (2, 1, 2, 2), (0, 2, 3)), ((3, 2, 5), (1, 4, 2), (0, 1, 2))],
)
def test_boxes_in_space_have_the_sizes_of_the_blocks(
    shape: tuple[int, ...], of_grid: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    layout = blocks(shape, *of_grid)
    ax = dl.show.partition(of_grid, shape)
    full = {rank: lay.shape_of(layout.box(rank) or ()) for rank in layout.grid.ranks}
    full = {rank: local for rank, local in full.items() if 0 not in local}
    found = {int(solid.get_gid().split("-")[1]): corners(solid) for solid in ax.collections}
    assert found.keys() == full.keys()
    for rank, (x, y, z) in found.items():
        assert tuple(stop - start for start, stop in (y, z, x)) == pytest.approx([full[rank][d] for d in dims])
    for one in found:
        for other in found:
            apart = any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(found[one], found[other], strict=True))
            assert apart or one == other
    order = sorted(
        found, key=lambda rank: next(s.get_zorder() for s in ax.collections if s.get_gid() == f"rank-{rank}")
    )
    assert found[order[-1]][1][0] == 0  # the nearest is in front


def test_in_space_the_ranks_that_are_seen_are_named() -> None:
    ax = dl.show.partition((3, 3, 3), (9, 9, 9))
    hidden = {9 * i + 3 * j + k for i in (1, 2) for j in (1, 2) for k in (0, 1)}
    assert ranks_of(ax) == sorted(str(rank) for rank in range(27) if rank not in hidden)


def test_a_picture_goes_into_the_axes_it_is_given() -> None:
    _, ax = plt.subplots()
    solid = plt.figure().add_subplot(projection="3d")
    report = dl.report(torch.nn.ReLU(), (2,), (4,))
    assert dl.show.partition((2,), (5,), ax=ax) is ax
    assert dl.show.halos((2,), (5,), widths=(1,), ax=ax) is ax
    assert dl.show.messages((2,), (1,), (5,), ax=ax) is ax
    assert dl.show.cuts(report, ax=ax) is ax
    assert dl.show.partition((2, 1, 1), (5, 2, 2), ax=solid) is solid
    assert len(plt.get_fignums()) == 2
    with pytest.raises(ValueError, match='needs an ax of projection="3d"'):
        dl.show.partition((2, 1, 1), (5, 2, 2), ax=ax)


def test_dims_can_be_chosen() -> None:
    ax = dl.show.partition((2, 3, 2), (4, 9, 10), dims=(1,))
    assert ax.get_xlabel() == "dim 1"
    assert ax.get_xlim() == (0, 9)


# Halos


def needed_by(ax: Any, wanted: Layout, held: Layout, rank: int) -> None:
    """The parts drawn are those that the plan receives, in global coordinates and in the colours of the senders."""
    box = wanted.box(rank)
    assert box is not None
    edges = [(edge.peer, edge.box[-2:]) for leg in plan(held, wanted, rank).legs for edge in leg.receives]
    box, own = box[-2:], (held.box(rank) or ())[-2:]
    expected = [
        (peer, *(start + a for (start, _), (a, _) in zip(box, local, strict=True)), *(b - a for a, b in local))
        for peer, local in edges
    ]
    parts = drawn(ax, "from")
    assert sorted((peer, *sides(patch)) for peer, patch in parts) == sorted(expected)
    assert all(to_rgb(patch.get_facecolor()) == pytest.approx(dl.show.colour(peer)) for peer, patch in parts)
    for gid, outline in (("own", own), ("needed", box)):
        (patch,) = (patch for patch in ax.patches if patch.get_gid() == gid)
        assert sides(patch) == (*(a for a, _ in outline), *(b - a for a, b in outline))


@pytest.mark.parametrize("boundary", lay.BOUNDARIES)
@pytest.mark.parametrize("rank", [0, 4, 8])
def test_halos_of_widths_are_those_of_a_halo_exchange(boundary: str, rank: int) -> None:
    widths, shape = (2, (1, 3)), (13, 16)
    X = blocks(shape, 3, 3)

    def layouts(world: Any) -> tuple[Layout, Layout]:
        layer = HaloExchange(world.grid((3, 3)), widths, boundary)
        return layer.layouts({r: lay.shape_of(X.box(r) or ()) for r in X.grid.ranks})

    Y = spmd(9, layouts)[0][1]
    needed_by(dl.show.halos((3, 3), shape, rank, widths=widths, boundary=boundary), Y, X, rank)


@pytest.mark.parametrize("rank", range(6))
def test_halos_of_a_kernel_are_those_of_the_convolution(rank: int) -> None:
    options = {"kernel_size": (5, 3), "stride": (2, 1), "padding": (3, 0), "dilation": (1, 2)}

    def layouts(world: Any) -> tuple[Layout, ...]:
        P = world.grid((1, 1, 3, 2))
        layer = dl.nn.DistributedConv2d(P, 2, 2, **options)
        X = lay.balanced_blocks(P.grid_of_ranks, (1, 2, 17, 13))
        return layer.layouts({r: lay.shape_of(X.box(r) or ()) for r in X.grid.ranks})[:2]

    X, Z = spmd(6, layouts)[0]
    ax = dl.show.halos((1, 1, 3, 2), (1, 2, 17, 13), rank, **options)
    needed_by(ax, Z, X, rank)
    planned = plan(X, Z, rank)
    assert bool([patch for patch in ax.patches if patch.get_gid() == "zeros"]) == bool(planned.gaps)


def test_a_strip_reaches_over_several_neighbours() -> None:
    ax = dl.show.halos((6,), (12,), rank=2, widths=(5,))
    parts = [(peer, patch.get_x(), patch.get_width()) for peer, patch in drawn(ax, "from")]
    assert parts == [(0, 0, 2), (1, 2, 2), (2, 4, 2), (3, 6, 2), (4, 8, 2), (5, 10, 1)]


def test_a_rank_with_nothing_needs_nothing() -> None:
    ax = dl.show.halos((4, 1), (2, 5), rank=3, widths=(1, 1))
    assert ax.get_title(loc="left") == "rank 3: needs nothing"
    assert not drawn(ax, "from")


def test_of_more_dims_a_slice_is_drawn() -> None:
    ax = dl.show.halos((2, 2, 2), (9, 8, 7), rank=3, widths=(1, 1, 1), dims=(1, 2))
    assert sorted({peer for peer, _ in drawn(ax, "from")}) == [0, 1, 2, 3]
    ax = dl.show.halos((2, 2, 2), (9, 8, 7), rank=7, widths=(1, 1, 1))  # whose needs begin in the other half
    assert sorted({peer for peer, _ in drawn(ax, "from")}) == [0, 1, 2, 3]


# Messages


def edges_of(X: Layout, Y: Layout) -> list[tuple[int, int, int]]:
    """Source, target and elements of all that moves, as the receivers say."""
    everyone = {*X.grid.ranks, *Y.grid.ranks}
    legs = [(rank, leg) for rank in everyone for leg in plan(X, Y, rank).legs]
    return sorted((edge.peer, rank, edge.size) for rank, leg in legs for edge in leg.receives)


PAIRS: dict[str, Callable[[], tuple[Layout, Layout]]] = {
    "rows to columns": lambda: (blocks((7, 5), 2, 1), blocks((7, 5), 1, 2)),
    "a strip": lambda: (blocks((7,), 2), blocks((7,), 3)),
    "3x5 to 5x3": lambda: (blocks((31, 47), 3, 5), blocks((31, 47), 5, 3)),
    "empty blocks": lambda: (blocks((2, 5), 4, 1), blocks((2, 5), 1, 2)),
    "halos": lambda: (blocks((9, 12), 2, 2), lay.haloed(blocks((9, 12), 2, 2), [(1, 1), (2, 2)])),
    "halos beyond the edge": lambda: (blocks((9,), 3), lay.haloed(blocks((9,), 3), [(2, 2)], "zeros")),
    "round": lambda: (blocks((9, 4), 3, 1), lay.haloed(blocks((9, 4), 3, 1), [(4, 2), (0, 0)], "circular")),
    "sums of halos": lambda: (lay.haloed(blocks((9, 12), 2, 2), [(1, 1), (2, 2)]), blocks((9, 12), 2, 2)),
    "a broadcast": lambda: (lay.whole(grid(1), (4, 4)), lay.whole(grid(4), (4, 4))),
    "sums on all": lambda: (lay.whole(grid(3), (4, 4)), lay.whole(grid(3), (4, 4))),
    "four dims": lambda: (blocks((4, 3, 8, 6), 2, 1, 2, 1), blocks((4, 3, 8, 6), 1, 1, 2, 2)),
    "other ranks": lambda: (
        lay.balanced_blocks(Grid((2,), (3, 1)), (5,)),
        lay.balanced_blocks(Grid((2,), (0, 2)), (5,)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_arrows_are_the_edges_of_the_plans(name: str) -> None:
    X, Y = PAIRS[name]()
    ax = dl.show.messages(X, Y, itemsize=8)
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    wanted = edges_of(X, Y)
    assert sorted(tuple(map(int, a.get_gid().split("-")[1:])) for a in arrows) == [edge[:2] for edge in wanted]
    for layout, kind in ((X, "input"), (Y, "output")):
        full = {rank: lay.shape_of(layout.box(rank) or ()) for rank in layout.grid.ranks}
        full = {rank: local for rank, local in full.items() if 0 not in local}
        patches = dict(drawn(ax, kind))
        assert patches.keys() == full.keys()
        for one in patches:
            x, y, w, h = patches[one].get_bbox().bounds
            cut = [d for d in range(len(X.dims)) if any(len(set(z.dims[d].ranges)) > 1 for z in (X, Y))]
            down = cut[-2:][0] if len(cut) > 1 else 0
            assert h == pytest.approx(full[one][down])
            for other in patches:
                x2, y2, w2, h2 = patches[other].get_bbox().bounds
                assert one == other or x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    sent = sum(size for source, target, size in wanted if source != target)
    assert ax.get_title().endswith(f", {8 * sent} bytes")


def test_an_arrow_is_as_wide_as_its_bytes_and_goes_between_its_boxes() -> None:
    X, Y = blocks((9, 12), 2, 2), lay.haloed(blocks((9, 12), 2, 2), [(1, 1), (2, 2)])
    ax = dl.show.messages(X, Y)
    sizes = {(source, target): size for source, target, size in edges_of(X, Y) if source != target}
    widest = max(sizes.values())
    inputs, outputs = dict(drawn(ax, "input")), dict(drawn(ax, "output"))
    for patch in (patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)):
        source, target = map(int, patch.get_gid().split("-")[1:])
        if source == target:
            assert patch.get_linestyle() != "-"
            continue
        assert patch.get_linewidth() == pytest.approx(max(4 * sizes[source, target] / widest, 0.4))
        for rectangle, (x, y) in zip((inputs[source], outputs[target]), patch._posA_posB, strict=True):
            box = rectangle.get_bbox()
            assert box.x0 < x < box.x1
            assert box.y0 < y < box.y1


def test_parts_of_the_output_have_the_colours_of_their_senders() -> None:
    X, Y = PAIRS["rows to columns"]()
    ax = dl.show.messages(X, Y)
    ground = {tuple(round(0.5 + part / 2, 6) for part in dl.show.colour(rank)): rank for rank in range(2)}
    parts = [patch for patch in ax.patches if patch.get_gid() == "part"]
    found = [
        (ground[tuple(round(c, 6) for c in to_rgb(p.get_facecolor()))], p.get_width() * p.get_height()) for p in parts
    ]
    assert sorted(found) == sorted((source, size) for source, _, size in edges_of(X, Y))
    summed = dl.show.messages(*PAIRS["sums on all"]())
    assert not [patch for patch in summed.patches if patch.get_gid() == "part"]
    assert summed.get_title().startswith("Allreduce, ")


def test_the_messages_of_some_ranks_alone() -> None:
    X, Y = PAIRS["3x5 to 5x3"]()
    ax = dl.show.messages(X, Y, ranks=[4, 7])
    arrows = [patch.get_gid() for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    wanted = [edge for edge in edges_of(X, Y) if {4, 7} & set(edge[:2])]
    assert sorted(arrows) == sorted(f"message-{source}-{target}" for source, target, _ in wanted)
    with pytest.raises(ValueError, match=r"ranks \[15\] are in neither layout"):
        dl.show.messages(X, Y, ranks=[15])


@pytest.mark.parametrize("name", PAIRS)
def test_a_plan_and_its_operator_are_drawn_as_their_rank_sees_them(name: str) -> None:
    X, Y = PAIRS[name]()
    mine = plan(X, Y, 1)
    alone = [dl.show.messages(mine), spmd(1, lambda world: dl.show.messages(Operator(mine, world.world_transport)))[0]]
    for ax in alone:
        arrows = [patch.get_gid() for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
        wanted = [edge for edge in edges_of(X, Y) if 1 in edge[:2]]
        assert sorted(arrows) == sorted(f"message-{source}-{target}" for source, target, _ in wanted)
        others = [rank for kind in ("input", "output") for rank, _ in drawn(ax, kind) if rank != 1]
        assert sorted(others) == sorted(rank for edge in wanted for rank in edge[:2] if rank != 1)


def test_a_plan_of_a_rank_without_part_says_so() -> None:
    X, Y = PAIRS["rows to columns"]()
    ax = dl.show.messages(plan(X, Y, 9))
    assert [word.get_text() for word in ax.texts] == ["rank 9: nothing"]
    assert not ax.patches


def test_ranks_without_a_point_are_named_below() -> None:
    ax = dl.show.messages(*PAIRS["empty blocks"]())
    assert "ranks 2\N{EN DASH}3: nothing" in [word.get_text() for word in ax.texts]


# Reports


class Skip(torch.nn.Module):
    """A convolution cut in space, and a linear layer of two dims made one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()
        self.pool, self.head = torch.nn.AdaptiveAvgPool2d((4, 3)), torch.nn.Linear(96, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.act(self.first(x))).flatten(1))


@pytest.fixture(scope="module", name="report")
def _report() -> dl.Report:
    return dl.report(Skip(), (2, 1, 2, 2), (4, 3, 37, 29))


def test_cuts_have_a_line_for_each_level_and_a_part_for_each_cut(report: dl.Report) -> None:
    ax = dl.show.cuts(report)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "first \N{EN DASH} act"
    rows = [row for row in report.rows if row.path in ("first", "pool", ".", "", "head")]
    assert len(names) == len(rows)
    for y, row in enumerate(rows):
        for d, factors in enumerate(row.cuts):
            mine = [p for p in ax.patches if int(p.get_y() + 0.5) == y and int(p.get_x() + 1e-9) == d]
            axes = [axis for _, cut in factors for axis in cut]
            assert len(mine) == math.prod(report.grid[axis] for axis in axes)
            inks = {to_rgb(dl.show.colour(axis)) for axis in axes} or {to_rgb((0.85, 0.85, 0.85))}
            assert {to_rgb(patch.get_facecolor()) for patch in mine} == inks
    words = [word.get_text() for word in ax.texts]
    assert "37/2" in words
    assert [f"({', '.join(words[:4])})"] == [report.rows[1].output]
    legend = ax.get_legend()
    assert [entry.get_text() for entry in legend.get_texts()] == [
        "cut in 2 by axis 0",
        "cut in 2 by axis 2",
        "cut in 2 by axis 3",
        "whole on every rank",
    ]


def test_a_row_has_its_output_in_numbers_too(report: dl.Report) -> None:
    (row,) = (row for row in report.rows if row.path == "first")
    assert row.output == "(4/2, 8, 37/2, 29/2)"
    assert row.cuts == (((4, (0,)),), ((8, ()),), ((37, (2,)),), ((29, (3,)),))


def test_what_is_gathered_is_said() -> None:
    report = dl.report(lambda x: torch.linalg.svdvals(x), (2, 1), (4, 4))
    assert report.gathered
    assert [label.get_text() for label in dl.show.cuts(report).get_yticklabels()] == [". (gathered)"]


def test_bars_are_the_numbers_of_the_report(report: dl.Report) -> None:
    memory, sent = dl.show.layers(report).axes
    for ax, kinds in (
        (memory, [[row.weights for row in report.rows], [row.kept for row in report.rows]]),
        (sent, [[row.forward.bytes for row in report.rows], [row.backward.bytes for row in report.rows]]),
    ):
        assert [[bar.get_width() for bar in kind] for kind in ax.containers] == kinds
        assert [bar.get_x() for bar in ax.containers[1]] == kinds[0]
    assert [label.get_text() for label in memory.get_yticklabels()] == [row.path or "." for row in report.rows]


def test_of_many_modules_the_smallest_share_a_bar(report: dl.Report) -> None:
    memory, _ = dl.show.layers(report, most=2).axes
    names = [label.get_text() for label in memory.get_yticklabels()]
    assert len(names) == 3
    assert names[-1] == f"{len(report.rows) - 2} others"
    assert sum(bar.get_width() for kind in memory.containers for bar in kind) == sum(
        row.weights + row.kept for row in report.rows
    )


def test_scaling_draws_the_numbers_of_the_reports() -> None:
    model, grids = Skip(), [(1, 1, 2, 2), (1, 1, 1, 1), (1, 1, 4, 1), (1, 1, 2, 1)]
    reports = [dl.report(model, of_grid, (4, 3, 37, 29)) for of_grid in grids]
    memory, seconds, sent = dl.show.scaling(reports).axes
    numbers = [(r.ranks, r.peak, r.seconds, r.forward.bytes + r.backward.bytes) for r in reports]
    for ax, which in ((memory, 1), (seconds, 2), (sent, 3)):
        wanted = sorted((n[0], float(n[which])) for n in numbers if n[which])
        assert sorted(map(tuple, ax.collections[0].get_offsets().tolist())) == wanted
        best = {ranks: min(value for n, value in wanted if n == ranks) for ranks, _ in wanted}
        line, ideal = ax.lines
        assert dict(zip(*line.get_data(), strict=True)) == best
        first = min(best)
        assert ideal.get_ydata().tolist() == pytest.approx([best[first] * first / ranks for ranks in best])
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert sorted(best) == [2, 4]  # one rank sends nothing
    assert [label.get_text() for label in sent.get_xticklabels()] == ["1\n1x1x1x1", "2\n1x1x2x1", "4\n1x1x2x2\n1x1x4x1"]


# Errors


def test_what_cannot_be_drawn_is_refused(report: dl.Report) -> None:
    X, other = blocks((7, 5), 2, 1), dl.report(torch.nn.ReLU(), (2,), (4,), machine=dl.Machine(latency=1.0))
    scalars = Layout(grid(2), ())
    many = grid(64)
    for call, kind, words in [
        (lambda: dl.show.partition((2, 2), (7,)), ValueError, "shape (7,) cannot be cut over a grid of shape (2, 2)"),
        (lambda: dl.show.partition((2, 2)), ValueError, "a grid of shape (2, 2) needs the shape of a tensor"),
        (lambda: dl.show.partition((2, 2), (7, 5), axes=(0, 2)), ValueError, "axes (0, 2) do not fit"),
        (lambda: dl.show.partition((2, 2), (7, 5), axes=(0,)), ValueError, "axes (0,) do not fit"),
        (lambda: dl.show.partition((1025,), (2000,)), ValueError, "room for 1024 ranks, not for 1025"),
        (lambda: dl.show.partition((2, 0), (7, 5)), TypeError, "the shape of a grid is needed, not (2, 0)"),
        (lambda: dl.show.partition("2x2", (7, 5)), TypeError, "the shape of a grid is needed, not '2x2'"),
        (lambda: dl.show.partition(scalars), ValueError, "a tensor without dims cannot be drawn"),
        (lambda: dl.show.partition((2, 2), (7, 5), dims=(1, 0)), ValueError, "dims=(1, 0) are not 1 to 3"),
        (lambda: dl.show.halos((2, 2), (7, 5)), ValueError, "exactly one of widths and kernel_size"),
        (lambda: dl.show.halos((2, 2), (7, 5), 4, widths=(1, 1)), ValueError, "rank 4 is not on the grid"),
        (lambda: dl.show.halos((2, 2), (7, 5), widths=(1,)), ValueError, "widths (1,) are not"),
        (lambda: dl.show.halos((2, 2), (7, 5), widths=(1, -1)), ValueError, "widths (1, -1) are not"),
        (lambda: dl.show.halos((2, 2), (7, 5), widths=(1, 1), boundary="x"), ValueError, "boundary 'x' is none of"),
        (lambda: dl.show.halos((2, 2), (7, 5), kernel_size=(3, 3), stride=(1,)), ValueError, "a kernel of 2 dims"),
        (lambda: dl.show.halos((2, 2), (2, 5), kernel_size=(3, 3)), ValueError, "is shorter than the kernel of 3"),
        (lambda: dl.show.messages(X), TypeError, "messages go from X to Y"),
        (lambda: dl.show.messages(plan(X, X, 0), X), TypeError, "no Y can be given"),
        (lambda: dl.show.messages(X, blocks((7,), 2)), ValueError, "cannot go from 2 dims to 1"),
        (lambda: dl.show.messages(lay.whole(many, (2,)), lay.whole(many, (2,))), ValueError, "room for 2048 messages"),
        (lambda: dl.show.cuts(X), TypeError, "a Report of dl.report is needed"),
        (lambda: dl.show.layers(None), TypeError, "a Report of dl.report is needed, not None"),
        (lambda: dl.show.layers(report, most=0), ValueError, "at least one bar"),
        (lambda: dl.show.scaling([report, report]), ValueError, "at least two numbers of ranks"),
        (lambda: dl.show.scaling([report, other]), ValueError, "different machines cannot be compared"),
        (lambda: dl.show.scaling([X]), TypeError, "a Report of dl.report is needed"),
    ]:
        with pytest.raises(kind) as refused:
            call()
        assert words in str(refused.value)
    assert not plt.get_fignums()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: dl.show.partition((2,), (5,)), lambda: dl.show.messages((2,), (1,), (5,))):
        with pytest.raises(ImportError, match=r'pip install "distdl_lite\[pictures\]"'):
            call()
    assert dl.show.colour(0)
