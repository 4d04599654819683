"""Attention whose tokens are cut: each way against the serial model, what it moves, and what a rank holds."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distdl_lite as dl
from distdl_lite.grid import Grid
from distdl_lite.layout import Dim
from distdl_lite.model.distributed import Distributed
from distdl_lite.model.prove import Proof, prove
from distdl_lite.model.ring import Ring, rotated
from distdl_lite.model.rules import attention
from distdl_lite.nn.dropout import mask_of
from distdl_lite.testing import count, spmd

TOKENS = (0, None, 2, None)
BOTH = (0, None, 2, 3)  # tokens and features


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Any, k: Any, v: Any, mask: Any = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


class Block(nn.Module):
    """Tokens of (N, C, H, W), or (N, L, C) if causal, of `heads` heads for queries and fewer for keys."""

    def __init__(self, channels: int, heads: int, groups: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels // groups)
        self.out, self.heads, self.causal = nn.Linear(channels, channels), heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        n, length, channels = tokens.shape
        q, k, v = (
            t.view(n, length, -1, channels // self.heads).transpose(1, 2)
            for t in (self.q(tokens), *self.kv(tokens).chunk(2, -1))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=k.shape[1] < self.heads)
        y = tokens + self.out(y.transpose(1, 2).reshape(n, length, channels))
        return y.transpose(1, 2).reshape(x.shape) if x.dim() == 4 else y


class Own(nn.Module):
    def __init__(self, layer: nn.MultiheadAttention, weights: bool) -> None:
        super().__init__()
        self.layer, self.weights = layer, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, need_weights=self.weights)[0]


@pytest.fixture(autouse=True)
def _many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FEW", 0)


def forced(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Let attention take one way where it is there."""
    ways = attention.Tokens.ways

    def chosen(self: Any, dtype: torch.dtype) -> list[attention.Way]:
        found = list(ways(self, dtype))
        return [way for way in found if way.kind == kind] or found

    monkeypatch.setattr(attention.Tokens, "ways", chosen)


def kinds(proof: Proof) -> Counter[str]:
    assert not proof.program.gathered
    return Counter(m.kind for m in proof.program.compiler.movements)


@pytest.mark.parametrize("kind", ["ring", "heads", "sum", "gather"])
def test_each_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in ("sum", "gather"):
        monkeypatch.setattr(attention, "FEW", math.inf)
    forced(monkeypatch, kind)
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(7, 9, generator=generator) > 0.4
    allowed[3] = False  # a query that sees nothing
    q, k, v = (2, 4, 7, 4), (2, 4, 9, 4), (2, 4, 9, 3)
    few = {"q": ((2, 6, 7, 4), (2, 2, 9, 4), (2, 2, 9, 3)), "one": ((2, 4, 7, 4), (2, 1, 9, 4), (2, 1, 9, 3))}
    cases: list[tuple[dict[str, Any], tuple[Any, ...], tuple[Any, ...]]] = [
        ({}, (q, q, q), ()),
        ({"is_causal": True, "scale": 0.3}, (q, k, v), ()),
        ({}, (q, k, v, allowed), ((None, None),)),
        ({}, (q, k, v, (4, 7, 9)), ((None, None, None),)),
        ({}, (q, k, v, (2, 1, 1, 9)), (TOKENS,)),
        ({"enable_gqa": True, "is_causal": True}, few["q"], ()),
        ({"enable_gqa": True}, (*few["q"], (2, 6, 7, 9)), (TOKENS,)),
        ({"enable_gqa": True}, few["one"], ()),
        ({}, ((2, 4, 5, 4), (2, 4, 3, 4), (2, 4, 3, 4)), ()),  # a rank without keys
    ]
    for number, (options, inputs, of_mask) in enumerate(cases):
        for grid, axes in (((1, 1, 4, 1), TOKENS), ((1, 1, 2, 2), BOTH), ((2, 1, 2, 1), TOKENS))[
            : 3 if number == 0 else 2
        ]:
            proof = prove(
                Attention(**options), grid, *inputs, in_axes=(axes,) * 3 + of_mask, out_axes=[TOKENS], steps=0
            )
            if not options and len(inputs) == 3 and inputs[0] == inputs[1] and axes == TOKENS:
                assert set(kinds(proof)) - {"reduce_scatter"} == {kind}


