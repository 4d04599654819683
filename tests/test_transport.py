"""One conformance suite for all transports: every operator of the table, every dtype, awkward memory."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from cases import SIZE, Case, applied, cases, even, integers, line, random_blocks
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite import layout as lay
from distdl_lite.agreement import raise_together
from distdl_lite.grid import Grid
from distdl_lite.layout import shape_of
from distdl_lite.plan import plan
from distdl_lite.testing import count
from distdl_lite.transport import Transport
from distdl_lite.transport.sums import ENGINES

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


def operator(case: Case, transport: Transport) -> dl.Operator:
    return dl.Operator(plan(case.X, case.Y, transport.rank), transport, case.name)


def moved(case: Case, op: dl.Operator, x: dict[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The output on this rank for an input that every rank knows."""
    return op.apply(x[op.plan.rank].to(dtype) if op.plan.rank in x else torch.empty(0, dtype=dtype))


def check(case: Case, op: dl.Operator, x: dict[int, torch.Tensor], dtype: torch.dtype) -> None:
    y, wanted = moved(case, op, x, dtype), applied(case.X, case.Y, x, op.plan.rank)
    assert y.dtype is dtype
    assert torch.equal(y.to(torch.complex128).real, torch.empty(0) if wanted is None else wanted), case.name


@on_ranks(SIZE, mpi=True)
def test_operators_are_their_dense_matrices(world: dl.Partition) -> None:
    for case in cases():
        op = operator(case, world.world_transport)
        for seed in (0, 10):  # the second run finds the channel
            check(case, op, random_blocks(case.X, seed), torch.float64)
        check(case.swapped(), op.adjoint, random_blocks(case.Y, 20), torch.float64)


@on_ranks(SIZE, mpi=True)
def test_dtypes(world: dl.Partition) -> None:
    """Small integers are exact in every dtype."""
    for case in cases()[::3]:
        op, x = operator(case, world.world_transport), random_blocks(case.X, low=0)
        for dtype in (*FLOATS, *INTEGERS):
            check(case, op, x, dtype)


@on_ranks(SIZE, mpi=True)
def test_imaginary_parts(world: dl.Partition) -> None:
    total = lay.copies(line(*range(SIZE)), (), {(): (3,)})
    x = torch.tensor([1 + 2j, 3j, 4]) * (world.rank + 1)
    y = dl.Operator(plan(total, total, world.rank), world.world_transport).apply(x)
    assert torch.equal(y, torch.tensor([10 + 20j, 30j, 40]))


@on_ranks(SIZE, mpi=True)
def test_dtypes_that_are_moved_but_not_added(world: dl.Partition) -> None:
    for case in cases():
        op, x = operator(case, world.world_transport), random_blocks(case.X, low=0, high=2)
        if case.sums:
            with pytest.raises(TypeError, match="bool tensors can be moved but not added"):
                moved(case, op, x, torch.bool)
        else:
            check(case, op, x, torch.bool)
            check(case, op, x, torch.uint16)  # nor does torch add these


@on_ranks(SIZE, mpi=True)
def test_sums_of_halves_are_rounded_once(world: dl.Partition) -> None:
    """256 + 1 is 256 in bfloat16, 256 + 1 + 1 + 1 is 260."""
    grid = line(*range(SIZE))
    total = lay.copies(grid, (), {(): (2,)})
    x = torch.full((2,), 256.0 if world.rank == 0 else 1.0, dtype=torch.bfloat16)
    for Y in (total, lay.copies(line(2), (), {(): (2,)}), lay.whole(Grid((2,), (1, 3)), (2,)), even(line(1, 3), 2)):
        op = dl.Operator(plan(total, Y, world.rank), world.world_transport)
        y = op.apply(x)
        assert torch.equal(y, torch.full(y.shape, 260.0, dtype=torch.bfloat16)), op


@on_ranks(SIZE, mpi=True)
def test_memory_of_any_order_is_read_and_never_written(world: dl.Partition) -> None:
    """Transposed, sliced, expanded and channels_last inputs; the output is fresh memory."""
    for case in cases():
        op, blocks = operator(case, world.world_transport), random_blocks(case.X)
        for shape_x in strange(blocks):
            x = shape_x.get(world.rank, torch.empty(0, dtype=torch.float64))
            before, version = x.clone(), x._version
            y = op.apply(x)
            wanted = applied(case.X, case.Y, shape_x, world.rank)
            assert torch.equal(y, torch.empty(0) if wanted is None else wanted), case.name
            assert y.is_contiguous()
            y.fill_(77.0)
            assert x._version == version
            assert torch.equal(x, before), case.name


