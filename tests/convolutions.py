"""Cases that convolutions and transposed convolutions share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from twins import assert_refused, assert_starts_alike, assert_twins, integers, with_integers

import distdl_lite as dl
from distdl_lite.nn.conv import conv, conv_transpose


class Case(NamedTuple):
    """A layer by its torch name and arguments, its partitions' shapes, and the shape of its input."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grids: tuple[Any, Any, Any]
    shape: tuple[int, ...]
    bounds: Any = None


def layer_type(name: str) -> type[torch.nn.Module]:
    module = conv_transpose if "Transpose" in name else conv
    return getattr(module, f"Distributed{name}")


def check(world: dl.Partition, case: Case) -> None:
    """Start values bit-equal, and with integer weights output and all gradients exactly equal."""
    P_x, P_y, P_w = (None if grid is None else world.grid(grid) for grid in case.grids)
    torch.manual_seed(7)
    serial = getattr(torch.nn, case.name)(*case.arguments, dtype=torch.float64, **case.options)
    after = torch.rand(1)
    torch.manual_seed(7)
    layer = layer_type(case.name)(P_x, *case.arguments, dtype=torch.float64, P_y=P_y, P_w=P_w, **case.options)
    assert torch.equal(torch.rand(1), after)
    assert_starts_alike(layer, serial, world.rank)
    assert_twins(layer, with_integers(serial), integers(*case.shape), P_x, P_y, case.bounds)


def check_refused(world: dl.Partition, case: Case, text: str = "dim ") -> None:
    """An input that does not fit is refused on all ranks of the input's partition with the same text."""
    P_x, P_y, P_w = (None if grid is None else world.grid(grid) for grid in case.grids)
    layer = layer_type(case.name)(P_x, *case.arguments, dtype=torch.float64, P_y=P_y, P_w=P_w, **case.options)
    x = P_x.cut(integers(*case.shape))
    assert_refused(world, P_x, lambda: layer(x), text)


def assert_weighted_second_gradients(layer: Any, serial: Any, x: torch.Tensor, P: Any, rank: int) -> None:
    """Check a gradient penalty's gradients, of input and weights, against the serial layer's."""
    found = []
    for module, start in ((layer, x[P.block(x.shape)]), (serial, x)):
        leaf = start.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
        g.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1][P.block(x.shape)], rtol=1e-11, atol=1e-11)
    for name, parameter in layer.named_parameters():
        box = layer._distdl_places[name].layout.box(rank)
        expected = getattr(serial, name).grad[tuple(slice(*r) for r in box)]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-11)
