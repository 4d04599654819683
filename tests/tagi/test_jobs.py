"""A job of its own under mpirun, of which one rank fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from jobs import mpirun

pytestmark = pytest.mark.jobs

FAILS = """
import os, signal, sys, time, torch
import distdl_lite as dl
from distdl_lite import tagi
dl.abort_on_exception()
world = dl.Partition.world()
net = tagi.DDPSequential(tagi.Sequential(tagi.Linear(3, 40), tagi.ReLU(), tagi.Linear(40, 2)), average=False)
for step in range(100):
    x = torch.ones(4, 3)
    if step == 3 and world.rank == 1:
        with open(sys.argv[1], "w") as file:
            file.write(str(time.time()))
        {failure}
    net(x)
    tagi.OutputUpdater().update(net.output_z_buffer, x[:, :2], 0.1, net.input_delta_z_buffer)
    net.backward()
    net.step()
print("not here")
"""


@pytest.mark.parametrize(
    ("failure", "text"),
    [("x = x[:, :2]", "mu_x must be of shape (B, 3), not (4, 2)"), ("os.kill(os.getpid(), signal.SIGKILL)", "")],
)
def test_a_rank_that_fails_ends_the_job(tmp_path: Path, failure: str, text: str) -> None:
    script, when = tmp_path / "job.py", tmp_path / "time"
    script.write_text(FAILS.format(failure=failure))
    done = mpirun(2, str(script), str(when))
    assert done.returncode != 0
    assert time.time() - float(when.read_text()) < 20
    assert text in done.stderr
    assert "not here" not in done.stdout
