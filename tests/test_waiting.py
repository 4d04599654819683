"""The end of a job in which one rank waits too long for another."""

from __future__ import annotations

import pytest
from jobs import mpirun

from distdl_lite.transport.waiting import abort_on_timeout

_PROGRAM = """
import time
import torch
import distdl_lite as dl
import distdl_lite.nn as dnn
world, x = dl.Partition.world(), torch.ones(1, 1, 4)
teams = [world.create_partition_inclusive([rank, 3]) for rank in range(3)]
nets = [dnn.DistributedConv1d(team.grid((1, 1, 2)), 1, 1, 3, padding=1) for team in teams]
copies = dl.DataParallel(torch.nn.Linear(4, 4), teams[2], engine="thread") if teams[2].active else None
nets = [net for net, team in zip(nets, teams) if team.active]
losses = [net(x).sum() for net in nets]
dl.abort_on_timeout(1.5 + world.rank / 4)
for step in range(5):
    time.sleep(0.45 * (world.rank == 3))
    for net in nets:
        net(x)
if world.rank == 0:
    nets[0](x)
if world.rank == 1:
    losses[0].backward()
if world.rank == 2:
    copies(x).sum().backward()
"""


@pytest.mark.jobs
def test_calls_that_one_rank_leaves_out() -> None:
    """They end the job, and all who wait say so; ranks that wait for each other now and then do not."""
    done = mpirun(4, "-c", _PROGRAM)
    assert done.returncode != 0
    for rank, where in enumerate(["in DistributedConv1d number 1, called", "called", "called"]):
        text = (
            f"rank {rank} has waited for others for more than {1.5 + rank / 4:g} s {where} at <string>:{18 + 2 * rank}"
        )
        assert text in done.stderr
    assert "rank 3 has waited" not in done.stderr  # it ends


def test_limits() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="seconds must be above 0"):
            abort_on_timeout(seconds)
    abort_on_timeout(3600)
    abort_on_timeout(None)
    abort_on_timeout(None)
