"""Softmax and log-softmax against torch's on the whole tensor, along cut and whole dims."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from blocks import block, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, assert_second_gradients

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.partition import Partition
from distdl_lite.testing import count

KINDS = ((dnn.DistributedSoftmax, torch.nn.Softmax), (dnn.DistributedLogSoftmax, torch.nn.LogSoftmax))


@on_ranks(4, mpi=True)
def test_double_backward(world: Partition) -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    for distributed, serial in KINDS:
        for shape in ((1, 4, 1), (2, 2, 1), (4, 1, 1)):
            P = world.grid(shape)
            assert_second_gradients(distributed(P, 1), serial(1), x, P)


@on_ranks(4, mpi=True)
def test_messages(world: Partition) -> None:
    P = world.grid((2, 2))
    for dim, forward, backward in ((1, 2, 1), (0, 2, 1)):
        layer, x = dnn.DistributedSoftmax(P, dim), torch.rand(3, 2, requires_grad=True)
        with count() as counted:
            y = layer(x)
        assert counted.collectives == forward
        with count() as counted:
            y.sum().backward()
        assert counted.collectives == backward
    with count() as counted:
        dnn.DistributedSoftmax(world.grid((4, 1)), 1)(x).sum().backward()
    assert counted.messages == 0


@on_ranks(2, mpi=True)
def test_low_precision(world: Partition) -> None:
    """Halves are computed in float32, where torch's own log-softmax is two units of the last place off."""
    P, x = world.grid((1, 2)), torch.randn(3, 8) * 20
    cuts = P.bounds(x.shape)
    for distributed, serial in KINDS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            half = x.to(dtype)
            whole, mine = leaf(half.float()), leaf(block(half, P, cuts))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = distributed(P, 1)(mine)
                assert y.dtype is serial(1)(half).dtype
            expected = serial(1)(whole)
            torch.testing.assert_close(y, block(expected, P, cuts).to(dtype))
            expected.sum().backward()
            y.sum().backward()
            torch.testing.assert_close(mine.grad, block(whole.grad, P, cuts).to(dtype), rtol=2e-2, atol=2e-3)
        mine = block(x, P, cuts) + 3e38 * (world.rank == 0)  # finite, and so is its softmax
        assert torch.isfinite(dnn.DistributedSoftmax(P, 1)(mine)).all()


@on_ranks(4)
def test_life(world: Partition) -> None:
    P = world.grid((1, 3), (0, 1, 3))
    layer = dnn.DistributedLogSoftmax(P, -1)
    x = block(torch.arange(10.0).view(2, 5), P, P.bounds((2, 5))).requires_grad_(world.rank == 1)
    y = layer(x)
    assert y.requires_grad == P.active
    if P.active:
        y.square().sum().backward()
    assert (x.grad is not None) == (world.rank == 1)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    with torch.no_grad():
        assert not layer(x).requires_grad
    x = leaf(x)
    layer(x).square().sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(lambda x: layer(x * 1), x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, plain)
    assert repr(layer) == "DistributedLogSoftmax(dim=-1, P_x=(1, 3))"


@on_ranks(4)
def test_refusals(world: Partition) -> None:
    P = world.grid((2, 2))
    with pytest.raises(ValueError, match=r"out of range .*dim=2"):
        dnn.DistributedSoftmax(P, 2)(torch.rand(2, 2))
    with pytest.raises(ValueError, match="dim=None"):
        dnn.DistributedSoftmax(P)
    layer = dnn.DistributedSoftmax(P, 1)
    ragged = torch.rand(2 + (world.rank == 3), 2)
    assert_refused(world, P, lambda: layer(ragged), "the blocks form no tensor product")
    assert_refused(world, P, lambda: layer(ragged.long()[:2]), "a floating dtype is needed", TypeError)
    assert_refused(world, P, lambda: layer(dl.zero_volume_tensor()), "has 1 dims")
