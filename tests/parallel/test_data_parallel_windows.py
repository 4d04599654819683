"""Windows of backwards inside `no_sync`, and loops of unequal length inside `join`."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from copies import assert_gradients, assert_parameters, draw, mean_square, mlp, train, twins
from ranks import on_ranks
from torch import nn
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.testing import count, spmd

OPTIONS = [{}, {"bucket_mb": 1e-4}, {"overlap": False}, {"engine": "poll"}, {"engine": "thread"}]
SIZES = [[3, 1, 4, 1], [2, 0, 5, 2]]  # of the micro-batches of each rank


def square_sum(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum()


@pytest.mark.check("A9")
@on_ranks(2, mpi=True)
def test_a_window_of_uneven_micro_batches_is_one_batch(world: dl.Partition) -> None:
    for options in OPTIONS:
        dp, single = twins(mlp(3, 5, 2), world, average="sum", **options)
        for step in range(3):
            batches = [draw(n, 3, seed=10 * step + i) for i, n in enumerate(SIZES[world.rank])]
            dp.zero_grad()
            single.zero_grad()
            with count() as c:
                with dp.no_sync():
                    for batch in batches[:-1]:
                        square_sum(dp(batch)).backward()
                assert not c.collectives
                square_sum(dp(batches[-1])).backward()
            whole = torch.cat([draw(n, 3, seed=10 * step + i) for sizes in SIZES for i, n in enumerate(sizes)])
            (square_sum(single(whole)) / len(whole)).backward()
            assert_gradients(dp, single)
            assert c.by_label["sums"].collectives == len(dp._sync.buckets)
            assert len(dp._sync.buckets) > 1 or "bucket_mb" not in options


@pytest.mark.check("A10")
@on_ranks(2, mpi=True)
def test_forward_may_be_outside(world: dl.Partition) -> None:
    for options, forward_inside in itertools.product(OPTIONS, (False, True)):
        dp, single = twins(mlp(3, 5, 2), average="sum", **options)
        batches = [draw(n, 3, seed=i) for i, n in enumerate(SIZES[world.rank])]
        losses = [square_sum(dp(batch)) for batch in batches]
        with dp.no_sync():
            if forward_inside:
                losses = [square_sum(dp(batch)) for batch in batches]
            for loss in losses[:-1]:
                loss.backward()
        losses[-1].backward()
        whole = torch.cat([draw(n, 3, seed=i) for sizes in SIZES for i, n in enumerate(sizes)])
        (square_sum(single(whole)) / len(whole)).backward()
        assert_gradients(dp, single)


class Branch(nn.Module):
    """A layer that forward may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x: torch.Tensor, takes: bool) -> torch.Tensor:
        return self.always(x) + (self.sometimes(x) if takes else 0)


@pytest.mark.check("A10")
@on_ranks(2, mpi=True)
def test_gradients_add_up_without_zero_grad(world: dl.Partition) -> None:
    """Windows and synchronised backwards in any order, with a branch that ranks take at different times."""
    plan = [(True, "ff"), (False, "tf"), (True, "ft"), (True, "tt"), (False, "ff"), (False, "ft"), (True, "tf")]
    for options, average in itertools.product(OPTIONS, ("samples", "ranks")):
        dp, single = twins(Branch(), average=average, **options)
        for step, (syncs, takes) in enumerate(plan):
            x = draw(6, 3, seed=step)
            context = torch.enable_grad() if syncs else dp.no_sync()
            with context:
                mean_square(dp(x[3 * world.rank :][:3], takes[world.rank] == "t")).backward()
            (sum(mean_square(single(x[3 * r :][:3], takes[r] == "t")) for r in range(2)) / 2).backward()
            if syncs:
                assert_gradients(dp, single)