def strange(blocks: dict[int, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
    """The blocks in other memory orders, and one with stride 0."""
    backwards = {r: tuple(reversed(range(x.dim()))) for r, x in blocks.items()}
    reverse = {r: x.permute(backwards[r]).contiguous().permute(backwards[r]) for r, x in blocks.items()}
    sliced = {r: torch.stack([x, x + 1], -1)[..., 0] for r, x in blocks.items()}
    expanded = {r: torch.tensor(3.0 + r, dtype=x.dtype).expand(x.shape) for r, x in blocks.items()}
    made = [reverse, sliced, expanded]
    if all(x.dim() == 4 for x in blocks.values()):
        made.append({r: x.to(memory_format=torch.channels_last) for r, x in blocks.items()})
    return made


@on_ranks(SIZE, mpi=True)
def test_start_and_finish(world: dl.Partition) -> None:
    """What is started is finished once; other operators may move in between."""
    case = next(case for case in cases() if case.name == "rows to columns")
    one, other = (operator(case, world.world_transport) for _ in range(2))
    x = random_blocks(case.X)
    wanted = applied(case.X, case.Y, x, world.rank)
    pending = one.start(x[world.rank])
    with pytest.raises(RuntimeError, match="rows to columns: started again before it was finished"):
        one.start(x[world.rank])
    assert torch.equal(other.apply(x[world.rank]), wanted)
    assert torch.equal(one.finish(pending), wanted)
    with pytest.raises(RuntimeError, match="rows to columns: finished before it was started"):
        one.finish(pending)
    assert torch.equal(one.apply(x[world.rank]), wanted)


@on_ranks(SIZE, mpi=True)
def test_counts(world: dl.Partition) -> None:
    case = next(case for case in cases() if case.name == "rows to columns")
    op = operator(case, world.world_transport)
    x = random_blocks(case.X)[world.rank]
    with count() as outer:
        op.apply(x)
        with count() as inner:
            op.apply(x)
    assert (inner.messages, outer.messages) == (3, 6)
    assert outer.bytes == 2 * inner.bytes
    assert inner.bytes == 8 * sum(edge.size for edge in op.plan.legs[0].sends if edge.peer != world.rank)
    assert inner.by_label["rows to columns"].messages == 3
    assert 0 < inner.seconds < 60
    op.apply(x)
    assert inner.messages == 3
    team, transport = world.team, world.world_transport
    with count() as sums:
        transport.agree(team, 1)
        transport.all_reduce(team, torch.ones(5))
    assert (sums.messages, sums.bytes, list(sums.by_label)) == (1, 20, ["sums"])
    assert sums.seconds > sums.by_label["sums"].seconds
    everywhere = lay.copies(line(*range(SIZE)), (), {(): (7,)})
    with count() as halves:  # which travel as float32
        dl.Operator(plan(everywhere, everywhere, world.rank), transport).apply(torch.ones(7, dtype=torch.bfloat16))
    assert halves.bytes == 4 * 7 * (SIZE - 1)
    assert not world.world_transport.local["tallies"]


@on_ranks(SIZE, mpi=True)
def test_calls_that_no_operator_describes(world: dl.Partition) -> None:
    transport, everyone = world.world_transport, world.team
    assert transport.agree(everyone, 2**63) == 0
    assert transport.agree(transport.team([transport.rank]), 7) == 7
    assert transport.gather_objects(everyone, f"from {transport.rank}") == [f"from {r}" for r in range(SIZE)]
    assert transport.maxima(everyone, [transport.rank, -transport.rank]) == [3, 0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        x = torch.tensor([[transport.rank, -transport.rank]], dtype=dtype)
        for op, wanted in (("sum", [[6, -6]]), ("max", [[3, 0]]), ("min", [[0, -3]])):
            y = x.clone()
            assert transport.all_reduce(everyone, y, op) is y
            assert y.tolist() == wanted
    y = torch.full((2, 0, 3), 1.0)
    assert transport.all_reduce(everyone, y) is y
    x = integers((3, 2), seed=transport.rank)
    transport.broadcast(everyone, x, 2)
    assert torch.equal(x, integers((3, 2), seed=2))
    pair = transport.team((3, 0) if transport.rank in (0, 3) else (1, 2))
    assert pair is transport.team(list(pair))
    assert transport.gather_objects(pair, transport.rank) == list(pair)


@on_ranks(SIZE, mpi=True)
def test_errors_are_raised_together(world: dl.Partition) -> None:
    error = KeyError("later") if world.rank == 3 else ValueError("first") if world.rank == 1 else None
    with pytest.raises(ValueError, match="first"):
        raise_together(world.team, error)
    raise_together(world.team, None)


@on_ranks(SIZE, mpi=True)
def test_large_message(world: dl.Partition) -> None:
    """Past every eager limit, and both ways at once."""
    X, Y = even(line(0, 1, 2, 3), 2**20), even(line(3, 2, 1, 0), 2**20)
    op = dl.Operator(plan(X, Y, world.rank), world.world_transport)
    x = torch.arange(2**18, dtype=torch.float32) + world.rank
    assert torch.equal(op.apply(x), x - world.rank + (3 - world.rank))
    assert op.plan.shape_out == shape_of(Y.box(world.rank))


@on_ranks(SIZE, mpi=True)
def test_what_is_done_before_and_after_a_sum_is_done_once(world: dl.Partition) -> None:
    transport, everybody = world.world_transport, world.team
    transport.open_sums(everybody, "before and after")
    for engine, team, dtype in itertools.product(
        (*ENGINES, "auto"), (everybody, transport.team([world.rank])), (torch.float32, torch.bfloat16)
    ):
        x, y = torch.zeros(3, dtype=dtype), torch.zeros(2)
        sums = [
            transport.start_sum(team, t, engine, "before and after", partial(t.fill_, n), partial(t.mul_, 2))
            for n, t in ((1, x), (2, y))
        ]
        for pending in (*sums, *sums):
            assert pending.wait()
            assert pending.wait(0)
        assert x.tolist() == [2 * len(team)] * 3
        assert y.tolist() == [4 * len(team)] * 2
