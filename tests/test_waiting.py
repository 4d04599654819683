"""The limit of a wait."""

from __future__ import annotations

import pytest

from distdl_lite.transport.waiting import abort_on_timeout


def test_limits() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="seconds must be above 0"):
            abort_on_timeout(seconds)
    abort_on_timeout(3600)
    abort_on_timeout(None)
    abort_on_timeout(None)
