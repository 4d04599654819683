"""The gallery's pages on processes, with few steps: what each prints as its difference to one device is rounding.

The manual's build runs the same files whole, on threads.
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import distdl_lite as dl
from distdl_lite.testing import launch
from distdl_lite.transport import current

PAGES = sorted((Path(__file__).parent.parent / "docs" / "gallery").glob("*.py"))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page_equals_one_device(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def few_steps(ranks: int, body: Callable[..., Any]) -> Any:
        return launch(ranks, partial(body, **{"steps": 2} if "steps" in inspect.signature(body).parameters else {}))

    monkeypatch.setattr("distdl_lite.testing.launch", few_steps)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    try:
        found = runpy.run_path(str(page))
    except SystemExit:
        assert dl.Partition.world().rank > 0  # rank 0 alone goes on to draw
    else:
        assert 0 <= found["difference"] < found.get("TOLERANCE", 1e-5)
        assert list(tmp_path.glob("*.png"))
    finally:
        dl.abort_on_exception(False)
        current().local.pop("launched", None)  # for the next page
