"""Column and row parallel linear layers: one behind the other, messages, start values, refusals."""

from __future__ import annotations

import copy
import itertools
import pickle

import torch
from blocks import check_held, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.partition import Partition
from distdl_lite.testing import count

Column, Row = dnn.DistributedColumnParallelLinear, dnn.DistributedRowParallelLinear


@on_ranks(4, mpi=True)
def test_feed_forward_and_double_backward(world: Partition) -> None:
    """Column then row: the hidden features cut, the rows cut outside too, or all whole; also with the batch cut."""
    torch.manual_seed(0)
    serial = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    for shape, (cuts_rows, is_whole) in itertools.product(
        ((1, 4), (2, 2)), ((False, False), (True, False), (False, True))
    ):
        P = world.grid(shape)
        net = torch.nn.Sequential(
            Column(P, 6, 9, gather_output=is_whole, sequence_parallel=cuts_rows, dtype=torch.float64),
            torch.nn.Tanh(),
            Row(P, 9, 2, input_is_parallel=not is_whole, scatter_output=cuts_rows, dtype=torch.float64),
        )
        dl.load_serial_state_dict(net, serial.state_dict())
        serial.zero_grad()
        rows = slice(world.rank, world.rank + 1) if cuts_rows else P.block((4, 4))[0]
        whole, mine = leaf(x), leaf(x[rows])
        for model, start in ((serial, whole), (net, mine)):
            (gradient,) = torch.autograd.grad(model(start).square().sum(), start, create_graph=True)
            gradient.square().sum().backward()
        torch.testing.assert_close(mine.grad, whole.grad[rows], rtol=1e-9, atol=1e-12)
        for i in (0, 2):  # sums in another order
            check_held(net[i], serial[i], world.rank, rtol=1e-9, atol=1e-12)


@on_ranks(4, mpi=True)
def test_messages(world: Partition) -> None:
    """Of each option forward and backward, as the docstrings say; also on two lines, whose rows are cut alike."""
    for P in (world.grid((1, 4)), world.grid((2, 2))):
        line, own = P.shape[-1], P.shape[0] > 1  # whether weights are summed over the leading axis
        n, part = 8 // P.shape[0], 8 // P.size
        for layer, width, rows, forward, backward in (
            (Column(P, 8, 8), 8, n, 0, 1),
            (Column(P, 8, 8, gather_output=True), 8, n, 1, 1),
            (Column(P, 8, 8, sequence_parallel=True), 8, part, 1, 1),
            (Row(P, 8, 8), 8 // line, n, 1, 0),
            (Row(P, 8, 8, input_is_parallel=False), 8, n, 1, 1),
            (Row(P, 8, 8, scatter_output=True), 8 // line, n, 1, 1),
        ):
            x = torch.rand(rows, width, requires_grad=True)
            with count() as counted:
                y = layer(x)
            assert counted.collectives == forward, layer
            with count() as counted:
                y.sum().backward()
            assert counted.collectives == backward + own, layer
            assert counted.messages == counted.collectives


@on_ranks(4)
def test_start_values(world: Partition) -> None:
    """Those of the serial layer for the seed, those of a line's first rank where seeds differ; and back to serial."""
    P = world.grid((2, 2))
    for kind in (Column, Row):
        torch.manual_seed(3)
        serial, after = torch.nn.Linear(7, 5), torch.rand(1)
        torch.manual_seed(3)
        layer = kind(P, 7, 5)
        assert torch.equal(torch.rand(1), after)
        check_held(layer, serial, world.rank)
        state = dl.serial_state_dict(layer)
        for name, value in state.items():
            assert torch.equal(value, serial.state_dict()[name])
        torch.manual_seed(world.rank)
        values = world.allgather_data(kind(P, 7, 5).weight.tolist())
        assert values is not None
        assert values[0] == values[2]
        layer(torch.ones(3, 7 if kind is Column else (4, 3)[world.rank % 2])).sum().backward()
        norm = dl.grad_norm(layer)
        assert all(value == norm for value in world.allgather_data(norm) or ())


@on_ranks(2, mpi=True)
def test_life(world: Partition) -> None:
    P = world.grid((1, 2))
    for layer, width in (
        (Column(P, 6, 4), 6),
        (Column(P, 6, 4, gather_output=True, sequence_parallel=True), 6),
        (Row(P, 6, 4), 3),
        (Row(P, 6, 4, input_is_parallel=False, scatter_output=True), 6),
    ):
        x = torch.rand(4, width, requires_grad=True)
        y = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
        torch.testing.assert_close(layer(x.t().contiguous().t()), y)
        with torch.no_grad():
            assert not layer(x).requires_grad
        y.sum().backward()  # a gradient of stride 0
        plain, x.grad = x.grad, None
        checkpoint(lambda x, m=layer: m(x * 1), x, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, plain)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer(x)
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), y.detach(), rtol=0.05, atol=0.05)
        layer.requires_grad_(False)
        assert not layer(x.detach()).requires_grad
        one = x.detach().clone().requires_grad_(world.rank == 1)
        layer(one).sum().backward()
        assert (one.grad is not None) == (world.rank == 1)
        if layer.bias is not None and world.rank == 0:
            layer.bias.requires_grad_()
    row = Row(P, 6, 4)
    row.weight.requires_grad_(False)
    row(torch.rand(4, 3)).sum().backward()  # the bias alone, which rank 1 has none of
    assert torch.equal(row.bias.grad, torch.full_like(row.bias, 4.0)) if world.rank == 0 else row.bias.grad is None
    assert repr(Column(P, 6, 4, False)) == (
        "DistributedColumnParallelLinear(in_features=6, out_features=4, P=(1, 2), gather_output=False, "
        "sequence_parallel=False; here weight (2, 6) of (4, 6))"
    )


@on_ranks(4)
def test_refusals(world: Partition) -> None:
    P = world.grid((2, 2))
    for layer, x, kind, text in (
        (Column(P, 4, 4), torch.rand(3, 3), ValueError, "the input has [3] features, in_features=4"),
        (Column(P, 4, 4), torch.rand(3, 4 + world.rank % 2), ValueError, "the input has [4, 5] features"),
        (Column(P, 4, 4), torch.rand(3 + world.rank % 2, 4), ValueError, "the blocks form no tensor product"),
        (Column(P, 4, 4), torch.rand(4), ValueError, "an input of 1 dims is too small"),
        (Column(world.grid((4,)), 4, 4, sequence_parallel=True), torch.rand(4), ValueError, "sequence_parallel=True"),
        (Row(world.grid((4,)), 4, 4, scatter_output=True), torch.rand(1), ValueError, "scatter_output=True"),
        (Row(P, 4, 4), torch.rand(3, 4), ValueError, "in_features=4: each of the 2 ranks along this dim"),
        (
            Row(P, 4, 4),
            torch.rand(3, 2).double(),
            TypeError,
            "the input has dtype torch.float64, the weight torch.float32",
        ),
    ):
        assert_refused(world, P, lambda layer=layer, x=x: layer(x), text, kind)
