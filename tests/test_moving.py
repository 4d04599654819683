"""The programs of the guide's pages on moving in, after the move, run on ranks and compute what one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distdl_lite.testing import spmd

PROGRAMS = Path(__file__).parent.parent / "docs" / "moving" / "programs"


def printed(name: str, ranks: int, folder: Path, monkeypatch: Any, capsys: Any) -> str:
    """What a program prints on so many ranks, run in a new folder."""
    (folder / str(ranks)).mkdir()
    monkeypatch.chdir(folder / str(ranks))
    path = PROGRAMS / f"{name}_after.py"
    program = compile(path.read_text(), str(path), "exec")
    spmd(ranks, lambda world: exec(program, {"__name__": "__main__"}))
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(p.stem.removesuffix("_after") for p in PROGRAMS.glob("*_after.py")))
def test_a_program_prints_the_same_on_one_rank_and_on_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distdl_lite.abort_on_exception", lambda: None)  # it would stay on for all other tests
    alone, two = (printed(name, ranks, tmp_path, monkeypatch, capsys) for ranks in (1, 2))
    assert "mean" in alone
    assert two == alone
