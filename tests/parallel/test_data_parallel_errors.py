"""Wrong uses of `DataParallel` are errors on all ranks, and failed backwards leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from copies import assert_gradients, draw, mean_square, mlp, twins
from ranks import on_ranks
from torch import nn
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.testing import spmd
from distdl_lite.transport.sums import ENGINES

ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"module": torch.tanh}, TypeError, "DataParallel: a torch.nn.Module is needed, not <built-in method tanh"),
    ({"module": dl.tagi.Sequential()}, TypeError, "no gradients to sum; use dl.tagi.DDPSequential"),
    ({"P": 3}, TypeError, "P must be a Partition or a communicator, not 3"),
    ({"P": "world"}, TypeError, "P must be a Partition or a communicator, not 'world'"),
    ({"average": "mean"}, ValueError, "average must be one of samples, sum, ranks, none, not 'mean'"),
    ({"average": None}, ValueError, "average must be one of samples, sum, ranks, none, not None"),
    ({"sync_buffers": True}, ValueError, "sync_buffers must be one of root, mean, none, not True"),
    ({"engine": "mpi"}, ValueError, "engine must be one of auto, inline, thread, poll, not 'mpi'"),
    ({"init": "root"}, ValueError, "init must be one of broadcast, check, none, not 'root'"),
    ({"overlap": 1}, TypeError, "overlap must be a bool, not 1"),
    ({"dim": 0.0}, TypeError, "dim must be an integer, not 0.0"),
    ({"dim": True}, TypeError, "dim must be an integer, not True"),
    ({"bucket_mb": "4"}, TypeError, "bucket_mb must be a number, not '4'"),
    ({"bucket_mb": True}, TypeError, "bucket_mb must be a number, not True"),
    ({"bucket_mb": 0}, ValueError, "bucket_mb must be positive and finite, not 0"),
    ({"bucket_mb": float("inf")}, ValueError, "bucket_mb must be positive and finite, not inf"),
    ({"timeout": -1}, ValueError, "timeout must be positive and finite, not -1"),
    ({"timeout": float("nan")}, ValueError, "timeout must be positive and finite, not nan"),
    ({"timeout": float("inf")}, ValueError, "timeout must be positive and finite, not inf"),
    ({"comm_hook": "fp16"}, TypeError, "comm_hook must be callable, not 'fp16'"),
    ({"module": nn.LazyLinear(3)}, ValueError, "the module has lazy parameters; call its forward once before"),
    ({"update": "later"}, ValueError, "update must be one of now, deferred, not 'later'"),
    ({"update": "deferred"}, ValueError, 'update="deferred" needs the optimizer'),
    ({"blocking_parameter_updates": 1}, TypeError, "blocking_parameter_updates must be a bool, not 1"),
    ({"buckets": 3}, TypeError, "unexpected keyword argument 'buckets'"),
]


@pytest.mark.check("A39")
@pytest.mark.parametrize(("arguments", "error", "text"), ARGUMENTS, ids=lambda value: None)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        spmd(1, lambda world: dl.DataParallel(**{"module": mlp(3, 2), **arguments}))
    assert text in str(raised.value)


@pytest.mark.check("A39")
@on_ranks(3, mpi=True)
def test_bad_arguments_of_one_rank(world: dl.Partition) -> None:
    """All ranks of P raise, and are still together."""
    P = world.create_partition_inclusive([0, 2])
    for arguments, error, text in ARGUMENTS:
        if arguments.keys() & {"P", "buckets"}:  # who is in it, and what is called, must be known
            continue
        bad = arguments if world.rank == 2 else {}
        if P.active:
            assert_refused(world, P, lambda b=bad: dl.DataParallel(**{"module": mlp(3, 2), "P": P, **b}), text, error)
    with pytest.raises(TypeError, match="Module is needed, not None") if world.rank == 1 else contextlib.nullcontext():
        dl.DataParallel(None if world.rank == 1 else mlp(3, 2), P)  # outside P


def refused(world: dl.Partition, make: Callable[[], Any], text: str, error: type[Exception] = ValueError) -> None:
    began = time.monotonic()
    assert_refused(world, world, make, text, error)
    assert time.monotonic() - began < 10  # on a busy machine; alone, below 0.1


@pytest.mark.check("A36")
@pytest.mark.parametrize("ranks", [2, 3])
def test_different_models(ranks: int) -> None:
    def body(world: dl.Partition) -> None:
        last = world.rank == ranks - 1
        other = [
            (mlp(3, 5, 2), rf"rank {ranks - 1} has ('0.weight', (5, 3), 'float64'), rank 0 ('0.weight', (4, 3), 'float64')"),
            (mlp(3, 4, 2).float(), f"rank {ranks - 1} has ('0.weight', (4, 3), 'float32'), rank 0 ('0.weight', (4, 3)"),
            (mlp(3, 4), f"the ranks hold different modules: of ranks 0 and {ranks - 1}, one lacks 2.weight"),
            (mlp(3, 4, 2, 2), f"the ranks hold different modules: of ranks 0 and {ranks - 1}, one lacks 4.weight"),
            (nn.Sequential(*mlp(3, 4, 2), nn.BatchNorm1d(2)), "one lacks 3.weight"),
            (nn.Tanh(), "one lacks 0.weight"),
            (mlp(3, 4, 2).to("meta"), f"rank {ranks - 1} has ('0.weight', (4, 3), 'float64', 'meta'), rank 0 ('0.weight',"),
        ]  # fmt: skip
        for module, text in other:
            refused(world, lambda m=module: dl.DataParallel(m if last else mlp(3, 4, 2)), text)
        without_data = "0.weight, 0.bias of all ranks is on the device meta, without data"
        refused(world, lambda: dl.DataParallel(mlp(3, 4).to("meta")), without_data)
        dl.DataParallel(mlp(3, 4, 2))(draw(2, 3)).sum().backward()  # all are still together

    spmd(ranks, body)


@pytest.mark.check("A36")
@on_ranks(3, mpi=True)
def test_different_options(world: dl.Partition) -> None:
    changes = {"average": "sum", "sync_buffers": "none", "engine": "inline", "overlap": False, "init": "check"}
    for name, value in {**changes, "bucket_mb": 1.0, "dim": -1, "timeout": 5}.items():
        options = {name: value} if world.rank == 1 else {}
        refused(
            world,
            lambda o=options: dl.DataParallel(mlp(3, 2), world, **o),
            f"DataParallel: rank 1 has {name}={value!r}, rank 0",
        )


@pytest.mark.check("A36")
@on_ranks(2, mpi=True)
def test_different_optimizers(world: dl.Partition) -> None:
    """Their steps would let the replicas come apart."""
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    cases: list[tuple[Callable[[list[Any]], Any], str]] = [
        (lambda p: dl.DataParallelOptimizer(sgd(p, 0.2)), "rank 1 has optimizer of 0.weight=\"SGD {'lr': 0.2,"),
        (lambda p: dl.DataParallelOptimizer(adam(p, 0.1)), "rank 1 has optimizer of 0.weight=\"Adam {'lr': 0.1,"),
        (lambda p: dl.DataParallelOptimizer(sgd(p[:2], 0.1)), "rank 1 has optimizer of 2.weight=None, rank 0"),
        (lambda p: None, "rank 1 has optimizer of 0.weight=None, rank 0"),
    ]
    for make, text in cases:
        module = mlp(3, 4, 2)
        usual = dl.DataParallelOptimizer(sgd(module.parameters(), 0.1))
        optimizer = make(list(module.parameters())) if world.rank else usual
        refused(world, lambda m=module, o=optimizer: dl.DataParallel(m, world, o), text)
    module = mlp(3, 4, 2)
    backwards = list(module.parameters())[:: 1 - 2 * world.rank]
    optimizer = dl.DataParallelOptimizer(adam(backwards, 0.1))  # each rank may have an order of its own
    dp = dl.DataParallel(module, world, optimizer, update="deferred")
    for _ in range(2):
        mean_square(dp(draw(2, 3))).backward()
        optimizer.step()
    dp.check_replicas()


@pytest.mark.check("A36")
@on_ranks(2)
def test_models_that_differ_later(world: dl.Partition) -> None:
    dp = dl.DataParallel(mlp(3, 2))
    dp.module.append(nn.Linear(2, 2 + world.rank).double())
    refused(world, lambda: dp(draw(2, 3)), "rank 1 has ('1.weight', (3, 2), 'float64'), rank 0 ('1.weight', (2, 2)")


@on_ranks(2)
def test_tensors_of_another_shape_inside_the_parameters(world: dl.Partition) -> None:
    """What pruning and growing a layer in place leave."""

    def grow(layers: nn.Sequential) -> None:
        layers[0].weight.data, layers[0].bias.data, layers[2].weight.data = draw(5, 3), draw(5), draw(2, 5)

    for options in ({}, {"engine": "thread", "bucket_mb": 1e-5}):
        dp, single = twins(mlp(3, 4, 2), **options)
        x = draw(6, 3)
        mean_square(dp(x[3 * world.rank :][:3])).backward()
        for module in (dp.module, single):
            grow(module)
            module.zero_grad()
        mean_square(dp(x[3 * world.rank :][:3])).backward()
        mean_square(single(x)).backward()
        assert_gradients(dp, single)
        dp.zero_grad()
        if world.rank:
            dp.module[0].weight.data = draw(5, 3)[:, :2]
        text = "parameters were replaced, or have another dtype" if world.rank else "backward failed on another rank"
        with pytest.raises(RuntimeError, match=text):
            mean_square(dp(x[:3, : 3 - world.rank])).backward()


@on_ranks(2, mpi=True)
def test_a_module_that_changes_on_one_rank_alone(world: dl.Partition) -> None:
    """The other is in backward; with deferred updates it finds out in the next forward."""
    for engine, update, norm in itertools.product(("thread", "inline"), ("now", "deferred"), (False, True)):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2) if norm else nn.Tanh())
        optimizer = dl.DataParallelOptimizer(torch.optim.SGD(module.parameters(), lr=0.1))
        dp = dl.DataParallel(module, world, optimizer, update=update, engine=engine, bucket_mb=1e-5)

        def steps(number: int, dp: dl.DataParallel = dp, module: nn.Sequential = module) -> None:
            for _ in range(number):
                dp(torch.ones(2, 3, dtype=module[0].weight.dtype)).sum().backward()

        steps(1)
        if world.rank:
            dp.double()
        text = "replaced, or have another dtype or shape, on some ranks alone" if world.rank else "backward failed on"
        with pytest.raises(RuntimeError, match=text):
            steps(2)


@pytest.mark.check("A20")
@on_ranks(2, mpi=True)
def test_sparse_gradients(world: dl.Partition) -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.table, self.bag = nn.Embedding(5, 2, sparse=sparse), nn.EmbeddingBag(5, 2)

    text = "sparse gradients are not summed; build ['table'] with sparse=False"
    refused(world, lambda: dl.DataParallel(Words(True)), text, TypeError)
    refused(world, lambda: dl.DataParallel(Words(world.rank == 1)), text, TypeError)
    refused(world, lambda: dl.DataParallel(nn.EmbeddingBag(5, 2, sparse=True)), "build ['EmbeddingBag']", TypeError)
    dl.DataParallel(Words(False))


@pytest.mark.check("A20")
@on_ranks(2)
def test_sparse_gradients_without_a_layer_that_says_so(world: dl.Partition) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(draw(5, 2))

        def forward(self, words: torch.Tensor, sparse: bool) -> torch.Tensor:
            return nn.functional.embedding(words, self.table, sparse=sparse)

    for engine in ENGINES:
        dp = dl.DataParallel(Words(), engine=engine, bucket_mb=1e-5)
        text = "DataParallel: the gradient of table is sparse, and is not summed"
        for sparse in (True, world.rank == 1, world.rank == 0):
            dp.zero_grad()
            refused(world, lambda dp=dp, s=sparse: dp(torch.tensor([1, 2]), s).sum().backward(), text, TypeError)


@pytest.mark.check("A20")
def test_sparse_gradients_on_one_rank() -> None:
    with pytest.raises(TypeError, match=r"build \['Embedding'\] with sparse=False"):
        spmd(1, lambda world: dl.DataParallel(nn.Embedding(5, 2, sparse=True)))


class Breaks(torch.autograd.Function):
    """The identity, which cannot be gone back through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("broke in backward")