@pytest.mark.check("A10")
@on_ranks(2, mpi=True)
def test_gradients_may_be_kept_as_zeros(world: dl.Partition) -> None:
    dp, single = twins(mlp(3, 4, 2))
    for step in range(3):
        x = draw(4, 3, seed=step)
        dp.zero_grad(set_to_none=False)
        single.zero_grad(set_to_none=False)
        mean_square(dp(x[2 * world.rank :][:2])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A6")
@on_ranks(2, mpi=True)
def test_what_was_there_is_kept_where_nothing_weighs(world: dl.Partition) -> None:
    """No rank has a row, or one has: gradients of before stay, as where zeros are added to them."""
    empty, cases = draw(0, 3), [(0, 0), (0, 2), (3, 0)]
    for options, rows, windows, by_hand, average in itertools.product(
        OPTIONS, cases, (True, False), (True, False), ("samples", "sum")
    ):
        if average == "sum" and (windows or any(rows)):
            continue  # what was there counts as a sum over rows, or is refused, as below
        dp, single = twins(mlp(3, 4, 2), world, average=average, **options)
        x = draw(4, 3)
        if by_hand:
            for model in (dp, single):
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
        else:
            square_sum(dp(x[2 * world.rank :][:2])).backward()
            ((1 / 4 if average == "sum" else 1 / 2) * square_sum(single(x))).backward()
        if windows:
            with dp.no_sync():
                square_sum(dp(empty)).backward()
        batches = [draw(n, 3, seed=n) for n in rows]
        (mean_square if average == "samples" else square_sum)(dp(batches[world.rank])).backward()
        if any(rows):
            mean_square(single(torch.cat(batches))).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A6")
@on_ranks(2)
def test_a_rank_that_weighs_something_after_all(world: dl.Partition) -> None:
    """Its first forward has no row, the second has."""
    dp, single = twins(mlp(3, 4, 2))
    x = draw(4, 3)
    for model in (dp, single):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    mine = x[2 * world.rank :][:2]
    for first, second in ((mine[:0], mine), (mine, mine[:0])):
        loss = square_sum(dp(first)) + square_sum(dp(second))
        loss.backward()
        (square_sum(single(x)) / 2).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A13")
@on_ranks(2)
def test_a_frozen_parameter_keeps_its_gradient(world: dl.Partition) -> None:
    for options in OPTIONS:
        dp, single = twins(mlp(3, 4, 2), **options)
        for step in range(5):
            for model, rows in ((dp, slice(2 * world.rank, 2 * world.rank + 2)), (single, slice(0, 4))):
                model.get_parameter("module.0.weight" if model is dp else "0.weight").requires_grad_(step in (0, 4))
                mean_square(model(draw(4, 3, seed=step)[rows])).backward()
            assert_gradients(dp, single)


@pytest.mark.check("A10")
@on_ranks(2, mpi=True)
def test_sums_that_cannot_be_told_apart_are_refused(world: dl.Partition) -> None:
    for average in ("sum", "none"):
        dp, single = twins(mlp(3, 2), average=average)
        x = draw(2, 3)
        square_sum(dp(x)).backward()
        text = f'grad holds a sum over ranks, .* with average="{average}" call zero_grad'
        with dp.no_sync(), pytest.raises(RuntimeError, match=text):
            square_sum(dp(x)).backward()
        square_sum(dp(x)).backward()  # a synchronised one may follow
        factor = {"sum": 1 / 2, "none": 2.0}[average]
        for _ in range(2):
            (factor * square_sum(single(x))).backward()
        assert_gradients(dp, single)
        for set_to_none in (True, False):
            dp.zero_grad(set_to_none)
            single.zero_grad()
            with dp.no_sync():
                square_sum(dp(x)).backward()
            square_sum(dp(x)).backward()
            ({"sum": 1 / 2, "none": 4.0}[average] * square_sum(single(x))).backward()
            assert_gradients(dp, single)


def epochs(world: dl.Partition, lengths: Sequence[Sequence[int]], rows: Sequence[int], **options: object) -> None:
    """Epochs of different lengths on the ranks; one process trains on the rows of those that still have some."""
    torch.manual_seed(0)
    dp, single = twins(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), world, **options)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (dp, single)]
    for number, steps in enumerate(lengths):
        batches = [[draw(rows[r], 3, seed=100 * number + 10 * r + s) for s in range(n)] for r, n in enumerate(steps)]
        with dp.join():
            for batch in batches[world.rank]:
                optimizers[0].zero_grad()
                mean_square(dp(batch)).backward()
                optimizers[0].step()
        for step in range(max(steps)):
            there = [mine[step] for mine in batches if step < len(mine)]
            optimizers[1].zero_grad()
            if options.get("average") == "ranks":
                (sum(mean_square(single(batch)) for batch in there) / len(there)).backward()
            else:
                mean_square(single(torch.cat(there))).backward()
            optimizers[1].step()
        assert_parameters(dp, single, 1e-12)
        dp.check_replicas()


