"""Convolutions against torch's: cut along batch, channels and space, with blocks of all sizes."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from convolutions import Case, assert_weighted_second_gradients, check, check_refused
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, assert_twins, integers, with_integers

import distdl_lite as dl
from distdl_lite.nn import DistributedConv1d, DistributedConv2d, DistributedConvTranspose2d
from distdl_lite.nn.conv import overlap
from distdl_lite.testing import count

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.fixture(autouse=True)
def _least_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks are copied with their halos; here they overlap, where they can."""
    monkeypatch.setattr(overlap, "LEAST_BYTES", getattr(request, "param", 0))


both_ways = pytest.mark.parametrize(
    "_least_bytes", [overlap.LEAST_BYTES, 0], ids=["copied", "overlapped"], indirect=True
)


SPACE = ((1, 1, 4), None, None)
SQUARE = ((1, 1, 2, 2), None, None)
CASES = [
    Case("Conv1d", (2, 3, 7), {"padding": 3}, SPACE, (2, 2, 5)),  # a halo wider than the neighbour's block
    Case("Conv1d", (2, 3, 3), {"stride": 3}, SPACE, (2, 2, 9)),  # fewer outputs than ranks
    Case("Conv1d", (2, 3, 1), {"stride": 5}, SPACE, (2, 2, 9)),  # blocks that no output reads
    Case("Conv1d", (2, 3, 1), {"stride": 2}, SPACE, (1, 2, 9)),
    Case("Conv1d", (2, 3, 2), {"stride": 2, "padding": 1}, SPACE, (1, 2, 8)),
    Case("Conv1d", (2, 3, 3), {"padding": 1}, SPACE, (0, 2, 9)),
    Case("Conv1d", (2, 3, 3), {"padding": 1}, SPACE, (1, 2, 3)),  # a rank without input
    Case("Conv1d", (2, 3, 3), {"padding": 1}, SPACE, (1, 2, 10), [(0, 1), (0, 2), (0, 7, 7, 8, 10)]),
    Case("Conv2d", (2, 3, 3), {"dilation": 2, "padding": 2}, SQUARE, (1, 2, 7, 5)),
    Case("Conv3d", (1, 2, 2), {"dilation": 2, "padding": 1}, ((1, 1, 2, 1, 2), None, None), (1, 1, 4, 3, 5)),
    Case("Conv2d", (4, 6, 3), {"groups": 2, "padding": (1, 0)}, ((1, 2, 1, 2), None, None), (2, 4, 3, 7)),
    Case("Conv2d", (3, 4, 3), {"padding": "same"}, ((1, 2, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1)), (2, 3, 5, 4)),
    Case("Conv1d", (5, 3, 3), {"padding": 1}, ((2, 2, 1), (2, 1, 1), (2, 1, 2, 1)), (3, 5, 6)),
    Case("Conv1d", (5, 3, 3), {"padding": 1}, ((1, 1, 2), (1, 2, 2), (2, 1, 2)), (3, 5, 6)),
    *(
        Case("Conv2d", (2, 2, (3, 5)), {"padding": (1, 2), "padding_mode": mode}, SQUARE, (2, 2, 4, 5))
        for mode in ("circular", "reflect", "replicate")
    ),
]


@both_ways
@on_ranks(4, mpi=True)
def test_awkward(world: dl.Partition) -> None:
    """Named cases, on threads and on MPI ranks."""
    for case in CASES:
        check(world, case)


@on_ranks(4)
def test_placement(world: dl.Partition) -> None:
    """Input and output on disjoint, overlapping and equal ranks in any order."""
    for ranks_x, ranks_y in (([0, 1], [2, 3]), ([3, 1], [1, 2]), ([2, 0], [2, 0])):
        P_x = world.create_partition_inclusive(ranks_x).grid((1, 1, 2))
        P_y = world.create_partition_inclusive(ranks_y).grid((1, 2, 1))
        layer = DistributedConv1d(P_x, 2, 4, 3, padding=1, dtype=torch.float64, P_y=P_y)
        serial = with_integers(torch.nn.Conv1d(2, 4, 3, padding=1, dtype=torch.float64))
        assert_twins(layer, serial, integers(2, 2, 7), P_x, P_y)


