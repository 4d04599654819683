"""Padding of the global tensor: an output block wants a box of it, grown or cropped, that may leave the tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.factors import cut
from distdl_lite.layout import Box, Dim, Range, Shape
from distdl_lite.nn.blocks import Local, edge_pad, torch_dtype
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.options import numbers, per_dim
from distdl_lite.nn.rule_layer import RuleLayer
from distdl_lite.nn.value import Value, rule
from distdl_lite.partition import Partition

_MODES = {"constant": "constant", "reflection": "reflect", "replication": "replicate"}  # by the operation's first word
_BOUNDARIES = {"constant": "zeros"}  # the others are of the same name
Sides = Mapping[int, Range]  # by dim the points on its left and on its right, of which negative ones are cropped


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(c: Compiler, op: Any, x: Value, padding: Sequence[int], *options: Any, **named: Any) -> Value:
    if op.name == "constant_pad_nd":
        options = ("constant", *options)
    mode = options[0] if options else named.get("mode", _MODES.get(op.name.partition("_")[0], "constant"))
    value = options[1] if len(options) > 1 else named.get("value")
    return padded(c, x, padding, mode, value or 0)


def padded(c: Compiler, x: Value, padding: Sequence[int], mode: str = "constant", value: float = 0.0) -> Value:
    """The value padded at its edges, in even blocks.

    Where a padded dim is cut each rank fetches what its block reads, and zeros where nobody holds anything; other constants,
    reflections and replications are made at the edge. Raises ValueError if a circular one reads more points than there are.
    """
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    sides = {x.ndim - 1 - i: pair for i, pair in enumerate(pairs) if any(pair)}
    x = c.plain(x, sides)
    x = c.renamed(x, x.dims)  # a number made late is none any more
    y = {d: cut(x.shape[d] + left + right, x.axes(d), c.grid) for d, (left, right) in sides.items()}
    short = [d for d, (left, right) in sides.items() if max(left, right) > x.shape[d] + min(left, 0) + min(right, 0)]
    if mode == "circular" and short:  # torch returns unset memory
        raise ValueError(f"padding={tuple(padding)} reads more than what it leaves of a tensor of {x.shape}")
    if not x.axes(*sides):
        linear = mode in ("constant", "circular")  # torch's backward of the others names its input
        return c.call(F.pad, x, list(padding), mode, value, dims=x.with_dims(y), dtype=x.dtype, linear=linear)
    wanted = {
        d: replace(dim, ranges=tuple((a - sides[d][0], b - sides[d][0]) for a, b in dim.ranges)) for d, dim in y.items()
    }
    shape, even = x.shape, c.even(x.dims)
    if mode == "circular":
        x, held = _around(c, x, sides, wanted)
    else:
        held = {d: lay.bounded(dim, shape[d], _BOUNDARIES.get(mode, mode)) for d, dim in wanted.items()}
    local, dims = [tuple((new[d],) if d in new else f for d, f in enumerate(even)) for new in (held, y)]
    z = c.move(x, local, "halo")
    blocks = [[c.range(new[d]) if d in new else (0, n) for d, n in enumerate(c.local(dims))] for new in (wanted, held)]
    edge = _edge(tuple(blocks[0]), tuple(blocks[1]), shape, sides, mode, value)
    return c.renamed(z, dims) if edge is None else c.call(edge, z, dims=dims, dtype=x.dtype, linear=True)


def _around(c: Compiler, x: Value, sides: Sides, wanted: Mapping[int, Dim]) -> tuple[Value, dict[int, Dim]]:
    """What negative padding leaves of the value, and the wanted ranges of that, which is repeated without end.

    torch's circular padding wraps round what is left of the tensor, where the other modes read the tensor.
    """
    kept, repeated = {}, {}
    for d, (left, right) in sides.items():
        (dim,), low, high = x.dims[d], max(-left, 0), x.shape[d] - max(-right, 0)
        kept[d] = replace(dim, ranges=tuple((min(max(a, low), high), min(max(b, low), high)) for a, b in dim.ranges))
        repeated[d] = replace(wanted[d], period=high - low if max(left, right) > 0 else None)
    return c.move(x, x.with_dims(kept)), repeated


def _edge(wanted: Box, held: Box, shape: Shape, sides: Sides, mode: str, value: float) -> Local | None:
    """What is left to do beyond the edge of a tensor of the given shape."""
    if mode in ("reflect", "replicate"):
        return edge_pad(wanted, held, shape, mode)
    inside = tuple((0, n) if d in sides else wanted[d] for d, n in enumerate(shape))
    outside = [
        tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(piece, wanted, strict=True))
        for piece in (lay.uncovered(wanted, [inside]) if value else ())
    ]

    def fill(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        with torch.no_grad():  # the adjoint reads no gradient of points beyond the edge
            for piece in outside:
                y[piece] = value
        return y

    return fill if outside else None


class _DistributedPad(RuleLayer):
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

    def result_dtype(self, inputs: Inputs) -> torch.dtype:
        if self.mode == "constant":
            return inputs.dtype
        return torch_dtype(self, inputs, self.P_x.dim, partial(F.pad, pad=(0,) * len(self.padding), mode=self.mode))

    def rule(self, c: Compiler, x: Value) -> Value:
        sides = zip(x.shape[::-1], self.padding[::2], self.padding[1::2], strict=False)
        # torch 2.14 refuses to make nothing by reflection on the meta device alone.
        device = "cpu" if any(n + left + right == 0 for n, left, right in sides) else "meta"
        try:
            F.pad(torch.empty(x.shape, dtype=x.dtype, device=device), self.padding, self.mode, self.value)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(f"padding={self.padding} of a tensor of shape {x.shape}: {error}") from error
        return padded(c, x, self.padding, self.mode, self.value)

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
