"""One conformance suite for all transports: every operator of the table, every dtype, awkward memory."""

from __future__ import annotations

import itertools
from functools import partial
from time import sleep

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
from distdl_lite.transport import RowsByRank, Transport
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


@on_ranks(SIZE, mpi=True)
def test_what_was_sent_may_be_overwritten_when_the_call_has_returned(world: dl.Partition) -> None:
    """Also while other ranks have not come yet."""
    for case in cases():
        op, blocks = operator(case, world.world_transport), random_blocks(case.X)
        x = blocks[world.rank].clone() if world.rank in blocks else torch.empty(0, dtype=torch.float64)
        if world.rank % 2:
            sleep(0.005)
        y, wanted = op.apply(x), applied(case.X, case.Y, blocks, world.rank)
        x.fill_(77.0)
        assert torch.equal(y, torch.empty(0) if wanted is None else wanted), case.name


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
    assert transport.agree(everyone, 2**61 + transport.rank) == 2**63 + 6
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


@on_ranks(SIZE, mpi=True)
def test_gradients_of_any_order_are_movements(world: dl.Partition) -> None:
    for case in cases()[1::3]:
        op = operator(case, world.world_transport)
        op.graph = op.adjoint.graph = True
        blocks = {"x": random_blocks(case.X, 0), "w": random_blocks(case.Y, 1), "v": random_blocks(case.X, 2)}
        nothing = torch.empty(0, dtype=torch.float64)
        x, w, v = (blocks[name].get(world.rank, nothing).clone().requires_grad_() for name in "xwv")
        (gradient,) = torch.autograd.grad(op(x), x, w, create_graph=True)
        (second,) = torch.autograd.grad(gradient, w, v.detach())
        for found, wanted in (
            (gradient.detach(), applied(case.Y, case.X, blocks["w"], world.rank)),
            (second, applied(case.X, case.Y, blocks["v"], world.rank)),
        ):
            assert wanted is None or torch.equal(found, wanted), case.name


@on_ranks(SIZE, mpi=True)
def test_agreements_that_differ(world: dl.Partition) -> None:
    """Votes of overlapping teams may be open at once, and an open one is closed by the next."""
    transport, everyone = world.world_transport, world.team
    even_ranks = transport.team((0, 2))
    for _ in range(3):
        transport.start_agreeing(everyone, 10**world.rank)
        if world.rank in even_ranks:
            transport.start_agreeing(even_ranks, 2**63 + world.rank)
            assert transport.agreed(even_ranks) == 2
        assert transport.agreed(everyone) == 1111
        transport.start_agreeing(everyone, 5)
        assert transport.agree(everyone, 1) == SIZE


@on_ranks(SIZE, mpi=True)
def test_large_and_empty_host_data(world: dl.Partition) -> None:
    transport, team = world.world_transport, world.team
    told = transport.gather_objects(team, b"x" * (world.rank << 20))
    assert [len(found) for found in told] == [rank << 20 for rank in range(SIZE)]
    assert transport.maxima(team, []) == []
    assert transport.maxima(team, [world.rank] * 100_000) == [SIZE - 1] * 100_000


@on_ranks(SIZE, mpi=True)
def test_operators_and_sums_under_way_together(world: dl.Partition) -> None:
    """Sums of two lanes start in another order on each rank, two operators end in the other one than they began in."""
    transport, team = world.world_transport, world.team
    case = next(case for case in cases() if case.name == "rows to columns")
    one, other, x = operator(case, transport), operator(case.swapped(), transport), random_blocks(case.X)
    back = random_blocks(case.Y, 5)
    for lane in "ab":
        transport.open_sums(team, lane)
    for turn in range(4):
        totals = {lane: torch.full((10**turn,), float(world.rank)) for lane in "ab"}
        order = "ab" if (world.rank + turn) % 2 else "ba"
        sums = [transport.start_sum(team, totals[lane], lane=lane) for lane in order]
        began, left = one.start(x[world.rank]), torch.empty(3)
        rounded = torch.full((3,), 1 + 2.0**-12)
        halves = transport.start_rounded_sum(team, rounded, left, torch.bfloat16, lane="a")
        assert torch.equal(other.apply(back[world.rank]), applied(case.Y, case.X, back, world.rank))
        assert torch.equal(one.finish(began), applied(case.X, case.Y, x, world.rank))
        for pending in (halves, *sums):
            while not pending.wait(0.001):
                pass
        assert all(total.eq(6).all() for total in totals.values())
        kept = transport.all_reduce(team, left.clone())
        torch.testing.assert_close(rounded + kept, torch.full((3,), 4 + 2.0**-10), rtol=0, atol=0)


