"""A distributed layer beside its serial twin, on inputs in blocks of any sizes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import assert_equals_serial

Make = Callable[..., torch.nn.Module]  # takes partitions


def integers(*shape: int, dtype: torch.dtype = torch.float64, low: int = -4, high: int = 5) -> torch.Tensor:
    """Random integers, the same on all ranks; sums of their products are exact."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def with_integers(serial: torch.nn.Module) -> torch.nn.Module:
    """The layer with integer weights."""
    with torch.no_grad():
        for parameter in serial.parameters():
            parameter.copy_(integers(*parameter.shape))
    return serial


def uneven(rng: random.Random, shape: Sequence[int], grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Random cut points, of which some may coincide."""
    return [(0, *sorted(rng.randint(0, n) for _ in range(p - 1)), n) for n, p in zip(shape, grid, strict=True)]


def assert_twins(
    layer: torch.nn.Module,
    serial: torch.nn.Module,
    x: torch.Tensor,
    P_x: dl.CartesianPartition,
    P_y: dl.CartesianPartition | None = None,
    bounds: Sequence[Sequence[int]] | None = None,
    tolerance: float = 0.0,
) -> None:
    """Check equality with the serial layer; `bounds` cut the input in other blocks than balanced ones."""
    first = torch.nn.Identity() if bounds is None else dnn.Repartition(P_x, P_x, bounds=bounds)
    layer, serial = torch.nn.Sequential(first, layer), torch.nn.Sequential(torch.nn.Identity(), serial)
    assert_equals_serial(layer, serial, x, P_x, P_y, rtol=tolerance, atol=tolerance)


def assert_starts_alike(layer: torch.nn.Module, serial: torch.nn.Module, rank: int) -> None:
    """Check that a layer's parameters are the serial one's, bit for bit."""
    for name, parameter in layer.named_parameters():
        box = layer._distdl_places[name].layout.box(rank)
        expected = getattr(serial, name)
        assert (
            parameter.numel() == 0 if box is None else torch.equal(parameter, expected[tuple(slice(*r) for r in box)])
        )


def assert_second_gradients(layer: torch.nn.Module, serial: torch.nn.Module, x: torch.Tensor, P: Any) -> None:
    """Check the gradient of a squared input gradient against the serial layer's, for a layer without weights."""
    block = P.block(x.shape)
    found = []
    for module, start in ((layer, P.cut(x)), (serial, x)):
        leaf = start.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
        g.square().sum().backward()
        found.append(leaf.grad)
    if block is not None:
        torch.testing.assert_close(found[0], found[1][block], rtol=1e-12, atol=1e-12)


def assert_refused(
    world: dl.Partition,
    P: dl.Partition,
    attempt: Callable[[], Any],
    text: str,
    error: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> None:
    """Check that all ranks of `P` raise the same error, with `text` in it."""
    message = None
    try:
        attempt()
    except error as raised:
        message = str(raised)
    if P.active:
        messages = world.world_transport.gather_objects(P.team, message)
        assert set(messages) == {message}
        assert message is not None
        assert text in message, message
