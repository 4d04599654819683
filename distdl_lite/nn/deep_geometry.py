"""What each rank reads and computes in a run of convolutions that exchange one deep halo; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from distdl_lite import layout as lay
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, Layout, Range
from distdl_lite.nn.convolution import Convolution

_CROP, _CROP_BY_RELU = 16, 100  # a crop takes as long as the convolution of one point in so many: backward copies it

Link = Sequence[Any]  # a convolution and the pointwise layers behind it


@dataclass(frozen=True)
class Span:
    """What a rank computes of one spatial dim of one layer.

    Attributes
    ----------
    padding : int
        On both sides of what it holds: the layer's own at the edge. Beside a cut the outputs that read it are of no use.
    made, kept : (start, stop)
        The outputs that come out, and those that are kept for the next layer.
    own : int
        The size of its block of the outputs.
    blank : sequence of (start, stop)
        Of those that come out and are kept, counted from the first that comes out, the ones that lack inputs. They are set to
        zero: a sum of a part may overflow where the whole does not, and the gradient of a weight would be 0 inf.
    """

    padding: int
    made: Range
    kept: Range
    own: int
    blank: Sequence[Range]

    @property
    def size(self) -> int:
        return self.made[1] - self.made[0]


Spans = tuple[Span, ...]  # by layer


@dataclass(frozen=True)
class Deep:
    """A run's one exchange: the inputs that it fetches, and by dim and index along it what is computed from them."""

    Z: Layout
    lengths: Sequence[Sequence[int]]
    spans: Sequence[Sequence[Spans]]


def lengths_of(convs: Sequence[Convolution], X: Layout) -> list[Sequence[int]]:
    """The lengths of the spatial dims of the input and behind each layer. Raises ValueError if one does not fit."""
    _, channels, *space = lay.global_shape_of(X)
    found: list[Sequence[int]] = [space]
    for conv in convs:
        if conv.in_channels != channels:
            raise ValueError(f"{channels} channels do not fit")
        found.append([conv._output_length(d, n) for d, n in enumerate(found[-1])])
        channels = conv.out_channels
    return found


def outputs(convs: Sequence[Convolution], X: Layout) -> Layout:
    """The blocks that the last layer returns."""
    batch = lay.global_shape_of(X)[0]
    return lay.balanced_blocks(X.grid, (batch, convs[-1].out_channels, *lengths_of(convs, X)[-1]))


def deepest(links: Sequence[Link], X: Layout, most: float) -> Deep | None:
    """The longest run from the first layer on that may be fused; None if that is not even two layers."""
    found = None
    for depth in range(2, len(links) + 1):
        deep = _deep(links[:depth], X)
        if deep is None or _excess(deep) > most:
            break
        found = deep
    return found


def _deep(links: Sequence[Link], X: Layout) -> Deep | None:
    """The geometry of a run; None if some rank holds nothing of some tensor, or no data would move."""
    convs = [link[0] for link in links]
    lengths, Y = lengths_of(convs, X), outputs(convs, X)
    if any(start >= stop for dim in (*X.dims, *Y.dims) for start, stop in dim.ranges):
        return None
    dims, spans = list(X.dims), []
    dims[0] = Y.dims[0]
    for d, dim in enumerate(X.dims[2:]):
        n = [length[d] for length in lengths]
        if min(n) < len(dim.ranges):
            return None
        along = [_spans(links, d, n, (i, len(dim.ranges))) for i in range(len(dim.ranges))]
        if any(start >= stop for (start, stop), _ in along):
            return None
        dims[2 + d] = Dim(tuple(reads for reads, _ in along), dim.axes)
        spans.append([computed for _, computed in along])
    Z = Layout(X.grid, tuple(dims))
    return None if X.same_boxes(Z) else Deep(Z, lengths, spans)


def _spans(links: Sequence[Link], d: int, lengths: Sequence[int], position: tuple[int, int]) -> tuple[Range, Spans]:
    """Of one dim, at one of so many positions along it: the input that is read, empty if any layer's is, and what is computed."""
    index, parts = position
    blocks = [lay.ranges_of(balanced(n, parts))[index] for n in lengths]
    wanted = [blocks[-1]]
    for (conv, *_), n in zip(reversed(links), lengths[-2::-1], strict=True):
        start, stop = conv._wanted(d, wanted[0])[0]
        wanted.insert(0, (0, n) if parts == 1 else (max(start, 0), min(stop, n)))
        if wanted[0][0] >= wanted[0][1]:
            return wanted[0], ()
    held = true = wanted[0]  # true: what of it lacks nothing
    spans = list[Span]()
    for (conv, *behind), n, m, reads, block in zip(
        links, lengths[:-1], lengths[1:], wanted[1:], blocks[1:], strict=True
    ):
        padding, made = _made(conv, d, n, held, reads)
        kept = max(made[0], 0), min(made[1], m)
        crop = _CROP_BY_RELU if begins_with_relu(behind) else _CROP
        if (kept[1] - kept[0]) * crop > (reads[1] - reads[0]) * (crop + 1) or reads is wanted[-1]:
            kept = reads
        low, high = _complete(conv, d, n, m, true)
        true = max(kept[0], low), min(kept[1], high)
        blank = [(a - made[0], b - made[0]) for a, b in ((kept[0], true[0]), (true[1], kept[1])) if a < b]
        spans.append(Span(padding, made, kept, block[1] - block[0], blank))
        held = kept
    return wanted[0], tuple(spans)


def _made(conv: Convolution, d: int, n: int, held: Range, wanted: Range) -> tuple[int, Range]:
    """The least padding with which the outputs wanted come out of what is held of a dim of length `n`, and all that do."""
    start, stop = conv._wanted(d, wanted)[0]
    stride = conv.stride[d]
    least = max(-start, stop - n, 0)
    padding = least + (held[0] - start - least) % stride
    first = wanted[0] - (start - held[0] + padding) // stride
    number = (held[1] - held[0] + 2 * padding - conv.dilation[d] * (conv.kernel_size[d] - 1) - 1) // stride + 1
    return padding, (first, first + number)


def _complete(conv: Convolution, d: int, n: int, m: int, held: Range) -> Range:
    """The outputs of a dim, of length `n` before and `m` behind the layer, that lack none of the inputs they read."""
    pad, reach, stride = conv.pads[d][0], conv.dilation[d] * (conv.kernel_size[d] - 1) + 1, conv.stride[d]
    first = 0 if held[0] == 0 else -((-held[0] - pad) // stride)
    return first, m if held[1] == n else (held[1] + pad - reach) // stride + 1


def _excess(deep: Deep) -> float:
    """How much the rank that computes the most beyond its blocks does so: a part of their points."""
    alike = [{(tuple(s.size for s in spans), tuple(s.own for s in spans)) for spans in dim} for dim in deep.spans]
    worst = 0.0
    for rank in product(*alike):
        made, own = (sum(map(math.prod, zip(*(dim[which] for dim in rank), strict=True))) for which in (0, 1))
        worst = max(worst, made / own - 1)
    return worst


def begins_with_relu(behind: Sequence[Any]) -> bool:
    return bool(behind) and type(behind[0]) is nn.ReLU
