"""Losses in graphs: one number on every rank, with the serial gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distdl_lite as dl

SHAPE = (3, 4, 5, 6)
GRIDS = [(1, 1, 2, 2), (2, 2, 1, 1), (1, 4, 1, 1)]


class Losses(torch.nn.Module):
    """Several of one input and one target."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self.functions, self.weight = functions, torch.nn.Parameter(torch.tensor(0.7))
        self.register_buffer("of_classes", torch.tensor([0.5, 2.0, 1.0, 0.1]))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return [function(x * self.weight, t, self.of_classes) for function in self.functions]


def proved(grid: tuple[int, ...], x: Any, t: Any, *functions: Callable[..., Any]) -> None:
    proof = dl.prove(Losses(*functions), grid, x, t, tolerance=1e-12)
    assert not proof.program.gathered


def of(function: Callable[..., Any], before: Callable[..., Any] = torch.sin, **options: Any) -> Callable[..., Any]:
    """A loss of numbers of (-1, 1) and of (0, 1)."""
    return lambda x, t, w: function(before(x), t.sigmoid(), **options) * 0.5


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_pointwise_losses() -> None:
    functions = [
        of(function, **options, reduction=reduction)
        for reduction in ("mean", "sum", "none")
        for function, options in (
            (F.mse_loss, {}),
            (F.l1_loss, {}),
            (F.smooth_l1_loss, {"beta": 0.5}),
            (F.huber_loss, {"delta": 0.3}),
            (F.binary_cross_entropy, {"before": torch.sigmoid}),
            (F.binary_cross_entropy_with_logits, {}),
            (F.kl_div, {"log_target": True}),
            (F.poisson_nll_loss, {"full": True}),
            (F.hinge_embedding_loss, {"margin": 0.5}),
        )
    ]
    functions += [
        of(F.kl_div, reduction="batchmean"),
        lambda x, t, w: F.binary_cross_entropy_with_logits(x, t, weight=t[:, :1].detach(), pos_weight=w.view(4, 1, 1)),
        lambda x, t, w: F.binary_cross_entropy(x.sigmoid(), t.sigmoid(), weight=w.view(1, 4, 1, 1)),
        lambda x, t, w: F.soft_margin_loss(x, t.detach()),
        lambda x, t, w: F.margin_ranking_loss(x, t, t.sign(), margin=0.1),
        lambda x, t, w: F.mse_loss(x.flatten(2), t.flatten(2)) * F.l1_loss(x.mean((2, 3)), t.mean((2, 3))),
        lambda x, t, w: F.mse_loss(x.sum(), t.sum()),
        lambda x, t, w: F.mse_loss(x, t).sqrt() * F.l1_loss(x, t, reduction="sum"),
    ]
    for grid in GRIDS:
        proved(grid, SHAPE, SHAPE, *functions)


def test_class_losses() -> None:
    """Also with cut classes, of rows made of batch and space, of copies, and where a mean is not a number."""
    t = torch.randint(4, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    functions: list[Callable[..., Any]] = []
    for reduction in ("mean", "sum", "none"):
        for options in ({}, {"ignore_index": 2}):
            functions += [
                lambda x, t, w, o=options, r=reduction: F.cross_entropy(x * 5, t, reduction=r, **o),
                lambda x, t, w, o=options, r=reduction: F.cross_entropy(x, t, w, reduction=r, label_smoothing=0.2, **o),
                lambda x, t, w, o=options, r=reduction: F.nll_loss(x, t, w, reduction=r, **o),
            ]
    functions += [
        lambda x, t, w: F.cross_entropy(x.permute(0, 2, 3, 1).flatten(0, 2), t.flatten(), w),
        lambda x, t, w: F.cross_entropy(x.mean((2, 3)), t[:, 0, 0], w),
        lambda x, t, w: F.cross_entropy(x[0, :, 0, 0], t[0, 0, 0]) + F.nll_loss(x[:, :, 1, 2], t[:, 0, 0]),
    ]
    for grid in GRIDS:
        proved(grid, SHAPE, t, *functions)
        proved(
            grid, SHAPE, SHAPE,
            lambda x, t, w: F.cross_entropy(x, t.sigmoid(), w, label_smoothing=0.3),
            lambda x, t, w: F.cross_entropy(x, t.sigmoid(), reduction="none"),
        )  # fmt: skip
    rows, classes = (6, 8), torch.randint(8, (6,))
    for grid in ((2, 2), (1, 4)):
        dl.prove(torch.nn.CrossEntropyLoss(), grid, rows, classes, tolerance=1e-12)


def test_dims_that_python_reads() -> None:
    """Of numbers that torch has made, but of no data."""

    def dice(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        over = torch.arange(2, x.dim()).tolist()
        return (2 * (x * t).sum(over) / (x.square().sum([0, *over]) + t.square().sum(over))).mean()

    for grid in GRIDS:
        proved(grid, SHAPE, SHAPE, dice, lambda x, t, w: x * torch.arange(start=1, end=7))
    with pytest.raises(RuntimeError, match="data-dependent"):
        proved(GRIDS[0], SHAPE, SHAPE, lambda x, t, w: x.sum(torch.arange(2, x.dim()).add_(0).tolist()))


def test_complex() -> None:
    x, target = torch.complex(*torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(0)).double())
    for loss in (torch.nn.PoissonNLLLoss(), torch.nn.PoissonNLLLoss(reduction="sum"), torch.nn.L1Loss()):
        dl.prove(loss, (2, 1), x, target)
