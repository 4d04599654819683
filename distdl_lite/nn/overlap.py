"""Convolutions whose halo travels while they compute, and which do not copy their input.

A convolution is linear: that of a block with its halo is that of the block with zeros in the halo's place, which waits for
nobody, plus those of the halo's slabs alone, each of which reaches a few outputs at one edge. The backward mirrors it: the
gradients of the slabs go out first, the block's own follow while they travel, and what arrives is added to it.
`_Overlapped` does this; ``fetch`` and the plain convolution are the same, slower for large blocks, and differentiable twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.layout import Dim, Layout
from distdl_lite.operator import ANCHOR, Operator
from distdl_lite.plan import Pattern, plan
from distdl_lite.transport import Transport

LEAST_BYTES = 1 << 20  # of the largest block; below, copying it takes less time than the calls for slabs

Convolve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """The local convolution: per spatial dim as in torch, with the padding that stands for the halo."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: Sequence[bool],
    ) -> Any:
        """The wanted ones of the gradients of input, weight and bias."""
        none = [0] * len(self.size)
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None if bias is None else list(bias.shape), self.stride, self.padding, self.dilation,
            False, none, self.groups, list(wanted),
        )  # fmt: skip


@dataclass(frozen=True)
class Slab:
    """One side of the halo along one dim.

    Attributes
    ----------
    fetch : Operator
        From the input blocks to the slabs.
    arrives : bool
        Whether this rank's slab holds anything but zeros.
    dim : int
        Of the tensor.
    width : int
        Of the slab, and of the outputs that it reaches.
    is_left : bool
    taps : int
        How many points of the kernel meet it.
    room : int
        Zeros to add on the block's side, so that these taps fit everywhere.
    kernel : Kernel
        From the slab to the outputs that it reaches.
    """

    fetch: Operator
    arrives: bool
    dim: int
    width: int
    is_left: bool
    taps: int
    room: int
    kernel: Kernel

    def reached(self, y: torch.Tensor) -> torch.Tensor:
        """The outputs it reaches."""
        return y.narrow(self.dim, 0 if self.is_left else y.shape[self.dim] - self.width, self.width)

    def met(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of the kernel that meets it."""
        return weight.narrow(self.dim, 0 if self.is_left else weight.shape[self.dim] - self.taps, self.taps)

    def extended(self, x: torch.Tensor) -> torch.Tensor:
        if not self.room:
            return x
        return F.pad(x, (0, 0) * (x.dim() - self.dim - 1) + ((0, self.room) if self.is_left else (self.room, 0)))

    def cropped(self, x: torch.Tensor) -> torch.Tensor:
        """The adjoint of `extended`."""
        return x.narrow(self.dim, 0 if self.is_left else self.room, self.width)


@dataclass(frozen=True)
class Overlap:
    """A convolution that overlaps, for one structure.

    Attributes
    ----------
    slabs : tuple of Slab
    kernel : Kernel
        With zeros in the place of the halo.
    compose : callable
        The same of input, weight and bias by differentiable operations.
    graph : bool
        Whether any rank's input requires grad.
    """

    slabs: tuple[Slab, ...]
    kernel: Kernel
    compose: Convolve
    graph: bool

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        anchor = ANCHOR if self.graph and not x.requires_grad else None
        return _Overlapped.apply(x, weight, bias, anchor, self)


def slabs(
    X: Layout, Z: Layout, kernel: Kernel, cut: Sequence[int], transport: Transport, label: str
) -> tuple[Slab, ...] | None:
    """The slabs around the blocks of `X` that make up the boxes of `Z`; None where their shapes do not allow to overlap.

    The blocks must be grown by the kernel's padding along the spatial dims `cut`, and be the same along all others. The
    answer is the same on all ranks.
    """
    for d, (have, want) in enumerate(zip(X.dims, Z.dims, strict=True)):
        grown = kernel.padding[d - 2] if d - 2 in cut else 0
        if (
            tuple((a - grown, b + grown) for a, b in have.ranges) != want.ranges
            or min(b - a for a, b in have.ranges) < 1
        ):
            return None
    found = []
    for number, d in enumerate(cut):
        width, reach = kernel.padding[d], kernel.dilation[d] * (kernel.size[d] - 1)
        shortest = min(b - a for a, b in X.dims[2 + d].ranges)
        if kernel.stride[d] != 1 or width > reach or shortest + 2 * width - reach < width:
            return None
        for is_left in (True, False) if width else ():
            S = replace(Z, dims=_slab_dims(X, Z, [2 + c for c in cut[:number]], 2 + d, is_left))
            built = plan(X, S, transport.rank)
            if built.pattern is not Pattern.EXCHANGE:
                return None
            taps = math.ceil(width / kernel.dilation[d])
            done, own = cut[: number + 1], {d: taps}
            part = replace(
                kernel,
                size=tuple(own.get(e, k) for e, k in enumerate(kernel.size)),
                padding=tuple(0 if e in cut and (e not in done or e == d) else p for e, p in enumerate(kernel.padding)),
            )
            arrives = any(leg.receives for leg in built.legs)
            fetch = Operator(built, transport, label)
            found.append(Slab(fetch, arrives, 2 + d, width, is_left, taps, (taps - 1) * kernel.dilation[d], part))
    return tuple(found)


def _slab_dims(X: Layout, Z: Layout, done: Sequence[int], dim: int, is_left: bool) -> tuple[Dim, ...]:
    """A slab lies beside the block along its dim; the corners belong to the slabs of the dims that come first."""
    dims = list(Z.dims)
    for d in done:
        dims[d] = replace(Z.dims[d], ranges=X.dims[d].ranges)
    sides = zip(X.dims[dim].ranges, Z.dims[dim].ranges, strict=True)
    dims[dim] = replace(Z.dims[dim], ranges=tuple((z[0], x[0]) if is_left else (x[1], z[1]) for x, z in sides))
    return tuple(dims)


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        anchor: torch.Tensor | None,
        how: Overlap,
    ) -> torch.Tensor:
        pending = [slab.fetch.start(x) for slab in how.slabs]
        y = how.kernel(x, weight, bias)
        arrived = []
        for slab, moving in zip(how.slabs, pending, strict=True):
            halo = slab.fetch.finish(moving)
            if slab.arrives:
                arrived.append(slab.extended(halo))
                slab.reached(y).add_(slab.kernel(arrived[-1], slab.met(weight), None))
        ctx.how = how
        ctx.save_for_backward(x, weight, bias, *arrived)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, *arrived = ctx.saved_tensors
        how, (wants_x, wants_w, wants_b) = ctx.how, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _differentiable_backward(how, gradient, x, weight, bias)
        else:
            found = _backward(how, gradient, x, weight, bias, arrived, wants_w, wants_b)
        kept = (g if wanted else None for g, wanted in zip(found, (wants_x, wants_w, wants_b), strict=True))
        return (*kept, None, None)


def _backward(
    how: Overlap,
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arrived: Sequence[torch.Tensor],
    wants_w: bool,
    wants_b: bool,
) -> tuple[torch.Tensor | None, ...]:
    halos, parts, pending = iter(arrived), [], []
    for slab in how.slabs:
        halo = gradient.new_empty(0)
        if slab.arrives:
            here, met = slab.reached(gradient), slab.met(weight)
            halo, part, _ = slab.kernel.backward(here, next(halos), met, None, (how.graph, wants_w, False))
            parts.append((slab, part))
        if how.graph:
            pending.append(slab.fetch.adjoint.start(slab.cropped(halo) if slab.arrives else halo))
    gx = how.kernel.backward(gradient, x, weight, bias, (True, False, False))[0] if how.graph else None
    _, gw, gb = how.kernel.backward(gradient, x, weight, bias, (False, wants_w, wants_b))
    for slab, part in parts if wants_w else ():
        slab.met(gw).add_(part)
    for slab, moving in zip(how.slabs if how.graph else (), pending, strict=True):
        slab.fetch.adjoint.finish(moving, into=gx)
    return gx, gw, gb


def _differentiable_backward(
    how: Overlap, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """By the plain composition, for gradients of gradients; all ranks move the input's if any of them wants it."""
    x = x.detach().requires_grad_() if how.graph and not x.requires_grad else x
    given = [t if t is None else t.view_as(t) for t in (x, weight, bias)]
    y = how.compose(*given)  # type: ignore[arg-type]
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in given)
