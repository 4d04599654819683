"""Sums whose numbers travel as halves: what rounding takes is kept, not lost."""

from __future__ import annotations

import torch
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count
from distdl_lite.transport import Team, Transport


@on_ranks(3, mpi=True)
def test_what_rounding_keeps_is_not_lost(world: dl.Partition) -> None:
    """Sums and what is left on all ranks add up to the exact sums; also where a number is out of range."""
    transport = world.world_transport
    for team in ((0, 1, 2), (0, 2)):
        if world.rank in team:
            check_sums(transport, transport.team(team))
    alone, left = torch.full((2,), 0.1), torch.ones(2)
    transport.start_rounded_sum(transport.team([world.rank]), alone, left, torch.bfloat16).wait()
    assert torch.equal(alone, torch.full((2,), 0.1))
    assert left.tolist() == [0.0, 0.0]


def check_sums(transport: Transport, team: Team) -> None:
    transport.open_sums(team, "test")
    for dtype in (torch.float16, torch.bfloat16):
        for size in (1, 2, 7, 1000, 0):
            for engine in ("auto", "thread", "poll", "inline"):
                x = torch.randn(size, generator=torch.Generator().manual_seed(transport.rank), dtype=torch.float64)
                if size > 2:
                    x[2] = 1e5
                exact = transport.all_reduce(team, x.clone())
                y, left = x.clone(), torch.full_like(x, 7.0)
                with count() as counted:
                    pending = transport.start_rounded_sum(team, y, left, dtype, engine, "test")
                    assert pending.wait()
                    assert pending.wait()
                    assert pending.wait(0)
                assert (counted.messages, counted.bytes) == ((1, 2 * size) if size else (0, 0))
                assert torch.equal(transport.all_reduce(team, y.clone()), len(team) * y)
                torch.testing.assert_close(transport.all_reduce(team, left) + y, exact, rtol=1e-6, atol=1e-6)
