"""Recurrent networks cut along the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import distdl_lite as dl


class Sequences(nn.Module):
    """A recurrent network from zeros, and its last states."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.inner = kind(6, 5, 2, **options)

    def forward(self, x: torch.Tensor) -> Any:
        y, states = self.inner(x.tanh())
        return y, states


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind: type[nn.Module]) -> None:
    """Nothing moves where the batch is cut alone; time and features are made whole."""
    by_state = (None, 0, None)
    outputs = [(0, None, None), by_state, *([by_state] if kind is nn.LSTM else [])]
    trial = dl.model.prove.Trial(Sequences(kind, batch_first=True, bidirectional=True), (5, 7, 6))
    proof = trial.on((2, 1), None, outputs)
    assert not proof.program.compiler.movements
    assert not proof.program.gathered
    proof = trial.on(
        (1, 2, 1), [(0, 1, 2)], [(0, 1, 2), (None, None, None), *([(None, None, None)] if kind is nn.LSTM else [])]
    )
    assert not proof.program.gathered
    later = [(1, 0, None), by_state, *([by_state] if kind is nn.LSTM else [])]
    dl.prove(Sequences(kind), (2, 1), (7, 5, 6), in_axes=[(None, 0, None)], out_axes=[(None, 0, None), *later[1:]])
