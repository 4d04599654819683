"""Padding against torch's, with blocks of all sizes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import assert_refused, assert_second_gradients, assert_twins, integers

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import adjoint_test, count

KINDS = ["ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"]


def twin(name: str, P: dl.CartesianPartition, padding: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    options = (padding, 3.0) if name.startswith("Constant") else (padding,)
    return getattr(dnn, f"Distributed{name}")(P, *options), getattr(torch.nn, name)(*options)


CASES: list[tuple[str, Any, tuple[int, ...], tuple[int, ...]]] = [
    ("ZeroPad1d", (9, 0), (1, 1, 4), (2, 2, 3)),  # blocks of nothing but padding
    ("ZeroPad1d", (2, 2), (1, 4), (0, 3)),  # an empty tensor
    ("ZeroPad1d", (-3, -4), (1, 1, 4), (1, 2, 7)),  # an empty output
    ("ConstantPad1d", (2, 3), (2, 2), (1, 1)),
    ("ConstantPad1d", (-2, 5), (4,), (3,)),
    ("ConstantPad2d", (1, -1, 2, 0), (1, 1, 1, 2, 2), (2, 1, 3, 4, 5)),  # more dims before the padded ones
    ("ConstantPad3d", 1, (1, 2, 1, 2), (1, 3, 2, 5)),
    ("ReflectionPad1d", (4, 4), (1, 1, 4), (1, 2, 5)),  # several hops
    ("ReflectionPad1d", (-7, 4), (1, 1, 4), (1, 2, 5)),  # nothing but the mirror image
    ("ReflectionPad2d", (3, 2, 1, 1), (1, 1, 2, 2), (0, 2, 4, 5)),
    ("ReplicationPad1d", (9, 9), (1, 1, 4), (1, 2, 1)),
    ("ReplicationPad3d", (1, 2, 0, -1, 3, 1), (1, 1, 2, 1, 2), (1, 2, 3, 4, 5)),
    ("CircularPad1d", 5, (1, 1, 4), (2, 2, 5)),  # every point three times
    ("CircularPad1d", (-2, 3), (1, 1, 4), (1, 1, 5)),  # wraps round what is left
    ("CircularPad2d", (2, 1, 0, 3), (1, 1, 2, 2), (1, 2, 4, 5)),
    ("CircularPad3d", (1, 0, 2, 2, -1, 1), (1, 1, 2, 1, 2), (1, 2, 4, 3, 5)),
]


@on_ranks(4, mpi=True)
def test_awkward(world: dl.Partition) -> None:
    """Named cases, on threads and on MPI ranks, also with the padded dims whole and on some ranks alone."""
    for name, padding, grid, shape in CASES:
        P = world.grid(grid)
        assert_twins(*twin(name, P, padding), integers(*shape), P)
    for name, padding, _, shape in CASES[:2] + CASES[7:9] + CASES[12:13]:
        few = world.create_partition_inclusive([3, 1]).grid((1,) * (len(shape) - 1) + (2,))
        whole = world.create_partition_inclusive([2, 0]).grid((2,) + (1,) * (len(shape) - 1))
        for P in (few, whole):
            assert_twins(*twin(name, P, padding), integers(*shape), P)


@on_ranks(4)
def test_dtypes_and_second_gradients(world: dl.Partition) -> None:
    """Integers, bools, halves and complex numbers are moved as they are; double backward is the serial one's."""
    P = world.grid((1, 1, 2, 2))
    for kind in KINDS:
        layer, serial = twin(f"{kind}2d", P, (2, 1, 1, 2))
        assert_second_gradients(layer, serial, torch.randn(1, 2, 5, 4, dtype=torch.float64), P)
        for dtype in (torch.int64, torch.bfloat16, torch.complex64, torch.bool):
            x = integers(1, 2, 5, 4, dtype=dtype)
            if dtype is torch.bool and kind in ("ReflectionPad", "ReplicationPad"):  # which torch refuses
                continue
            whole = serial(x)
            y = layer(x[P.block(x.shape)])
            assert y.dtype is whole.dtype
            assert torch.equal(y, whole[P.block(whole.shape)])