@pytest.mark.check("A12")
@on_ranks(3, mpi=True)
def test_failed_backwards(world: dl.Partition) -> None:
    """Also of one rank alone: at its next backward all others know."""
    for options in (
        {},
        {"engine": "thread", "bucket_mb": 1e-5},
        {"overlap": False},
        {"engine": "thread"},
        {"engine": "poll", "bucket_mb": 1e-5},
    ):
        dp, single = twins(mlp(3, 4, 4, 2), world, **options)
        x = draw(6, 3)
        mine = x[2 * world.rank :][:2]
        for failing in ((0, 1, 2), (1,), (0, 2), (0, 1, 2), (2,)):
            broken = world.rank in failing
            hidden = dp.module[:3](mine)
            loss = mean_square(dp(Breaks.apply(mine.clone().requires_grad_()) if broken else mine)) + hidden.sum()
            if broken:
                with pytest.raises(ArithmeticError, match="broke in backward"):
                    loss.backward()
                dp.zero_grad()
                mean_square(dp(mine)).backward()
            else:
                with pytest.raises(RuntimeError, match="backward failed on another rank, whose gradients are lacking"):
                    loss.backward()
                dp.zero_grad()
                mean_square(dp(mine)).backward()
            single.zero_grad()
            mean_square(single(x)).backward()
            assert_gradients(dp, single)


