"""Layers that read beyond their blocks send their halo, or what a move of the cuts makes them, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from ranks import on_ranks
from traffic import LINE, SHAPE, SQUARE, Points, assert_sends, block, cuts, exchanged, gradient_sum, made, plus

import distdl_lite as dl

# Layers that read a halo: how many points to the left and to the right of blocks that start at multiples of 8.
HALOS = {
    "DistributedConv2d(P, 8, 8, 1)": (0, 0),
    "DistributedConv2d(P, 8, 4, 2, stride=2)": (0, 0),
    "DistributedConv2d(P, 8, 8, 3, padding=1)": (1, 1),
    "DistributedConv2d(P, 8, 8, 3, padding=1, padding_mode='reflect')": (1, 1),
    "DistributedConv2d(P, 8, 8, 3, padding=1, groups=8, bias=False)": (1, 1),
    "DistributedConv2d(P, 8, 8, 3, stride=2, padding=1)": (1, 0),
    "DistributedConv2d(P, 8, 8, 2, padding='same')": (0, 1),
    "DistributedConv2d(P, 8, 8, 5, padding=4, dilation=2)": (4, 4),
    "DistributedConvTranspose2d(P, 8, 4, 2, stride=2)": (0, 0),
    "DistributedConvTranspose2d(P, 8, 4, 4, stride=2, padding=1)": (1, 1),
    "DistributedConvTranspose2d(P, 8, 4, 3, stride=2, padding=1, output_padding=1)": (0, 1),
    "DistributedMaxPool2d(P, 2)": (0, 0),
    "DistributedMaxPool2d(P, 3, 2, 1)": (1, 0),
    "DistributedAvgPool2d(P, 3, 1, 1)": (1, 1),
    "DistributedAdaptiveAvgPool2d(P, 8)": (0, 0),
    "DistributedAdaptiveMaxPool2d(P, 8)": (0, 0),
    "DistributedUpsample(P, scale_factor=2)": (0, 0),
    "DistributedUpsample(P, scale_factor=2, mode='bilinear')": (1, 1),
    "DistributedUpsample(P, scale_factor=2, mode='bilinear', align_corners=True)": (1, 1),
    "DistributedUpsample(P, scale_factor=2, mode='bicubic')": (2, 2),
    "DistributedUpsample(P, scale_factor=0.5, mode='area')": (0, 0),
    "HaloExchange(P, (0, 0, (1, 2), (1, 2)))": (1, 2),
}
PLACES = [
    ("2d", SHAPE, SQUARE),
    ("2d", SHAPE, LINE),
    ("1d", (4, 8, 64), (1, 1, 4)),
    ("3d", (2, 8, 16, 16, 24), (1, 1, 2, 1, 2)),
]


def grown(own: list[list[Points]], halo: tuple[int, int], around: bool = False) -> list[list[Points]]:
    """The blocks with a halo to the left and right along each cut spatial dim; `around`: on a ring, else to the edge."""
    found = list(own)
    for d, blocks in enumerate(own):
        n = blocks[-1][-1] + 1
        if d > 1 and (len(blocks) > 1 or around):
            wanted = [range(b[0] - halo[0], b[-1] + 1 + halo[1]) for b in blocks]
            found[d] = [[i % n if around else i for i in w if around or 0 <= i < n] for w in wanted]
    return found


def assert_sends_halo(
    world: dl.Partition,
    text: str,
    shape: Sequence[int],
    grid: Sequence[int],
    halo: tuple[int, int] = (1, 1),
    around: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check what a layer sends of a tensor in balanced blocks: the halo, and backward the sum of gradients too."""
    P, own = world.grid(grid), cuts(shape, grid)
    layer = made(text, P=P, dtype=dtype)
    forward, backward = exchanged(own, grown(own, halo, around), world.rank, dtype.itemsize)
    assert_sends(layer, [block(P, shape, dtype)], forward, plus(backward, gradient_sum(layer)), grid)


@on_ranks(4, mpi=True)
def test_halos(world: dl.Partition) -> None:
    """Convolutions, pools and interpolation send their halo and nothing else, whatever the number of dims."""
    for dims, shape, grid in PLACES:
        for text, halo in HALOS.items():
            if dims == "2d" or "2d" in text:
                assert_sends_halo(world, text.replace("2d", dims), shape, grid, halo)


