"""Drawings as text and SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from distdl_lite import layout as lay
from distdl_lite import show
from distdl_lite.grid import Grid
from distdl_lite.plan import plan

ROWS, COLUMNS = Grid((2, 1), (0, 1)), Grid((1, 2), (0, 1))


def test_a_grid_is_written_as_its_ranks_stand() -> None:
    assert show.grid_text(Grid((2, 2), (3, 1, 10, 0))) == " 3  1\n10  0"
    assert show.grid_text(Grid((2, 1, 2), range(4))) == "0 1\n\n2 3"
    assert show.grid_text(Grid((3,), range(3))) == "0 1 2"


def test_a_layout_is_written_box_by_box() -> None:
    layout = lay.balanced_blocks(ROWS, (7, 5))
    assert show.layout_text(layout) == "rank 0  at 0,0  holds [0:4, 0:5]\nrank 1  at 1,0  holds [4:7, 0:5]"
    assert show.layout_text(layout, [1, 9]) == "rank 1  at 1,0  holds [4:7, 0:5]"


def test_a_plan_names_peers_bytes_and_global_boxes() -> None:
    X, Y = lay.balanced_blocks(ROWS, (7, 5)), lay.balanced_blocks(COLUMNS, (7, 5))
    built = plan(X, Y, 1)
    assert show.plan_text(built, X, Y, 4).splitlines() == [
        "rank 1  sends to       rank 0  36 bytes  [4:7, 0:3]",
        "rank 1  sends to       itself  24 bytes  [4:7, 3:5]",
        "rank 1  receives from  rank 0  32 bytes  [0:4, 3:5]",
        "rank 1  receives from  itself  24 bytes  [4:7, 3:5]",
    ]
    assert show.traffic(built, 4) == (1, 36)
    assert show.plan_text(plan(X, Y, 5), X, Y, 4) == "rank 5  takes no part"


def test_a_collective_is_named_with_its_team() -> None:
    X = lay.copies(Grid((2,), (0, 1)), (), {(): (3,)})
    built = plan(X, X, 0)
    assert "by Allreduce of ranks 0,1" in show.plan_text(built, X, X, 8)
    assert show.traffic(built, 8) == (1, 24)


@pytest.mark.parametrize("shape", [(7, 5), (6,), (2, 3, 8, 8)])
def test_svg_draws_every_block_that_holds_something(shape: tuple[int, ...]) -> None:
    grid = Grid((1,) * (len(shape) - 1) + (4,), range(4))
    layout = lay.balanced_blocks(grid, shape)
    picture = ElementTree.fromstring(show.svg([("input <x>", layout), ("output", layout)]))
    boxes = [element for element in picture.iter() if element.tag.endswith("rect")]
    assert len(boxes) == 8
    assert "input <x>" in [element.text for element in picture.iter()]


def test_svg_draws_copies_once_and_leaves_out_empty_blocks() -> None:
    copies = show.svg([("copies", lay.whole(Grid((2,), (0, 1)), (4, 4)))])
    assert copies.count("<rect") == 1
    assert ">0,1</text>" in copies
    assert show.svg([("blocks", lay.balanced_blocks(Grid((4,), range(4)), (2,)))]).count("<rect") == 2


def test_svg_of_too_many_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1024 ranks, not 1025"):
        show.svg([("blocks", lay.balanced_blocks(Grid((1025,), range(1025)), (2000,)))])
