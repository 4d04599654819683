"""Layers that add up over ranks send their few numbers in as few collectives as the formulas say."""

from __future__ import annotations

import itertools

import torch
from ranks import on_ranks
from traffic import LINE, NOTHING, SHAPE, SQUARE, assert_sends, block, collective, gradient_sum, made, plus

import distdl_lite as dl
import distdl_lite.nn as dnn


@on_ranks(4, mpi=True)
def test_norms(world: dl.Partition) -> None:
    """Two float64 numbers a row in one all-reduce forward and one backward, which brings BatchNorm's gradients too."""
    batch, channels = SHAPE[:2]
    rows = {
        "DistributedBatchNorm(P, 8)": (2 * channels, False),
        "DistributedInstanceNorm(P, 8)": (2 * batch * channels, False),
        "DistributedInstanceNorm(P, 8, affine=True)": (2 * batch * channels, True),
        "DistributedGroupNorm(P, 2, 8)": (2 * batch * 2, True),
        "DistributedLayerNorm(P, (8, 64, 96))": (2 * batch, False),  # its weights are cut as the rows are
        "DistributedRMSNorm(P, (8, 64, 96))": (batch, False),
    }
    for grid, (text, (count_of_numbers, sums)) in itertools.product((SQUARE, LINE), rows.items()):
        P = world.grid(grid)
        layer, sides = made(text, P=P), collective(8 * count_of_numbers, 3)
        gradients = gradient_sum(layer) if sums else NOTHING
        assert_sends(layer, [block(P, SHAPE)], sides, plus(sides, gradients), text)
    P = world.grid((1, 2, 2, 1))
    halves = collective(8 * 2 * channels // 2, 1)
    assert_sends(dnn.DistributedBatchNorm(P, 8), [block(P, SHAPE)], halves, halves)


@on_ranks(4)
def test_norms_without_statistics_to_share(world: dl.Partition) -> None:
    """Running statistics, and rows that no rank shares, cost the sum of gradients alone."""
    for text, grid in {
        "DistributedBatchNorm(P, 8).eval()": SQUARE,
        "DistributedGroupNorm(P, 2, 8)": (4, 1, 1, 1),
        "DistributedInstanceNorm(P, 8, affine=True)": (4, 1, 1, 1),
        "DistributedLayerNorm(P, 96)": LINE,
        "DistributedRMSNorm(P, 96)": LINE,
    }.items():
        P = world.grid(grid)
        layer = made(text, P=P)
        assert_sends(layer, [block(P, SHAPE)], NOTHING, gradient_sum(layer), text)


@on_ranks(4, mpi=True)
def test_parallel_linear(world: dl.Partition) -> None:
    """One collective of Megatron's on one side, none on the other."""
    rows, ins, outs, others = 16, 64, 32, 3
    P = world.grid((1, 4))
    once = {name: (1, 1, 4 * rows * n) for name, n in (("x", ins), ("y", outs))}  # an all-reduce of a shown tensor
    part = {name: collective(4 * rows * n // 4, others) for name, n in (("x", ins), ("y", outs))}
    column, row = "DistributedColumnParallelLinear(P, 64, 32", "DistributedRowParallelLinear(P, 64, 32"
    whole, features, leading = torch.ones(rows, ins), block(P, (rows, ins)), torch.ones(rows // 4, ins)
    for text, x, forward, backward in (
        (f"{column})", whole, NOTHING, once["x"]),
        (f"{column}, gather_output=True)", whole, part["y"], once["x"]),
        (f"{column}, sequence_parallel=True)", leading, part["x"], part["x"]),
        (f"{row})", features, once["y"], NOTHING),
        (f"{row}, scatter_output=True)", features, part["y"], part["y"]),
        (f"{row}, input_is_parallel=False)", whole, once["y"], part["x"]),
    ):
        assert_sends(made(text, P=P), [x.detach().requires_grad_()], forward, backward, text)


@on_ranks(4, mpi=True)
def test_embedding(world: dl.Partition) -> None:
    """The vocabulary cut: one all-reduce of the output; the features cut: nothing. Backward the gradient of replicas."""
    index = torch.arange(16)
    for lead, p in ((1, 4), (2, 2)):
        P = world.grid((lead, p))
        looked_up = index[P.block((16, 4))[0]]
        table = 4 * 32 * 64 // p
        gradients = NOTHING if lead == 1 else (1, 1, table)
        shown = (1, 1, 4 * len(looked_up) * 64)
        for kind, forward in (("vocabulary", shown), ("feature", NOTHING)):
            assert_sends(dnn.DistributedEmbedding(P, 32, 64, cut=kind), [looked_up], forward, gradients, kind)


@on_ranks(4, mpi=True)
def test_softmax_and_dropout(world: dl.Partition) -> None:
    """A number per point along the cut dim; a seed of 8 bytes."""
    P = world.grid(SQUARE)
    lines = 4 * 4 * 8 * 48  # bytes of a number for each of (N, C, w)
    x = [block(P, SHAPE)]
    for text in ("DistributedSoftmax(P, 2)", "DistributedLogSoftmax(P, 2)"):
        assert_sends(made(text, P=P), x, (2, 2, 2 * lines), collective(lines, 1), text)
    for text in ("DistributedSoftmax(P, 1)", "DistributedDropout(P).eval()", "DistributedDropout(P, 0.0)"):
        assert_sends(made(text, P=P), x, NOTHING, NOTHING, text)
    for text in ("DistributedDropout(P)", "DistributedDropout2d(P)"):
        assert_sends(made(text, P=P), x, (1, 1, 8), NOTHING, text)


@on_ranks(4, mpi=True)
def test_losses_and_means(world: dl.Partition) -> None:
    """Sum, weight and whether a rank failed, in one all-reduce of 24 bytes; backward nothing."""
    P = world.grid(SQUARE)
    x = block(P, SHAPE)
    for kind in ("MSE", "L1", "SmoothL1", "Huber", "BCE", "BCEWithLogits", "KLDiv", "PoissonNLL"):
        for reduction in ("mean", "sum"):
            layer = made(f"Distributed{kind}Loss(P, reduction={reduction!r})", P=P)
            assert_sends(layer, [x, torch.ones_like(x)], (1, 1, 24), NOTHING, kind)
        assert_sends(
            made(f"Distributed{kind}Loss(P, reduction='none')", P=P), [x, torch.ones_like(x)], NOTHING, NOTHING
        )
    assert_sends(dnn.DistributedMean(P, (2, 3)), [x], (1, 1, 4 * 4 * 8), NOTHING)
    assert_sends(dnn.DistributedMean(P, (0, 1)), [x], NOTHING, NOTHING)
    target = torch.zeros(4, 32, 48, dtype=torch.long)
    for kind in ("NLL", "CrossEntropy"):
        assert_sends(made(f"Distributed{kind}Loss(P)", P=P), [x, target], (1, 1, 24), NOTHING, kind)
    P = world.grid((1, 4, 1, 1))
    x, target = block(P, SHAPE), torch.zeros(4, 64, 96, dtype=torch.long)
    lines = 4 * 4 * 64 * 96  # bytes of a number for each point
    classes = [(1, 1, lines), collective(lines, 3)]  # maxima, and sums of exponentials
    assert_sends(dnn.DistributedNLLLoss(P), [x, target], (1, 1, 24), NOTHING)
    forward = plus(plus(*classes), (1, 1, 24))
    assert_sends(dnn.DistributedCrossEntropyLoss(P), [x, target], forward, classes[1])
