"""The linear layer on every kind of partition, with integers in float64: equal to the bit."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from blocks import block, check_held, cuts_of, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
from distdl_lite.nn import DistributedLinear
from distdl_lite.partition import Partition

# shape of P_x, P_y, P_w, with the ranks of each; lead dims of the input
CASES = (
    ((1, 1), [2], (1, 1), [2], (1, 1), [2], (5,)),
    ((1, 2), [0, 1], (1, 2), [2, 3], (2, 2), [0, 1, 2, 3], (5,)),
    ((1, 2), [3, 1], (1, 2), [0, 1], (2, 2), [1, 0, 3, 2], (5,)),
    ((2, 1), [0, 1], (2, 2), [0, 1, 2, 3], (2, 2, 1), [0, 1, 2, 3], (5,)),
    ((2, 2), [0, 1, 2, 3], (2, 1), [0, 2], (2, 1, 2), [0, 1, 2, 3], (3,)),
    ((4, 1), [0, 1, 2, 3], (4, 1), [0, 1, 2, 3], (4, 1, 1), [0, 1, 2, 3], (2,)),
    ((3, 1), [3, 1, 0], (1, 4), [0, 1, 2, 3], (4, 1), [3, 2, 1, 0], (5,)),
    ((1, 4), [0, 1, 2, 3], (1, 1), [3], (1, 4), [0, 1, 2, 3], (5,)),
    ((2, 2), [0, 1, 2, 3], None, None, None, None, (5,)),
    ((1, 2), [2, 3], (2, 2), [0, 1, 2, 3], None, None, (5,)),
    ((2,), [0, 1], (2,), [2, 3], (2, 2), [0, 1, 2, 3], ()),
    ((1, 2, 2), [0, 1, 2, 3], (1, 2, 1), [3, 0], (1, 2, 1, 2), [0, 1, 2, 3], (2, 3)),
    ((2, 1, 2), [0, 1, 2, 3], (2, 1, 1), [0, 2], (2, 1, 2), [0, 1, 2, 3], (3, 2)),
    ((1, 1, 2), [0, 1], (1, 1, 2), [0, 1], (2, 2), [0, 1, 2, 3], (2, 3)),
)
SIZES = ((7, 5), (1, 8), (3, 2))  # in and out features


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).double()


def partitions(world: Partition, case: tuple) -> tuple[Partition, Partition | None, Partition | None]:
    return tuple(None if case[i] is None else world.grid(case[i], case[i + 1]) for i in (0, 2, 4))


@on_ranks(4, mpi=True)
def test_equals_serial(world: Partition) -> None:
    rng = random.Random(0)
    for number, case in enumerate(CASES):
        for n_in, n_out in SIZES:
            P_x, P_y, P_w = partitions(world, case)
            serial = torch.nn.Linear(n_in, n_out, bias=number % 3 > 0, dtype=torch.float64)
            layer = DistributedLinear(P_x, P_y, P_w, n_in, n_out, bias=number % 3 > 0, dtype=torch.float64)
            with torch.no_grad():
                for p in serial.parameters():
                    p.copy_(integers(*p.shape))
            dl.load_serial_state_dict(layer, serial.state_dict())
            P_y = P_y or P_x
            for rows in (case[-1], tuple(n + 1 for n in case[-1]), tuple(0 for _ in case[-1])):
                cuts = cuts_of((*rows, n_in), P_x.shape, rng if number % 2 else None)
                x_global, g = integers(*rows, n_in), integers(*rows, n_out)
                x_serial, x = leaf(x_global), leaf(block(x_global, P_x, cuts))
                serial.zero_grad()
                layer.zero_grad()
                y_serial, y = serial(x_serial), layer(x)
                y_serial.backward(g)
                out = P_y.bounds(g.shape)
                if P_y.active:
                    assert torch.equal(y, block(y_serial, P_y, out))
                if y.requires_grad:
                    y.backward(block(g, P_y, out).view(y.shape))
                if P_x.active:
                    assert torch.equal(x.grad, block(x_serial.grad, P_x, cuts))
                check_held(layer, serial, world.rank)


@on_ranks(4)
def test_start_values_use_the_global_fan_in(world: Partition) -> None:
    torch.manual_seed(3)
    serial, after = torch.nn.Linear(7, 5), torch.rand(1)
    torch.manual_seed(3)
    layer = DistributedLinear(world.grid((1, 2)), world.grid((1, 2), (2, 3)), world.grid((2, 2)), 7, 5)
    assert torch.equal(torch.rand(1), after)
    check_held(layer, serial, world.rank)


@on_ranks(4, mpi=True)
def test_column_then_row_and_double_backward(world: Partition) -> None:
    """Two layers that keep the hidden features cut, as in a transformer's feed-forward part."""
    P, cut = world.grid((1, 1)), world.grid((1, 4))
    torch.manual_seed(0)
    serial = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).double()
    net = torch.nn.Sequential(
        DistributedLinear(P, cut, world.grid((4, 1)), 6, 9, dtype=torch.float64),
        torch.nn.Tanh(),
        DistributedLinear(cut, P, world.grid((1, 4)), 9, 2, dtype=torch.float64),
    )
    dl.load_serial_state_dict(net, serial.state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    x_serial, mine = leaf(x), leaf(x if P.active else x.new_empty(0))
    for model, start in ((serial, x_serial), (net, mine)):
        y = model(start)
        (gradient,) = torch.autograd.grad(y.square().sum(), start, create_graph=True)
        gradient.square().sum().backward()
    if P.active:
        torch.testing.assert_close(mine.grad, x_serial.grad)
    for i in (0, 2):
        check_held(net[i], serial[i], world.rank, rtol=1e-9, atol=1e-12)  # sums in another order


@on_ranks(2)
def test_life(world: Partition) -> None:
    P = world.grid((1, 2))
    layer = DistributedLinear(P, P, None, 6, 4)
    x = torch.rand(4, 3, requires_grad=True)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    assert torch.equal(layer(x.t().contiguous().t()), y)
    with torch.no_grad():
        assert not layer(x).requires_grad
    y.sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(lambda x: layer(x * 1), x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, plain)
    row = DistributedLinear(P, world.grid((1, 1)), world.grid((1, 2)), 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert row(x).dtype is torch.bfloat16 or not row.P_y.active
        assert layer(x).dtype is torch.bfloat16
    assert repr(row).startswith(
        "DistributedLinear(in_features=6, out_features=4, P_x=(1, 2), P_y=(1, 1), P_w=(1, 2); here weight (4, 3) of (4, 6)"
    )


@on_ranks(4)
def test_refusals(world: Partition) -> None:
    P = world.grid((1, 2))
    for P_y, P_w in ((world.grid((2,)), None), (P, world.grid((2, 1))), (P, world.grid((2, 1, 2)))):
        with pytest.raises(ValueError, match=r"P_x of shape \(1, 2\)"):
            DistributedLinear(P, P_y, P_w, 4, 4)
    layer = DistributedLinear(P, P, world.grid((2, 2)), 4, 4)
    for x, kind, text in (
        (torch.rand(3, 3), ValueError, "in_features=4: each of the 2 ranks along this dim"),
        (torch.rand(3, 2, 2), ValueError, "has 3 dims, its partition"),
        (torch.rand(3, 2).double(), TypeError, "the input has dtype torch.float64, the weight torch.float32"),
        (torch.rand(3 + world.rank, 2), ValueError, "the blocks form no tensor product"),
    ):
        with pytest.raises(kind, match=text):
            layer(x if P.active else dl.zero_volume_tensor())
