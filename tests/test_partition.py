"""Teams and grids: arithmetic that communicates nothing, seen from every rank."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks, over_mpi

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.grid import Grid, balanced, ravel, unravel
from distdl_lite.partition import Partition
from distdl_lite.testing import spmd


@given(st.integers(0, 200), st.integers(1, 40))
def test_balanced(length: int, parts: int) -> None:
    cuts = balanced(length, parts)
    sizes = [b - a for a, b in pairwise(cuts)]
    assert (cuts[0], cuts[-1], len(sizes)) == (0, length, parts)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes.count(length // parts + 1) == length % parts


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_ravel_and_unravel(shape: list[int], data: st.DataObject) -> None:
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    assert unravel(ravel(index, shape), shape) == index


def test_grid() -> None:
    grid = Grid((2, 3), (5, 3, 1, 0, 2, 4))
    assert grid.index(0) == (1, 0)
    assert grid.rank((1, 0)) == 0
    assert grid.index(7) is None
    assert grid.position(4) == 5
    assert grid.padded(3).shape == (1, 2, 3)
    assert grid.transposed().index(0) == (0, 1)
    assert list(grid.members({1: 2})) == [1, 4]


@on_ranks(4)
def test_world(world: Partition) -> None:
    assert world == Partition.world() == Partition()
    assert (world.size, world.shape, world.dim, world.index) == (4, (4,), 1, (world.rank,))
    assert world.active
    assert list(world.ranks) == [0, 1, 2, 3]
    assert world.comm is world._comm is None


@on_ranks(4)
def test_teams(world: Partition) -> None:
    """In the given order, of an inactive or Cartesian partition too."""
    team = world.create_partition_inclusive(iter([2, 0]))
    assert (team.active, team.rank) == {0: (True, 1), 2: (True, 0)}.get(world.rank, (False, -1))
    assert team.index == {0: (1,), 2: (0,)}.get(world.rank)
    assert list(team.create_partition_inclusive([1]).ranks) == [0]
    other = world.create_partition_inclusive([3, 2, 1])
    assert list(team.create_partition_union(other).ranks) == [2, 0, 3, 1]
    square = world.grid((2, 2), [3, 1, 0, 2])
    assert list(square.create_partition_inclusive(range(1, 3)).ranks) == [1, 0]
    assert list(world.create_partition_inclusive([]).ranks) == []


@on_ranks(4)
def test_cartesian(world: Partition) -> None:
    P = world.grid((2, 2), [3, 1, 0, 2], periods=[True, False])
    assert P.index == {3: (0, 0), 1: (0, 1), 0: (1, 0), 2: (1, 1)}[world.rank]
    assert P.cartesian_index(2) == (1, 0)
    null = world.world_transport.proc_null
    assert P.neighbor_ranks(0) == ((2, 2), (null, 1))
    assert P.neighbor_ranks() == P.neighbor_ranks(P.rank)
    line = P.create_cartesian_subtopology_partition([False, True])
    assert list(line.ranks) == ([3, 1] if world.rank in (3, 1) else [0, 2])
    assert (line.shape, line.periods) == ((2,), (False,))
    assert P.create_allreduction_partition([-1]) == line
    assert P.create_cartesian_subtopology_partition([False, False]).shape == ()
    outside = world.grid((2, 1), [0, 1])
    if world.rank > 1:
        assert (outside.active, outside.rank, outside.index, outside.shape) == (False, -1, None, (2, 1))
        assert outside.neighbor_ranks() is None
        assert outside.neighbor_ranks(0) == ((null, 1), (null, null))
        assert outside.create_cartesian_subtopology_partition([True, False]).active is False
    grid = outside.create_cartesian_subtopology_partition([True, False]).create_cartesian_topology_partition((1, 2))
    assert (grid.active, grid.shape, grid.size) == (world.rank < 2, (1, 2), 2 * (world.rank < 2))


@on_ranks(4)
def test_blocks(world: Partition) -> None:
    P = world.grid((1, 3), [2, 0, 3])
    assert P.bounds((5, 7)) == ((0, 5), (0, 3, 5, 7))
    wanted = {2: slice(0, 3), 0: slice(3, 5), 3: slice(5, 7)}
    assert P.block((5, 7)) == ((slice(0, 5), wanted[world.rank]) if P.active else None)
    x = torch.arange(35, dtype=torch.int16).view(5, 7)
    for axes, slices in ((None, P.block((5, 7))), ((1, None), P.block((5, 7), (1, None)))):
        mine = P.cut(x, axes)
        assert mine.dtype is torch.int16
        assert torch.equal(mine, x[slices] if P.active else torch.empty(0))
        assert mine.is_contiguous()
        assert mine.untyped_storage().nbytes() == mine.nbytes
    assert P.cut(torch.empty(5, 7, device="meta")).device.type == "meta"


REFUSALS: dict[str, Callable[[Partition], object]] = {
    "ranks [4, 7] are not in a partition of 4 ranks": lambda P: P.create_partition_inclusive([0, 7, 4]),
    "name a rank twice": lambda P: P.create_partition_inclusive([1, 1]),
    "a grid of shape (3,) does not fit a partition of 4 ranks": lambda P: P.create_cartesian_topology_partition((3,)),
    "a grid of shape (-2, -2) does not fit": lambda P: P.create_cartesian_topology_partition((-2, -2)),
    "periods (True,) do not fit a grid of shape (2, 2)": lambda P: P.grid((2, 2), periods=[True]),
    "a grid of shape (5,) needs 5 ranks, the partition has 4": lambda P: P.grid((5,)),
    "a grid of shape (3,) does not fit a partition of 2 ranks": lambda P: P.grid((3,), [0, 1]),
    "does not have one bool per axis": lambda P: P.grid((2, 2)).create_cartesian_subtopology_partition([True]),
    "axes [2] are not all axes": lambda P: P.grid((2, 2)).create_allreduction_partition([2]),
    "axes [1, 1] name an axis twice": lambda P: P.grid((2, 2)).create_allreduction_partition([1, -1]),
    "rank 4 is not in a partition of 4 ranks": lambda P: P.grid((2, 2)).cartesian_index(4),
    "a tensor of shape (3,) cannot be cut over a grid of shape (2, 2)": lambda P: P.grid((2, 2)).block((3,)),
    "root 4 is not in a partition of 4 ranks": lambda P: P.broadcast_data(1, root=4),
}


NO_SEQUENCES: dict[str, Callable[[Any], object]] = {
    "shape=4": lambda P: P.grid(4),
    "shape='2x1'": lambda P: P.grid("2x1"),
    "shape=2": lambda P: P.create_cartesian_topology_partition(2),
    "ranks=1": lambda P: P.grid((1,), ranks=1),
    "ranks=3": lambda P: P.create_partition_inclusive(3),
    "axes=0": lambda P: P.grid((2, 2)).create_allreduction_partition(0),
}


@on_ranks(4)
def test_refusals(world: Partition) -> None:
    for text, call in REFUSALS.items():
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            call(world)
        assert text in str(raised.value)
    with pytest.raises(TypeError, match=r"is made by Partition.grid"):
        dl.CartesianPartition()
    for text, call in NO_SEQUENCES.items():
        with pytest.raises(TypeError, match=f"^{text} is no sequence of integers$"):
            call(world)


@on_ranks(4, mpi=True)
def test_small_data(world: Partition) -> None:
    team, pair = world.create_partition_inclusive([3, 0, 2]), world.create_partition_inclusive([1, 2])
    mine = {"from": world.rank}
    assert team.allgather_data(mine) == (None if world.rank == 1 else [{"from": r} for r in (3, 0, 2)])
    assert world.allreduce_data([world.rank], lambda a, b: a + b) == [0, 1, 2, 3]
    assert team.broadcast_data(mine, root=2) == (None if world.rank == 1 else {"from": 2})
    received = team.broadcast_data(mine if world.rank == 2 else None, root=1, P_data=pair)
    assert received == {"from": 2}


@on_ranks(4)
def test_life(world: Partition) -> None:
    with world.grid((2, 2)) as P:
        assert P.active
    assert (P.active, P.rank, P.index, P.shape) == (False, -1, None, (2, 2))
    P = world.grid((2, 2), [3, 1, 0, 2], periods=[True, False])
    assert copy.deepcopy(P) is copy.copy(P) is P
    twin = pickle.loads(pickle.dumps(P))
    assert twin == P
    assert hash(twin) == hash(P)
    assert type(twin) is dl.CartesianPartition
    assert world.grid((2, 2), [3, 1, 0, 2]) != P
    assert world.grid((4, 1), [3, 1, 0, 2]) != P
    assert P != "a partition"


def test_repr_is_readable() -> None:
    texts = spmd(4, lambda world: (repr(world.grid((2, 2))), repr(world.create_partition_inclusive([2, 0]))))
    assert texts[1] == (
        "CartesianPartition(shape=(2, 2), ranks=0..3, index=(0, 1))",
        "Partition(shape=(2,), ranks=[2, 0], inactive)",
    )


def test_pickles_of_a_larger_world_are_refused() -> None:
    (text, *_) = spmd(4, lambda world: pickle.dumps(world.grid((1, 4))))
    with pytest.raises(ValueError, match=r"over ranks \[0, 1, 2, 3\] does not fit a world of 2 ranks"):
        spmd(2, lambda world: pickle.loads(text))


@over_mpi
@pytest.mark.mpi(min_size=2)
def test_communicators_of_the_user() -> None:
    """`comm` is the user's own; partitions of one communicator work together, those of two do not."""
    from mpi4py import MPI

    world = Partition(MPI.COMM_WORLD)
    assert world == Partition()
    team = world.create_partition_inclusive([1, 0])
    if team.active:
        assert team.comm is team.comm
        assert team.comm.rank == team.rank
        assert team.comm.allgather(world.rank) == [1, 0]
        assert MPI.Comm.Compare(team.comm, MPI.COMM_WORLD) != MPI.IDENT
    else:
        assert team.comm is None
    if world.rank < 2:
        for number in range(3000):  # MPICH has room for about 2,000 communicators
            again = world.create_partition_inclusive([number % 2, 1 - number % 2]).grid((1, 2))
            assert again.comm.rank == again.rank
        assert again.comm is team.comm
        team.comm.Free()  # as MPI allows, on all ranks of it
        assert again.comm.allgather(world.rank) == [1, 0]
    half = MPI.COMM_WORLD.Split(world.rank % 2, world.rank)
    own = Partition(half)
    assert own == Partition(half)
    assert own.allgather_data(world.rank) == list(range(world.rank % 2, world.size, 2))
    with pytest.raises(ValueError, match="a partition needs an intracommunicator that this rank belongs to"):
        Partition(MPI.COMM_NULL)
    with pytest.raises(ValueError, match="partitions of different communicators"):
        own.create_partition_union(world)


