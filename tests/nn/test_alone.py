"""Layers that one rank has for itself: the short way of a call beside the long one, which a hook makes it take."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.bench.layers import _pairs

SHAPES = (2, 8, 6, 6), (1, 8, 6, 6), (0, 8, 6, 6)


def outcome(call: Any, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Output and gradient, or the kind of the error."""
    torch.default_generator.manual_seed(1)
    x = torch.rand(shape, dtype=dtype, requires_grad=True)
    try:
        y = call(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return (type(error),)
    if y.requires_grad:
        y.abs().sum().backward()
    return y.detach(), x.grad


@on_ranks(2)
def test_short_way_equals_the_long_one(world: dl.Partition) -> None:
    """Whatever changes between calls: mode, shape, dtype, frozen weights; buffers and gradients of weights too."""
    alone, line = world.grid((1, 1, 1, 1), (world.rank,)), world.grid((1,), (world.rank,))
    for name, layer, _ in _pairs(alone, line, SHAPES[0]):
        if not isinstance(layer, torch.nn.Module):  # a loss or a lookup with its target, which fits one shape
            continue
        other = copy.deepcopy(layer)
        other.register_forward_hook(lambda module, args, output: None)
        for number, (shape, training, dtype) in enumerate(
            (shape, training, dtype)
            for dtype in (torch.float32, torch.float64)
            for shape in (*SHAPES, SHAPES[0])
            for training in (True, False)
        ):
            for module in (layer, other):
                module.train(training).to(dtype).requires_grad_(number % 5 > 0)
            found, wanted = (outcome(module, shape, dtype) for module in (layer, other))
            where = f"{name} {number}"
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text, w=where: f"{w}: {text}"
            )
            if len(wanted) > 1 and shape[0]:
                assert layer._distdl_alone is not None, name
        for mine, its in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=0)
        for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


@on_ranks(1)
def test_losses_with_their_targets(world: dl.Partition) -> None:
    """Two tensors; the weights of classes, and targets of another shape, which are refused."""
    P, weight = world.grid((1, 1)), torch.rand(3)
    loss, serial = dnn.DistributedCrossEntropyLoss(P, weight=weight), torch.nn.CrossEntropyLoss(weight)
    for n in (4, 4, 2, 4):
        x, target = torch.rand(n, 3), torch.randint(3, (n,))
        assert torch.equal(loss(x, target), serial(x, target))
    with pytest.raises(ValueError, match="passed a target of shape"):
        loss(torch.rand(4, 3), torch.randint(3, (5,)))
    assert torch.equal(loss(input=x, target=target), serial(x, target))


@on_ranks(1)
def test_a_dropped_layer_goes_at_once(world: dl.Partition) -> None:
    """Its weights do not wait for the garbage collector."""
    P = world.grid((1, 1))
    makers: list[Callable[[], Any]] = [
        lambda: dnn.DistributedLinear(P, None, None, 3, 3),
        lambda: dnn.DistributedBatchNorm(P, 3),
        lambda: dnn.DistributedDropout(P),
    ]
    gc.disable()
    try:
        for make in makers:
            layer = make()
            layer(torch.rand(2, 3))
            assert layer._distdl_alone is not None
            known = weakref.ref(layer)
            del layer
            assert known() is None
    finally:
        gc.enable()


class _Doubled(dnn.DistributedAvgPool2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@on_ranks(1)
def test_forward_of_ones_own(world: dl.Partition) -> None:
    """A subclass's forward and one put in its place are called, also after calls of the layer's own."""
    P, x = world.grid((1, 1, 1, 1)), torch.rand(1, 1, 4, 4)
    layer, doubled = dnn.DistributedAvgPool2d(P, 2), _Doubled(P, 2)
    for _ in range(2):
        assert torch.equal(doubled(x), 2 * layer(x))
    layer.forward = lambda x: "mine"
    assert layer(x) == "mine"
    del layer.forward
    assert torch.equal(doubled(x), 2 * layer(x))
