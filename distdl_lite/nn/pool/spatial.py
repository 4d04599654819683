"""The base of layers whose outputs read a range of the input per dim and channel: pools and interpolation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.factors import cut, uncut
from distdl_lite.layout import Dim, Range
from distdl_lite.nn.blocks import Local, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.value import NoRule, Operation, Value


@dataclass(frozen=True)
class View:
    """One spatial dim as one rank sees it.

    Attributes
    ----------
    geometry
        How outputs read inputs: `outputs`, their global number, and ``reads(start, stop)``, the input range that these read;
        it may leave the dim, which ends it there.
    length : int
        The global number of inputs.
    block, held : (start, stop)
        This rank's outputs, and the inputs it holds for them.
    is_whole : bool
        Whether the dim is not cut, so that the rank holds all of it.
    """

    geometry: Any
    length: int
    block: Range
    held: Range
    is_whole: bool

    @property
    def size(self) -> int:
        return self.block[1] - self.block[0]


def check_batch(op: Operation, x: Value) -> None:
    """Raise NoRule for ``(C, *space)``, which torch's pools take too; their names tell the number of spatial dims."""
    if any(f"pool{n}d" in op.name for n in (1, 2, 3) if n != x.ndim - 2):
        raise NoRule


def pooled(
    c: Compiler,
    x: Value,
    geometries: Sequence[Any],
    whole: Local,
    part: Callable[[Sequence[View]], Local],
    count: int = 1,
    shares: bool = False,
    linear: bool = False,
) -> Any:
    """The rule of kernels whose outputs read a range of the input per spatial dim, for each channel alone.

    Each rank fetches the inputs that its outputs read, and computes alone. A dim that is not cut stays whole. Returns a value, or
    maxima and their places.

    Parameters
    ----------
    geometries : sequence
        Of the spatial dims, see `View`.
    whole : callable
        What torch makes of a block none of whose spatial dims is cut.
    part : callable
        From the views of the spatial dims to what this rank makes of the inputs it holds.
    count : int
        How many tensors they return: 2 with places of maxima.
    shares : bool
        Whether each rank computes its inputs' shares of the averages that read them, whose geometries say what an input `meets`.
    linear : bool
        Whether their backward does without the input.
    """
    space = range(2, x.ndim)
    x = c.spread_home(c.plain(x, space), space)
    of_dims, is_whole = dict(zip(space, geometries, strict=True)), not x.axes(*space)
    outputs = {d: _outputs(c, x.axes(d), g.outputs, shares) for d, g in of_dims.items()}
    dtypes = [x.dtype, torch.long][:count]
    if shares:
        z, y = x, x.with_dims(outputs)
        made = x.with_dims({d: _met(x.dims[d][0], g) for d, g in of_dims.items()})
        dtypes = dtypes if is_whole else [wide(x.dtype)]
        # torch takes one average of all points as a mean.
        linear = not is_whole or all(g.outputs == 1 for g in geometries)
    else:
        even = dict(enumerate(c.even(x.dims)))
        y = made = x.with_dims({**even, **outputs})
        reads = {d: _reads(outputs[d], g, x.shape[d]) for d, g in of_dims.items()}
        z = c.move(x, x.with_dims({**even, **reads}), "halo")
    local = whole
    if not is_whole and 0 not in c.local(made):  # an empty block is not computed
        local = part(
            [View(g, x.shape[d], c.range(made[d][0]), c.range(z.dims[d][0]), not x.axes(d)) for d, g in of_dims.items()]
        )
    found = c.calls(local, z, dims=[made] * count, dtypes=dtypes, one=count == 1, everywhere=False, linear=linear)
    return found if count == 2 else c.cast(c.add_up(found[0], y), x.dtype)


def _outputs(c: Compiler, axes: tuple[int, ...], count: int, shares: bool) -> Dim:
    """How a dim of outputs is cut. Few that are sums are copied in a network, where all ranks will go on with them."""
    return uncut(count) if shares and c.copies_few and count < c.parts(axes) else cut(count, axes, c.grid)


def _met(held: Dim, geometry: Any) -> Dim:
    """The outputs of a dim that read what the ranks hold."""
    return Dim(tuple(geometry.meets(*r) for r in held.ranges), held.axes) if held.axes else uncut(geometry.outputs)


class SpatialFace(Face):
    """Base of layers without weights that treat each channel of ``(N, C, *space)`` alone: pools and interpolation."""

    has_channels = True
    return_indices = False

    def _distdl_outside(self, x: torch.Tensor) -> Any:
        return (x, torch.empty_like(x, dtype=torch.long)) if self.return_indices else x


def _reads(outputs: Dim, geometry: Any, length: int) -> Dim:
    """What the output blocks of a dim hold of the input."""
    if len(outputs.ranges) == 1:
        return Dim(((0, length),), outputs.axes)
    ranges = tuple(geometry.reads(a, b) if a < b else (length, length) for a, b in outputs.ranges)
    return lay.bounded(Dim(ranges, outputs.axes), length, "none")


def windows(z: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """The points that each output of a dim reads: of shape ``(..., outputs, taps, ...)`` for an index (outputs, taps)."""
    return z.index_select(dim, index.reshape(-1).to(z.device)).unflatten(dim, index.shape)
