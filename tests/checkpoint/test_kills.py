"""Jobs that are killed while they save."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import ROOT, run

KILLS = 8  # of a run of 200 see killed.py


@pytest.mark.jobs
def test_a_killed_job_leaves_complete_checkpoints(tmp_path: Path) -> None:
    done = run(sys.executable, str(ROOT / "tests/checkpoint/killed.py"), str(tmp_path), str(KILLS))
    assert f"{KILLS} jobs were killed" in done.stdout, done.stdout + done.stderr
