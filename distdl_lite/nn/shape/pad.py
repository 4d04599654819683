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
from distdl_lite.layout import Box, Shape
from distdl_lite.nn.blocks import Local, edge_pad
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.value import Operation, Value, rule

_MODES = {"reflection": "reflect", "replication": "replicate", "circular": "circular"}


def _mode(name: str) -> str:
    """The mode of an operation or a layer of torch."""
    return _MODES.get(name.lower().partition("pad")[0].strip("_"), "constant")


@rule("pad")
def pad(c: Compiler, op: Any, x: Value, padding: Sequence[int], mode: str = "constant", value: Any = None) -> Value:
    return padded(c, x, padding, mode, value or 0)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad_of_mode(c: Compiler, op: Any, x: Value, padding: Sequence[int], value: float = 0) -> Value:
    return padded(c, x, padding, _mode(op.name), value)


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
        # torch's backward of reflections and replications names its input.
        of_nothing = {"everywhere": mode == "constant", "linear": mode == "circular"}
        return c.call(F.pad, x, list(padding), mode, value, dims=x.with_dims(y), dtype=x.dtype, **of_nothing)
    if mode == "circular" and min(padding) < 0:  # it wraps round what is left, where the other modes read the tensor
        x = padded(c, x, [min(n, 0) for n in padding])
        return padded(c, x, [max(n, 0) for n in padding], mode)
    shape, even, boundary = x.shape, dict(enumerate(c.even(x.dims))), mode
    if mode == "constant":
        boundary = "none" if value else "zeros"  # which nobody holds
    wanted = {
        d: replace(dim, ranges=tuple((a - sides[d][0], b - sides[d][0]) for a, b in dim.ranges)) for d, dim in y.items()
    }
    held = {d: lay.bounded(dim, shape[d], boundary) for d, dim in wanted.items()}
    z, dims = c.move(x, x.with_dims({**even, **held}), "halo"), x.with_dims({**even, **y})
    block = c.local(dims)
    boxes = [tuple(c.range(new[d]) if d in new else (0, n) for d, n in enumerate(block)) for new in (wanted, held)]
    edge = None
    if boundary == "none":
        edge = _constant_pad(*boxes, value)
    elif boundary in ("reflect", "replicate"):
        edge = edge_pad(*boxes, shape, mode)
    return c.renamed(z, dims) if edge is None else c.call(edge, z, dims=dims, dtype=x.dtype)


def _constant_pad(wanted: Box, held: Box, value: float) -> Local | None:
    """The local step that takes a constant for what is wanted beyond the edge: from the box held to the box wanted."""
    pads: list[int] = []
    for (start, stop), (low, high) in zip(reversed(wanted), reversed(held), strict=True):
        missing = stop - start - (high - low)
        left = min(max(-start, 0), missing)
        pads += left, missing - left
    return partial(F.pad, pad=pads, value=value) if any(pads) else None


class _DistributedPad(Face):
    """The tensor that the blocks over `P_x` form, padded at its own edges, equal to torch's.

    Input in blocks of any sizes and of any dtype that torch pads, cut along any dims; output in balanced blocks of the
    padded tensor over `P_x`, whose ranks call it together. Ranks outside return what they pass.

    Parameters
    ----------
    P_x : Partition
        One axis per tensor dim. The last 1, 2 or 3 dims are padded; before them stand channels and, maybe, the batch, and
        any number of dims for a constant.
    padding, value
        As in torch's layer: points, ``(left, right)`` of the last dim first, of which negative ones are cropped; the value of
        a constant pad.

    Raises
    ------
    ValueError, TypeError
        At build if torch refuses the padding for the shape of the global tensor, or a circular one reads more points than
        cropping has left (torch returns unset memory). On all ranks alike.

    Notes
    -----
    One exchange forward, with the ranks that hold what the output block reads, and its adjoint backward; none where the
    padded dims are not cut and the others are cut in balanced blocks. Circular padding that crops too takes two.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2))
    ...     return dl.nn.DistributedReflectionPad1d(P, (2, 1))(P.cut(torch.arange(4.0).view(1, 1, 4))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[2.0, 1.0, 0.0, 1.0]]], [[[2.0, 3.0, 2.0]]]]
    """

    value = 0.0

    @property
    def for_one_point(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Attributes with which torch's layer takes a tensor of one point."""
        return {"padding": (0,) * len(self.padding)}

    def judged(self, *inputs: tuple[Shape, torch.dtype], device: str = "meta") -> Operation:
        sides = zip(inputs[0][0][::-1], self.padding[::2], self.padding[1::2], strict=False)
        # torch 2.14 refuses to make nothing by reflection on the meta device alone.
        return super().judged(*inputs, device="cpu" if any(map(_is_nothing, sides)) else device)

    def rule(self, c: Compiler, x: Value, **held: Value) -> Value:
        return padded(c, x, self.padding, _mode(self.serial.__name__), self.value or 0)


def _is_nothing(sides: Sequence[Any]) -> bool:
    return all(isinstance(n, int) for n in sides) and sum(sides) == 0


class DistributedZeroPad1d(_DistributedPad, serial=torch.nn.ZeroPad1d): ...


class DistributedZeroPad2d(_DistributedPad, serial=torch.nn.ZeroPad2d): ...


class DistributedZeroPad3d(_DistributedPad, serial=torch.nn.ZeroPad3d): ...


class DistributedConstantPad1d(_DistributedPad, serial=torch.nn.ConstantPad1d): ...


class DistributedConstantPad2d(_DistributedPad, serial=torch.nn.ConstantPad2d): ...


class DistributedConstantPad3d(_DistributedPad, serial=torch.nn.ConstantPad3d): ...


class DistributedReflectionPad1d(_DistributedPad, serial=torch.nn.ReflectionPad1d): ...


class DistributedReflectionPad2d(_DistributedPad, serial=torch.nn.ReflectionPad2d): ...


class DistributedReflectionPad3d(_DistributedPad, serial=torch.nn.ReflectionPad3d): ...


class DistributedReplicationPad1d(_DistributedPad, serial=torch.nn.ReplicationPad1d): ...


class DistributedReplicationPad2d(_DistributedPad, serial=torch.nn.ReplicationPad2d): ...


class DistributedReplicationPad3d(_DistributedPad, serial=torch.nn.ReplicationPad3d): ...


class DistributedCircularPad1d(_DistributedPad, serial=torch.nn.CircularPad1d): ...


class DistributedCircularPad2d(_DistributedPad, serial=torch.nn.CircularPad2d): ...


class DistributedCircularPad3d(_DistributedPad, serial=torch.nn.CircularPad3d): ...