@both_ways
@on_ranks(4)
def test_second_gradients(world: dl.Partition) -> None:
    """A gradient penalty's gradients are the serial layer's."""
    P = world.grid((1, 1, 2, 2))
    torch.manual_seed(3)
    serial = torch.nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    torch.manual_seed(3)
    layer = DistributedConv2d(P, 2, 2, 3, padding=1, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    assert_weighted_second_gradients(layer, serial, x, P, world.rank)


@both_ways
@on_ranks(2)
def test_second_gradients_of_unpacked_tensors(world: dl.Partition) -> None:
    """A checkpoint gives backward a copy of the weight: the sum over the replicas goes to the weight itself."""
    P = world.grid((1, 1, 2, 1))
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def saved_elsewhere(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return layer(x)

    for call in (partial(checkpoint, use_reentrant=False), saved_elsewhere):
        found = []
        for cut in (True, False):
            torch.manual_seed(3)
            options = {"padding": 1, "dtype": torch.float64}
            layer = DistributedConv2d(P, 2, 2, 3, **options) if cut else torch.nn.Conv2d(2, 2, 3, **options)
            leaf = (x[P.block(x.shape)] if cut else x).clone().requires_grad_()
            (g,) = torch.autograd.grad(call(layer, leaf).pow(3).sum(), leaf, create_graph=True)
            g.square().sum().backward()
            found.append([layer.weight.grad, layer.bias.grad])
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@both_ways
@on_ranks(2)
def test_tensors(world: dl.Partition) -> None:
    """Strided inputs, inputs without grad on one rank, two forwards before two backwards, stride-0 gradients."""
    P = world.grid((1, 1, 2, 1))
    serial = with_integers(torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64))
    layer = DistributedConv2d(P, 2, 3, 3, padding=1, dtype=torch.float64)
    dl.load_serial_state_dict(layer, serial.state_dict())
    wide, small = integers(1, 2, 4, 14)[..., ::2].transpose(2, 3), integers(2, 2, 5, 4)
    small = small.to(memory_format=torch.channels_last)
    expected = [serial(x) for x in (wide, small)]
    blocks = [x[P.block(x.shape)].requires_grad_(world.rank == 0) for x in (wide, small)]
    outputs = [layer(x) for x in blocks]
    for y, y_serial in zip(outputs, expected, strict=True):
        assert torch.equal(y, y_serial[P.block(y_serial.shape)])
        y.sum().backward()
        y_serial.sum().backward()
    assert torch.equal(layer.weight.grad, serial.weight.grad)
    assert torch.equal(layer.bias.grad, serial.bias.grad)


@on_ranks(2)
def test_life(world: dl.Partition) -> None:
    """Shapes may change, layers be copied and pickled; one rank alone sends nothing."""
    P = world.grid((1, 1, 2))
    serial = with_integers(torch.nn.Conv1d(1, 2, 3, padding=1, dtype=torch.float64))
    layer = DistributedConv1d(P, 1, 2, 3, padding=1, dtype=torch.float64)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for n in (5, 8, 5):
            assert_twins(module, serial, integers(1, 1, n), P)
    alone = world.grid((1, 1, 1))
    layer = DistributedConv1d(alone, 1, 2, 3, padding=1)
    with count() as c:
        x = torch.ones(1, 1, 4) if alone.active else dl.zero_volume_tensor()
        layer(x.requires_grad_()).sum().backward()
    assert c.messages == 0
    assert "1, 2, kernel_size=(3,), stride=(1,), padding=1, P_x=(1, 1, 1)" in repr(layer)


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 1, 2))
    Q = world.create_partition_inclusive([0, 2]).grid((1, 2, 1))
    attempts: list[tuple[Any, str]] = [
        (lambda: DistributedConv2d(P, 2, 2, 3), "P_x of shape (1, 1, 2) has 3 axes"),
        (lambda: DistributedConv1d(P, 2, 2, 3, padding_mode="odd"), "padding_mode 'odd'"),
        (lambda: DistributedConv1d(P, 2, 2, 3, padding="most"), "padding 'most'"),
        (lambda: DistributedConv1d(P, 2, 2, 3, padding="same", stride=2), "needs stride 1"),
        (lambda: DistributedConv1d(P, 2, 2, 3, padding=-1), "must not be negative"),
        (lambda: DistributedConv1d(P, 2, 2, 3, stride=0), "stride=0 must be positive"),
        (lambda: DistributedConv1d(P, 2, 3, 3, groups=2), "groups=2 do not divide"),
        (lambda: DistributedConv1d(P, 2, 2, (3, 3)), "kernel_size=(3, 3) is neither an integer nor 1 of them"),
        (lambda: DistributedConv1d(Q, 3, 6, 3, groups=3), "do not fall on the boundaries of groups=3"),
        (lambda: DistributedConv1d(Q, 2, 2, 3, P_w=P), "does not fit P_x"),
    ]
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)
    Q_w = world.create_partition_inclusive([0, 2]).grid((1, 2, 1))
    refused = "cannot be summed over the 2 parts of P_in"
    alone = world.create_partition_inclusive([0]).grid((1, 1, 1))
    assert_refused(world, Q, lambda: DistributedConv1d(Q, 2, 2, 3, groups=2, P_y=alone, P_w=Q_w), refused)
    grids = ((1, 1, 3), None, None)
    check_refused(world, Case("Conv1d", (1, 1, 9), {}, grids, (1, 1, 7)), "shorter than the kernel")
    whole = Case("Conv1d", (2, 1, 1), {}, ((1, 2, 1), None, None), (1, 4, 3))
    check_refused(
        world, whole, "has 4 channels, in_channels=2: each of the 2 ranks along this dim passes its block of it"
    )
    reflected = {"padding": 4, "padding_mode": "reflect"}
    check_refused(world, Case("Conv1d", (1, 1, 3), reflected, grids, (1, 1, 4)), "a reflect boundary of 4")
    x = integers(1, 1, 7, dtype=torch.float32)
    R = world.grid((1, 1, 3))
    layer = DistributedConv1d(R, 1, 1, 3, dtype=torch.float64)
    assert_refused(world, R, lambda: layer(x[R.block(x.shape)]), "dtype torch.float32", TypeError)
    missing = "__init__() missing 3 required positional arguments: 'in_channels', 'out_channels', and"
    assert_refused(world, R, lambda: DistributedConv1d(R), missing, TypeError)
    for kind in (DistributedConv2d, DistributedConvTranspose2d):
        for wrong, text in (
            ((), ".__init__() missing 4 required positional arguments: 'P_x', 'in_channels'"),
            ((None, 1, 1, 1), ": a Partition is needed, not None"),
            (((1, 1, 2, 2), 1, 1, 1), ": a Partition is needed, not (1, 1, 2, 2)"),
            ((R, 1, 1, 1), ": P_x of shape (1, 1, 3) has 3 axes"),
        ):
            named = text if text[0] == "." else f"{kind.__name__}{text}"
            assert_refused(world, R, lambda kind=kind, wrong=wrong: kind(*wrong), named, (TypeError, ValueError))
    assert "kernel_size" in inspect.signature(DistributedConv2d).parameters


