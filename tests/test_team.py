"""Teams are compared by identity: no call takes longer for a larger one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.bench.stub import world_of


class Untouchable:
    """Ranks that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"a call asks the ranks of a team for {name}")

    __hash__ = __iter__ = __len__ = __getitem__ = __eq__ = None  # type: ignore[assignment]


class Network(dnn.Module):
    def __init__(self, P: dl.CartesianPartition) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [
                dnn.HaloExchange(P, (0, 0, 1, 1), "zeros"),
                dnn.DistributedConv2d(P, 2, 2, 3, padding=1),
                dnn.DistributedBatchNorm(P, 2),
                dnn.DistributedMaxPool2d(P, 3, stride=1),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_no_call_looks_at_the_ranks_of_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(1024)
    P = world.grid((1, 1, 32, 32))
    network, alone, x = Network(P), dnn.HaloExchange(P, (0, 0, 1, 1)), torch.rand(2, 2, 6, 7, requires_grad=True)
    for _ in range(2):
        network(x).sum().backward()
        alone(x).sum().backward()
    teams = world.world_transport.local["teams"].values()
    ranks = [(team, team.ranks) for team in teams]
    for team in teams:
        team.ranks = Untouchable()
    try:
        network(x).sum().backward()
        alone(x).sum().backward()
    finally:
        for team, its in ranks:
            team.ranks = its


def test_set_up_of_many_ranks_learns_lengths_along_axes() -> None:
    P = world_of(65536).grid((256, 256))
    for layer in (dnn.HaloExchange(P, (1, 1)), dnn.Repartition(P, P.grid((128, 512)))):
        before = P.world_transport.received
        layer(torch.rand(5, 4))
        assert P.world_transport.received - before < 4 * (256 + 256)


@on_ranks(4)
def test_one_object_for_each_set_of_ranks(world: dl.Partition) -> None:
    transport = world.world_transport
    team = transport.team([3, 1])
    assert team is transport.team((1, 3)) is transport.team({1, 3})
    assert world.team is world.grid((2, 2)).team is world.create_partition_inclusive([2, 3, 0, 1]).team
    assert list(team) == [1, 3]
    assert (team.index(3), 3 in team, 2 in team, team.is_inside(world.team), world.team.is_inside(team)) == (
        1,
        1,
        0,
        1,
        0,
    )
    with pytest.raises(ValueError, match="rank 2 is not in"):
        team.index(2)
    assert copy.deepcopy(team) is pickle.loads(pickle.dumps(team)) is team
    teams = [transport.team(ranks) for ranks in ([1, 2], [0, 3], [0], [0, 1, 2, 3])]
    assert [list(t) for t in sorted(teams)] == [[0], [0, 1, 2, 3], [0, 3], [1, 2]]


@on_ranks(2)
def test_blocks_that_form_no_grid_are_told_in_full(world: dl.Partition) -> None:
    """Where lengths along an axis differ, dtypes or numbers of dims, set-up gets everything, and names the rank."""
    P = world.grid((1, 2))
    layer = dnn.HaloExchange(P, (0, 1))
    assert layer(torch.ones(2, 3)).shape == (2, 4)
    assert layer._distdl_structure.passed is None
    for x in (
        torch.ones(2 + world.rank, 3),
        torch.ones((2,) * (1 + world.rank)),
        torch.ones(2, 3).to([torch.half, torch.int][world.rank]),
    ):
        with pytest.raises(ValueError, match="rank 1"):
            layer(x)
        assert set(layer._distdl_structure.passed) == {0, 1}
    assert layer(torch.ones(2, 3)).shape == (2, 4)
