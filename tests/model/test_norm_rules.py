"""Norms and softmax in graphs: statistics of the global tensor, however the values lie, with nothing gathered.

Compared to 1e-9 in float64: sums of a few numbers near one, in another order than torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distdl_lite.model.prove import Proof, prove

GRIDS = ((1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 1, 1))
SHAPE = (3, 6, 7, 5)


class Each(nn.Module):
    """Several outputs of one input; `forward` is given the modules."""

    def __init__(self, forward: Callable[..., Any], *inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.each = nn.ModuleList(inner), forward
        for p in self.parameters():
            nn.init.uniform_(p, 0.5, 2)
        for name, b in self.named_buffers():
            if "running" in name:
                nn.init.uniform_(b, 0.5, 2)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.each(*self.inner, *inputs)


def proved(
    model: nn.Module,
    *inputs: Any,
    grids: Sequence[tuple[int, ...]] = GRIDS,
    modes: Sequence[bool] = (True, False),
    **how: Any,
) -> list[Proof]:
    """The proofs on all grids, in training and in evaluation, none of which gathered."""
    found = [prove(model.train(mode), grid, *inputs, **how) for grid in grids for mode in modes]
    assert not any(proof.program.gathered for proof in found)
    return found


def kinds(proof: Proof) -> list[str]:
    return [movement.kind for movement in proof.program.compiler.movements]


def test_batch_and_instance_norms() -> None:
    """Also their running statistics, those of instance norms too, which torch's record does not mention."""
    model = Each(
        lambda a, b, c, d, x: (a(x).sin(), b(x.tanh()), c(x + 1), d(x * 2)),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        nn.InstanceNorm2d(6),
        nn.InstanceNorm2d(6, momentum=0.3, affine=True, track_running_stats=True),
    )
    proved(model, SHAPE)
    (proof,) = proved(
        Each(lambda a, x: a(x), nn.BatchNorm2d(6)),
        SHAPE,
        grids=GRIDS[:1],
        modes=[True],
        dtype=torch.float32,
        tolerance=1e-4,
    )
    assert kinds(proof) == ["statistics"]  # one all-reduce forward, and its adjoint


def test_norms_of_samples() -> None:
    """Channels cut inside groups, too; normalised dims cut, of which some are cut twice."""
    model = Each(
        lambda a, b, c, d, e, f, x: (a(x), b(x), c(x).sin(), d(x), e(x), f(x)),
        nn.GroupNorm(2, 6),
        nn.GroupNorm(6, 6, affine=False),
        nn.GroupNorm(1, 6),
        nn.LayerNorm(5, bias=False),
        nn.LayerNorm([6, 7, 5], eps=0.1),
        nn.RMSNorm([7, 5]),
    )
    proved(model, SHAPE, modes=[True])
    proved(Each(lambda a, x: a(x), nn.GroupNorm(2, 6)), (2, 6, 3, 3), grids=[(1, 4, 1, 1)], modes=[True])


def test_softmax() -> None:
    """Cut dims share maxima and sums; values are not moved."""
    model = Each(
        lambda x: (
            x.softmax(1),
            F.log_softmax(x, -1),
            x.softmax(0, dtype=torch.float64),
            F.softmin(x, 2),
            torch.logsumexp(x, (1, 3)).sin(),
            x.masked_fill(x < 0.5, -torch.inf).logsumexp(2, keepdim=True).exp(),  # some of nothing
        )
    )
    for proof in proved(model, SHAPE, modes=[True], steps=0):
        assert set(kinds(proof)) <= {"maximum", "all_reduce", "output"}


def test_flattened_dims() -> None:
    """Cuts inside a dim that came out of several."""
    model = Each(
        lambda a, b, c, d, e, x: (
            a(x.flatten(2)),
            b(x.flatten(2)).sin(),
            c(x.flatten(2).transpose(1, 2)),
            d(x.flatten(1)),
            e(x.flatten(1, 2)),
            x.flatten(2).softmax(-1),
        ),
        nn.BatchNorm1d(6),
        nn.GroupNorm(3, 6),
        nn.LayerNorm(6),
        nn.BatchNorm1d(6 * 8 * 4),
        nn.LayerNorm(4),
    )
    proved(model, (3, 6, 8, 4), grids=GRIDS[:3], modes=[True])


def test_copies_and_dims_cut_twice() -> None:
    """A value that the ranks along an axis hold copies of, and one cut by two axes in one dim, in blocks that are uneven."""
    model = Each(
        lambda a, b, c, x: (a(x), b(x).sin(), c(x), x.softmax(1), x.logsumexp(0)),
        nn.BatchNorm1d(5),
        nn.LayerNorm(5),
        nn.RMSNorm(5),
    )
    for axes in ([(0, None)], [(None, 1)], [(None, None)], [(0, 1)]):
        proved(model, (7, 5), grids=[(2, 2)], modes=[True], in_axes=axes)
    proved(model, (7, 5), grids=[(2, 1, 2)], modes=[True], in_axes=[(0, 2)])
    joined = Each(lambda a, b, x: (a(x.flatten(0, 2)), b(x.flatten(0, 2))), nn.BatchNorm1d(5), nn.LayerNorm(5))
    proved(joined, (2, 2, 3, 5), grids=[(2, 2, 1, 1)], modes=[True])


def test_blocks_of_nothing() -> None:
    """More ranks along a dim than it has points."""
    model = Each(
        lambda a, b, c, x: (a(x), b(x).sin(), c(x), x.softmax(2)),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(5),
    )
    proved(model, (1, 2, 3, 5), grids=[(1, 1, 4, 1)])