def test_queries_or_keys_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, whole = (2, 3, 8, 4), (2, 3, 9, 4), (0, None, None, None)
    grid = (1, 1, 4, 1)
    assert not kinds(prove(Attention(is_causal=True), grid, q, k, k, in_axes=(TOKENS, whole, whole), out_axes=[TOKENS]))
    found = kinds(prove(Attention(), grid, q, k, k, in_axes=(whole, TOKENS, TOKENS), out_axes=[TOKENS]))
    assert found == {"ring": 3}  # after a slice of the queries
    few = (2, 3, 2, 4)
    found = kinds(prove(Attention(), grid, few, k, k, in_axes=(whole, TOKENS, TOKENS), out_axes=[whole]))
    assert found == {"sum": 1, "all_reduce": 1}
    found = kinds(
        prove(Attention(), (2, 2, 1, 1), q, k, k, in_axes=((0, 1, None, None),) * 3, out_axes=[(0, 1, None, None)])
    )
    assert not found


def test_choice() -> None:
    grid = (1, 1, 4, 1)
    assert kinds(prove(Block(8, 4), grid, (1, 8, 6, 4), steps=0)) == {"heads": 2}
    assert kinds(prove(Block(9, 3), grid, (1, 9, 7, 5), steps=0)) == {"ring": 3}  # three heads are too few
    attention.FEW = 2**20  # the fixture restores it
    assert kinds(prove(Block(9, 3), grid, (1, 9, 7, 5), steps=0)) == {"gather": 1}
    wide = Attention(), grid, (1, 3, 5, 4), (1, 3, 90, 4), (1, 3, 90, 4)
    assert kinds(prove(*wide, in_axes=(TOKENS,) * 3, out_axes=[TOKENS], steps=0)) == {"sum": 2, "reduce_scatter": 1}


def test_image_tokens() -> None:
    for grid in ((1, 1, 2, 2), (2, 1, 2, 1), (1, 1, 1, 4)):
        prove(Block(8, 4), grid, (2, 8, 6, 8))
        prove(Block(9, 3), grid, (2, 9, 5, 7))
    prove(Block(8, 2), (1, 2, 2, 1), (2, 8, 6, 5))


def test_sequences() -> None:
    for grid, axes in (((1, 4, 1), None), ((2, 2, 1), [(0, 1, 2)]), ((1, 2, 2), [(0, 1, 2)])):
        for groups in (1, 2, 4):
            prove(Block(8, 4, groups, causal=True), grid, (2, 9, 8), in_axes=axes, out_axes=axes, steps=0)


def test_multihead_attention() -> None:
    for training in (True, False):
        for first in (True, False):
            layer = nn.MultiheadAttention(8, 4, batch_first=first)
            shape, axes = ((2, 7, 8), (0, 1, 2)) if first else ((7, 2, 8), (1, 0, 2))
            model = Own(layer, weights=False).train(training)
            assert kinds(prove(model, (1, 4, 1), shape, in_axes=[axes], out_axes=[axes])) == {"heads": 2}
        prove(Own(nn.MultiheadAttention(8, 4, batch_first=True), weights=True).train(training), (2, 2, 1), (2, 7, 8))


@pytest.mark.parametrize(
    ("kind", "grid", "axes"),
    [("ring", (1, 1, 4, 1), TOKENS), ("ring", (1, 1, 2, 2), BOTH), ("heads", (2, 1, 2, 1), TOKENS)],
)
def test_dropout(kind: str, grid: tuple[int, ...], axes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is the library's, by the global index of the scores, on any grid."""
    monkeypatch.setattr(attention, "seed_of", lambda c: 77)
    forced(monkeypatch, kind)
    q, k = (torch.randn(2, 4, n, 3, dtype=torch.float64) for n in (7, 9))
    inputs = [t.clone().requires_grad_() for t in (q, k)]
    kept = mask_of(((0, 2), (0, 4), (0, 7), (0, 9)), (2, 4, 7, 9), 77, 0.3)
    wanted = ((inputs[0] @ inputs[1].mT / math.sqrt(3)).softmax(-1) * kept / 0.7) @ inputs[1]
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)

    class Dropped(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, k, dropout_p=0.3)

    def body(world: dl.Partition) -> None:
        P = world.grid(grid)
        blocks = [P.cut(t, axes).requires_grad_() for t in (q, k)]
        y = Distributed(Dropped(), P, (axes, axes), (TOKENS,))(*blocks)
        mine = P.block(wanted.shape, TOKENS)
        torch.testing.assert_close(y, wanted[mine], rtol=1e-12, atol=1e-12)
        y.backward(gradient[mine])
        for block, t in zip(blocks, inputs, strict=True):
            torch.testing.assert_close(block.grad, t.grad[P.block(t.shape, axes)], rtol=1e-12, atol=1e-12)

    spmd(4, body)


def ring_of(P: dl.Partition, shape: tuple[int, ...], **options: Any) -> tuple[Distributed, list[torch.Tensor]]:
    blocks = [P.cut(torch.randn(shape, dtype=torch.float64), TOKENS).requires_grad_() for _ in range(3)]
    net = Distributed(Attention(**options), P, (TOKENS,) * 3, (TOKENS,))
    return net, blocks


