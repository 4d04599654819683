"""Transposed convolutions against torch's: cut along batch, channels and space, with blocks of all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convolutions import Case, assert_weighted_second_gradients, check, check_refused
from ranks import on_ranks
from twins import assert_refused, integers, with_integers

import distdl_lite as dl
from distdl_lite.nn import DistributedConv1d, DistributedConvTranspose1d, DistributedConvTranspose2d
from distdl_lite.testing import count

SPACE = ((1, 1, 4), None, None)
CASES = [
    Case("ConvTranspose1d", (2, 3, 2), {"stride": 2}, SPACE, (2, 2, 7)),
    Case("ConvTranspose1d", (2, 3, 4), {"stride": 2, "padding": 1}, SPACE, (1, 2, 5)),
    Case("ConvTranspose1d", (2, 3, 1), {"stride": 3}, SPACE, (1, 2, 2)),  # outputs without any input
    Case("ConvTranspose1d", (2, 3, 1), {"stride": 9, "output_padding": 8}, SPACE, (1, 2, 1)),  # blocks of bias alone
    Case("ConvTranspose1d", (2, 3, 7), {"padding": 3}, SPACE, (1, 2, 5)),  # inputs from several hops away
    Case("ConvTranspose1d", (2, 3, 3), {"padding": 1}, SPACE, (1, 2, 3)),  # fewer points than ranks
    Case("ConvTranspose1d", (2, 3, 3), {"stride": 2}, SPACE, (0, 2, 5)),
    Case("ConvTranspose1d", (2, 3, 3), {"stride": 2}, SPACE, (1, 2, 8), [(0, 1), (0, 2), (0, 5, 5, 6, 8)]),
    Case("ConvTranspose2d", (2, 3, 3), {"dilation": 2, "padding": 2}, ((1, 1, 2, 2), None, None), (1, 2, 5, 4)),
    Case("ConvTranspose2d", (4, 6, 2), {"groups": 2, "stride": 2}, ((1, 2, 1, 2), None, None), (2, 4, 3, 5)),
    Case(
        "ConvTranspose3d", (1, 2, 3), {"stride": 2, "output_padding": 1}, ((1, 1, 2, 1, 2), None, None), (1, 1, 3, 2, 3)
    ),
    Case("ConvTranspose1d", (3, 4, 3), {"stride": 2}, ((1, 2, 1), (1, 2, 1), (2, 2, 1)), (2, 3, 5)),
    Case("ConvTranspose1d", (5, 3, 3), {"stride": 2}, ((2, 2, 1), (2, 1, 1), (2, 1, 2, 1)), (3, 5, 6)),
    Case("ConvTranspose1d", (5, 3, 3), {"stride": 2}, ((1, 1, 2), (1, 2, 2), (2, 1, 2)), (3, 5, 6)),
]


@on_ranks(4, mpi=True)
def test_awkward(world: dl.Partition) -> None:
    """Named cases, on threads and on MPI ranks."""
    for case in CASES:
        check(world, case)


@on_ranks(4)
def test_second_gradients(world: dl.Partition) -> None:
    """A gradient penalty's gradients are the serial layer's."""
    P = world.grid((1, 1, 2, 2))
    torch.manual_seed(3)
    serial = torch.nn.ConvTranspose2d(2, 2, 3, stride=2, dtype=torch.float64)
    torch.manual_seed(3)
    layer = DistributedConvTranspose2d(P, 2, 2, 3, stride=2, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    assert_weighted_second_gradients(layer, serial, x, P, world.rank)


@on_ranks(4)
def test_transposes_the_convolution(world: dl.Partition) -> None:
    """With the same weight it is what the convolution's backward computes."""
    P = world.grid((1, 1, 4))
    options = {"stride": 2, "padding": 1, "bias": False, "dtype": torch.float64}
    torch.manual_seed(3)
    forth = DistributedConv1d(P, 2, 3, 3, **options)
    back = DistributedConvTranspose1d(P, 3, 2, 3, **options)
    dl.load_serial_state_dict(back, dl.serial_state_dict(forth))
    x = torch.randn(1, 2, 9, dtype=torch.float64)[P.block((1, 2, 9))].requires_grad_()
    y = forth(x)
    g = torch.randn(1, 3, 5, dtype=torch.float64)[P.block((1, 3, 5))]
    y.backward(g)
    torch.testing.assert_close(back(g), x.grad, rtol=1e-14, atol=1e-14)