@on_ranks(4)
def test_adjoints(world: dl.Partition) -> None:
    """The backward is the exact adjoint, for permuted memory too."""
    P = world.grid((1, 1, 2, 2))
    x = torch.randn(1, 5, 4, 2, dtype=torch.float64).permute(0, 3, 1, 2)
    for kind in KINDS:
        padding = 2, 1, -1, 2
        linear = dnn.DistributedConstantPad2d(P, padding, 0.0)
        layer = linear if kind == "ConstantPad" else twin(f"{kind}2d", P, padding)[0]
        assert adjoint_test(layer, x[P.block(x.shape)], P=P) < 1e-14


@on_ranks(2)
def test_messages(world: dl.Partition) -> None:
    """One message to each rank that reads, and none where the padded dims are whole."""
    for kind in KINDS:
        for grid, messages in (((1, 1, 2), 1), ((2, 1, 1), 0)):
            P = world.grid(grid)
            x = integers(2, 2, 8)
            layer = twin(f"{kind}1d", P, (2, 0))[0]
            with count() as c:
                layer(x[P.block(x.shape)])
            assert c.messages <= messages


@on_ranks(2)
def test_life(world: dl.Partition) -> None:
    """Shapes may change, layers be copied, pickled and checkpointed; one rank's gradient alone; the description."""
    P = world.grid((1, 1, 2))
    layer, serial = twin("CircularPad1d", P, (3, 1))
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for n in (5, 8, 5):
            assert_twins(module, serial, integers(1, 1, n), P)
    assert "padding=(3, 1), P_x=(1, 1, 2)" in repr(layer)
    assert "value=3.0" in repr(twin("ConstantPad1d", P, 1)[0])
    for kind in KINDS:
        layer = twin(f"{kind}1d", P, (-1, 4))[0]
        x = integers(1, 1, 7)[P.block((1, 1, 7))].requires_grad_(world.rank == 1)
        expected = torch.autograd.grad(layer(x * x).sum(), x)[0] if world.rank == 1 else layer(x * x).sum().backward()
        y = checkpoint(lambda z, layer=layer: layer(z * z), x, use_reentrant=False)
        y.sum().backward()
        assert (x.grad is expected is None) if world.rank == 0 else torch.equal(x.grad, expected)


@on_ranks(3)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.create_partition_inclusive([0, 2]).grid((1, 1, 2))
    whole = world.create_partition_inclusive([0, 2]).grid((2, 1, 1))

    line = world.create_partition_inclusive([0, 2]).grid((2,))

    def padded(name: str, P: dl.CartesianPartition, padding: Any, *shape: int) -> Any:
        x = integers(*shape)
        return lambda: twin(name, P, padding)[0](P.cut(x))

    attempts: list[tuple[Any, str]] = [
        (padded("ZeroPad1d", P, (1, 2, 3), 1, 1, 7), "padding=(1, 2, 3)"),
        (padded("ReflectionPad3d", P, 1, 1, 1, 7), "input of shape (1, 1, 7)"),
        (padded("ZeroPad2d", line, 1, 7), "input of shape (7,)"),
        (padded("ZeroPad1d", P, (-4, -4), 1, 1, 7), "input of shape (1, 1, 7), padding=(-4, -4)"),
        (padded("ReflectionPad1d", P, (7, 0), 1, 1, 7), "input of shape (1, 1, 7), padding=(7, 0)"),
        (padded("ReplicationPad1d", P, (1, 0), 1, 1, 0), "input of shape (1, 1, 0), padding=(1, 0)"),
        (padded("CircularPad1d", P, (0, 8), 1, 1, 7), "wrapping around more than once"),
    ]
    for cut in (P, whole):
        attempts.append((padded("CircularPad1d", cut, (7, -1), 1, 1, 7), "reads more than what it leaves"))
    for attempt, text in attempts:
        assert_refused(world, P, attempt, text)
