"""The base of layers whose outputs read a range of the input per dim and channel: pools and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout, Range
from distdl_lite.nn.blocks import Local, anchored, connected_zeros, operator_between, own_box, wide
from distdl_lite.nn.inputs import Inputs, agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import spatial_axes
from distdl_lite.partition import Partition


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


class SpatialLayer(Module):
    """Base of layers without weights that treat each channel alone: pools and interpolation.

    Each rank fetches the inputs that its outputs read, wherever their owners are, by one operator, and computes alone. A dim
    that is not cut stays whole. Override `geometry` and `local`; also `between` where outputs are sums of what ranks compute.

    Parameters
    ----------
    P_x : Partition
        Of the input and the output: ``[P_b, P_c, *P_space]``.
    """

    return_indices = False  # of maxima: whether their places are returned too

    def __init__(self, P_x: Partition, dims: int) -> None:
        super().__init__(P_x)
        self.P_x, self.dims = P_x, dims
        spatial_axes(self, "P_x", P_x, dims)

    def geometry(self, d: int, length: int, inputs: Inputs) -> Any:
        """The geometry of spatial dim `d`; the same on all ranks. Raises ValueError if the length does not fit."""
        raise NotImplementedError

    def local(self, views: Sequence[View]) -> Local:
        """What this rank computes from the inputs it holds."""
        raise NotImplementedError

    def is_linear(self, views: Sequence[View]) -> bool:
        """Whether the backward of `local` does without the input; the same on all ranks."""
        return False

    def result_dtype(self, inputs: Inputs) -> torch.dtype:
        """The dtype of torch's result. Raises TypeError if torch's layer does not take the input's."""
        raise NotImplementedError

    def layouts(self, inputs: Inputs) -> tuple[Layout, Layout, list[Any]]:
        """The layouts of input and output, and the geometry of each spatial dim; the same on all ranks."""
        grid = self.P_x.grid_of_ranks
        X = lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes))
        batch, channels, *space = lay.global_shape_of(X)
        if 0 in space:
            raise self._refuse(f"the input of shape {lay.global_shape_of(X)} has no points")
        geometries = [self.geometry(d, n, inputs) for d, n in enumerate(space)]
        return X, lay.balanced_blocks(grid, (batch, channels, *(g.outputs for g in geometries))), geometries

    def between(self, X: Layout, Y: Layout, geometries: Sequence[Any]) -> tuple[Layout, Layout]:
        """What `local` is given and what it computes: what the rank's outputs read, and these outputs."""
        dims = zip(Y.dims[2:], geometries, lay.global_shape_of(X)[2:], strict=True)
        return Layout(X.grid, (*Y.dims[:2], *(_reads(*dim) for dim in dims))), Y

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        inputs = replace(inputs, dtype=self.result_dtype(inputs))  # where autocast chooses another, it casts the input
        X, Y, geometries = self.layouts(inputs)
        Z, W = self.between(X, Y, geometries)
        box, is_whole = own_box(self, W), [n == 1 for n in X.grid.shape[2:]]
        dims = zip(geometries, lay.global_shape_of(X)[2:], box[2:], own_box(self, Z)[2:], is_whole, strict=True)
        views, shape = [View(*dim) for dim in dims], lay.shape_of(box)
        local = self.local(views) if 0 not in shape else partial(connected_zeros, shape, linear=self.is_linear(views))
        graph, dtype = inputs.requires_grad, inputs.dtype
        fetch, deliver = operator_between(X, Z, self, graph), operator_between(W, Y, self, graph)
        added = dtype if all(is_whole) else wide(dtype)

        def run(layer: SpatialLayer, x: torch.Tensor) -> Any:
            x = x if x.dtype is dtype else x.to(dtype)
            # Also where nothing moves: a checkpoint around it runs the layer again on the ranks that have a graph.
            y = local(anchored(x, graph) if fetch is None else fetch(x))
            if layer.return_indices:
                return with_places(y)
            y = y if deliver is None else deliver(y.to(added))
            return y if y.dtype is dtype else y.to(dtype)

        return run

    def _distdl_outside(self, x: torch.Tensor) -> Any:
        return with_places(x) if self.return_indices else x


def _reads(outputs: Dim, geometry: Any, length: int) -> Dim:
    """What the output blocks of a dim hold of the input."""
    if len(outputs.ranges) == 1:
        return Dim(((0, length),), outputs.axes)
    ranges = tuple(geometry.reads(a, b) if a < b else (length, length) for a, b in outputs.ranges)
    return lay.bounded(Dim(ranges, outputs.axes), length, "none")


def windows(z: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """The points that each output of a dim reads: of shape ``(..., outputs, taps, ...)`` for an index (outputs, taps)."""
    return z.index_select(dim, index.reshape(-1).to(z.device)).unflatten(dim, index.shape)


def with_places(y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima and their places, of which there are none where nothing was pooled."""
    return (y, torch.empty_like(y, dtype=torch.long)) if isinstance(y, torch.Tensor) else y
