"""Layers that one rank has for itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn


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
    P, line = world.grid((1, 1)), world.grid((1, 1, 1))
    makers: list[Callable[[], Any]] = [
        lambda: dnn.DistributedLinear(P, None, None, 3, 3),
        lambda: dnn.DistributedBatchNorm(P, 3),
        lambda: dnn.DistributedDropout(P),
        lambda: torch.nn.Sequential(torch.nn.Unflatten(1, (1, 3)), dnn.DistributedConv1d(line, 1, 1, 1)),
        lambda: torch.nn.Sequential(torch.nn.Unflatten(1, (1, 3)), dnn.DistributedConvTranspose1d(line, 1, 1, 1)),
        lambda: torch.nn.Sequential(torch.nn.Unflatten(1, (3, 1)), dnn.DistributedGroupNorm(line, 1, 3)),
        lambda: torch.nn.Sequential(dnn.DistributedZeroPad1d(P, 1), dnn.DistributedMean(P, 1, keepdim=True)),
    ]
    gc.disable()
    try:
        for make in makers:
            layer = make()
            layer(torch.rand(2, 3))
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