def test_bytes() -> None:
    """Blocks pass once forward, once more backward, and their gradients go home; those in the future stay where they are."""
    block = 2 * 3 * 4 * (5 + 5) * 8  # N, heads, tokens, features of keys and values, bytes

    def body(world: dl.Partition, causal: bool) -> tuple[int, int]:
        net, blocks = ring_of(world.grid((1, 1, 4, 1)), (2, 3, 16, 5), is_causal=causal)
        net(*blocks)
        with count() as forward:
            y = net(*blocks)
        with count() as backward:
            y.sum().backward()
        return forward.bytes, backward.bytes

    assert spmd(4, lambda world: body(world, False)) == [(3 * block, 6 * block)] * 4
    # Rank r's block is wanted by those behind it; the gradients of r blocks leave it.
    assert spmd(4, lambda world: body(world, True)) == [((3 - r) * block, (3 - r + r) * block) for r in range(4)]


def test_rotated() -> None:
    """Each rank holds what the next one held; the blocks do not overlap, so that what moves is copied and not added."""
    dim = rotated(Dim(((0, 3), (3, 5), (5, 7)), (0,)), {0: 1}, Grid((3,), range(3)))
    assert dim.ranges == ((3, 5), (5, 7), (0, 3))
    assert not dim.overlaps


class _Largest(TorchDispatchMode):
    """The most elements that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else [made]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return made


def test_memory() -> None:
    """No rank holds all keys, nor buffers for them: here with fewer tokens than features, so that scores are small."""

    def body(world: dl.Partition) -> int:
        net, blocks = ring_of(world.grid((1, 1, 4, 1)), (1, 3, 16, 100))
        net(*blocks)
        with _Largest() as largest:
            net(*blocks).sum().backward()
        (ring,) = (value for value in net.program.compiler.names.values() if isinstance(value, Ring))
        operators = [operator for operator, _ in ring.steps if operator is not None]
        assert len(operators) == 3
        assert not any(operator._channels or operator.adjoint._channels for operator in operators)
        return largest.elements

    assert max(spmd(4, body)) <= 3 * 4 * 201


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distdl_lite.model.ring._AT_ONCE", 50)
    q, k = (2, 3, 7, 4), (2, 3, 19, 4)
    axes = (TOKENS, TOKENS, TOKENS, TOKENS)
    prove(Attention(), (1, 1, 4, 1), q, k, k, (2, 3, 7, 19), in_axes=axes, out_axes=[TOKENS], steps=0)


def test_half_precision() -> None:
    inputs = [torch.randn(2, 3, 9, 4).bfloat16() for _ in range(3)]
    prove(
        Attention(),
        (1, 1, 4, 1),
        *inputs,
        dtype=None,
        in_axes=(TOKENS,) * 3,
        out_axes=[TOKENS],
        steps=0,
        tolerance=0.03,
    )


def test_no_second_derivative() -> None:
    def body(world: dl.Partition) -> None:
        net, blocks = ring_of(world.grid((1, 1, 2, 1)), (1, 3, 4, 2))
        y = net(*blocks)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(y.sum(), blocks, create_graph=True)

    spmd(2, body)


def test_checkpoint() -> None:
    def body(world: dl.Partition) -> None:
        net, blocks = ring_of(world.grid((1, 1, 3, 1)), (1, 3, 7, 2))
        net(*blocks).square().sum().backward()
        wanted = [t.grad.clone() for t in blocks]
        for t in blocks:
            t.grad = None
        torch.utils.checkpoint.checkpoint(net, *blocks, use_reentrant=False).square().sum().backward()
        assert all(torch.equal(t.grad, w) for t, w in zip(blocks, wanted, strict=True))

    spmd(3, body)


@pytest.mark.mpi(min_size=4)
def test_over_mpi() -> None:
    P = dl.Partition.world().create_partition_inclusive(range(4)).create_cartesian_topology_partition((1, 1, 2, 2))
    if not P.active:
        return
    for channels, heads in ((8, 4), (9, 3)):  # by heads, and blocks that pass by
        torch.manual_seed(3)
        model = Block(channels, heads).double()
        x = torch.randn(2, channels, 5, 7, dtype=torch.float64)
        whole = x.clone().requires_grad_()
        wanted = model(whole)
        wanted.square().sum().backward()
        mine, net = P.block(x.shape), Distributed(model, P)
        for _ in range(2):
            block = x[mine].clone().requires_grad_()
            y = net(block)
            torch.testing.assert_close(y, wanted[mine], rtol=1e-10, atol=1e-10)
            y.square().sum().backward()
            torch.testing.assert_close(block.grad, whole.grad[mine], rtol=1e-10, atol=1e-10)
