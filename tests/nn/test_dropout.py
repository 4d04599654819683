"""Dropout: one mask on every partition, with the right statistics, and torch's behaviour around it."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random

import pytest
import torch
from blocks import block, cuts_of, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused

import distdl_lite.nn as dnn
from distdl_lite.nn import dropout
from distdl_lite.nn.dropout import mask_of
from distdl_lite.partition import Partition
from distdl_lite.testing import count


def whole_mask(shape: tuple[int, ...], seed: int, p: float) -> torch.Tensor:
    return mask_of(tuple((0, n) for n in shape), shape, seed, p)


def splitmix64(seed: int, i: int) -> int:
    """The i-th number, in Python's integers."""
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def hashed(seed: int, i: int) -> int:
    """The number of a point, read as a signed one."""
    z = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * (splitmix64(seed, 0) | 1) % 2**64
    return z - 2**64 * (z >= 2**63)


def test_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [splitmix64(1234567, i) for i in range(3)] == [  # published test values
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    for seed, p in itertools.product((0, 1234567, 2**63 - 2), (2**-24, 0.1, 0.5, 1 - 2**-53)):
        expected = torch.tensor([hashed(seed, i) >= p * 2**64 - 2**63 for i in range(60)])
        for pieces in (2**16, 7):
            monkeypatch.setattr(dropout, "_HASHED_AT_ONCE", pieces)
            assert torch.equal(whole_mask((3, 4, 5), seed, p).view(-1), expected)


def test_any_box_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "_HASHED_AT_ONCE", 11)
    rng, shape = random.Random(0), (5, 1, 7, 3)
    expected = whole_mask(shape, 99, 0.4)
    for _ in range(100):
        box = tuple(tuple(sorted((rng.randint(0, n), rng.randint(0, n)))) for n in shape)
        assert torch.equal(mask_of(box, shape, 99, 0.4), expected[tuple(slice(*r) for r in box)])
    far = 2**40  # beyond 32 bits
    assert mask_of(((far, far + 2), (0, 9)), (far + 2, 9), 5, 0.5).view(-1).tolist() == [
        hashed(5, far * 9 + i) >= 0 for i in range(18)
    ]


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9])
def test_statistics(p: float) -> None:
    """Mean, and independence of points that are neighbours along any dim, of dims' sizes of 2^k, and of seeds."""
    shape = (64, 128, 256)
    n = math.prod(shape)
    for seed in (0, 1, 2**62, 1234567890123):
        centred = (whole_mask(shape, seed, p).double() - (1 - p)) / math.sqrt(p * (1 - p))
        found = {"mean": centred.mean()}
        for dim, step in itertools.product(range(3), (1, 2, 3, 16)):
            a, b = centred.narrow(dim, step, shape[dim] - step), centred.narrow(dim, 0, shape[dim] - step)
            found[f"dim {dim}, step {step}"] = (a * b).mean()
        other = (whole_mask(shape, seed + 1, p).double() - (1 - p)) / math.sqrt(p * (1 - p))
        found["the next seed"] = (centred * other).mean()
        found["runs of three"] = (centred[..., 2:] * centred[..., 1:-1] * centred[..., :-2]).mean()
        found["squares"] = (centred.view(32, 2, 64, 2, -1).prod(1).prod(2)).mean() / 2
        worst = max(found, key=lambda name: abs(found[name]))
        assert abs(found[worst]) < 5 / math.sqrt(n), (worst, found[worst])  # five standard deviations
        rows = centred.sum((1, 2)) / math.sqrt(n / shape[0])
        assert 0.5 < rows.square().mean() < 1.7  # of chi-squared with 64 degrees of freedom: past three of its sigmas


