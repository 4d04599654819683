"""What a rank sends in a layer's forward and backward, counted and by formulas of its geometry.

Counts are those of `distdl_lite.testing.count`: messages (a collective is one), collectives, and bytes. A collective
between blocks counts what it gives to each other rank; sums of gradients and of shown numbers count their tensor once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

import distdl_lite.nn as dnn
from distdl_lite.testing import count
from distdl_lite.transport.counts import Tally

SHAPE = (4, 8, 64, 96)  # float32: 768 KiB, of which a rank of four holds 192
SQUARE, LINE = (1, 1, 2, 2), (1, 1, 4, 1)

Sent = tuple[int, int, int]  # messages, of which collectives, and bytes
NOTHING: Sent = (0, 0, 0)
Points = Sequence[int]  # of one dim


def made(text: str, **names: Any) -> Any:
    """What an expression of layers makes."""
    return eval(text, {**vars(dnn), **names})


def block(P: Any, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This rank's block of a tensor of ones, which requires grad."""
    slices = P.block(shape)
    sizes = [0] if slices is None else [s.stop - s.start for s in slices]
    return torch.ones(sizes, dtype=dtype, requires_grad=True)


def traffic(layer: Any, *inputs: torch.Tensor) -> tuple[Tally, Tally]:
    """What this rank sends in forward, and what in backward."""
    with count() as forward:
        y = layer(*inputs)
    with count() as backward:
        y.backward(torch.ones_like(y))
    return forward, backward


def numbers(tally: Tally) -> Sent:
    return tally.messages, tally.collectives, tally.bytes


def assert_sends(layer: Any, inputs: Sequence[torch.Tensor], forward: Sent, backward: Sent, what: Any = "") -> None:
    """Check the numbers; a convolution may use fewer messages than neighbours."""
    for tally, expected in zip(traffic(layer, *inputs), (forward, backward), strict=True):
        found = numbers(tally)
        if "Conv" in type(layer).__name__:
            assert tally.messages <= expected[0], (layer, what)
            assert found[1:] == expected[1:], (layer, what)
        else:
            assert found == expected, (layer, what)


def plus(a: Sent, b: Sent) -> Sent:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def gradient_sum(layer: torch.nn.Module) -> Sent:
    """All gradients of weights in one all-reduce; nothing without weights."""
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    return (1, 1, size) if size else NOTHING


def collective(size: int, others: int) -> Sent:
    """A collective in which `size` bytes go to each of the others."""
    return 1, 1, size * others


def exchanged(own: list[list[Points]], wanted: list[list[Points]], rank: int, itemsize: int) -> tuple[Sent, Sent]:
    """What a rank sends, and what it sends back, where boxes `own` go to boxes `wanted`.

    Per dim the points of each index along that axis, of row-major grids.
    """
    sources, targets = list(itertools.product(*own)), list(itertools.product(*wanted))

    def points(source: int, target: int) -> int:
        pairs = zip(sources[source], targets[target], strict=True)
        return math.prod(sum(point in have for point in want) for have, want in pairs)

    given = [points(rank, other) for other in range(len(targets)) if other != rank]
    taken = [points(other, rank) for other in range(len(sources)) if other != rank]
    forward, backward = ((sum(map(bool, n)), 0, sum(n) * itemsize) for n in (given, taken))
    return forward, backward


def cut(n: int, p: int) -> list[range]:
    """Balanced blocks: the first n mod p have one point more."""
    sizes = [n // p + (i < n % p) for i in range(p)]
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(p)]


def cuts(shape: Sequence[int], grid: Sequence[int]) -> list[list[Points]]:
    return [list(cut(n, p)) for n, p in zip(shape, grid, strict=True)]
