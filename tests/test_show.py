"""Layouts and plans as text, and pictures: what is drawn is what layouts, plans and reports say."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

import distdl_lite as dl
from distdl_lite import layout as lay
from distdl_lite.grid import Grid
from distdl_lite.layout import Layout, shape_of
from distdl_lite.nn import DistributedConv2d, HaloExchange
from distdl_lite.plan import plan
from distdl_lite.show import text
from distdl_lite.testing import spmd

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _no_figure_stays() -> Iterator[None]:
    yield
    plt.close("all")


def grid(*shape: int) -> Grid:
    return Grid(shape, range(math.prod(shape)))


def blocks(shape: tuple[int, ...], *of_grid: int) -> Layout:
    return lay.balanced_blocks(grid(*of_grid), shape)


def full(layout: Layout) -> dict[int, Any]:
    """The boxes of the ranks that hold something."""
    boxes = {rank: layout.box(rank) or () for rank in layout.grid.ranks}
    return {rank: box for rank, box in boxes.items() if 0 not in shape_of(box)}


def sides(patch: Any) -> tuple[tuple[float, float], ...]:
    """From where to where a patch reaches, down and to the right."""
    y, x = patch.get_y(), patch.get_x()
    return (y, y + patch.get_height()), (x, x + patch.get_width())


def drawn(ax: Any, kind: str) -> list[tuple[int, Any]]:
    """The patches of a kind with the rank that each is of."""
    named = [(str(patch.get_gid()).split("-"), patch) for patch in ax.patches]
    return [(int(words[1]), patch) for words, patch in named if words[0] == kind]


def words_of(words: Any) -> list[str]:
    return [word.get_text() for word in words]


def arrows_of(ax: Any) -> list[Any]:
    return [word for word in ax.texts if getattr(word, "arrow_patch", None)]


def test_layouts_and_plans_are_written_with_boxes_peers_bytes_and_teams() -> None:
    X, Y, Z = blocks((7, 5), 2, 1), blocks((7, 5), 1, 2), lay.whole(grid(2), (3,))
    assert text.layout_text(X, [9, 0, 1]) == "rank 0  at 0,0  holds [0:4, 0:5]\nrank 1  at 1,0  holds [4:7, 0:5]"
    assert text.plan_text(plan(X, Y, 1), X, Y, 4).splitlines() == [
        "rank 1  sends to       rank 0  36 bytes  [4:7, 0:3]",
        "rank 1  sends to       itself  24 bytes  [4:7, 3:5]",
        "rank 1  receives from  rank 0  32 bytes  [0:4, 3:5]",
        "rank 1  receives from  itself  24 bytes  [4:7, 3:5]",
    ]
    assert text.plan_text(plan(X, Y, 5), X, Y, 4) == "rank 5  takes no part"
    assert "by Allreduce of ranks 0,1" in text.plan_text(plan(Z, Z, 0), Z, Z, 8)


def test_colours_of_neighbours_on_a_grid_differ() -> None:
    assert len({dl.show.colour(rank) for rank in range(33)}) == 32
    for rank, other in {(rank, rank + step) for step in range(1, 17) for rank in range(4 * step)}:
        gap = zip(dl.show.colour(rank), dl.show.colour(other), strict=True)
        assert max(abs(a - b) for a, b in gap) > 0.1, (rank, other)


@pytest.mark.parametrize(("shape", "of_grid"), [((7,), (2,)), ((31, 47), (3, 5)), ((8, 53), (1, 4)), ((2, 5), (4, 2))])
def test_blocks_are_drawn_where_they_lie(shape: tuple[int, ...], of_grid: tuple[int, ...]) -> None:
    ax, wanted = dl.show.partition(of_grid, shape), full(blocks(shape, *of_grid))
    found = drawn(ax, "rank")
    assert {rank: sides(patch)[-len(shape) :] for rank, patch in found} == wanted
    assert all(to_rgb(patch.get_facecolor()) == pytest.approx(dl.show.colour(rank)) for rank, patch in found)
    assert words_of(ax.texts) == [*map(str, wanted)]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, shape[-1]), (shape[0] if len(shape) > 1 else 1, 0))
    assert ax.get_title(loc="left") == ("hold nothing: 4\N{EN DASH}7" if len(wanted) < math.prod(of_grid) else "")


def test_partitions_grids_and_layouts_are_drawn_into_the_axes_given() -> None:
    P = spmd(4, lambda world: world.grid((2, 2)))[0]
    pictures = [dl.show.partition(x, (7, 5)) for x in (P, grid(2, 2), [2, 2], blocks((7, 5), 2, 2))]
    assert len({tuple(map(sides, ax.patches)) for ax in pictures}) == 1
    plt.close("all")
    ax, solid = plt.figure().add_subplot(), plt.figure().add_subplot(projection="3d")
    assert dl.show.halos((2,), (5,), widths=(1,), ax=ax) is ax
    assert dl.show.messages((2,), (1,), (5,), ax=ax) is ax
    assert dl.show.cuts(dl.report(torch.nn.ReLU(), (2,), (4,)), ax=ax) is ax
    assert dl.show.partition((2, 1, 1), (5, 2, 2), dims=(0, 1, 2), ax=solid) is solid
    assert dl.show.partition((2, 3, 2), (4, 9, 10), dims=(1,), ax=ax) is ax
    assert (ax.get_xlabel(), ax.get_xlim()) == ("dim 1", (0, 9))
    assert len(plt.get_fignums()) == 2


def test_copies_share_a_block_and_blocks_that_overlap_stand_apart() -> None:
    assert words_of(dl.show.partition((2, 2, 3), (9, 12), axes=(1, -1)).texts) == [f"{r}, {r + 6}" for r in range(6)]
    ax = dl.show.partition(lay.haloed(blocks((9, 12), 1, 2), [(0, 0), (2, 1)]))
    (_, one), (_, other) = drawn(ax, "rank")
    assert (one.get_width(), other.get_width()) == (7, 8)
    assert sides(one)[1][1] < sides(other)[1][0]
    assert words_of(ax.get_xticklabels()) == ["12", "4", "7", "0"]


CUBE, BATCH = ((7, 2, 9), (2, 4, 2), (0, 1, 2), 10), ((4, 3, 37, 29), (2, 1, 2, 2), (0, 2, 3), 6)


@pytest.mark.parametrize(("shape", "of_grid", "dims", "hidden"), [CUBE, BATCH])
def test_boxes_in_space_are_to_scale_apart_and_named_where_seen(
    shape: Any, of_grid: Any, dims: Any, hidden: int
) -> None:
    ax, wanted = dl.show.partition(of_grid, shape), full(blocks(shape, *of_grid))
    corners = {int(box.get_gid().split("-")[1]): box._faces.reshape(-1, 3)[:, [1, 2, 0]] for box in ax.collections}
    assert corners.keys() == wanted.keys()
    for rank, mine in corners.items():
        assert tuple(mine.max(0) - mine.min(0)) == pytest.approx([shape_of(wanted[rank])[d] for d in dims])
        for other in corners.keys() - {rank}:
            theirs = corners[other]
            assert ((mine.max(0) < theirs.min(0)) | (theirs.max(0) < mine.min(0))).any()
    assert {int(word) for word in words_of(ax.texts)} == wanted.keys() - {hidden}
    assert max(ax.collections, key=lambda box: box.get_zorder())._faces[..., 1].min() == 0  # the nearest is in front


def check_halos(ax: Any, X: Layout, Y: Layout, rank: int) -> None:
    """The parts drawn are those that the plan receives, in global coordinates and in the colours of the senders."""
    own, box, mine = (X.box(rank) or ())[-2:], (Y.box(rank) or ())[-2:], plan(X, Y, rank)
    edges, parts, wanted = [edge for leg in mine.legs for edge in leg.receives], drawn(ax, "from"), []
    for edge in edges:
        global_box = zip(box, edge.box[-2:], strict=True)
        wanted.append((edge.peer, tuple((first + a, first + b) for (first, _), (a, b) in global_box)))
    assert sorted((peer, sides(patch)) for peer, patch in parts) == sorted(wanted)
    assert all(to_rgb(patch.get_facecolor()) == pytest.approx(dl.show.colour(peer)) for peer, patch in parts)
    outlines = {patch.get_gid(): sides(patch) for patch in ax.patches}
    assert (outlines["own"], outlines["needed"], "zeros" in outlines) == (own, box, bool(mine.gaps))


@pytest.mark.parametrize("boundary", lay.BOUNDARIES)
def test_halos_of_widths_are_those_of_a_halo_exchange(boundary: str) -> None:
    X, widths = blocks((13, 16), 3, 3), (2, (1, 3))
    shapes = {rank: shape_of(box) for rank, box in full(X).items()}
    Y = spmd(9, lambda world: HaloExchange(world.grid((3, 3)), widths, boundary).layouts(shapes))[0][1]
    for rank in (0, 4, 8):
        check_halos(dl.show.halos((3, 3), (13, 16), rank, widths=widths, boundary=boundary), X, Y, rank)


def test_halos_of_a_kernel_are_those_of_the_convolution() -> None:
    options: Any = {"kernel_size": (5, 3), "stride": (2, 1), "padding": (3, 0), "dilation": (1, 2)}
    X = blocks((1, 2, 17, 13), 1, 1, 3, 2)
    shapes = {rank: shape_of(box) for rank, box in full(X).items()}
    Z = spmd(6, lambda world: DistributedConv2d(world.grid((1, 1, 3, 2)), 2, 2, **options).layouts(shapes))[0][1]
    for rank in range(6):
        check_halos(dl.show.halos((1, 1, 3, 2), (1, 2, 17, 13), rank, **options), X, Z, rank)


def test_halos_over_several_neighbours_of_nothing_and_in_a_slice() -> None:
    ax = dl.show.halos((6,), (12,), rank=2, widths=(5,))
    parts = [(peer, *sides(patch)[1]) for peer, patch in drawn(ax, "from")]
    assert parts == [(0, 0, 2), (1, 2, 4), (2, 4, 6), (3, 6, 8), (4, 8, 10), (5, 10, 11)]
    ax = dl.show.halos((4, 1), (2, 5), rank=3, widths=(1, 1))
    assert (ax.get_title(loc="left"), drawn(ax, "from")) == ("rank 3 needs nothing", [])
    for rank in (3, 7):  # what rank 7 needs begins in the blocks of the others
        ax = dl.show.halos((2, 2, 2), (9, 8, 7), rank=rank, widths=(1, 1, 1), dims=(1, 2))
        assert sorted({peer for peer, _ in drawn(ax, "from")}) == [0, 1, 2, 3]


PAIRS: dict[str, tuple[Layout, Layout]] = {
    "rows to columns": (blocks((7, 5), 2, 1), blocks((7, 5), 1, 2)),
    "a strip": (blocks((7,), 2), blocks((7,), 3)),
    "3x5 to 5x3": (blocks((31, 47), 3, 5), blocks((31, 47), 5, 3)),
    "empty blocks": (blocks((2, 5), 4, 1), blocks((2, 5), 1, 2)),
    "halos": (blocks((9, 12), 2, 2), lay.haloed(blocks((9, 12), 2, 2), [(1, 1), (2, 2)], "zeros")),
    "round": (blocks((9, 4), 3, 1), lay.haloed(blocks((9, 4), 3, 1), [(4, 2), (0, 0)], "circular")),
    "sums of halos": (lay.haloed(blocks((9, 12), 2, 2), [(1, 1), (2, 2)]), blocks((9, 12), 2, 2)),
    "a broadcast": (lay.whole(grid(1), (4, 4)), lay.whole(grid(4), (4, 4))),
    "sums on all": (lay.whole(grid(3), (4, 4)), lay.whole(grid(3), (4, 4))),
    "four dims": (blocks((4, 3, 8, 6), 2, 1, 2, 1), blocks((4, 3, 8, 6), 1, 1, 2, 2)),
    "other ranks": (lay.balanced_blocks(Grid((2,), (3, 1)), (5,)), lay.balanced_blocks(Grid((2,), (0, 2)), (5,))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_arrows_are_the_edges_of_the_plans_between_their_boxes(name: str) -> None:
    X, Y = PAIRS[name]
    received = [
        (rank, e) for rank in {*X.grid.ranks, *Y.grid.ranks} for leg in plan(X, Y, rank).legs for e in leg.receives
    ]
    edges = sorted((edge.peer, rank, edge.size) for rank, edge in received)
    sizes = [size for source, target, size in edges if source != target]
    ax, most = dl.show.messages(X, Y, itemsize=8), 4 * min(1, (30 / len(edges)) ** 0.5) / max(sizes)
    title, *nothing = ax.get_title().split("; ")
    assert title.endswith(f", {8 * sum(sizes)} bytes")
    assert title.startswith("Allreduce") == (name == "sums on all")
    assert nothing == (["hold nothing: 2\N{EN DASH}3"] if name == "empty blocks" else [])
    boxes = [{rank: patch.get_bbox() for rank, patch in drawn(ax, kind)} for kind in ("input", "output")]
    assert [box.keys() for box in boxes] == [full(X).keys(), full(Y).keys()]
    for side in boxes:
        assert not any(one.overlaps(other) for one in side.values() for other in side.values() if one is not other)
    arrows, parts = [], [patch for patch in ax.patches if patch.get_gid() == "part"]
    for arrow in arrows_of(ax):
        source, target = map(int, arrow.arrow_patch.get_gid().split("-")[1:])
        arrows.append((source, target, arrow.arrow_patch.get_linewidth()))
        assert boxes[0][source].contains(*arrow.xyann)
        assert boxes[1][target].contains(*arrow.xy)
        of_its_end = [to_rgb(part.get_facecolor()) for part in parts if part.get_bbox().contains(*arrow.xy)]
        assert X.overlaps != any(ink == pytest.approx(dl.show.colour(source)) for ink in of_its_end)
    wide = [(source, target, max(most * n, 0.4) if source != target else 0.8) for source, target, n in edges]
    assert sorted(arrows) == [pytest.approx(arrow) for arrow in sorted(wide)]
    some = [arrow.arrow_patch.get_gid() for arrow in arrows_of(dl.show.messages(X, Y, ranks=[1]))]
    assert sorted(some) == [f"message-{source}-{target}" for source, target, _ in edges if 1 in (source, target)]


@pytest.fixture(scope="module", name="reports")
def _reports() -> list[dl.Report]:
    layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d((4, 3))
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(96, 5))
    grids = [(2, 1, 2, 2), (1, 1, 2, 2), (1, 1, 1, 1), (1, 1, 4, 1), (1, 1, 2, 1)]
    return [dl.report(model, of_grid, (4, 3, 37, 29)) for of_grid in grids]


def test_cuts_have_a_line_for_each_level_and_a_part_for_each_cut(reports: list[dl.Report]) -> None:
    ax, rows = dl.show.cuts(reports[0]), {row.path: row for row in reports[0].rows}
    assert words_of(ax.get_yticklabels()) == ["0 \N{EN DASH} 1", "2", "3", "4"]
    assert rows["0"].cuts == (((4, (0,)),), ((8, ()),), ((37, (2,)),), ((29, (3,)),))
    bars = iter(ax.collections)
    for factors in (factors for path in ("0", "2", "3", "4") for factors in rows[path].cuts):
        bar, axes = next(bars), [axis for _, cut in factors for axis in cut]
        assert len(bar.get_paths()) == math.prod(reports[0].grid[axis] for axis in axes)
        assert {to_rgb(ink) for ink in bar.get_facecolors()} == (
            {dl.show.colour(axis) for axis in axes} or {to_rgb("0.85")}
        )
    assert words_of(ax.texts)[:4] == ["4/2", "8", "37/2", "29/2"]
    assert words_of(ax.get_legend().get_texts())[:3] == [f"cut in 2 by axis {axis}" for axis in (0, 2, 3)]
    gathered = dl.report(lambda x: torch.linalg.svdvals(x), (2, 1), (4, 4))
    assert words_of(dl.show.cuts(gathered).get_yticklabels()) == [". (gathered)"]
    named = spmd(4, lambda world: dl.show.partition(world.grid(h=2, w=2, of="n c h w"), (1, 1, 8, 8)).get_ylabel())
    assert named == ["h"] * 4
    by_hand = dl.summary(lambda P: torch.nn.Sequential(dl.nn.DistributedAvgPool2d(P, 2)), (1, 2, 8, 8), (1, 1, 2, 1))
    assert words_of(dl.show.cuts(by_hand).get_yticklabels()) == ["0"]
    with pytest.raises(ValueError, match="no module of the report says how its output is cut"):
        dl.show.cuts(replace(by_hand, rows=()))
    with pytest.raises(TypeError, match="a number for each spatial dim, such as \\(3, 3\\)"):
        dl.show.halos((2, 2), (8, 8), kernel_size=3)  # type: ignore[arg-type]


def test_bars_and_points_are_the_numbers_of_the_reports(reports: list[dl.Report]) -> None:
    rows, (held, sent) = reports[0].rows, dl.show.layers(reports[0]).axes
    moved = [[row.forward.bytes for row in rows], [row.backward.bytes for row in rows]]
    for ax, kinds in ((held, [[row.weights for row in rows], [row.kept for row in rows]]), (sent, moved)):
        assert [[bar.get_width() for bar in kind] for kind in ax.containers] == kinds
        assert [bar.get_x() for bar in ax.containers[1]] == kinds[0]
    assert words_of(held.get_yticklabels()) == [row.path or "." for row in rows]
    panels = dl.show.scaling(reports[1:]).axes
    numbers = [(r.ranks, r.peak, r.seconds, r.forward.bytes + r.backward.bytes) for r in reports[1:]]
    for which, ax in enumerate(panels, 1):
        points = sorted((n[0], float(n[which])) for n in numbers if n[which])
        assert sorted(map(tuple, ax.collections[0].get_offsets().tolist())) == points
        best = {ranks: min(number for n, number in points if n == ranks) for ranks, _ in points}
        line, ideal = ax.lines
        assert dict(zip(*line.get_data(), strict=True)) == best
        assert ideal.get_ydata().tolist() == pytest.approx([points[0][0] * points[0][1] / ranks for ranks in best])
    assert [*best] == [2, 4]  # one rank sends nothing
    assert words_of(ax.get_xticklabels()) == ["1\n1x1x1x1", "2\n1x1x2x1", "4\n1x1x2x2\n1x1x4x1"]


def test_suggestions_scale_and_names_of_many_grids_give_way_to_the_fastest() -> None:
    found = [s for n in (1, 8, 64) for s in dl.suggest(torch.nn.ReLU(), (1, 1, 64, 128), ranks=n)]
    panels = dl.show.scaling(found).axes
    assert len(panels[0].collections[0].get_offsets()) == len(found) > 8
    fastest = [min((s.report.seconds, s.grid) for s in found if s.report.ranks == ranks)[1] for ranks in (1, 8, 64)]
    names = [f"{math.prod(grid)}: {'x'.join(map(str, grid))}" for grid in fastest]
    assert words_of(panels[-1].get_xticklabels()) == names


def test_what_cannot_be_drawn_is_refused() -> None:
    many = lay.whole(grid(64), (2,))
    for call, kind, words in [
        (lambda: dl.show.partition((2, 2), (7,)), ValueError, "shape (7,) cannot be cut over a grid of shape (2, 2)"),
        (lambda: dl.show.partition((2, 2)), ValueError, "needs the shape of a tensor"),
        (lambda: dl.show.partition((2, 0), (7, 5)), TypeError, "the shape of a grid is needed, not (2, 0)"),
        (lambda: dl.show.partition((2, 2), (7, 5), dims=(0, 2)), ValueError, "dims=(0, 2) are not 1 to 3 of the 2"),
        (lambda: dl.show.partition((2, 2), (7, 5), axes=(0, 2)), ValueError, "axes (0, 2) do not fit"),
        (lambda: dl.show.halos((2, 2), (7, 5)), ValueError, "either kernel_size or widths must be given"),
        (lambda: dl.show.halos((2, 2), (7, 5), widths=(1,)), ValueError, "for each of 2 dims"),
        (lambda: dl.show.halos((2, 2), (7, 5), 4, widths=(1, 1)), ValueError, "rank 4 is not on the grid"),
        (lambda: dl.show.halos((2, 2), (7, 5), widths=(1, 1), boundary="x"), ValueError, "boundary 'x' is none of"),
        (lambda: dl.show.halos((2, 2), (2, 5), kernel_size=(3, 3)), ValueError, "is shorter than the kernel of 3"),
        (lambda: dl.show.messages(many, many), ValueError, "room for 2048 messages"),
    ]:
        with pytest.raises(kind) as refused:
            call()
        assert words in str(refused.value)
    assert not plt.get_fignums()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError
    with pytest.raises(ImportError, match=r'pip install "distdl_lite\[pictures\]"'):
        dl.show.partition((2,), (5,))