@on_ranks(4)
def test_rings(world: dl.Partition) -> None:
    """Round a ring every rank has two neighbours, which on two ranks are one."""
    for grid in (SQUARE, LINE):
        for text in (
            "DistributedConv2d(P, 8, 8, 3, padding=1, padding_mode='circular')",
            "HaloExchange(P, (0, 0, 1, 1), boundary='circular')",
        ):
            assert_sends_halo(world, text, SHAPE, grid, around=True)


@on_ranks(4, mpi=True)
def test_large_blocks(world: dl.Partition) -> None:
    """Where the halo travels while the convolution computes, the bytes are the same: of 2 MiB a block, 16 KiB a side."""
    for grid in (SQUARE, LINE):
        assert_sends_halo(world, "DistributedConv2d(P, 8, 8, 3, padding=1)", (1, 8, 512, 512), grid)


@on_ranks(4)
def test_item_sizes(world: dl.Partition) -> None:
    """Half precision halves the bytes, double precision doubles them."""
    for dtype in (torch.bfloat16, torch.float64):
        for text in (
            "DistributedAvgPool2d(P, 3, 1, 1)",
            "HaloExchange(P, (0, 0, 1, 1))",
            "DistributedConv2d(P, 8, 8, 3, padding=1, dtype=dtype)",
        ):
            assert_sends_halo(world, text, SHAPE, SQUARE, dtype=dtype)


@on_ranks(4, mpi=True)
def test_pads(world: dl.Partition) -> None:
    """A pad moves the cuts by a part of its width: only points between the old and the new cuts travel."""
    for grid, (top, bottom, left, right) in itertools.product(
        (SQUARE, LINE), ((2, 2, 2, 2), (0, 3, 1, 2), (-1, 4, 2, 0))
    ):
        P, own = world.grid(grid), cuts(SHAPE, grid)
        for kind in (
            "ZeroPad2d(P, pad)",
            "ConstantPad2d(P, pad, 1.5)",
            "ReflectionPad2d(P, pad)",
            "ReplicationPad2d(P, pad)",
        ):
            padded = cuts((4, 8, 64 + top + bottom, 96 + left + right), grid)
            wanted: list[list[Points]] = [
                [[i - before for i in b if 0 <= i - before < n] for b in blocks]
                for blocks, before, n in zip(padded, (0, 0, top, left), SHAPE, strict=True)
            ]
            layer = made(f"Distributed{kind}", P=P, pad=(left, right, top, bottom))
            assert_sends(layer, [block(P, SHAPE)], *exchanged(own, wanted, world.rank, 4), grid)


@on_ranks(4, mpi=True)
def test_adaptive_pools(world: dl.Partition) -> None:
    """Output i of m reads [floor(i n / m), ceil((i + 1) n / m)): a maximum fetches that; an average's owner gets shares."""
    for grid, size in itertools.product((SQUARE, LINE), (1, 4, 5, 7, 12)):
        P, own, outputs = world.grid(grid), cuts(SHAPE, grid), cuts((*SHAPE[:2], size, size), grid)
        wanted, shares = list(own), list(own)
        for d in (2, 3):
            n, p = SHAPE[d], grid[d]
            reads = [[*range(i * n // size, -(-(i + 1) * n // size))] for i in range(size)]
            wanted[d] = [sorted({i for o in b for i in reads[o]}) for b in outputs[d]] if p > 1 else own[d]
            shares[d] = [[o for o in range(size) if set(reads[o]) & set(b)] for b in own[d]]
        largest = made(f"DistributedAdaptiveMaxPool2d(P, {size})", P=P)
        assert_sends(largest, [block(P, SHAPE)], *exchanged(own, wanted, world.rank, 4), grid)
        average = made(f"DistributedAdaptiveAvgPool2d(P, {size})", P=P)
        sent = exchanged(outputs, shares, world.rank, 4)[::-1]
        sent = sent if size > 1 else [(1, 1, n) for *_, n in sent]  # a share from each rank: a reduce
        assert_sends(average, [block(P, SHAPE)], *sent, grid)
