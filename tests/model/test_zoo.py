"""The models of the zoo, cut over grids, beside themselves on one device."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from zoo.cases import CASES, Case

from distdl_lite.factors import length_of
from distdl_lite.model.compile import Program
from distdl_lite.model.prove import Trial
from distdl_lite.testing import count

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of what models do


def has_modes(model: torch.nn.Module) -> bool:
    """Whether training and evaluation differ: by statistics alone, as no model drops anything."""
    return any(name.endswith("running_mean") for name, _ in model.named_buffers())


class Counted(Trial):
    """A trial that compares what its networks send with their reports."""

    is_counted = False

    def _run(self, net: torch.nn.Module, *given: Any) -> Any:
        if not self.is_counted:
            return super()._run(net, *given)
        opened, forwards = ExitStack(), list[Any]()
        net.register_forward_pre_hook(lambda *_: forwards.append(opened.enter_context(count())))
        net.register_forward_hook(lambda *_: opened.close())
        with count() as both:
            found = super()._run(net, *given)
        sent = [sum(c.messages for c in forwards), sum(c.bytes for c in forwards)]
        told = net.P.allgather_data([*sent, both.messages - sent[0], both.bytes - sent[1]])
        if net.P.rank == 0:
            made = net.report()
            said = made.forward.messages, made.forward.bytes, made.backward.messages, made.backward.bytes
            assert [self.steps * n for n in said] == [max(column) for column in zip(*told, strict=True)]
        return found


def check_movements(case: Case, program: Program, largest: int) -> None:
    """Nothing is gathered, and where windows are cut anew no activation becomes whole that is larger than every weight."""
    assert program.gathered == []
    if case.is_windowed:
        for m in program.compiler.movements:
            becomes_whole = any(dim.axes for dim in m.X.dims) and not any(dim.axes for dim in m.Y.dims)
            assert not becomes_whole or math.prod(map(length_of, m.Y.dims)) <= largest, (m.path, m.kind)


@pytest.mark.parametrize("name", CASES)
def test_cut_over_grids(name: str) -> None:
    case = CASES[name]
    model = case.make()
    largest = max(p.numel() for p in model.parameters())
    trial = Counted(model.train(), *case.whole())
    for grid in case.grids:
        trial.is_counted = grid == case.grids[1]
        check_movements(case, trial.on(grid, tolerance=case.tolerance).program, largest)
    if has_modes(model):
        proof = Trial(model.eval(), *case.whole()).on(case.grids[1], tolerance=case.tolerance)
        check_movements(case, proof.program, largest)