@on_ranks(SIZE, mpi=True)
def test_rows_go_to_any_ranks(world: dl.Partition) -> None:
    """Uneven, none at all, in an order of the ranks that is not theirs, while other calls come between."""
    transport, ranks = world.world_transport, (2, 0, 3)
    if world.rank not in ranks:
        return
    place = ranks.index(world.rank)
    given = [[1, 0, 2], [0, 3, 1], [2, 0, 0]]
    rows = torch.cat([torch.full((n, 2), 10.0 * place + to) for to, n in enumerate(given[place])])
    taken = [counts[place] for counts in given]
    into = torch.empty(sum(taken), 2)
    moving = transport.exchange_rows(ranks, RowsByRank(rows, given[place]), RowsByRank(into, taken))
    assert transport.agree(transport.team(ranks), 1) == 3
    wanted = torch.cat([torch.full((n, 2), 10.0 * of + place) for of, n in enumerate(taken)])
    assert torch.equal(moving.finish(), wanted)
    assert moving.test()


@on_ranks(SIZE, mpi=True)
def test_a_single_element_of_any_stride(world: dl.Partition) -> None:
    """It counts as contiguous: an expanded gradient, as that of a sum, and one of every fourth element."""
    transport, everyone, pair = world.world_transport, line(*range(SIZE)), line(0, 3)
    for x in (torch.tensor(2.0).expand(1), torch.arange(2.0, 10.0)[::8], torch.ones(5, 5)[::5, ::5].mul(2)):
        one = {(): tuple(x.shape)}
        for grid in (everyone, pair):
            total = lay.copies(grid, (), one)
            for Y in (total, lay.copies(line(3), (), one)):
                op = dl.Operator(plan(total, Y, world.rank), transport)
                if op.plan.legs:
                    y = op.apply(x)
                    assert not y.numel() or y.item() == 2 * grid.size
                    back = op.adjoint.apply(x if y.numel() else torch.empty(0))
                    assert back.item() == (2 * grid.size if Y is total else 2)
        cut = even(everyone, SIZE) if x.dim() == 1 else None
        if cut is not None:
            whole = dl.Operator(plan(cut, lay.gathered(cut, [0]), world.rank), transport)
            assert whole.apply(x).tolist() == [2.0] * SIZE
            assert whole.adjoint.apply(torch.ones(SIZE)).item() == SIZE
        team = world.team
        assert transport.all_reduce(team, x.clone()).item() == 2 * SIZE
        transport.broadcast(team, copy := x.clone(), 1)
        assert copy.item() == 2


@on_ranks(SIZE, mpi=True)
def test_everything_that_moves(world: dl.Partition) -> None:
    check_everything(world, "cpu")


@pytest.mark.cuda
@on_ranks(SIZE, mpi=True)
def test_everything_that_moves_while_a_kernel_still_writes_it(world: dl.Partition) -> None:
    check_everything(world, "cuda")


def check_everything(world: dl.Partition, device: str) -> None:
    transport, team = world.world_transport, world.team
    transport.open_sums(team)
    size = 1 if device == "cpu" else 2000
    slow, mine = torch.rand(size, size, device=device), float(world.rank)

    def late(x: torch.Tensor) -> torch.Tensor:
        """The tensor, which the device writes after it has been busy for a while."""
        y = x.new_zeros(x.shape).to(device)
        for _ in range(60):
            torch.mm(slow, slow)
        return y.copy_(x)

    for case in cases()[::4]:
        op, x = operator(case, transport), random_blocks(case.X, low=0)
        for dtype in (torch.float32, torch.bfloat16):
            block = x[world.rank].to(dtype) if world.rank in x else torch.empty(0, dtype=dtype)
            y, wanted = op.apply(late(block)) * 1, applied(case.X, case.Y, x, world.rank)
            assert y.device.type == device
            assert wanted is None or torch.equal(y.cpu().double(), wanted), case.name
    for dtype in (torch.float32, torch.bfloat16):
        total, later, copy = (late(torch.full((5,), mine, dtype=dtype)) for _ in range(3))
        transport.all_reduce(team, total)
        pending = transport.start_sum(team, later)
        transport.broadcast(team, copy, 2)
        assert pending.wait()
        assert (total.tolist(), later.tolist(), copy.tolist()) == ([6.0] * 5, [6.0] * 5, [2.0] * 5)
    rounded, left = late(torch.full((5,), mine)), torch.empty(5, device=device)
    assert transport.start_rounded_sum(team, rounded, left, torch.float16).wait()
    assert (rounded.tolist(), left.tolist()) == ([6.0] * 5, [0.0] * 5)
    rows, into = late(torch.full((SIZE, 3), mine)), torch.empty(SIZE, 3, device=device)
    moving = transport.exchange_rows(range(SIZE), RowsByRank(rows, [1] * SIZE), RowsByRank(into, [1] * SIZE))
    assert moving.finish()[:, 0].tolist() == list(range(SIZE))
