"""Layers that are made otherwise on one rank: an error with the same text on all ranks of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.partition import Partition

CONV = (4, 4, 3)
# What is named of a layer, its arguments, and what one rank has in their place.
MADE: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("eps=0.1", "GroupNorm", (2, 4), {"eps": 0.1}),
    ("BatchNorm.running_mean", "BatchNorm", (4,), {"affine": False}),
    ("momentum=0.5", "BatchNorm", (4,), {"momentum": 0.5}),
    ("p=0.1", "Dropout", (), {"p": 0.1}),
    ("stride=1", "MaxPool2d", (2,), {"stride": 1}),
    ("count_include_pad=False", "AvgPool2d", (3, 1, 1), {"count_include_pad": False}),
    ("divisor_override=2", "AvgPool2d", (3,), {"divisor_override": 2}),
    ("mode='bilinear'", "Upsample", (8,), {"mode": "bilinear"}),
    ("recompute_scale_factor=True", "Upsample", (None, 1.7), {"recompute_scale_factor": True}),
    ("padding=1", "Conv2d", CONV, {"padding": 1}),
    ("dilation=(2, 2)", "Conv2d", CONV, {"dilation": 2}),
    ("padding_mode=circular", "Conv2d", (*CONV, 1, 1), {"padding_mode": "circular"}),
    ("Conv2d.weight of shape (4, 2, 3, 3)", "Conv2d", CONV, {"groups": 2}),
    ("Conv2d.weight of shape (4, 4, 3, 3), torch.float64", "Conv2d", CONV, {"dtype": torch.float64}),
    ("call of layer DistributedConv2d", "Conv2d", CONV, {"bias": False}),
]


def check(text: str, world: Partition, make: Callable[..., torch.nn.Module], *usual: Any, **odd: Any) -> None:
    with pytest.raises(ValueError, match="the ranks disagree: rank 2: ") as found:
        make(*usual, **(odd if world.rank == 2 else {}))(torch.ones(1, 4, 4, 4))
    told = world.allgather_data(str(found.value))
    assert told is not None
    assert len(set(told)) == 1
    assert text in told[0]


class _Table(dnn.DistributedEmbedding):
    def __init__(self, P: Partition, **options: Any) -> None:
        super().__init__(P, 5, 4, **options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.long())


@on_ranks(3, mpi=True)
def test_what_differs_is_named_on_all_ranks(world: Partition) -> None:
    rows, columns = world.grid((1, 1, 3, 1)), world.grid((1, 1, 1, 3))
    for text, kind, arguments, other in MADE:
        check(text, world, getattr(dnn, f"Distributed{kind}"), rows, *arguments, **other)
    check("P_x=(1, 1, 1, 3)", world, lambda P_x=rows: dnn.DistributedMaxPool2d(P_x, 2), P_x=columns)
    conv = dnn.DistributedConv2d(rows, *CONV)  # what is made afterwards is the same on all ranks again
    conv(torch.ones(1, 4, 4, 4)).sum().backward()
    assert conv.weight.grad is not None
    line = world.grid((3, 1))
    check("scale_grad_by_freq=True", world, lambda **odd: _Table(line, **odd), scale_grad_by_freq=True)
    kinds = dnn.DistributedMaxPool2d, dnn.DistributedAvgPool2d
    check("DistributedMaxPool2d number", world, lambda kind=kinds[1]: kind(rows, 2), kind=kinds[0])
    # Grids of other sides, of which ranks count other lengths, and the same ranks in another order.
    fours = world.grid((1, 1, 3, 1)), world.grid((1, 1, 3))
    check("P_x=(1, 1, 3)", world, lambda P_x=fours[0]: dnn.DistributedDropout(P_x), P_x=fours[1])
    orders = world.grid((1, 1, 3, 1)), world.grid((1, 1, 3, 1), ranks=[0, 2, 1])
    text = "partitions shape=(1, 1, 3, 1), ranks=[0, 2, 1], others shape=(1, 1, 3, 1), ranks=0..2"
    check(text, world, lambda P_x=orders[0]: dnn.DistributedMaxPool2d(P_x, 2), P_x=orders[1])


@on_ranks(3, mpi=True)
def test_an_option_that_changes_on_one_rank_is_named_on_all(world: Partition) -> None:
    """Also after the layer was set up."""
    P, x = world.grid((3, 1)), torch.rand(2, 4)
    layers: tuple[tuple[torch.nn.Module, dict[str, Any], tuple[torch.Tensor, ...]], ...] = (
        (dnn.DistributedMSELoss(P), {"reduction": "sum"}, (x, x)),
        (dnn.DistributedBatchNorm(P, 4), {"eps": 0.5}, (x,)),
        (dnn.DistributedBatchNorm(P, 4), {"momentum": None}, (x,)),
        (dnn.DistributedDropout(P), {"p": 0.1}, (x,)),
    )
    for layer, options, inputs in layers:
        layer(*inputs)
        (name, odd), *_ = options.items()
        usual = getattr(layer, name)
        setattr(layer, name, odd if world.rank == 2 else usual)
        with pytest.raises(ValueError, match=f"the ranks disagree: rank 2: options .*{name}='?{odd}") as found:
            layer(*inputs)
        told = world.allgather_data(str(found.value))
        assert told is not None
        assert len(set(told)) == 1
        setattr(layer, name, usual)
        layer(*inputs)
        setattr(layer, name, odd)
        layer(*inputs)
    loss, dropout = layers[0][0], layers[-1][0]
    loss.reduction = "avg"
    with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
        loss(x, x)
    dropout.p = 1.7
    with pytest.raises(ValueError, match=r"has to be between 0 and 1, but got 1.7"):
        dropout(x)


@on_ranks(3, mpi=True)
def test_roots_that_differ_are_refused(world: Partition) -> None:
    root, P = int(world.rank == 1), world.grid((3, 1))
    with pytest.raises(ValueError, match=r"the ranks name different roots, \[0, 1\]"):
        world.broadcast_data(world.rank, root=root)
    with pytest.raises(ValueError, match=r"gather: the ranks disagree: rank 1: partitions .*ranks=\[1\]"):
        dl.gather(torch.ones(1, 2), P, root=root)
