"""The guide's pages of layers: their tables of traffic are what is sent, their examples print what they say."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from traffic import Sent, made, numbers, traffic

import distdl_lite as dl
from distdl_lite.testing import spmd

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "layers"
PAGES = sorted(GUIDE.glob("*.rst"))
FIGURES = [page for page in PAGES if page.stem != "overview"]


def told(page: Path) -> Iterator[tuple[str, str, str, str]]:
    """The rows of a page's tables of traffic: the code block before the table, a layer, what is sent forward and backward."""
    setting = ""
    for part in re.split(r"(?m)^(?=\.\. )", page.read_text()):
        if part.startswith(".. code-block:: python"):
            setting = "\n".join(re.findall(r"(?m)^   (\S.*)$", part))
        for row in re.split(r"(?m)^   \* - ", part)[1:]:
            cells = [" ".join(cell.split()) for cell in re.split(r"(?m)^     - ", re.split(r"\n(?=\S)", row)[0])]
            if "(P" in cells[0]:
                yield setting, cells[0].strip("`"), cells[1], cells[2]


def claimed(cell: str) -> tuple[Sent, bool]:
    """The numbers in a cell, and whether the messages are a bound."""
    messages = sum(map(int, re.findall(r"(\d+) messages?", cell)))
    collectives = sum(map(int, re.findall(r"(\d+) (?:all-reduce|all-gather|reduce-scatter|broadcast|reduce)", cell)))
    size = sum(int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", cell))
    assert (size or collectives or messages) or cell.startswith("nothing"), cell
    return (messages + collectives, collectives, size), "at most" in cell


@pytest.mark.parametrize("page", FIGURES, ids=lambda page: page.stem)
def test_figures_of_the_guide(page: Path) -> None:
    """The tables say what rank 0 sends."""

    def body(world: dl.Partition) -> int:
        rows = list(told(page))
        for setting, text, *cells in rows:
            names: dict[str, Any] = {"torch": torch, "dl": dl, "world": world}
            exec(setting, names)
            inputs = [names[name] for name in ("x", "target") if name in names]
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            tallies = traffic(made(text, **names), *inputs)
            for tally, cell in zip(tallies if world.rank == 0 else (), cells, strict=False):
                expected, is_bound = claimed(cell)
                found = numbers(tally)
                assert found[1:] == expected[1:], (text, cell, found)
                assert found[0] <= expected[0] if is_bound else found[0] == expected[0], (text, cell, found)
        return len(rows)

    assert min(spmd(4, body)) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_the_guide(page: Path) -> None:
    """With the texts of errors, which Sphinx does not compare."""
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert not failed
    assert tried > 0
