"""Convolutions as one graph node, in which the halo of a large block travels while it computes.

The plain composition of a convolution has four nodes: the weight's and the bias's sum over their replicas, the movement of
the halo and the convolution. After a large convolution the caches are cold, and each costs 50 us; `Fused` is one.

A small block is copied with its halo. A large one is not: a convolution is linear, that of a block with its halo is that of
the block with zeros in the halo's place, which waits for nobody, plus those of the halo's slabs alone, each of which reaches
a few outputs at one edge. The backward mirrors it: the gradients of the slabs go out first, the block's own follow while
they travel, and what arrives is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.autograd import Node, check_unbatched, is_recording
from distdl_lite.layout import Dim, Layout
from distdl_lite.operator import Operator
from distdl_lite.plan import Pattern, plan
from distdl_lite.reducer import Reducer, Replicas, replicated

LEAST_BYTES = 1 << 20  # of the largest block; below, copying it takes less time than the calls for slabs

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

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
        function = _CONVOLUTIONS[len(self.size)]
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
        return torch.ops.aten.convolution_backward.default(
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


Between = Callable[[Layout, Layout], Any]  # makes the operator between two layouts


def slabs(
    X: Layout, Z: Layout, kernel: Kernel, cut: Sequence[int], rank: int, between: Between
) -> tuple[Slab, ...] | None:
    """The slabs around the blocks of `X` that make up the boxes of `Z`; None where their shapes do not allow to overlap.

    The blocks must be grown by the kernel's padding along the spatial dims `cut`, and be the same along all others. The
    answer is the same on all ranks.
    """
    for d, (have, want) in enumerate(zip(X.dims, Z.dims, strict=True)):
        grown = kernel.padding[d - 2] if d - 2 in cut else 0
        wide = tuple((a - grown, b + grown) for a, b in have.ranges)
        if wide != want.ranges or min(b - a for a, b in have.ranges) < 1:
            return None
    found: list[tuple[Layout, Any]] = []
    for number, d in enumerate(cut):
        width, reach = kernel.padding[d], kernel.dilation[d] * (kernel.size[d] - 1)
        shortest = min(b - a for a, b in X.dims[2 + d].ranges)
        if kernel.stride[d] != 1 or width > reach or shortest + 2 * width - reach < width:
            return None
        for is_left in (True, False) if width else ():
            S = replace(Z, dims=_slab_dims(X, Z, [2 + c for c in cut[:number]], 2 + d, is_left))
            built = plan(X, S, rank)
            if built.pattern is not Pattern.EXCHANGE:
                return None
            taps = math.ceil(width / kernel.dilation[d])
            size = tuple(taps if e == d else k for e, k in enumerate(kernel.size))
            padding = tuple(0 if e in cut[number:] else p for e, p in enumerate(kernel.padding))
            part = replace(kernel, size=size, padding=padding)
            arrives, room = any(leg.receives for leg in built.legs), (taps - 1) * kernel.dilation[d]
            found.append(
                (
                    S,
                    partial(
                        Slab,
                        arrives=arrives,
                        dim=2 + d,
                        width=width,
                        is_left=is_left,
                        taps=taps,
                        room=room,
                        kernel=part,
                    ),
                )
            )
    return tuple(slab(between(X, S)) for S, slab in found)


def _slab_dims(X: Layout, Z: Layout, done: Sequence[int], dim: int, is_left: bool) -> tuple[Dim, ...]:
    """A slab lies beside the block along its dim; the corners belong to the slabs of the dims that come first."""
    dims = list(Z.dims)
    for d in done:
        dims[d] = replace(Z.dims[d], ranges=X.dims[d].ranges)
    sides = zip(X.dims[dim].ranges, Z.dims[dim].ranges, strict=True)
    dims[dim] = replace(Z.dims[dim], ranges=tuple((z[0], x[0]) if is_left else (x[1], z[1]) for x, z in sides))
    return tuple(dims)


@dataclass(frozen=True)
class Fused:
    """A convolution as one graph node: the call for one structure.

    Attributes
    ----------
    kernel : Kernel
    fetch : Operator or None
        From the block to the block with its halo, of which the kernel is then computed.
    slabs : tuple of Slab
        Those that travel while the kernel is computed of the block, where nothing is fetched before.
    compose : callable
        The same of input, weight and bias by differentiable operations.
    graph : bool
        Whether any rank's input requires grad.
    replicas : (Replicas, Replicas or None)
        Of weight and bias.
    reducer : Reducer
    """

    kernel: Kernel
    fetch: Operator | None
    slabs: tuple[Slab, ...]
    compose: Convolve
    graph: bool
    replicas: tuple[Replicas, Replicas | None]
    reducer: Reducer

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return self.of(x, layer.held("weight"), layer.held("bias"))

    def of(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution of a block; of weight and bias as they are held, not through `replicated`."""
        if is_recording(weight, bias, self.reducer.token if self.graph else None):
            return _Fused.apply(x, weight, bias, self.reducer.token, self)
        return self.forward(x, weight, bias)[0]

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The output, and what backward needs beside the arguments: the block with its halo, or the slabs that arrived."""
        z = x if self.fetch is None else self.fetch.apply(x)
        with _finished_on_errors([(slab.fetch, slab.fetch.start(x)) for slab in self.slabs]) as pending:
            y = self.kernel(z, weight, bias)
        kept = [] if self.fetch is None else [z]
        for slab, (fetch, moving) in zip(self.slabs, pending, strict=True):
            if slab.arrives:
                kept.append(slab.extended(fetch.finish(moving)))
                slab.reached(y).add_(slab.kernel(kept[-1], slab.met(weight), None))
            else:
                fetch.finish(moving, into=x)  # adds nothing
        return y, kept

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kept: Sequence[torch.Tensor],
        wanted: Sequence[bool],
    ) -> Sequence[torch.Tensor | None]:
        """The wanted ones of the gradients of weight and bias, after that of the input."""
        if self.fetch is not None or self.slabs:
            check_unbatched(gradient)
        arrived, parts, moving = iter(kept), [], []
        z = x if self.fetch is None else next(arrived)
        for slab in self.slabs:
            halo = gradient.new_empty(0)
            if slab.arrives:
                here, met = slab.reached(gradient), slab.met(weight)
                halo, part, _ = slab.kernel.backward(here, next(arrived), met, None, (self.graph, wanted[0], False))
                parts.append((slab, part))
            if self.graph:
                adjoint = slab.fetch.adjoint
                moving.append((adjoint, adjoint.start(slab.cropped(halo) if slab.arrives else halo)))
        with _finished_on_errors(moving) as pending:
            gz, gw, gb = self.kernel.backward(gradient, z, weight, bias, (self.graph, *wanted))
        for slab, part in parts if wanted[0] else ():
            slab.met(gw).add_(part)
        for adjoint, movement in pending:
            adjoint.finish(movement, into=gz)
        return (self.fetch.adjoint.apply(gz) if self.graph and self.fetch is not None else gz), gw, gb


def fused(
    geometry: Any,
    whole: Sequence[bool],
    layouts: tuple[Layout, Layout, Layout],
    fetch: Operator | None,
    product: Kernel,
    dtype: torch.dtype,
    graph: bool,
    rank: int,
    between: Between,
    replicas: Any,
    reducer: Any,
    moves: bool | None = None,
) -> Fused | None:
    """A convolution as one graph node; None on all ranks where that does not pay.

    Parameters
    ----------
    geometry : ConvGeometry
    whole : sequence of bool
        Which spatial dims are left to the local convolution.
    layouts : (X, Z, Y)
        Of the input, of what the ranks' outputs read, and of these.
    fetch : Operator or None
        From X to Z, None if they are equal; or if `moves` says so, for a program that is not run.
    product : Kernel
        The local convolution of the blocks of Z.
    """
    X, Z, Y = layouts
    moves = fetch is not None if moves is None else moves
    has_empty = any(a == b for dim in (*Z.dims, *Y.dims) for a, b in dim.ranges)
    if has_empty or geometry.mode not in ("zeros", "circular") or not dtype.is_floating_point:
        return None
    kernel, around, copied = product, (), fetch
    widest = math.prod(max(b - a for a, b in dim.ranges) for dim in X.dims) * dtype.itemsize
    if moves and widest >= LEAST_BYTES:
        kernel, copied = replace(kernel, padding=tuple(left for left, _ in geometry.pads)), None
        cut = [d for d in range(geometry.dims) if not whole[d]]
        exact = dtype in (torch.float32, torch.float64)  # half sums of slabs would round twice
        around = slabs(X, Z, kernel, cut, rank, between) if exact else None
        if around is None:  # a node of its own for the halo keeps no second copy of a large block
            return None

    def compose(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x if fetch is None else fetch(x), weight, bias)

    return Fused(kernel, copied, around, compose, graph, replicas, reducer)


@contextmanager
def _finished_on_errors(pending: list[tuple[Operator, Any]]) -> Iterator[list[tuple[Operator, Any]]]:
    """Movements under way; after an error, such as of memory, they are finished, so that their operators stay usable."""
    try:
        yield pending
    except BaseException:
        for operator, movement in pending:
            operator.finish(movement)
        raise


class _Fused(Node):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, how: Fused
    ) -> torch.Tensor:
        y, kept = how.forward(x, weight, bias)
        ctx.how, ctx.parameters = how, (weight, bias)
        ctx.save_for_backward(x, weight, bias, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, *kept = ctx.saved_tensors
        how, (wants_x, *wanted) = ctx.how, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # Not of the weight that a checkpoint has unpacked: sums go into the .grad of the parameter itself.
            gx, *learned = _differentiable_backward(how, gradient, x, *ctx.parameters)
        else:
            gx, *learned = how.backward(gradient, x, weight, bias, kept, wanted)
        found = zip(ctx.parameters, learned, wanted, how.replicas, strict=True)
        sums = (how.reducer.reduce(p, g, replicas) if wants else None for p, g, wants, replicas in found)
        return (gx if wants_x else None, *sums, None, None)


def _differentiable_backward(
    how: Fused, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """By the plain composition, for gradients of gradients; all ranks move the input's if any of them wants it."""
    x = x.detach().requires_grad_() if how.graph and not x.requires_grad else x.view_as(x)
    learned = zip((weight, bias), how.replicas, strict=True)
    given = [x, *(t if t is None else replicated(t, r).view_as(t) for t, r in learned)]
    y = how.compose(*given)
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in given)
