"""Plans against the definition of an operator, and their cost on many ranks."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import pytest
import torch
from cases import SIZE, Case, applied, cases, dense, random_blocks

from distdl_lite.grid import Grid
from distdl_lite.layout import Layout, balanced_blocks, copies, gathered, haloed, shape_of, whole
from distdl_lite.plan import Pattern, Plan, plan
from distdl_lite.testing import simulate

TABLE = pytest.mark.parametrize("case", cases(), ids=str)


def plans_of(case: Case) -> list[Plan]:
    return [plan(case.X, case.Y, rank) for rank in range(SIZE)]


def without_order(p: Plan) -> Plan:
    """The plan with sorted edges: several of one pair are ordered by their shift from source to target."""
    by_place = [
        tuple(sorted(edges, key=lambda e: (e.peer, e.box))) for leg in p.legs for edges in (leg.sends, leg.receives)
    ]
    pairs = zip(by_place[::2], by_place[1::2], strict=True)
    return replace(p, legs=tuple(replace(leg, sends=a, receives=b) for leg, (a, b) in zip(p.legs, pairs, strict=True)))


def zeros(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@TABLE
def test_plan_is_the_dense_matrix(case: Case) -> None:
    blocks = random_blocks(case.X)
    y = simulate(plans_of(case), blocks, zeros)
    for rank in range(SIZE):
        wanted = applied(case.X, case.Y, blocks, rank)
        assert wanted is None if rank not in y else torch.equal(y[rank], wanted)


@TABLE
def test_adjoint_is_the_transpose(case: Case) -> None:
    blocks = random_blocks(case.Y)
    x = simulate([p.adjoint() for p in plans_of(case)], blocks, zeros)
    for rank in x:
        wanted = sum(dense(case.X, case.Y, rank, target).T @ y.reshape(-1) for target, y in blocks.items())
        assert torch.equal(x[rank].reshape(-1), wanted)
    assert set(x) == {rank for rank in range(SIZE) if case.X.box(rank) is not None}
    for p in plans_of(case):
        assert without_order(p.adjoint()) == without_order(plan(case.Y, case.X, p.rank))
        assert p.adjoint().adjoint() == p


@TABLE
def test_every_send_has_its_receive(case: Case) -> None:
    plans = plans_of(case)
    sent, received = (
        {
            (a.rank, b, leg.team, leg.pattern): [shape_of(e.box) for e in edges(leg) if e.peer == b]
            for a in plans
            for leg in a.legs
            for b in {e.peer for e in edges(leg)}
        }
        for edges in (lambda leg: leg.sends, lambda leg: leg.receives)
    )
    assert sent == {(b, a, *leg): shapes for (a, b, *leg), shapes in received.items()}


@TABLE
def test_ranks_agree_on_pattern_and_teams(case: Case) -> None:
    plans = plans_of(case)
    assert {p.pattern for p in plans} == {case.pattern}
    for p in plans:
        assert len(p.legs) <= 2
        assert [leg.team for leg in p.legs] == sorted(leg.team for leg in p.legs)
        for leg in p.legs:
            assert all(leg.root == other.root for q in plans for other in q.legs if other.team == leg.team)
            assert not leg.team or p.rank in leg.team
            assert {edge.peer for edge in (*leg.sends, *leg.receives)} <= (set(leg.team) or set(range(SIZE)))


@TABLE
def test_gaps_and_adds_tell_the_truth(case: Case) -> None:
    """A point of the output receives several parts only if the plan says so, and nothing just in its gaps."""
    for p in plans_of(case):
        if p.shape_out is None:
            continue
        ones = {rank: torch.ones_like(block) for rank, block in random_blocks(case.X).items()}
        parts = applied(case.X, case.Y, ones, p.rank)
        assert p.adds_out or not parts.numel() or parts.max() <= 1
        untouched = torch.zeros(p.shape_out, dtype=torch.bool)
        for gap in p.gaps:
            assert not untouched[gap].any()  # gaps are disjoint
            untouched[gap] = True
        assert torch.equal(untouched, parts == 0)


def test_layouts_of_different_numbers_of_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 dims to 2"):
        plan(whole(Grid((1,), (0,)), (3,)), whole(Grid((1,), (0,)), (3, 3)), 0)


SIDE = 256
MANY = Grid((SIDE, SIDE), range(SIDE * SIDE))


def _many(name: str) -> tuple[Layout, Layout]:
    blocks = balanced_blocks(MANY, (5000, 7000))
    if name == "halo":
        return blocks, haloed(blocks, [(1, 1), (2, 2)])
    if name == "circular halo":
        return blocks, haloed(blocks, [(1, 1), (2, 2)], "circular")
    if name == "repartition":
        return blocks, balanced_blocks(Grid((128, 512), range(SIDE * SIDE)), (5000, 7000))
    if name == "all-gather":
        blocks = Layout(MANY, blocks.dims, (0,))
        return blocks, gathered(blocks, [1])
    same = copies(MANY, (0,), {(i,): (3, 5) for i in range(SIDE)})
    return same, same


@pytest.mark.parametrize("name", ["halo", "circular halo", "repartition", "all-gather", "all-reduce"])
def test_cost_on_65536_ranks(name: str) -> None:
    """A rank's plan holds its own edges: a table of all boxes took 1.8 s and 38 MB."""
    rank = 12345

    def seconds() -> float:
        began = time.perf_counter()
        plan(*_many(name), rank)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.1
    tracemalloc.start()
    try:
        made = plan(*_many(name), rank)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    assert made.legs
    assert made.pattern is {"all-gather": Pattern.ALL_GATHER, "all-reduce": Pattern.ALL_REDUCE}.get(
        name, Pattern.EXCHANGE
    )
