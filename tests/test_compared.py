"""The cases that the manual compares other libraries by: this one is exact in all of them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import distdl_lite as dl
from distdl_lite.testing import spmd

_FOLDER = Path(__file__).parent.parent / "docs" / "compared"


def script(name: str) -> Any:
    """A script of the folder, which import each other by their names."""
    sys.path.insert(0, str(_FOLDER))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(_FOLDER))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_model_that_is_cut_computes_what_one_process_does() -> None:
    ours = script("ours")
    assert {case.name: ours.run(case) for case in ours.CASES} == {case.name: "exact" for case in ours.CASES}


def test_a_container_computes_what_one_process_does_of_the_whole_batch() -> None:
    containers = script("containers")

    def ours(world: dl.Partition, model: torch.nn.Module) -> Any:
        return containers.sgd(dl.DataParallel(dl.SyncBatchNorm.convert(model), world))

    for name, make, rows in containers.CASES:
        verdicts = spmd(2, lambda P, m=make, r=rows: containers.run(m, r, P.rank, lambda model: ours(P, model)))
        assert verdicts == ["exact"] * 2, name


def test_what_differs_is_told() -> None:
    cases = script("cut_cases")
    whole = {"output": torch.ones(3)}
    assert cases.judge(whole, {"output": torch.tensor([1, 1, 1.5])}) == "WRONG: output by 50%"
    assert cases.judge(whole, {"output": torch.ones(2)}) == "WRONG: output of another shape"
    assert cases.judge(whole, {}) == "WRONG: output of another shape"
    assert cases.judge(whole, {"output": torch.full((3,), torch.nan)}).startswith("WRONG")
    assert cases.worst(["exact, gathers", "WRONG: output by 50%", "exact, gathers"]).startswith("WRONG")