@on_ranks(2)
def test_one_rank_sends_nothing(world: dl.Partition) -> None:
    """A partition of one rank, and the rank outside it, which returns what it passes."""
    P = world.grid((1, 1, 1))
    layer = DistributedConvTranspose1d(P, 1, 2, 3, output_padding=1, stride=2)
    with count() as c:
        x = torch.ones(1, 1, 4) if P.active else dl.zero_volume_tensor()
        layer(x.requires_grad_()).sum().backward()
    assert c.messages == 0
    assert "1, 2, kernel_size=(3,), stride=(2,), output_padding=(1,), P_x=(1, 1, 1)" in repr(layer)


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 1, 2))
    attempts: list[tuple[Any, str]] = [
        (lambda: DistributedConvTranspose2d(P, 2, 2, 3), "P_x of shape (1, 1, 2) has 3 axes"),
        (lambda: DistributedConvTranspose1d(P, 2, 2, 3, padding_mode="circular"), "padding_mode 'circular'"),
        (lambda: DistributedConvTranspose1d(P, 2, 2, 3, padding=-1), "must not be negative"),
        (lambda: DistributedConvTranspose1d(P, 2, 2, 3, output_padding=1), "output_padding=(1,) must be below"),
        (lambda: DistributedConvTranspose1d(P, 2, 2, 3, dilation=0), "dilation=0 must be positive"),
        (lambda: DistributedConvTranspose1d(P, 2, 3, 3, groups=2), "groups=2 do not divide"),
    ]
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)
    grids = ((1, 1, 3), None, None)
    for kernel, size in ((1, -1), (2, 0)):  # of 3 inputs, at padding 2
        case = Case("ConvTranspose1d", (1, 1, kernel), {"padding": 2}, grids, (1, 1, 3))
        check_refused(world, case, f"padding=2: calculated output size {size}. Output size is too small")
        with pytest.raises(RuntimeError, match=rf"{size}\)\. Output size is too small"):
            torch.nn.ConvTranspose1d(1, 1, kernel, padding=2, dtype=torch.float64)(integers(1, 1, 3))
    check_refused(world, Case("ConvTranspose1d", (2, 1, 1), {}, grids, (1, 3, 3)), "the input has 3 channels")
    x = integers(1, 1, 7, dtype=torch.float32)
    R = world.grid((1, 1, 3))
    layer = DistributedConvTranspose1d(R, 1, 1, 3, dtype=torch.float64)
    assert_refused(world, R, lambda: layer(x[R.block(x.shape)]), "dtype torch.float32", TypeError)


SIZED = {"stride": (3, 2), "padding": 1, "dilation": (1, 2), "dtype": torch.float64}


def check_output_sizes(world: dl.Partition, P: dl.CartesianPartition) -> None:
    x, serial = integers(2, 2, 5, 4), with_integers(torch.nn.ConvTranspose2d(2, 3, 3, **SIZED))
    layer = DistributedConvTranspose2d(P, 2, 3, 3, **SIZED)
    dl.load_serial_state_dict(layer, serial.state_dict())
    mine = P.cut(x)
    for size in ([13, 9], (15, 10), torch.Size((7, 7, 14, 9)), None):
        leaf, whole = mine.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(leaf, output_size=size), serial(whole, output_size=size)
        y.square().sum().backward()
        z.square().sum().backward()
        if P.active:
            assert torch.equal(y, P.cut(z))
            assert torch.equal(leaf.grad, P.cut(whole.grad))
        assert torch.equal(layer(leaf, size), y)
    for size in ([16, 9], [13, 8], [13], [1, 13, 9]):
        with pytest.raises(ValueError, match=r"output.size") as told:
            serial(x, size)
        text = str(told.value).removeprefix("ConvTranspose2D: ")
        assert_refused(world, P, lambda size=size: layer(mine, size), text)
    for size in (13, [13.0, 9.0], "13"):
        assert_refused(world, P, lambda size=size: layer(mine, size), "neither a list nor a tuple", TypeError)
    here = world.rank == P.ranks[0]
    assert torch.equal(layer(mine, [13, 9] if here else (13, 9)), layer(mine, (13, 9)))
    if P.size > 1:
        for one, other in (([13, 9], [14, 9]), (13, None)):
            size = one if here else other
            assert_refused(world, P, lambda size=size: layer(mine, size), "the ranks disagree", (ValueError, TypeError))


@on_ranks(3)
def test_output_size(world: dl.Partition) -> None:
    """Of the whole output, another one in each call, on several ranks and on one; what does not fit is refused as by torch."""
    for grid in ((1, 1, 3, 1), (1, 1, 1, 2), (1, 1, 1, 1)):
        check_output_sizes(world, world.grid(grid))
