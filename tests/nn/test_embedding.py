"""The embedding cut along its vocabulary and its features against torch's."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from blocks import check_held
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.nn.draws import drawn, normal
from distdl_lite.partition import Partition
from distdl_lite.testing import count

Embedding = dnn.DistributedEmbedding


def test_normal_numbers_in_blocks() -> None:
    """Bit-equal to one call, also where blocks or the last of them are no multiples of 16."""
    for shape in ((400_000, 3), (2**20 + 5, 1), (17, 61), (5, 3), (16, 1), (0, 4)):
        torch.manual_seed(1)
        whole, after = torch.empty(shape).normal_(), torch.rand(1)
        torch.manual_seed(1)
        mine = drawn(shape, tuple((0, n) for n in shape), normal(shape[0] * shape[1]), torch.float32)
        assert torch.equal(mine, whole)
        assert torch.equal(torch.rand(1), after)


@on_ranks(4, mpi=True)
def test_start_values(world: Partition) -> None:
    for cut, padding in itertools.product(("vocabulary", "feature"), (None, 3)):
        torch.manual_seed(5)
        serial, after = torch.nn.Embedding(7, 5, padding), torch.rand(1)
        torch.manual_seed(5)
        layer = Embedding(world.grid((2, 2)), 7, 5, padding, cut=cut)
        assert torch.equal(torch.rand(1), after)
        check_held(layer, serial, world.rank)
        state = dl.serial_state_dict(layer)
        assert world.rank or torch.equal(state["weight"], serial.weight)


@on_ranks(4, mpi=True)
def test_messages(world: Partition) -> None:
    P, index = world.grid((1, 4)), torch.tensor([[1, 2], [3, 3]])
    for cut, forward in (("vocabulary", 1), ("feature", 0)):
        layer = Embedding(world.grid((1, 1, 4)), 6, 8, cut=cut)
        with count() as counted:
            layer(index).sum().backward()
        assert counted.collectives == counted.messages == forward
    with count() as counted:
        Embedding(P, 6, 8, scale_grad_by_freq=True, cut="feature")(index[0]).sum().backward()
    assert counted.messages == 0


@on_ranks(2)
def test_life(world: Partition) -> None:
    P, index = world.grid((1, 2)), torch.tensor([5, 0, 5, 2])
    for cut, frequency in itertools.product(("vocabulary", "feature"), (False, True)):
        layer = Embedding(P, 6, 4, 5, scale_grad_by_freq=frequency, cut=cut)
        y = layer(index)
        assert torch.equal(copy.deepcopy(layer)(index), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(index), y)
        assert torch.equal(layer(index.repeat_interleave(2)[::2]), y)
        y.sum().backward()
        plain, layer.weight.grad = layer.weight.grad, None
        checkpoint(layer, index, use_reentrant=False).sum().backward()
        assert torch.equal(layer.weight.grad, plain)
        with torch.no_grad():
            assert not layer(index).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(index).dtype is torch.float32
        assert layer.bfloat16()(index).dtype is torch.bfloat16
        assert not layer.requires_grad_(False)(index).requires_grad
    assert repr(layer) == (
        "DistributedEmbedding(6, 4, padding_idx=5, scale_grad_by_freq=True, cut='feature', P=(1, 2); "
        "here weight (6, 2) of (6, 4))"
    )


@on_ranks(4)
def test_double_backward(world: Partition) -> None:
    serial = torch.nn.Embedding(5, 4, dtype=torch.float64)
    index = torch.tensor([4, 1, 1, 0])
    for cut in ("vocabulary", "feature"):
        layer = Embedding(world.grid((1, 4)), 5, 4, cut=cut, dtype=torch.float64)
        dl.load_serial_state_dict(layer, serial.state_dict())
        serial.zero_grad()
        for module in (serial, layer):
            (g,) = torch.autograd.grad(module(index).pow(3).sum(), module.weight, create_graph=True)
            g.square().sum().backward()
        check_held(layer, serial, world.rank, rtol=1e-12, atol=1e-12)


@on_ranks(4, mpi=True)
def test_refusals(world: Partition) -> None:
    P = world.grid((2, 2))
    for options, text in (
        ({"max_norm": 1.0}, "max_norm=1.0 is refused"),
        ({"sparse": True}, "sparse=True is refused"),
        ({"padding_idx": 5}, "padding_idx=5 is not within num_embeddings=5"),
        ({"padding_idx": -6}, "padding_idx=-6 is not within num_embeddings=5"),
        ({"cut": "rows"}, "cut='rows' is neither 'vocabulary' nor 'feature'"),
    ):
        with pytest.raises(ValueError, match=text):
            Embedding(P, 5, 4, **options)
    index = torch.zeros(3, dtype=torch.long)
    for cut in ("vocabulary", "feature"):
        layer = Embedding(P, 5, 4, cut=cut)
        assert_refused(world, P, lambda m=layer: m(index.float()), "int32 or int64 is needed", TypeError)
        assert_refused(world, P, lambda m=layer: m(torch.tensor(1)), "indices of 0 dims do not fit P of shape (2, 2)")
        ragged = index[: 3 - world.rank % 2]
        assert_refused(world, P, lambda m=layer, x=ragged: m(x), "the blocks form no tensor product")
        for wrong in (5, -1):
            one = index + wrong * (world.rank >= 2)  # the second line alone
            text = f"DistributedEmbedding: index {wrong} is not in range(5)"
            assert_refused(world, P, lambda m=layer, x=one: m(x), text, IndexError)
        assert layer(index).shape == (3, 4 if cut == "vocabulary" else 2)  # it still works
