"""Trainings that were recorded elsewhere."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from gaussians import DATA, difference, linears, tagi, teach

NAMES = [path.stem for path in sorted(DATA.glob("tagi_*.npz"))]


def recorded(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A recording, and the model that it begins with."""
    data = dict(numpy.load(DATA / f"{name}.npz"))
    layers = []
    for number, activation in enumerate(data["activations"]):
        out_features, in_features = data[f"start/{number}/mu_w"].shape
        layers += [tagi.Linear(in_features, out_features), *([getattr(tagi, activation)()] if activation else [])]
    net = tagi.Sequential(*layers).to(dtype)
    for number, layer in enumerate(linears(net)):
        for key in layer.NAMES:
            getattr(layer, key).copy_(torch.from_numpy(data[f"start/{number}/{key}"]))
    return data, net


def test_there_are_recordings() -> None:
    assert len(NAMES) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_training_comes_out(name: str, dtype: torch.dtype) -> None:
    data, net = recorded(name, dtype)
    for step, (x, y) in enumerate(zip(data["x"], data["y"], strict=True)):
        var_x = data["var_x"][step] if "var_x" in data else None
        var_obs = numpy.full(y.shape, data["sigma_v"] ** 2)
        mean, variance = teach(net, x, y, var_obs, var_x, steps=False)
        assert difference([mean, variance], [data["mu_out"][step], data["var_out"][step]]) <= 1e-5
        if step == 0:
            compare(net, data, "first_delta/{}/delta_{}", "delta_{}")
        net.step()
    compare(net, data, "end/{}/{}", "{}")


def compare(net: Any, data: Any, theirs: str, ours: str) -> None:
    for number, layer in enumerate(linears(net)):
        for key in layer.NAMES:
            assert difference([getattr(layer, ours.format(key))], [data[theirs.format(number, key)]]) <= 1e-5, key
