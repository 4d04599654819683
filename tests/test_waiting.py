"""The end of a job in which one rank waits too long for another."""

from __future__ import annotations

import pytest
from test_command_line import mpirun

from distdl_lite.transport.waiting import abort_on_timeout

_PROGRAM = """
import time
import torch
import distdl_lite as dl
import distdl_lite.nn as dnn
P = dl.Partition.world()
net = dnn.DistributedConv1d(P.grid((1, 1, 2)), 1, 1, 3, padding=1)
copies = dl.DataParallel(torch.nn.Linear(4, 4), engine="thread")
x = torch.ones(1, 1, 4)
loss = net(x).sum()
dl.abort_on_timeout(2)
for step in range(4):
    time.sleep(0.75 * P.rank)
    net(x)
if P.rank == 0:
    {}
print("rank", P.rank, "ends")
"""


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("call", "where"),
    [
        ("net(x)", "in DistributedConv1d number 1, called at <string>:16"),
        ("loss.backward()", "called at <string>:16"),
        ("copies(x).sum().backward()", "called at <string>:16"),
        ("pass", ""),
    ],
)
def test_a_call_that_one_rank_leaves_out(call: str, where: str) -> None:
    """It ends the job; ranks that wait for each other now and then do not."""
    done = mpirun(2, "-c", _PROGRAM.format(call))
    if not where:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ends") == 2
        return
    assert done.returncode != 0
    assert f"rank 0 has waited for others for more than 2 s {where}" in done.stderr
    assert "rank 1 has waited" not in done.stderr  # it ends


def test_limits() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="seconds must be above 0"):
            abort_on_timeout(seconds)
    abort_on_timeout(3600)
    abort_on_timeout(None)
    abort_on_timeout(None)
