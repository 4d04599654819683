"""The base of layers whose outputs read a range of the input per dim and channel: pools and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.factors import cut, uncut
from distdl_lite.layout import Dim, Range
from distdl_lite.nn.blocks import Local, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.value import Value


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


class Spatial:
    """A kernel whose outputs read a range of the input per spatial dim, for each channel alone: the geometry of a pool.

    Override `geometry` and `local`; also `shares` where outputs are sums of what ranks compute.
    """

    dims: int
    shares = False  # whether each rank computes its inputs' shares of the outputs that read them
    return_indices = False  # of maxima: whether their places are returned too

    def geometry(self, d: int, length: int, inputs: Inputs) -> Any:
        """The geometry of spatial dim `d`; the same on all ranks. Raises ValueError if the length does not fit."""
        raise NotImplementedError

    def local(self, views: Sequence[View]) -> Local:
        """What this rank computes from the inputs it holds."""
        raise NotImplementedError

    def is_linear(self, views: Sequence[View]) -> bool:
        """Whether the backward of `local` does without the input; the same on all ranks."""
        return False


def pooled(c: Compiler, kernel: Spatial, x: Value) -> Any:
    """The rule of such kernels: each rank fetches the inputs that its outputs read, and computes alone.

    A dim that is not cut stays whole. Returns a value, or maxima and their places.
    """
    space = range(2, x.ndim)
    x = c.spread_home(c.plain(x, space), space)
    inputs = Inputs({}, x.dtype, c.device, x.grad)
    geometries = [kernel.geometry(d - 2, x.shape[d], inputs) for d in space]
    outputs = {d: _outputs(c, kernel, x.axes(d), g.outputs) for d, g in zip(space, geometries, strict=True)}
    if kernel.shares:
        z, y = x, x.with_dims(outputs)
        met = {d: _met(x.dims[d][0], g) for d, g in zip(space, geometries, strict=True)}
        made = x.with_dims(met)
    else:
        even = c.even(x.dims)
        y = made = tuple((outputs[d],) if d in outputs else f for d, f in enumerate(even))
        reads = {d: _reads(outputs[d], g, x.shape[d]) for d, g in zip(space, geometries, strict=True)}
        z = c.move(x, tuple((reads[d],) if d in reads else f for d, f in enumerate(even)), "halo")
    views = [
        View(g, x.shape[d], c.range(made[d][0]), c.range(z.dims[d][0]), not x.axes(d))
        for d, g in zip(space, geometries, strict=True)
    ]
    count = 2 if kernel.return_indices else 1
    dtypes = [x.dtype, torch.long][:count]
    if kernel.shares and not all(view.is_whole for view in views):
        dtypes = [wide(x.dtype)]
    local, linear = kernel.local(views) if 0 not in c.local(made) else _not_called, kernel.is_linear(views)
    found = c.calls(local, z, dims=[made] * count, dtypes=dtypes, one=count == 1, linear=linear)
    if count == 2:
        return found
    return c.cast(c.add_up(found[0], y), x.dtype)


def _outputs(c: Compiler, kernel: Spatial, axes: tuple[int, ...], count: int) -> Dim:
    """How a dim of outputs is cut. Few that are sums are copied in a network, where all ranks will go on with them."""
    return uncut(count) if kernel.shares and c.copies_few and count < c.parts(axes) else cut(count, axes, c.grid)


def _met(held: Dim, geometry: Any) -> Dim:
    """The outputs of a dim that read what the ranks hold."""
    return Dim(tuple(geometry.meets(*r) for r in held.ranges), held.axes) if held.axes else uncut(geometry.outputs)


def _not_called(z: torch.Tensor) -> torch.Tensor:
    raise AssertionError("an empty block is not computed")


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
