"""Models of Gaussians for tests, and how they are trained and compared."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import distdl_lite as dl

DATA = Path(__file__).parent / "data"
tagi = dl.tagi


def network(*sizes: int, activation: str = "ReLU", seed: int = 0, **options: Any) -> Any:
    """Linear layers with an activation between them."""
    torch.manual_seed(seed)
    layers: list[Any] = []
    for a, b in itertools.pairwise(sizes):
        layers += [tagi.Linear(a, b, **options), getattr(tagi, activation)()]
    return tagi.Sequential(*layers[:-1])


def teach(net: Any, x: Any, y: Any, var_obs: Any = 0.1, var_x: Any = None, steps: bool = True) -> tuple[Any, Any]:
    """One step, as a script for pytagi would write it; returns the output before it."""
    output = net(x, var_x)
    updater = tagi.OutputUpdater()
    updater.update(output_states=net.output_z_buffer, mu_obs=y, var_obs=var_obs, delta_states=net.input_delta_z_buffer)
    net.backward()
    if steps:
        net.step()
    return output


def linears(net: Any) -> list[Any]:
    return [layer for layer in net.modules() if isinstance(layer, tagi.Linear)]


def weights(net: Any, prefix: str = "") -> list[torch.Tensor]:
    """Copies of all means and variances, or their deltas."""
    found = [getattr(layer, prefix + name) for layer in linears(net) for name in tagi.Linear.NAMES]
    return [tensor.clone() for tensor in found if tensor is not None]


def difference(found: Any, reference: Any) -> float:
    """The largest difference relative to the reference's largest number, over all arrays."""
    worst = 0.0
    for a, b in zip(found, reference, strict=True):
        a, b = (torch.as_tensor(numpy.asarray(value), dtype=torch.float64) for value in (a, b))
        assert a.shape == b.shape
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
    return worst


def refusals(world: dl.Partition, kind: type[Exception], make: Any) -> str:
    """The text with which all ranks are refused, within a second."""
    began = time.perf_counter()
    with pytest.raises(kind) as caught:
        make()
    assert time.perf_counter() - began < 2
    told = world.allgather_data(str(caught.value))
    assert len(set(told)) == 1, told
    return told[0]
