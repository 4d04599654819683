"""The limit of a wait."""

from __future__ import annotations

import threading
import time

import pytest

import distdl_lite as dl
from distdl_lite.testing import spmd
from distdl_lite.transport.waiting import abort_on_timeout


def test_threads_are_left_alone() -> None:
    """Ranks that are threads wait for their turns; a deadlock of theirs is an error anyway."""

    def body(world: dl.Partition) -> list[int]:
        if world.rank == 1:
            time.sleep(0.6)
        return world.allgather_data(world.rank) or []

    abort_on_timeout(0.2)
    try:
        assert spmd(2, body) == [[0, 1], [0, 1]]
        assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    finally:
        abort_on_timeout(None)


def test_limits() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="seconds must be above 0"):
            abort_on_timeout(seconds)
    abort_on_timeout(3600)
    abort_on_timeout(None)
    abort_on_timeout(None)