@pytest.mark.check("A7")
@on_ranks(3, mpi=True)
def test_unequal_numbers_of_steps(world: dl.Partition) -> None:
    for options in (*OPTIONS, {"average": "ranks"}):
        epochs(
            world, [(2, 5, 3), (4, 1, 1), (2, 2, 2), (0, 3, 1), (1, 2, 0), (0, 0, 0), (2, 0, 2)], (2, 1, 3), **options
        )


@pytest.mark.check("A7")
@on_ranks(3, mpi=True)
def test_optimizers_go_on_from_where_the_last_rank_was(world: dl.Partition) -> None:
    """Also after a loop in which some rank has made no step at all, and with another learning rate at its end."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), 0.01, amsgrad=True)

    def momentum(model: nn.Module) -> torch.optim.Optimizer:
        layers = list(model.children()) if isinstance(model, nn.Sequential) else list(model.module.children())
        groups = [{"params": layers[0].parameters()}, {"params": layers[2].parameters(), "lr": 0.02}]
        return torch.optim.SGD(groups, 0.1, momentum=0.9)

    for make, given in itertools.product((adam, momentum), (True, False)):
        dp, single = twins(mlp(3, 4, 2), world)
        optimizers = [make(dp), make(single)]
        if not given:
            wrapped = dl.DataParallelOptimizer(optimizers[0], blocking=True)
            module = dp.module
            del dp
            dp = dl.DataParallel(module, world, wrapped, blocking_parameter_updates=True)
        for number, steps in enumerate([(0, 2, 1), (3, 1, 0), (1, 1, 2), (2, 2, 2)]):
            data = [[draw(2, 3, seed=100 * number + 10 * r + s) for s in range(n)] for r, n in enumerate(steps)]
            with dp.join(*optimizers[:1] * given):
                for batch in data[world.rank]:
                    train(dp, optimizers[0], [batch])
                    optimizers[0].param_groups[-1]["lr"] *= 0.9
            for step in range(max(steps)):
                train(single, optimizers[1], [torch.cat([mine[step] for mine in data if step < len(mine)])])
                optimizers[1].param_groups[-1]["lr"] *= 0.9
            assert_parameters(dp, single, 1e-12)
            dp.check_replicas()


@pytest.mark.check("A7")
@on_ranks(3, mpi=True)
def test_joins_that_do_not_fit(world: dl.Partition) -> None:
    """States go by place: another order would mix them up."""
    other = world.rank == 2
    square = mlp(3, 3, 3)
    dp, single = twins(square, world)
    parameters = list(dp.parameters())
    sgd = torch.optim.SGD(parameters, 0.1)
    cases: list[tuple[list[Any], str]] = [
        ([torch.optim.Adam(parameters[::-1])], "parameter 0 of optimizer 0='2.bias', rank 0 '0.weight'"),
        ([sgd], "type of optimizer 0='SGD', rank 0 'Adam'"),
        ([], "number of optimizers=0, rank 0 1"),
        ([torch.optim.Adam(parameters[:1])], "group sizes of optimizer 0=[1], rank 0 [4]"),
        ([torch.optim.Adam([{"params": [p]} for p in parameters])], "group sizes of optimizer 0=[1, 1, 1, 1], rank 0 [4]"),
        (["Adam"], "type of optimizer 0='str', rank 0 'Adam'"),
    ]  # fmt: skip
    usual = [torch.optim.Adam(parameters)]
    for given, text in cases:
        with (
            pytest.raises(ValueError, match=re.escape(f"DataParallel: rank 2 has {text}")),
            dp.join(*(given if other else usual)),
        ):
            raise AssertionError("inside")
    second, _ = twins(mlp(3, 2), world)
    with dp.join(*usual), pytest.raises(RuntimeError, match="put both modules into one container"), second.join():
        raise AssertionError("inside")
    with second.join():
        mean_square(dp(draw(6, 3)[2 * world.rank :][:2])).backward()
    mean_square(single(draw(6, 3))).backward()
    assert_gradients(dp, single)


@pytest.mark.check("A7")
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@on_ranks(3, mpi=True)
def test_a_rank_that_raises_inside_a_join(world: dl.Partition) -> None:
    """The others get its text where they are: in backward, in the next forward or at the end of the loop."""
    wheres = ("loop", "backward", "no_sync", "together")
    for update, engine, failing, where in itertools.product(
        ("now", "deferred"), ("inline", "thread"), (0, 1, 2), wheres
    ):
        module = mlp(3, 4, 2)
        optimizer = dl.DataParallelOptimizer(torch.optim.SGD(module.parameters(), 0.1))
        dp = dl.DataParallel(module, world, optimizer, update=update, engine=engine, bucket_mb=1e-5)

        def loop(
            dp: dl.DataParallel = dp, optimizer: Any = optimizer, failing: int = failing, where: str = where
        ) -> None:
            with dp.join():
                for step in range([1, 2, 4][world.rank]):
                    optimizer.zero_grad()
                    rows = draw(2, 3).requires_grad_()
                    if step == 0 and where == "backward" and world.rank == failing:
                        rows.register_hook(lambda g: 1 / 0)
                    with dp.no_sync() if where == "no_sync" and world.rank == failing else contextlib.nullcontext():
                        dp(rows).square().sum().backward(create_graph=where == "together")
                    optimizer.step()
                    if world.rank == failing and where != "together":
                        _ = 1 / 0

        if where == "together":
            assert_refused(world, world, loop, "backward(create_graph=True) would lose", RuntimeError)
        elif world.rank == failing:
            with pytest.raises(ZeroDivisionError):
                loop()
        else:
            with pytest.raises(RuntimeError, match=r"^DataParallel: ZeroDivisionError: division by zero$"):
                loop()
        dp.zero_grad()
        with dp.join():
            dp(draw(1, 3)).sum().backward()
        dp.synchronize()
        dp.check_replicas()


@pytest.mark.check("A7")
@on_ranks(2)
def test_join_sends_nothing_of_its_own(world: dl.Partition) -> None:
    dp, _ = twins(mlp(3, 4, 2))
    steps = [4, 2][world.rank]
    with count() as c, dp.join():
        for step in range(steps):
            mean_square(dp(draw(2, 3, seed=step))).backward()
        assert c.collectives == steps
    assert all(p.grad is not None for p in dp.parameters())
    # the steps of the longest, one in which all have ended, who is ahead, and the parameters
    assert c.collectives == 4 + 1 + 1 + 1


@pytest.mark.check("A7")
@pytest.mark.parametrize("mode", ["root", "mean", "none"])
def test_buffers_of_ranks_that_ended_do_not_come_back(mode: str) -> None:
    def body(world: dl.Partition) -> None:
        for steps in ([1, 4], [4, 1], [0, 3]):
            dp, _ = twins(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), sync_buffers=mode)
            with dp.join():
                for step in range(steps[world.rank]):
                    mean_square(dp(draw(4, 3, seed=step))).backward()
            assert int(dp.module[1].num_batches_tracked) == max(steps)
            told = world.allgather_data([b.tolist() for b in dp.buffers()])
            assert told[0] == told[1]

    spmd(2, body)


@pytest.mark.check("A7")
def test_on_one_rank_windows_and_join_do_nothing() -> None:
    def body(world: dl.Partition) -> None:
        for average in ("samples", "sum"):
            dp, single = twins(mlp(3, 2), average=average)
            x = draw(4, 3)
            with dp.join():
                with dp.no_sync():
                    square_sum(dp(x[:1])).backward()
                square_sum(dp(x[1:])).backward()
            (square_sum(single(x)) / (4 if average == "sum" else 1)).backward()
            assert_gradients(dp, single)

    spmd(1, body)