@on_ranks(4, mpi=True)
def test_what_overlaps(world: dl.Partition) -> None:
    """Blocks that are grown alike on both sides, by one slab for each; the bytes are those of the copying way."""
    overlap.LEAST_BYTES = 0  # put back by the fixture
    square, line = world.grid((1, 1, 2, 2)), world.grid((1, 1, 4, 1))
    ways: list[tuple[Any, dict[str, Any], tuple[int, ...], int | None]] = [
        (square, {"kernel_size": 3, "padding": 1}, (1, 2, 8, 9), 4),
        (line, {"kernel_size": 3, "padding": 1}, (1, 2, 8, 9), 2),
        (line, {"kernel_size": (3, 5), "padding": (1, 2), "stride": (1, 3)}, (1, 2, 8, 9), 2),
        (square, {"kernel_size": 5, "padding": 2, "dilation": 1, "padding_mode": "circular"}, (1, 2, 8, 9), 4),
        (line, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (1, 2, 8, 9), None),
        (line, {"kernel_size": 3, "padding": 1, "stride": 2}, (1, 2, 8, 9), None),
        (line, {"kernel_size": 3}, (1, 2, 9, 9), None),
        (line, {"kernel_size": 3, "padding": 1}, (1, 2, 3, 9), None),
    ]
    for P, options, shape, slabs in ways:
        layer = DistributedConv2d(P, 2, 2, dtype=torch.float64, **options)
        x = integers(*shape)[P.block(shape)].requires_grad_()
        with count() as c:
            layer(x).sum().backward()
        assert len(getattr(layer._distdl_plan, "slabs", ())) == (slabs or 0), options
        overlap.LEAST_BYTES = 1 << 40
        with count() as copied:
            copy.deepcopy(layer)(x).sum().backward()
        overlap.LEAST_BYTES = 0
        assert c.bytes == copied.bytes
        assert c.messages == copied.messages or "padding_mode" in options  # round a ring both sides come from one rank


@both_ways
@on_ranks(2)
def test_an_input_without_gradient(world: dl.Partition) -> None:
    """Then no rank moves one; where one rank's requires grad, all do."""
    P, serial = world.grid((1, 1, 2)), with_integers(torch.nn.Conv1d(1, 2, 3, padding=1, dtype=torch.float64))
    layer = DistributedConv1d(P, 1, 2, 3, padding=1, dtype=torch.float64)
    dl.load_serial_state_dict(layer, serial.state_dict())
    x = integers(1, 1, 9)
    serial(x).square().sum().backward()
    y = layer(x[P.block(x.shape)])
    with count() as c:
        y.square().sum().backward()
    assert "DistributedConv1d" not in c.by_label
    assert torch.equal(layer.weight.grad, serial.weight.grad)
    layer.requires_grad_(False)
    block = x[P.block(x.shape)].requires_grad_(world.rank == 1)
    layer(block).sum().backward()
    assert world.rank == 0 or torch.equal(block.grad[0, 0, -1], serial.weight[:, 0, 1:].sum())


@both_ways
@on_ranks(2)
def test_bfloat16_from_one_convolution_to_the_next(world: dl.Partition) -> None:
    """Under autocast the second one's input has the dtype of its output, but its weight has not."""
    P = world.grid((1, 1, 2))
    torch.manual_seed(0)
    serial = torch.nn.Sequential(*(torch.nn.Conv1d(2, 2, 3, padding=1) for _ in range(2)))
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(DistributedConv1d(P, 2, 2, 3, padding=1) for _ in range(2)))
    x = integers(1, 2, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = net(x[P.block(x.shape)]), serial(x)
    y.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(y, wanted[P.block(wanted.shape)])
    for mine, whole in zip(net.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, whole.grad, rtol=2e-2, atol=2e-2)