@on_ranks(4, mpi=True)
def test_the_mask_is_the_same_on_any_partition(world: Partition) -> None:
    """Also in uneven blocks, and where the ranks' generators differ: the first rank's seed counts."""
    rng, x_global = random.Random(0), torch.rand(5, 3, 4, dtype=torch.float64) + 1
    grids = (((4, 1, 1), (3, 1, 0, 2)), ((2, 1, 2), (0, 1, 2, 3)), ((1, 3, 1), (1, 2, 0)), ((1, 1, 1), (2,)))
    for (shape, ranks), p, inplace in itertools.product(grids, (0.3, 0.5, 0.9), (False, True)):
        P = world.grid(shape, ranks)
        cuts = cuts_of(x_global.shape, shape, rng)
        torch.manual_seed(7 if world.rank == P.ranks[0] else world.rank)
        torch.randint(2**63 - 1, (1,))
        state = torch.get_rng_state()
        torch.manual_seed(7 if world.rank == P.ranks[0] else world.rank)
        x = leaf(block(x_global, P, cuts))
        y = dnn.DistributedDropout(P, p, inplace)(x * 1)
        assert torch.equal(torch.get_rng_state(), state)  # one draw, also outside
        if not P.active:
            continue
        torch.manual_seed(7)
        mask = whole_mask((5, 3, 4), int(torch.randint(2**63 - 1, (1,))), p)
        kept = block(mask, P, cuts).double() / (1 - p)
        assert 0 < mask.sum() < mask.numel()
        torch.testing.assert_close(y, block(x_global, P, cuts) * kept)
        y.sum().backward()
        torch.testing.assert_close(x.grad, kept)


@on_ranks(4)
def test_channels(world: Partition) -> None:
    kinds = (dnn.DistributedDropout1d, dnn.DistributedDropout2d, dnn.DistributedDropout3d)
    for dims, kind in enumerate(kinds, 1):
        shape = (1, 2, 2, *(1,) * (dims - 1))
        P, sizes = world.grid(shape), (4, 5, 3, *(2,) * (dims - 1))
        torch.manual_seed(dims)
        mask = whole_mask(sizes[:2], int(torch.randint(2**63 - 1, (1,))), 0.4)
        torch.manual_seed(dims)
        y = kind(P, 0.4)(block(torch.ones(sizes), P, P.bounds(sizes)))
        expected = (mask.view(4, 5, *(1,) * dims) / 0.6).expand(sizes)
        torch.testing.assert_close(y, block(expected, P, P.bounds(sizes)))
        with pytest.raises(ValueError, match=f"has 2 axes, a tensor .* has {dims + 2} dims"):
            kind(world.grid((2, 2)))


@on_ranks(2, mpi=True)
def test_life(world: Partition) -> None:
    P = world.grid((2, 1))
    layer, x = dnn.DistributedDropout(P, 0.5), torch.rand(6, 9)
    torch.manual_seed(0)
    y = layer(x)
    with count() as counted:
        assert not torch.equal(layer(x), y)  # the next seed
    assert (counted.collectives, counted.bytes) == (1, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        assert torch.equal(other(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x.t().contiguous().t()), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x.bfloat16()) != 0, y != 0)
    for p, value in ((0.0, x), (1.0, torch.zeros_like(x))):
        state, leafed = torch.get_rng_state(), leaf(x)
        found = dnn.DistributedDropout(P, p)(leafed)
        assert torch.equal(found, value)
        found.sum().backward()
        assert torch.equal(leafed.grad, torch.full_like(x, 1 - p))
        assert torch.equal(torch.get_rng_state(), state)
    inside = x.clone()
    assert dnn.DistributedDropout(P, 1.0, inplace=True)(inside) is inside
    assert not inside.any()
    inside = x.clone()
    assert dnn.DistributedDropout(P, 0.5, inplace=True)(inside).data_ptr() == inside.data_ptr()
    assert copy.deepcopy(layer).eval()(x) is x
    assert layer(torch.empty(0, 9)).shape == (0, 9)
    x = torch.rand(6, 9, requires_grad=world.rank == 1)  # rank 0 must recompute too
    torch.manual_seed(3)
    y = checkpoint(lambda x: layer(x * 1).exp(), x, use_reentrant=False)
    y.sum().backward()
    if world.rank == 1:  # y = exp(k x) with the same k in {0, 2} again
        torch.testing.assert_close(x.grad, torch.where(y == 1, 0, 2) * y.detach())
    assert repr(layer) == "DistributedDropout(p=0.5, inplace=False, P_x=(2, 1))"


@on_ranks(2)
def test_double_backward(world: Partition) -> None:
    layer, x = dnn.DistributedDropout(world.grid((2,)), 0.25), torch.rand(9, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    kept = (y / x).detach()
    (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    g.sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.detach() * kept**3)


@on_ranks(4)
def test_refusals(world: Partition) -> None:
    P = world.grid((2, 2))
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"DistributedDropout: (?=.*p=).*has to be between 0 and 1"):
            dnn.DistributedDropout(P, p)(torch.rand(2, 2))
    x = torch.rand(2 + (world.rank == 3), 2)
    assert_refused(world, P, lambda: dnn.DistributedDropout(P)(x), "the blocks form no tensor product")
