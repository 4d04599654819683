"""The reference lists every public object; each says what it is, what it takes, and how it is used. Other words, too."""

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

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.rst"


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


def test_the_program_for_assistants_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = (ROOT / "AGENTS.md").read_text().split("```python\n")[1].split("```")[0]
    try:
        testing.spmd(4, lambda world: exec(code, {}))
    finally:
        distdl_lite.abort_on_exception(False)
        distdl_lite.abort_on_timeout(None)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_files_that_the_code_in_an_afternoon_names_are_there() -> None:
    page = (ROOT / "docs" / "guide" / "afternoon.rst").read_text()
    named = [
        name
        for line in re.findall(r"(?m)^(``[\w/]+``(?:, ``[\w/]+``)*)$", page)
        for name in line.strip("`").split("``, ``")
    ]
    assert len(named) > 25
    package = ROOT / "distdl_lite"
    assert [name for name in named if not ((package / name).is_dir() or (package / f"{name}.py").is_file())] == []


def test_there_is_one_version() -> None:
    told = [
        re.search(r"(?m)^version = (.*)$", (ROOT / "setup.cfg").read_text()),
        re.search(r"(?m)^version: (.*)$", (ROOT / "CITATION.cff").read_text()),
        re.search(r"(?m)^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text()),
    ]
    assert {found and found[1] for found in told} == {distdl_lite.__version__}
