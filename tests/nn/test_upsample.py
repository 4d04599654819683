"""Interpolation against torch's, with blocks of all sizes."""

from __future__ import annotations

from typing import Any

import torch
from ranks import on_ranks
from twins import assert_refused, assert_second_gradients, assert_twins, integers

import distdl_lite as dl
from distdl_lite.nn import DistributedUpsample
from distdl_lite.testing import count


def tolerance(mode: str, dtype: torch.dtype) -> float:
    """Nearest points are copies; the others' sums are rounded in another order, gradients of many terms too."""
    if mode.startswith("nearest"):
        return 0.0
    return 1e-12 if dtype is torch.float64 else 2e-5


CASES: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({"scale_factor": 2}, (1, 1, 4), (2, 2, 7)),
    ({"scale_factor": 2}, (1, 1, 2, 2), (2, 2, 3, 5)),
    ({"scale_factor": 3}, (1, 1, 4), (1, 2, 5)),
    ({"size": 2}, (1, 1, 4), (1, 2, 9)),  # fewer outputs than ranks, points nobody reads
    ({"scale_factor": 2, "mode": "linear"}, (1, 1, 4), (1, 2, 3)),  # a rank without input
    ({"scale_factor": 2, "mode": "bilinear"}, (1, 1, 2, 2), (2, 2, 5, 7)),
    ({"scale_factor": 2, "mode": "bilinear", "align_corners": True}, (1, 1, 2, 2), (2, 2, 5, 7)),
    ({"scale_factor": 1.7, "mode": "bilinear"}, (1, 1, 4, 1), (1, 2, 6, 5)),
    ({"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True}, (2, 1, 1, 2), (2, 1, 6, 5)),
    ({"size": (3, 20), "mode": "bicubic"}, (1, 1, 2, 2), (1, 2, 8, 7)),
    ({"scale_factor": 2, "mode": "bicubic"}, (1, 1, 2, 2), (1, 2, 8, 7)),
    ({"size": 4, "mode": "trilinear"}, (1, 1, 2, 1, 2), (1, 2, 3, 4, 5)),
    ({"scale_factor": 0.4, "mode": "area"}, (1, 1, 2, 2), (0, 2, 8, 7)),
]


@on_ranks(4, mpi=True)
def test_awkward(world: dl.Partition) -> None:
    """Named cases, on threads and on MPI ranks."""
    for options, grid, shape in CASES:
        P = world.grid(grid)
        layer, serial = DistributedUpsample(P, **options), torch.nn.Upsample(**options)
        assert_twins(layer, serial, integers(*shape), P, tolerance=tolerance(layer.mode, torch.float64))


@on_ranks(2)
def test_twofold_is_exact(world: dl.Partition) -> None:
    """Where a dim grows by a power of two, torch interpolates the block with the same numbers as the whole."""
    P = world.grid((1, 1, 2))
    for options in ({"mode": "linear"}, {"mode": "nearest"}):
        for x in (torch.randn(1, 2, 1001), torch.randn(1, 2, 9, dtype=torch.bfloat16)):
            layer, serial = (
                DistributedUpsample(P, scale_factor=4, **options),
                torch.nn.Upsample(scale_factor=4, **options),
            )
            y = serial(x)
            assert torch.equal(layer(x[P.block(x.shape)]), y[P.block(y.shape)])


@on_ranks(2)
def test_area_keeps_half_precision(world: dl.Partition) -> None:
    for factor in (1.0, 0.5, 2.0):
        x = torch.ones(1, 1, 8, dtype=torch.bfloat16)
        layer = DistributedUpsample(world.grid((1, 1, 2)), scale_factor=factor, mode="area")
        y = layer(x[..., 4 * world.rank :][..., :4])
        assert y.dtype is torch.bfloat16
        assert (y == 1).all()


@on_ranks(2)
def test_torch_rounds_coordinates(world: dl.Partition) -> None:
    """Long float32 lines have torch's rounded coordinates, not the exact ones."""
    P = world.grid((1, 1, 2))
    x = torch.randn(1, 1, 5000)
    for options in ({"scale_factor": 1.3}, {"size": 7001}, {"size": 7001, "mode": "linear", "align_corners": True}):
        layer, serial = DistributedUpsample(P, **options), torch.nn.Upsample(**options)
        y = serial(x)
        torch.testing.assert_close(layer(x[P.block(x.shape)]), y[P.block(y.shape)], rtol=1e-6, atol=1e-6)


@on_ranks(3)
def test_placement(world: dl.Partition) -> None:
    """Ranks outside the partition return what they pass; one rank alone sends nothing."""
    for ranks, grid in (([2, 0], (1, 1, 2)), ([1], (1, 1, 1))):
        P = world.create_partition_inclusive(ranks).grid(grid)
        assert_twins(DistributedUpsample(P, scale_factor=3), torch.nn.Upsample(scale_factor=3), integers(2, 2, 8), P)
    layer = DistributedUpsample(P, size=5, mode="linear")
    with count() as c:
        layer(integers(1, 1, 3) if P.active else dl.zero_volume_tensor())
    assert c.messages == 0
    assert "size=5, mode='linear', P_x=(1, 1, 1)" in repr(layer)


@on_ranks(4)
def test_second_gradients(world: dl.Partition) -> None:
    """Double backward is the serial one's."""
    P = world.grid((1, 1, 2, 2))
    for options in ({"scale_factor": 2, "mode": "bilinear"}, {"size": (7, 4), "mode": "bilinear"}, {"size": (7, 4)}):
        layer, serial = DistributedUpsample(P, **options), torch.nn.Upsample(**options)
        assert_second_gradients(layer, serial, torch.randn(1, 2, 3, 6, dtype=torch.float64), P)


@on_ranks(2)
def test_refusals(world: dl.Partition) -> None:
    """What cannot be done is refused on all ranks with one text."""
    P = world.grid((1, 1, 2))
    x = integers(1, 1, 6)[P.block((1, 1, 6))]
    attempts: list[tuple[dict[str, Any], str]] = [
        ({"size": 3, "mode": "bilinear"}, "bilinear mode needs 4D input"),
        ({"size": 3, "mode": "bicubic"}, "mode='bicubic'"),
        ({"size": 3, "align_corners": True}, "align_corners"),
        ({"size": 3, "scale_factor": 2}, "size=3, scale_factor=2.0"),
        ({}, "either size or scale_factor should be defined"),
        ({"size": (3, 3)}, "size=(3, 3)"),
        ({"scale_factor": -1.0}, "scale_factor=-1.0"),
        ({"size": 3, "recompute_scale_factor": True}, "recompute_scale_factor"),
        ({"scale_factor": 0.1}, "scale_factor=0.1"),
        ({"scale_factor": 2.1}, "torch's gradient is not that of its output"),
    ]
    for options, text in attempts:
        assert_refused(world, P, lambda options=options: DistributedUpsample(P, **options)(x), text)
    flat = world.grid((1, 2))
    assert_refused(world, flat, lambda: DistributedUpsample(flat, size=3)(x[0]), "shape (1, 6)")
    assert_refused(world, P, lambda: DistributedUpsample(P, size=3)(x.long()), "floating", TypeError)
