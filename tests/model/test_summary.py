"""Summaries of networks of layers say, without data, what ranks then send, compute and hold."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
import torch
from families import FAMILIES
from generated import COPIED, SIZE, Draw
from torch.utils import _pytree as pytree

import distdl_lite as dl
from distdl_lite.model import summary as of_layers
from distdl_lite.model.dry_layers import Seen, seen
from distdl_lite.model.report import Traffic
from distdl_lite.nn.conv import overlap
from distdl_lite.testing import count, spmd

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of options such as an even kernel with padding="same"

Numbers = tuple[int, int, int, int]  # messages and bytes, forward and backward


def counted(net: torch.nn.Module, args: Sequence[torch.Tensor], steps: int = 2) -> Numbers:
    """What this rank counts in the last step."""
    for _ in range(steps):
        net.zero_grad()
        with torch.set_grad_enabled(net.training):
            with count() as forward:
                made = [y for y in pytree.tree_leaves(net(*args)) if y.requires_grad]
            with count() as backward:
                if made:
                    torch.autograd.backward(made, [torch.ones_like(y) for y in made])
    return forward.messages, forward.bytes, backward.messages, backward.bytes


def told(rank: Seen) -> Numbers:
    """The same of a rank without data."""
    forward, backward = (sum((both[side] for both in rank.sent.values()), Traffic()) for side in (0, 1))
    return forward.messages, forward.bytes, backward.messages, backward.bytes


def drawn(world: dl.Partition, family: str, number: int) -> tuple[Any, list[torch.Tensor], bool]:
    """A layer's constructor, this rank's blocks, and whether it trains."""
    d = Draw(world, family, number)
    overlap.LEAST_BYTES = d.choice((0, 0, COPIED))
    twins = FAMILIES[family](d)
    blocks, trains = [], d.chance(0.8) or True not in twins.modes
    for x, take in zip(twins.inputs, twins.take, strict=True):
        slices = take(x.shape)
        block = dl.zero_volume_tensor(dtype=x.dtype) if slices is None else x[slices].clone()
        blocks.append(block.requires_grad_((x.is_floating_point() or x.is_complex()) and d.chance(0.9)))
    return twins.layer, blocks, trains


def both_ways(family: str, number: int) -> tuple[Any, Any]:
    """What the ranks count, and what they are said to; or their errors."""

    def run(world: dl.Partition) -> Numbers:
        make, blocks, trains = drawn(world, family, number)
        return counted(make().train(trains), blocks)

    def look() -> Seen:
        make, blocks, trains = drawn(dl.Partition(), family, number)
        return seen(lambda: (make().train(trains), blocks), dl.Partition().team)

    found: list[Any] = []
    for attempt in (lambda: spmd(SIZE, run), lambda: [told(rank) for rank in of_layers.run(SIZE, None, look).values()]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(attempt())
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                found.append(f"{type(error).__name__}: {error}")
            finally:
                overlap.LEAST_BYTES = COPIED
    return found[0], found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_sends_what_is_counted(family: str) -> None:
    """On every rank."""
    first, equal = date.today().toordinal() * 1000, 0
    for number in range(first, first + 16):
        real, dry = both_ways(family, number)
        assert real == dry, f"{family} {number}"
        equal += isinstance(real, list)
    assert equal >= 8