@on_ranks(4)
def test_deactivated(world: Partition) -> None:
    """What layers, containers and loaders do follows from the partition they were made with, whatever becomes of it."""
    x = torch.rand(4, 2, 2, 4)

    def outcomes(ends: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        P, P_w, pair = world.grid((1, 2, 1, 1)), world.grid((2, 2, 1, 1)), world.grid((1, 2))
        square, line = world.grid((2, 2)), world.grid((4,))
        block, rows, half = P.cut(x), square.cut(x.flatten(1)), pair.cut(x.flatten(1))
        calls: list[tuple[torch.nn.Module, list[torch.Tensor]]] = [
            (dnn.DistributedConv2d(P, 2, 2, 3, padding=1, P_y=P, P_w=P_w), [block]),
            (dnn.DistributedLinear(pair, pair, square, 16, 3), [half]),
            (dnn.DistributedCrossEntropyLoss(square), [rows, torch.tensor([0, 1])]),
            (dnn.DistributedFlatten(P, P_y=pair), [block]),
            (dl.DataParallel(torch.nn.Linear(8, 3), line), [rows]),
        ]
        loader = dl.data.ShuffledLoader(torch.arange(3) + 3 * world.rank, 2, line)
        for partition in (P, P_w, pair, square, line) if ends else ():
            partition.deactivate()
        found = []
        for layer, inputs in calls:
            y = layer(*inputs)
            if y.requires_grad:
                y.sum().backward()
            found += [y.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]
        return [*found, *loader]

    found, expected = outcomes(True), outcomes(False)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_named_axes() -> None:
    """Names stand in reprs and errors, give lines, and go with a pickle; numbers go on working."""

    def body(world: Partition) -> None:
        P = world.grid(h=2, w=2, of="n c h w")
        assert (P.shape, P.names) == ((1, 1, 2, 2), ("n", "c", "h", "w"))
        assert P == world.grid((1, 1, 2, 2)) == world.grid((1, 1, 2, 2), of=["n", "c", "h", "w"])
        assert repr(P).startswith("CartesianPartition(n=1, c=1, h=2, w=2, ranks=0..3, index=(0, 0, ")
        assert pickle.loads(pickle.dumps(P)).names == P.names
        line = P.line("h")
        assert (line.shape, line.names) == ((2,), ("h",))
        assert list(line.ranks) == [world.rank % 2, world.rank % 2 + 2]
        assert P.line("h", "w").shape == (2, 2)
        assert P.line(2) == line
        assert P.line(-2) == line
        assert P.block((5, 7), ["w", None]) == P.block((5, 7), [3, None]) == P.block((5, 7), [-1, None])
        assert world.grid(rows=2).names == ("rows",)
        for wrong, text in (
            (lambda: world.grid((2,), h=2), "either a shape or named axes"),
            (lambda: world.grid(), "either a shape or named axes"),
            (lambda: world.grid(x=2, of="h w"), "the names"),
            (lambda: world.grid((2, 2), of="h w c"), "the names"),
            (lambda: world.grid((1, 2), of="h h"), "the names"),
            (lambda: P.line("z"), "n=1, c=1, h=2, w=2, ranks=0..3 has no axis 'z'"),
            (lambda: world.grid((4,)).line("h"), "its axes are not named"),
            (lambda: P.line(4), "has no axis 4"),
            (lambda: P.block((5,), ["z"]), "has no axis 'z'"),
        ):
            with pytest.raises((TypeError, ValueError), match=re.escape(text)):
                wrong()

    spmd(4, body)


def test_print_on_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    spmd(3, lambda world: world.print("rank", world.rank, root=1, sep="="))
    spmd(3, lambda world: world.create_partition_inclusive([2]).print("alone"))
    assert capsys.readouterr().out == "rank=1\nalone\n"


def test_a_layer_shows_what_it_holds() -> None:
    def body(world: Partition) -> str:
        line = world.grid((1, 2))
        return repr(dnn.DistributedLinear(world.grid((1, 1)), line, world.grid((2, 1)), 3, 5))

    shown = spmd(2, body)
    assert shown[1].endswith("; here weight (2, 3) of (5, 3), bias (2,) of (5,))")
    assert "here" not in spmd(1, lambda world: repr(dnn.DistributedLinear(*[world.grid((1, 1))] * 3, 3, 5)))[0]
