"""Sums of replica gradients: final when backward returns, whatever kind of backward it is."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import integers
from ranks import on_ranks

from distdl_lite import reducer as red
from distdl_lite.nn import DistributedLinear
from distdl_lite.partition import Partition
from distdl_lite.reducer import Replicas, replicated
from distdl_lite.transport import Team


class Shared(torch.nn.Module):
    """A parameter of which every rank of a team holds a copy; ``forward(x)`` is the sum of w x."""

    def __init__(self, P: Partition, start: torch.Tensor, order: int = 0) -> None:
        super().__init__()
        self.P, self.weight = P, torch.nn.Parameter(start.clone())
        self.replicas = Replicas(P.team, order, f"weight{order}")

    def use(self) -> torch.Tensor:
        return replicated(self.weight, self.replicas)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.use() * x).sum()


def x_of(rank: int) -> torch.Tensor:
    return integers((3,), seed=rank)


SUM = sum(x_of(rank) for rank in range(4))
W = integers((3,), seed=9, low=1)


@on_ranks(4, mpi=True)
def test_sums_are_final_when_backward_returns(world: Partition) -> None:
    model, x = Shared(world, W), x_of(world.rank)
    model(x).backward()
    assert torch.equal(model.weight.grad, SUM)
    model(x).backward()
    model(2 * x).backward()
    assert torch.equal(model.weight.grad, 4 * SUM)
    held = model.weight.grad
    model.zero_grad(set_to_none=False)
    model(x).backward()
    assert model.weight.grad is held
    assert torch.equal(held, SUM)
    model.zero_grad()
    assert model.weight.grad is None
    (model(x) + model(3 * x)).backward()  # used twice
    assert torch.equal(model.weight.grad, 4 * SUM)


@on_ranks(4, mpi=True)
def test_a_penalty_on_the_weights_is_counted_once(world: Partition) -> None:
    model, x = Shared(world, W), x_of(world.rank)
    (model(x) + model.weight.square().sum()).backward()
    assert torch.equal(model.weight.grad, SUM + 2 * W)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@on_ranks(4, mpi=True)
def test_other_kinds_of_backward_give_the_sum_too(world: Partition) -> None:
    model, x = Shared(world, W), x_of(world.rank)
    (gradient,) = torch.autograd.grad(model(x), model.weight)
    assert torch.equal(gradient, SUM)
    assert model.weight.grad is None
    model(x).backward(inputs=[model.weight])
    assert torch.equal(model.weight.grad, SUM)
    model.zero_grad()
    # d/dw of |sum of x w|^2 by all ranks; along v the derivative of that gradient, one value that all ranks show
    (gradient,) = torch.autograd.grad(model(x).square(), model.weight, create_graph=True)
    by_hand = sum(2 * (x_of(r) * W).sum() * x_of(r) for r in range(4))
    assert torch.equal(gradient.detach(), by_hand)
    v = integers((3,), seed=30)
    (second,) = torch.autograd.grad(gradient, model.weight, v)
    assert torch.equal(second, sum(2 * (x_of(r) * v).sum() * x_of(r) for r in range(4)))
    model(x).square().backward(create_graph=True)
    assert torch.equal(model.weight.grad.detach(), by_hand)
    model.weight.grad = None


@on_ranks(4)
def test_copies_sum_for_themselves(world: Partition) -> None:
    model, x = Shared(world, W), x_of(world.rank)
    twin = copy.deepcopy(model)
    twin.load_state_dict({"weight": 2 * W}, assign=True)
    twin(x).backward()
    assert model.weight.grad is None
    assert torch.equal(twin.weight.grad, SUM)
    assert torch.equal(twin.weight.detach(), 2 * W)


@on_ranks(4)
def test_nothing_is_summed_without_gradients(world: Partition) -> None:
    model, x = Shared(world, W), x_of(world.rank)
    with torch.no_grad():
        assert model.use() is model.weight
    model.weight.requires_grad_(False)
    assert model.use() is model.weight
    alone = Shared(world.create_partition_inclusive([world.rank]), W)
    alone(x).backward()
    assert torch.equal(alone.weight.grad, x)


@on_ranks(4, mpi=True)
def test_overlapping_teams_of_several_dtypes(world: Partition) -> None:
    """Teams are summed in one global order, in buckets of one dtype each."""
    teams = [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1, 2, 3]]
    models = [
        Shared(world.create_partition_inclusive(team), W.to(dtype), 2 * number + half)
        for number, team in enumerate(teams)
        for half, dtype in enumerate((torch.float64, torch.float32))
    ]
    mine = [model for model in models if model.P.active]
    order = mine if world.rank % 2 else mine[::-1]
    sum(model(x_of(world.rank).to(model.weight)).double() for model in order).backward()
    for model in mine:
        assert torch.equal(model.weight.grad, sum(x_of(r) for r in model.P.ranks).to(model.weight))


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(red, "BUCKET_BYTES", 8 * 16)


@pytest.mark.usefixtures("small_buckets")
@on_ranks(4, mpi=True)
def test_buckets(world: Partition) -> None:
    """Small buckets, a parameter larger than one, and a scalar and an empty one in between."""
    shapes = [(3,), (40,), (), (0, 2), (2, 5), (30,), (1,)]
    models = [Shared(world, integers(shape), order) for order, shape in enumerate(shapes)]
    sum(model(integers(shape, world.rank)) for model, shape in zip(models, shapes, strict=True)).backward()
    for model, shape in zip(models, shapes, strict=True):
        assert torch.equal(model.weight.grad, sum(integers(shape, rank) for rank in range(4)))


def test_buckets_hold_so_many_bytes_of_one_kind() -> None:
    replicas = Replicas(Team(None, (0, 1)), 0, "w")
    kinds = [(2, torch.float64), (2, torch.float64), (1, torch.float64), (9, torch.float64), (1, torch.float32)]
    kinds += [(3, torch.float64), (7, torch.float32)]
    group = [red.Entry(torch.empty(n, dtype=dtype), None, replicas, dtype) for n, dtype in kinds]
    sizes = [[entry.nbytes for entry in bucket] for bucket in red.buckets(group, 32)]
    assert sizes == [[16, 16], [8], [72], [4, 28], [24]]


@on_ranks(4, mpi=True)
def test_a_failed_backward_leaves_nothing_behind(world: Partition) -> None:
    model, x = Shared(world, W), x_of(world.rank)

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("broke in backward")

    other = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="broke in backward"):
            (Breaks.apply(other).sum() + model(x)).backward()
        model.weight.grad = None
        model(x).backward()
        assert torch.equal(model.weight.grad, SUM)


@on_ranks(4, mpi=True)
def test_parameters_that_differ_between_the_ranks_raise_on_all(world: Partition) -> None:
    models = [Shared(world, W, order) for order in range(2)]
    x = x_of(world.rank)
    loss = models[0](x) + (models[1](x) if world.rank != 2 else 0)
    with pytest.raises(RuntimeError, match=r"backward reached different parameters .* rank 2: 0 weight0 \(3,\)"):
        loss.backward()
    models[0].zero_grad()
    models[0](x).backward()
    assert torch.equal(models[0].weight.grad, SUM)


@on_ranks(4)
def test_gradients_of_stride_0_are_left_alone(world: Partition) -> None:
    model = Shared(world, W)
    g = torch.tensor(2.0, dtype=torch.float64).expand(3)
    model.use().backward(g)
    assert torch.equal(model.weight.grad, torch.full((3,), 8.0, dtype=torch.float64))
    assert float(g[0]) == 2.0


@on_ranks(2)
def test_gradients_of_the_caller_stay(world: Partition) -> None:
    """Also where a weight is alone in its bucket."""
    P = world.grid((2, 1))
    layer = DistributedLinear(P, None, None, 3, 3)
    layer(torch.randn(1, 3))
    g = torch.full((3, 3), 1.0 + world.rank)
    layer.use("weight").backward(g)
    assert (g == 1 + world.rank).all()
    assert (layer.weight.grad == 3).all()
