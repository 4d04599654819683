"""Padding of the global tensor: an output block wants a box of it, grown or cropped, that may leave the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.layout import Dim, Layout, Shape
from distdl_lite.nn.blocks import Local, connected_zeros, edge_pad, own_box, torch_dtype
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import numbers, per_dim
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan


class _DistributedPad(Module):
    """The tensor that the blocks over `P_x` form, padded at its own edges, equal to torch's.

    Input in blocks of any sizes and of any dtype that torch pads, cut along any dims; output in balanced blocks of the
    padded tensor over `P_x`, whose ranks call it together. Ranks outside return what they pass.

    Parameters
    ----------
    P_x : Partition
        One axis per tensor dim. The last 1, 2 or 3 dims are padded; before them stand channels and, maybe, the batch, and
        any number of dims for a constant.
    padding : int or sequence of int
        In points, ``(left, right)`` of the last dim first, as in torch; a negative number crops.
    value : float
        Of a constant pad.

    Raises
    ------
    ValueError
        In the constructor if partition or padding do not fit the dims; at build if torch refuses the padding for the shape
        of the global tensor, or a circular one reads more points than cropping has left (torch returns unset memory). On all
        ranks alike.

    Notes
    -----
    One exchange forward, with the ranks that hold what the output block reads, and its adjoint backward; none where the
    padded dims are not cut and the others are cut in balanced blocks.
    """

    dims: int
    mode = "constant"
    value: float = 0.0

    def __init__(self, P_x: Partition, padding: int | Sequence[int]) -> None:
        super().__init__(P_x)
        self.P_x = P_x
        self.padding = per_dim(self, 2 * self.dims, "padding", padding, least=None)
        leading = P_x.dim - self.dims
        if leading < 0 or (self.mode != "constant" and leading not in (1, 2)):
            raise self._refuse(
                f"P_x of shape {P_x.shape} has {P_x.dim} axes, which does not fit {self.dims} padded dims"
            )

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        grid, first = self.P_x.grid_of_ranks, self.P_x.dim - self.dims
        X = lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes))
        n = lay.global_shape_of(X)
        dtype = inputs.dtype
        if self.mode != "constant":
            nothing = partial(F.pad, pad=(0,) * len(self.padding), mode=self.mode)
            dtype = torch_dtype(self, inputs, self.P_x.dim, nothing)
        Y = lay.balanced_blocks(grid, self._padded_shape(n, inputs.dtype))
        lefts = (0,) * first + self.padding[::2][::-1]
        moved = [tuple((a - left, b - left) for a, b in dim.ranges) for dim, left in zip(Y.dims, lefts, strict=True)]
        wanted = Layout(grid, tuple(Dim(ranges, (axis,)) for axis, ranges in enumerate(moved)))
        kept, Z = self._around(X, wanted) if self.mode == "circular" else (X, self._bounded(wanted, n))
        mine, left, box, held = (own_box(self, layout) for layout in (X, kept, wanted, Z))
        if max(grid.shape[first:]) == 1 and X.dims[:first] == Y.dims[:first]:
            whole = self._whole(lay.shape_of(box))
            return lambda layer, x: whole(x if x.dtype is dtype else x.to(dtype))
        crop = tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(mine, left, strict=True))
        crops, transport = kept != X, self._distdl_transport
        fetch = Operator(plan(kept, Z, transport.rank), transport, type(self).__name__, inputs.requires_grad)
        edge = self._edge(box, held, n)

        def run(layer: Module, x: torch.Tensor) -> torch.Tensor:
            x = x.to(dtype)
            y = fetch(x[crop] if crops else x)
            return y if edge is None else edge(y)

        return run

    def _padded_shape(self, shape: Shape, dtype: torch.dtype) -> Shape:
        """The shape of the padded tensor. Raises ValueError if torch refuses to pad."""
        sides = zip(shape[::-1], self.padding[::2], self.padding[1::2], strict=False)
        # torch 2.14 refuses to make nothing by reflection on the meta device alone.
        device = "cpu" if any(n + left + right == 0 for n, left, right in sides) else "meta"
        try:
            found = F.pad(torch.empty(shape, dtype=dtype, device=device), self.padding, self.mode, self.value)
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._refuse(f"padding={self.padding} of a tensor of shape {shape}: {error}") from error
        return tuple(found.shape)

    def _bounded(self, wanted: Layout, shape: Shape) -> Layout:
        """What the ranks hold of a tensor of the given shape to make the wanted boxes, which may leave it."""
        boundary = "zeros" if self.mode == "constant" else self.mode
        padded = zip(wanted.dims[-self.dims :], shape[-self.dims :], strict=True)
        dims = (*wanted.dims[: -self.dims], *(lay.bounded(dim, n, boundary) for dim, n in padded))
        return replace(wanted, dims=dims)

    def _around(self, X: Layout, wanted: Layout) -> tuple[Layout, Layout]:
        """What negative padding leaves of the blocks, and the wanted boxes of that tensor, repeated without end.

        torch's circular padding wraps round what is left of the tensor, where the other modes read the tensor.
        """
        kept, repeated = list(X.dims), list(wanted.dims)
        lengths = lay.global_shape_of(X)
        for d, left, right in zip(range(-1, -self.dims - 1, -1), self.padding[::2], self.padding[1::2], strict=True):
            low, high = max(-left, 0), lengths[d] - max(-right, 0)
            if max(left, right) > high - low:
                raise self._refuse(f"padding={self.padding} reads more than what it leaves of a tensor of {lengths}")
            inside = tuple((min(max(a, low), high), min(max(b, low), high)) for a, b in X.dims[d].ranges)
            kept[d] = replace(X.dims[d], ranges=inside)
            repeated[d] = replace(wanted.dims[d], period=high - low if max(left, right) > 0 else None)
        return replace(X, dims=tuple(kept)), replace(wanted, dims=tuple(repeated))

    def _whole(self, shape: Shape) -> Local:
        """torch's padding, of which no other rank holds anything."""
        if self.mode in ("reflect", "replicate") and 0 in shape:  # which torch refuses
            return lambda x: connected_zeros(shape, x)
        return partial(F.pad, pad=self.padding, mode=self.mode, value=self.value)

    def _edge(self, wanted: lay.Box, held: lay.Box, shape: Shape) -> Local | None:
        """What is left to do beyond the edge of the tensor of the given shape."""
        if self.mode in ("reflect", "replicate"):
            return edge_pad(wanted, held, shape, self.mode)
        if self.value == 0:  # nobody holds anything there, so zeros arrive; a circular one has no edge
            return None
        outside = [
            tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(piece, wanted, strict=True))
            for piece in lay.uncovered(wanted, [tuple((0, n) for n in shape)])
        ]
        value = self.value

        def fill(y: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():  # the adjoint reads no gradient of points beyond the edge
                for piece in outside:
                    y[piece] = value
            return y

        return fill

    def extra_repr(self) -> str:
        return f"padding={self.padding}, P_x={self.P_x.shape}"


class _DistributedConstantPad(_DistributedPad):
    def __init__(self, P_x: Partition, padding: int | Sequence[int], value: float) -> None:
        super().__init__(P_x, padding)
        numbers(self, value=value)
        self.value = value

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}, P_x={self.P_x.shape}"


