"""Interpolation, cut along batch, channels and space.

Which points an output reads, and with what weights, is torch's affair: it rounds coordinates in its own way, by dtype and
device. So it is asked. Interpolated indicators of the points i = c (mod q) show the weight of the one point of that kind
near each output, for every c; that gives torch's own indices and weights for the *global* coordinates of each dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distdl_lite.layout import Range
from distdl_lite.nn.blocks import Local, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.options import options_of
from distdl_lite.nn.pool.adaptive_pool import adaptive_avg_pool
from distdl_lite.nn.pool.spatial import SpatialFace, View, pooled, windows
from distdl_lite.nn.value import NoRule, Operation, Value, rule

_TAPS = {"nearest": 1, "nearest-exact": 1, "bicubic": 4}  # else 2


@dataclass(frozen=True)
class _Interpolated:
    """What each output of a dim reads.

    Attributes
    ----------
    index, weight : torch.Tensor
        Of shape (outputs, taps): consecutive points, and their weights, zero beyond the dim's ends.
    factor : int
        n where the dim grows n-fold and torch's coordinates are exact relative to any block's start; else 0.
    """

    index: torch.Tensor
    weight: torch.Tensor
    factor: int

    @property
    def outputs(self) -> int:
        return len(self.index)

    @cached_property
    def _ranges(self) -> tuple[list[int], list[int]]:
        """Where the points with a weight start and stop, from each output on and up to it; neither decreases."""
        has_none = self.weight == 0
        starts = self.index.masked_fill(has_none, 2**62).amin(1).flip(0).cummin(0).values.flip(0)
        stops = self.index.masked_fill(has_none, -1).amax(1).cummax(0).values + 1
        return starts.tolist(), stops.tolist()

    def reads(self, start: int, stop: int) -> Range:
        return self._ranges[0][start], self._ranges[1][stop - 1]


@dataclass(frozen=True)
class Interpolation:
    """The options of an interpolation; `factors` are those that the coordinates follow, if not the lengths."""

    dims: int
    mode: str
    factors: tuple[float, ...] | None
    align_corners: bool | None = None

    def geometry(self, d: int, length: int, outputs: int, dtype: torch.dtype, device: str) -> _Interpolated:
        """How a spatial dim is read, the same on all ranks. Raises ValueError if torch's gradient is wrong."""
        factor, times = self.factors and self.factors[d], outputs / length
        if self.mode == "nearest" and self.dims != 2 and factor not in (None, times) and times in (1, 2):
            raise ValueError(
                f"dim {d + 2} of length {length} with scale_factor={factor}: torch's gradient is not that of its output; "
                f"recompute_scale_factor=True mends it"
            )
        index, weight = self._read(length, outputs, factor, dtype if self._taps == 1 else wide(dtype), device)
        return _Interpolated(index, weight, self._exact_factor(length, outputs, factor))

    @property
    def _taps(self) -> int:
        return _TAPS.get(self.mode, 2)

    def _exact_factor(self, length: int, outputs: int, factor: float | None) -> int:
        n = outputs // length
        is_exact = outputs == n * length and n & (n - 1) == 0 and outputs < 2**22  # float32 holds these halves
        return n if is_exact and factor in (None, n) and not self.align_corners else 0

    def _read(
        self, length: int, outputs: int, factor: float | None, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The points that each output reads and their weights (outputs, taps), found by interpolating indicators."""
        taps, positions = self._taps, torch.arange(outputs, dtype=torch.float64)
        scale = 1 / factor if factor else length / outputs
        if self.align_corners:
            near = positions * ((length - 1) / max(outputs - 1, 1))
        else:
            near = positions * scale if self.mode == "nearest" else (positions + 0.5) * scale - 0.5
        # Two points of slack on either side for torch's rounding.
        low = near.floor().clamp(-1, length - 1).long() - (taps + 1) // 2 - 1
        kinds = taps + 4
        points = torch.arange(length)
        indicators = (points % kinds == torch.arange(kinds)[:, None]).to(device, dtype)
        found = self._interpolate_lines(indicators, outputs, factor).cpu()
        near_points = low[:, None] + torch.arange(kinds)
        weight = found.gather(0, (near_points % kinds).T).T
        weight = weight.where((near_points >= 0) & (near_points < length), 0)
        offset = (weight != 0).to(torch.int8).argmax(1, keepdim=True)
        kept = offset + torch.arange(taps)
        return low[:, None] + kept, weight.gather(1, kept.clamp(max=kinds - 1)).where(kept < kinds, 0)

    def _interpolate_lines(self, lines: torch.Tensor, outputs: int, factor: float | None) -> torch.Tensor:
        """Interpolate lines, of shape (lines, length), along their one dim; torch's rule depends on the number of dims."""
        ones = (1,) * (self.dims - 1)
        factors = None if factor is None else (*map(float, ones), factor)
        batch = lines.view(1, lines.shape[0], *ones, lines.shape[1])
        return replace(self, factors=factors).of_block(batch, (*ones, outputs)).view(-1, outputs)

    def part(self, views: Sequence[View]) -> Local:
        """What this rank makes of the inputs it holds."""
        if all(view.is_whole or view.geometry.factor for view in views):
            return self._blockwise(views)
        # Index and weight (outputs, taps) of this rank's outputs in the block it holds; a point outside weighs nothing.
        dims = [
            (
                v.geometry.index[slice(*v.block)].clamp(v.held[0], v.held[1] - 1) - v.held[0],
                v.geometry.weight[slice(*v.block)],
            )
            for v in views
        ]

        def interpolate(z: torch.Tensor) -> torch.Tensor:
            y = z if self._taps == 1 else z.to(wide(z.dtype))
            return reduce(lambda y, dim: _weighted(y, dim, *dims[dim - 2]), range(z.dim() - 1, 1, -1), y).to(z.dtype)

        return interpolate

    def of_block(self, z: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """torch's interpolation of a block to so many outputs."""
        size, scale = (sizes, None) if self.factors is None else (None, self.factors)
        return F.interpolate(z, size, scale, self.mode, self.align_corners)

    def _blockwise(self, views: Sequence[View]) -> Local:
        """torch's interpolation of the held block, of which this rank's outputs are cut out."""
        held = [view.held[1] - view.held[0] for view in views]
        sizes = [v.geometry.outputs if v.is_whole else v.geometry.factor * n for v, n in zip(views, held, strict=True)]
        starts = [v.block[0] - (0 if v.is_whole else v.geometry.factor * v.held[0]) for v in views]
        cut = (..., *(slice(a, a + view.size) for a, view in zip(starts, views, strict=True)))
        return lambda z: self.of_block(z, sizes)[cut]


def interpolated(
    c: Compiler, op: Operation, x: Value, mode: str, factors: Any, align_corners: bool | None = None
) -> Any:
    """The value interpolated to the operation's shape."""
    kernel = Interpolation(x.ndim - 2, mode, factors and tuple(factors), align_corners)
    lengths = zip(x.shape[2:], op.shape[2:], strict=True)
    geometries = [kernel.geometry(d, *of_dim, x.dtype, c.device) for d, of_dim in enumerate(lengths)]
    return pooled(c, x, geometries, partial(kernel.of_block, sizes=op.shape[2:]), kernel.part, linear=True)


@rule(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
)  # fmt: skip
def upsample(c: Compiler, op: Any, x: Value, sizes: Any, *options: Any) -> Any:
    if "vec" not in op.function._overloadname:
        raise NoRule
    mode = "nearest-exact" if "exact" in op.name else op.name.split("_")[1][:-2]
    *align, factors = options
    return interpolated(c, op, x, mode, factors, *align)


class DistributedUpsample(SpatialFace, serial=torch.nn.Upsample):
    """Interpolation of the tensor that the blocks over `P_x` form, equal to torch's.

    Input ``(N, C, *space)`` of a floating dtype in blocks of any sizes, cut along any dims; output in balanced blocks over
    `P_x`, whose ranks call it together. Ranks outside return what they pass. The nearest modes are exact, the others equal
    torch's to the rounding of the sums.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    size, scale_factor, mode, align_corners, recompute_scale_factor
        As in torch.nn.Upsample, of the global tensor.

    Raises
    ------
    ValueError, TypeError
        At build, if torch refuses the options or the input, with its words, or the input is of integers. On all ranks alike.

    Notes
    -----
    Where a scale factor is given, its inverse takes the coordinates to the input, unless it is recomputed from the sizes:
    torch's rule.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2))
    ...     return dl.nn.DistributedUpsample(P, scale_factor=2)(P.cut(torch.arange(3.0).view(1, 1, 3))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[0.0, 0.0, 1.0]]], [[[1.0, 2.0, 2.0]]]]
    """

    for_one_point: ClassVar[Mapping[str, Any]] = {"size": 1, "scale_factor": None, "recompute_scale_factor": None}
    needs_floating = True

    def rule(self, c: Compiler, x: Value, **held: Value) -> Any:
        op = self.judged((x.shape, x.dtype))
        if self.mode == "area":  # torch's name of an adaptive average
            return adaptive_avg_pool(c, op, x, None)
        given = None if self.recompute_scale_factor else self.scale_factor
        factors = None if given is None else options_of(x.ndim - 2, given)[0]
        return interpolated(c, op, x, self.mode, factors, self.align_corners)


def _weighted(z: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the points that each output of a dim reads."""
    if index.shape[1] == 1:
        return z.index_select(dim, index[:, 0].to(z.device))
    trailing = (1,) * (z.dim() - dim - 1)
    return (windows(z, dim, index) * weight.to(z).view(*weight.shape, *trailing)).sum(dim + 1)