@pytest.mark.check("A12")
@on_ranks(2)
def test_rows_of_failed_backwards_do_not_count(world: dl.Partition) -> None:
    """Of one rank or of all, whether a window follows or a backward that sums."""
    for broken, windows, overlap in itertools.product(([0], [0, 1]), (0, 1), (True, False)):
        dp, single = twins(mlp(3, 4, 2), average="sum", overlap=overlap)
        x = draw(6, 3)
        mine = x[3 * world.rank :][:3]
        breaks = world.rank in broken
        hidden = dp.module[0](mine)
        loss = dp(Breaks.apply(mine.clone().requires_grad_()) if breaks else mine).sum() + hidden.sum()
        with pytest.raises(ArithmeticError if breaks else RuntimeError):
            loss.backward()
        dp.zero_grad()
        parts = mine.split([1, 2]) if windows else [mine]
        with dp.no_sync():
            for part in parts[:-1]:
                dp(part).square().sum().backward()
        dp(parts[-1]).square().sum().backward()
        (single(x).square().sum() / 6).backward()
        assert_gradients(dp, single)


@pytest.mark.check("A8")
@on_ranks(3, mpi=True)
def test_weights_that_are_none(world: dl.Partition) -> None:
    """They travel with the gradients: all ranks raise, and go on from there."""
    text = "DataParallel: the loss_weight of some rank is negative or not finite"
    x = draw(6, 3)
    mine = x[2 * world.rank :][:2]
    cases: list[dict[str, Any]] = [
        {},
        {"engine": "thread", "bucket_mb": 1e-5},
        {"average": "sum", "engine": "poll"},
        {"norm": True},
    ]
    for options, bad in itertools.product(cases, (math.nan, math.inf, -1.0)):
        model = nn.Sequential(*mlp(3, 4, 2), *([dl.SyncBatchNorm(2, P=world).double()] if "norm" in options else []))
        dp, single = twins(model, world, **{name: value for name, value in options.items() if name != "norm"})
        loss = mean_square(dp(mine))
        dp.weight = bad if world.rank == 1 else 2
        refused(world, loss.backward, text)
        for weighted in (dp, single):
            weighted.zero_grad()
        (dp(mine).square().sum() / (2 if dp._options.average == "sum" else 4)).backward()
        if "norm" not in options:
            mean_square(single(x)).backward()
            assert_gradients(dp, single)
    optimizer = dl.DataParallelOptimizer(torch.optim.SGD(single.parameters(), 0.1))
    dp = dl.DataParallel(single[:3], world, optimizer, update="deferred", bucket_mb=1e-5)
    before = copy.deepcopy(dp.state_dict())
    for step in range(2):
        dp.weight = math.nan if world.rank != 1 and not step else None
        optimizer.zero_grad()
        mean_square(dp(mine)).backward()
        optimizer.step()
        if not step:
            refused(world, lambda: dp(mine), text)
            assert all(map(torch.equal, before.values(), dp.state_dict().values()))
    assert not torch.equal(dp.state_dict()["0.weight"], before["0.weight"])
    dp.check_replicas()


