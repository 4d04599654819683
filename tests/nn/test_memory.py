"""A layer takes little more memory than torch's on the rank's block: its halo and a few copies, never a gathered tensor."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from traffic import made

import distdl_lite as dl
from distdl_lite.bench.unet import step_of
from distdl_lite.testing import spmd


class LiveBytes(TorchDispatchMode):
    """Follows the storages that are made under it, until they are freed; `peak` is the most they ever held together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._follow(tensor.untyped_storage(), given)
        return results

    def _follow(self, storage: Any, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in known or key in self._alive:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """The most that a first forward and backward hold beside the input and the weights: plans, buffers and all."""
    with LiveBytes() as live:
        y = layer(x)
        y.backward(torch.ones_like(y))
    return live.peak


# A layer, torch's on the block, and how many more copies of the block it may hold (of the output, where that is larger).
MEMORY = [
    ("DistributedConv2d(P, 8, 8, 1)", "Conv2d(8, 8, 1)", 0),
    ("DistributedConv2d(P, 8, 8, 3, padding=1)", "Conv2d(8, 8, 3, padding=1)", 2),
    ("DistributedConv2d(P, 8, 8, 3, stride=2, padding=1)", "Conv2d(8, 8, 3, stride=2, padding=1)", 2),
    ("DistributedConvTranspose2d(P, 8, 8, 2, stride=2)", "ConvTranspose2d(8, 8, 2, stride=2)", 0),
    ("DistributedConvTranspose2d(P, 8, 8, 1, stride=2, output_padding=1)", "ConvTranspose2d(8, 8, 1, 2, 0, 1)", 1),
    ("DistributedConvTranspose2d(P, 8, 8, 4, stride=2, padding=1)", "ConvTranspose2d(8, 8, 4, stride=2, padding=1)", 2),
    ("DistributedMaxPool2d(P, 2)", "MaxPool2d(2)", 0),
    ("DistributedMaxPool2d(P, 3, 2, 1)", "MaxPool2d(3, 2, 1)", 1),
    ("DistributedAvgPool2d(P, 3, 1, 1)", "AvgPool2d(3, 1, 1)", 1),
    ("DistributedAdaptiveAvgPool2d(P, 16)", "AdaptiveAvgPool2d(16)", 2),
    ("DistributedAdaptiveAvgPool2d(P, 1)", "AdaptiveAvgPool2d(1)", 2),
    ("DistributedAdaptiveMaxPool2d(P, 16)", "AdaptiveMaxPool2d(16)", 2),
    ("DistributedUpsample(P, scale_factor=2)", "Upsample(scale_factor=2)", 0),
    ("DistributedUpsample(P, scale_factor=2, mode='bilinear')", "Upsample(scale_factor=2, mode='bilinear')", 2),
    ("DistributedUpsample(P, scale_factor=2, mode='bicubic')", "Upsample(scale_factor=2, mode='bicubic')", 2),
    ("DistributedUpsample(P, size=(75 * world.size, 256), mode='bilinear')", "Upsample(size=(75, 256), mode='bilinear')", 4),
    ("DistributedZeroPad2d(P, 2)", "ZeroPad2d(2)", 1),
    ("DistributedReflectionPad2d(P, 2)", "ReflectionPad2d(2)", 2),
    ("DistributedCircularPad2d(P, 2)", "CircularPad2d(2)", 1),
    ("DistributedBatchNorm(P, 8)", "BatchNorm2d(8)", 2),
    ("DistributedBatchNorm(P, 8).eval()", "BatchNorm2d(8).eval()", 0),
    ("DistributedInstanceNorm(P, 8)", "InstanceNorm2d(8)", 2),
    ("DistributedGroupNorm(P, 2, 8)", "GroupNorm(2, 8)", 2),
    ("DistributedLayerNorm(P, (8, 64 * world.size, 128))", "LayerNorm((8, 64, 128))", 6),  # up to a constant: see normalised.py
    ("DistributedSoftmax(P, 2)", "Softmax(2)", 4),
    ("DistributedDropout(P)", "Dropout()", 2),
    ("HaloExchange(P, (0, 0, 1, 1))", "Identity()", 1),
]  # fmt: skip


def extra_memory(world: dl.Partition, ours: str, torchs: str, shape: Sequence[int]) -> tuple[int, int]:
    """What a layer holds more than torch's on a block of that shape, on the rank where it is most, and the bytes of the
    block, or of its output where that is larger."""
    P = world.grid((1, 1, world.size, 1))
    x = torch.ones(shape, requires_grad=True)
    twin = made(torchs, **vars(torch.nn))
    own = peak(made(ours, P=P, world=world), x)
    x.grad = None
    y = twin(x)
    everywhere = world.allgather_data(own - peak(twin, x))
    assert everywhere is not None
    return max(everywhere), max(x.nbytes, y.nbytes)


def check_memory(world: dl.Partition) -> None:
    shape = (1, 8, 64, 128)
    # Two points to either side, in send and receive buffers and as slabs; statistics, weights and indices.
    halo, small = 8 * 2 * 2 * 4 * 8 * 128, 1 << 15
    sends_to_itself = 0 if "MPI" in type(world.world_transport).__name__ else 1  # threads keep a copy on the way
    for ours, torchs, copies in MEMORY:
        extra, unit = extra_memory(world, ours, torchs, shape)
        allowed = (copies + sends_to_itself * bool(copies)) * unit + halo + small
        assert extra <= allowed, (ours, extra / unit, allowed / unit)


@on_ranks(4, mpi=True)
def test_memory(world: dl.Partition) -> None:
    """A layer holds its halo and a few copies of its own block more than torch's layer."""
    check_memory(world)


@on_ranks(8)
def test_memory_on_more_ranks(world: dl.Partition) -> None:
    """The bounds are those of four ranks: nothing grows with the tensor."""
    check_memory(world)


@on_ranks(4, mpi=True)
def test_memory_of_large_blocks(world: dl.Partition) -> None:
    """A convolution of large blocks takes no copy of them; a gathered tensor would be seen."""
    shape, side = (1, 8, 128, 512), 4 * 8 * 512
    extra, unit = extra_memory(world, "DistributedConv2d(P, 8, 8, 3, padding=1)", "Conv2d(8, 8, 3, padding=1)", shape)
    assert extra <= 16 * side + (1 << 15) < unit / 4
    extra, unit = extra_memory(world, "AllGather(P, axes_all_gather=(2,))", "Identity()", shape)
    assert extra >= 3 * unit


def test_memory_of_a_network() -> None:
    """A training step keeps nothing twice: its ranks share what one rank alone holds, but for halos."""

    def peaks(world: dl.Partition, grid: tuple[int, int]) -> int:
        step = step_of(world.grid((1, 1, *grid)), (416, 480))
        step()
        with LiveBytes() as live:
            step()
        return live.peak

    (alone,), halves, quarters = (
        spmd(a * b, lambda world, g=(a, b): peaks(world, g)) for a, b in ((1, 1), (1, 2), (2, 2))
    )
    assert max(halves) < 0.51 * alone, (halves, alone)
    assert max(quarters) < 0.27 * alone, (quarters, alone)
