"""The hand-written calls that the benchmarks compare with give what the primitives do."""

from __future__ import annotations

import pytest

import distdl_lite as dl
from distdl_lite.bench.primitives import _cases, _check_same


@pytest.mark.mpi(min_size=2)
def test_hand_written_calls_give_the_same() -> None:
    for name, layer, by_hand, shape in _cases(dl.Partition.world(), (1, 2, 12, 12)):
        _check_same(name, (layer(), by_hand()), shape)
