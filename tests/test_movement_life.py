"""Primitives over time: shapes that change, graphs and copies that live on, thousands of layers."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from blocks import NOTHING, grown
from cases import integers
from ranks import on_ranks, over_mpi
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.partition import Partition
from distdl_lite.transport import Team

# ---- shapes that change, graphs that live on -------------------------------------------------------------------------


@on_ranks(4, mpi=True)
def test_a_change_that_one_rank_cannot_see(world: Partition) -> None:
    """(7, 5) -> (8, 6) on a 2 x 2 grid leaves rank 0's block at (4, 3)."""
    P, line = world.grid((2, 2)), world.grid((4, 1))
    layers = [dnn.Repartition(P, line), dnn.HaloExchange(P, [1, (0, 1)], "circular")]
    for shape in ((7, 5), (8, 6), (7, 5), (8, 5)):
        x = integers(shape)
        assert torch.equal(layers[0](P.cut(x)), line.cut(x))
        assert torch.equal(layers[1](P.cut(x)), grown(P, x, ((1, 1), (0, 1)), "circular"))


@on_ranks(4, mpi=True)
def test_two_forwards_then_two_backwards(world: Partition) -> None:
    """A graph holds on to the operator it was made with."""
    P, line = world.grid((2, 2)), world.grid((4, 1))
    layer = dnn.Repartition(P, line)
    shapes = [(7, 5), (8, 6), (2, 9)]
    xs = [P.cut(integers(shape)).requires_grad_() for shape in shapes]
    ys = [layer(x) for x in xs]
    for shape, y in reversed(list(zip(shapes, ys, strict=True))):
        y.backward(line.cut(integers(shape, seed=1)))
    for shape, x in zip(shapes, xs, strict=True):
        assert torch.equal(x.grad, P.cut(integers(shape, seed=1)))


@on_ranks(4)
def test_double_backward(world: Partition) -> None:
    """f = sum of (A x^2)^2 has the gradient 4 x (A^T A x^2); its derivative along v is checked by hand."""
    P = world.grid((2, 2))
    layer, x, v = dnn.AllSumReduce(P, [0]), integers((3,), world.rank).requires_grad_(), integers((3,), 50 + world.rank)
    (gradient,) = torch.autograd.grad(layer(x**2).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient, x, v)
    column = [r for r in range(4) if r % 2 == P.index[1]]
    xs, vs = ({r: integers((3,), base + r) for r in column} for base in (0, 50))
    s, t = sum(xs[r] ** 2 for r in column), sum(vs[r] * xs[r] for r in column)
    assert torch.equal(gradient.detach(), 8 * xs[world.rank] * s)
    assert torch.equal(second, 8 * vs[world.rank] * s + 16 * xs[world.rank] * t)


@on_ranks(4)
def test_inputs_and_gradients_are_left_alone(world: Partition) -> None:
    """Also gradients of stride 0, and one that two operators share."""
    P = world.grid((2, 2))
    layers = [
        dnn.HaloExchange(P, [1, 1], "zeros"),
        dnn.AllSumReduce(P, [0]),
        dnn.AllGather(P, [1]),
        dnn.Repartition(P, P),
        dnn.Broadcast(P, P),
    ]
    for layer in layers:
        x = P.cut(integers((4, 6))).requires_grad_()
        before = x.detach().clone()
        y = layer(x)
        y.detach().add_(1)  # the output is fresh memory
        assert torch.equal(x, before)
        g = torch.ones(1, 1, dtype=torch.float64).expand(y.shape)
        (y + 2 * y).backward(g)
        assert torch.equal(g, torch.ones(y.shape, dtype=torch.float64))
        x.grad.add_(1)
        assert torch.equal(g, torch.ones(y.shape, dtype=torch.float64))


@on_ranks(4)
def test_copies_and_pickles(world: Partition) -> None:
    P, line = world.grid((2, 2)), world.grid((4, 1))
    x = integers((7, 5))
    layers = [
        dnn.Repartition(P, line),
        dnn.Broadcast(world.grid((1, 1)), P, preserve_batch=False),
        dnn.AllGather(P, [0]),
        dnn.HaloExchange(P, [1, 1], "reflect"),
    ]
    for layer in layers:
        block = layer.P_x.cut(x)
        wanted = layer(block)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(block), wanted)
            assert repr(twin) == repr(layer)
        assert torch.equal(layer(block), wanted)


@on_ranks(4, mpi=True)
def test_checkpointing(world: Partition) -> None:
    """Non-reentrant recomputation starts at the same place on all ranks, also where one asks for no gradient."""
    P, line = world.grid((2, 2)), world.grid((4, 1))
    there, back, halo = dnn.Repartition(P, line), dnn.Repartition(line, P), dnn.HaloExchange(P, [1, 0], "zeros")

    def body(x: torch.Tensor) -> torch.Tensor:
        return halo(back(there(x).square())).square()

    for asking in (range(4), [2]):
        results = []
        for run in (body, lambda x: checkpoint(body, x, use_reentrant=False)):
            x = P.cut(integers((7, 5))).requires_grad_(world.rank in asking)
            run(x).sum().backward()
            results.append(x.grad)
        assert results[0] is results[1] is None or torch.equal(*results)


# ---- life ------------------------------------------------------------------------------------------------------------


@over_mpi
@pytest.mark.mpi(min_size=2)
def test_layers_use_no_more_communicators() -> None:
    """MPICH has about 2,000 context ids, most of which are taken here; there is one communicator per team of ranks.

    Two ranks do this while the others sleep: ranks that share a core lose it for milliseconds at each collective.
    """
    world = Partition().create_partition_inclusive(range(2))
    if not world.active:
        return
    P, x = world.grid((2, 1)), integers((2, 2))
    kinds = [
        lambda: dnn.AllSumReduce(P, [0]),
        lambda: dnn.HaloExchange(P, [1, 1]),
        lambda: dnn.AllGather(P, [0]),
        lambda: dnn.Repartition(P, world.grid((1, 2))),
        lambda: dnn.Broadcast(world.grid((1,), [1]), P),
    ]

    def communicating() -> set[Team]:
        return {team for team in world.world_transport.local["teams"].values() if team.comm is not None}

    before, taken = {*communicating(), world.team}, [world.comm.Dup() for _ in range(1800)]
    try:
        for number in range(300):
            layer = kinds[number % 5]()
            layer(x if world.rank or number % 5 < 4 else NOTHING)
    finally:
        for comm in taken:
            comm.Free()
    assert communicating() <= before


@on_ranks(2, mpi=True)
def test_hundreds_of_forwards_hold_on_to_nothing(world: Partition) -> None:
    """Forwards and backwards of shapes that alternate, more of them than are kept."""
    P, line = world.grid((1, 2)), world.grid((2, 1))
    layer = dnn.Repartition(P, line)

    def operators() -> int:
        gc.collect()
        return sum(
            type(thing) is dl.Operator and thing.transport is world.world_transport for thing in gc.get_objects()
        )

    def run(times: int) -> None:
        for number in range(times):
            x = P.cut(integers((5 + number % 80, 3))).requires_grad_()
            layer(x).sum().backward()
            assert bool((x.grad == 1).all())

    others = operators()
    run(80)
    kept = operators()
    run(160)
    assert operators() <= kept <= others + 2 * 64