class DistributedZeroPad1d(_DistributedPad):
    dims = 1


class DistributedZeroPad2d(_DistributedPad):
    dims = 2


class DistributedZeroPad3d(_DistributedPad):
    dims = 3


class DistributedConstantPad1d(_DistributedConstantPad):
    dims = 1


class DistributedConstantPad2d(_DistributedConstantPad):
    dims = 2


class DistributedConstantPad3d(_DistributedConstantPad):
    dims = 3


class DistributedReflectionPad1d(_DistributedPad):
    dims = 1
    mode = "reflect"


class DistributedReflectionPad2d(_DistributedPad):
    dims = 2
    mode = "reflect"


class DistributedReflectionPad3d(_DistributedPad):
    dims = 3
    mode = "reflect"


class DistributedReplicationPad1d(_DistributedPad):
    dims = 1
    mode = "replicate"


class DistributedReplicationPad2d(_DistributedPad):
    dims = 2
    mode = "replicate"


class DistributedReplicationPad3d(_DistributedPad):
    dims = 3
    mode = "replicate"


class DistributedCircularPad1d(_DistributedPad):
    dims = 1
    mode = "circular"


class DistributedCircularPad2d(_DistributedPad):
    dims = 2
    mode = "circular"


class DistributedCircularPad3d(_DistributedPad):
    dims = 3
    mode = "circular"
