"""The transport that the guide writes passes the suite of all transports, and runs layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import ranks
import test_transport
import torch

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import assert_equals_serial

_SPEC = spec_from_file_location("queues", Path(__file__).parent.parent / "docs" / "develop" / "queues.py")
assert _SPEC is not None
assert _SPEC.loader is not None
_QUEUES = module_from_spec(_SPEC)
_SPEC.loader.exec_module(_QUEUES)
SUITE = [
    test
    for name, test in vars(test_transport).items()
    if name.startswith("test_") and inspect.isfunction(test) and "kernel" not in name
]


@pytest.mark.parametrize("test", SUITE, ids=lambda test: test.__name__)
def test_the_suite(test: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "spmd", _QUEUES.run)
    test("threads")


def test_a_layer() -> None:
    def body(world: dl.Partition) -> None:
        P = world.grid((1, 1, 2, 2))
        serial, x = torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64), torch.ones(2, 2, 9, 7).double()
        with torch.no_grad():
            for weight in serial.parameters():
                weight.fill_(2.0)
        assert_equals_serial(dnn.DistributedConv2d(P, 2, 3, 3, padding=1, dtype=torch.float64), serial, x, P)

    _QUEUES.run(4, body)