@pytest.mark.check("A12")
@on_ranks(2)
def test_forwards_that_fail_leave_nothing_behind(world: dl.Partition) -> None:
    dp, single = twins(mlp(3, 4, 2))
    x = draw(4, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dp(draw(4, 5))
    mean_square(dp(x[2 * world.rank :][:2])).backward()
    mean_square(single(x)).backward()
    assert_gradients(dp, single)


@pytest.mark.check("A37")
@on_ranks(2)
def test_a_rank_that_skips_backward_is_named(world: dl.Partition) -> None:
    """Threads find out at once; processes after `timeout`."""
    dp, _ = twins(mlp(3, 2))
    if world.rank == 0:
        with pytest.raises(
            RuntimeError, match=r"deadlock: rank 0 waits for sum of .* of ranks .0, 1.*; rank 1 has ended"
        ):
            mean_square(dp(draw(2, 3))).backward()


@on_ranks(2)
def test_steps_within_backward(world: dl.Partition) -> None:
    """They use a rank's own gradients, so that the copies would come apart; where they leave them, they may look."""
    for engine, wraps_first in itertools.product(ENGINES, (True, False)):
        module, seen = mlp(3, 2), list[torch.Tensor]()

        def step(drops: bool, parameter: torch.Tensor) -> None:
            if drops:
                parameter.grad = None
            else:
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad

        def look(parameter: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
            seen.append(parameter.grad.clone())

        dp = dl.DataParallel(module, world, engine=engine) if wraps_first else module
        handles = [p.register_post_accumulate_grad_hook(look) for p in module.parameters()]
        dp = dp if wraps_first else dl.DataParallel(module, world, engine=engine)
        x = torch.rand(2 + world.rank, 3).double()
        dp(x).sum().backward()
        assert seen
        for handle in handles:
            handle.remove()
        text = "0.weight was changed, or its gradient taken away, within backward, before the gradient was summed"
        for drops, alone in itertools.product((False, True), repeat=2):
            dp.zero_grad()
            steps = () if alone and world.rank else module.parameters()
            handles = [p.register_post_accumulate_grad_hook(partial(step, drops)) for p in steps]
            refused(world, lambda dp=dp, x=x: dp(x).sum().backward(), text, RuntimeError)
            for handle in handles:
                handle.remove()


@on_ranks(2)
def test_an_optimizer_that_steps_in_a_hook(world: dl.Partition) -> None:
    for update in ("now", "deferred"):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = dl.DataParallelOptimizer(torch.optim.SGD(layer.parameters(), 0.5))
        dp = dl.DataParallel(layer, world, optimizer, update=update)
        layer.weight.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())

        def step(dp: dl.DataParallel = dp) -> None:
            dp(torch.tensor([[1.0 + 2 * world.rank]])).sum().backward()
            dp.synchronize()

        refused(
            world, step, "DataParallel: weight was changed, or its gradient taken away, within backward", RuntimeError
        )


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@on_ranks(2)
def test_gradients_of_which_the_graph_is_asked_for(world: dl.Partition) -> None:
    """It would be lost in the sum; also where one rank alone asks."""
    for alone, update, engine in itertools.product((False, True), ("now", "deferred"), ("inline", "thread")):
        optimizer = dl.DataParallelOptimizer(torch.optim.SGD((model := mlp(1, 2, 1)).parameters(), 0.5))
        dp = dl.DataParallel(model, world, optimizer, update=update, engine=engine, bucket_mb=1e-5)

        def step(dp: dl.DataParallel = dp, graph: bool = not (alone and world.rank)) -> None:
            mean_square(dp(draw(1, 1))).backward(create_graph=graph)
            dp.synchronize()

        for _ in range(2):
            refused(world, step, "DataParallel: backward(create_graph=True) would lose the graph", RuntimeError)
            dp.zero_grad()
        x = draw(1, 1)
        (gradient,) = torch.autograd.grad(dp(x).sum(), model[0].weight, create_graph=True)
        (dp(x).sum() + gradient.square().sum()).backward()
        dp.synchronize()
        dp.check_replicas()


@on_ranks(3, mpi=True)
def test_comm_hooks_that_raise(world: dl.Partition) -> None:
    """On one rank or all, at any bucket: all ranks raise, and go on from there."""
    for engine, who, number in itertools.product(ENGINES, ([1], [0, 1, 2]), (0, 1, 3)):
        breaks = [True]

        def hook(bucket: Any, who: list[int] = who, number: int = number, breaks: list[bool] = breaks) -> None:
            bucket.gradients.mul_(2)
            if breaks[0] and world.rank in who and number in bucket.numbers:
                raise ZeroDivisionError("no such part")

        dp, single = twins(mlp(3, 4, 2), world, engine=engine, bucket_mb=1e-5, comm_hook=hook)
        x = draw(6, 3)
        mine = x[2 * world.rank :][:2]
        text = "DataParallel: ZeroDivisionError: no such part"
        refused(world, lambda dp=dp, x=mine: mean_square(dp(x)).backward(), text, RuntimeError)
        breaks[0] = False
        dp.zero_grad()
        mean_square(dp(mine)).backward()
        (2 * mean_square(single(x))).backward()
        assert_gradients(dp, single)
