"""The reference lists every public object; each says what it is, what it takes, and how it is used."""

from __future__ import annotations

import inspect
import re
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

import distdl_lite
from distdl_lite import data, nn, optim, show, tagi, testing

PAGE = Path(__file__).parent.parent / "docs" / "api.rst"


def public() -> dict[str, Any]:
    """Classes and functions by the first name under which a module exports them."""
    found: dict[int, tuple[str, Any]] = {}
    for module in (distdl_lite, nn, testing, data, show, tagi, optim):
        for name in getattr(module, "__all__", sorted(vars(module))):
            it = getattr(module, name)
            is_own = not name.startswith("_") and getattr(it, "__module__", "").startswith("distdl_lite")
            if is_own and (inspect.isclass(it) or inspect.isfunction(it)):
                found.setdefault(id(it), (f"{module.__name__}.{name}", it))
    return dict(found.values())


PUBLIC = public()


def listed() -> list[Any]:
    """What the page lists, under whichever name; of `plan`, the module."""
    module, found = "", []
    for line in PAGE.read_text().splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif name := re.fullmatch(r"   (\w[\w.]*)", line):
            path = f"{module}.{name[1]}"
            found.append(sys.modules.get(path) or reduce(getattr, path.split(".")[1:], distdl_lite))
    return found


def arguments(it: Any) -> list[str]:
    """The names of what a call takes; one that hands all of it on takes nothing of its own."""
    parameters = inspect.signature(it).parameters.values()
    is_open = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name in ("args", "kwargs") for p in parameters)
    return [] if is_open else [p.name for p in parameters]


def test_every_public_object_is_listed_once() -> None:
    """By itself or by its module."""
    found = listed()
    times = {name: found.count(it) + found.count(sys.modules[it.__module__]) for name, it in PUBLIC.items()}
    assert [name for name, n in times.items() if n != 1] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_words(name: str) -> None:
    it = PUBLIC[name]
    words = inspect.getdoc(it) or ""
    assert words.split("\n")[0].endswith("."), "its first line is no sentence"
    sections = re.findall(r"(?m)^(\w[\w ]*)\n-+$", words)
    assert not arguments(it) or {"Parameters", "Attributes"} & set(sections), f"it takes {arguments(it)}"
    assert "Examples" in sections, "it has no example"
    example = words.split("Examples\n--------\n")[1]
    assert re.search(r"(?m)^>>> |::$", example), "its example has no code"
