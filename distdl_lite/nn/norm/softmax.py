"""Softmax and log-softmax, also along cut dims: their ranks share maxima and sums of exponentials, no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.factors import Dims, uncut
from distdl_lite.layout import Layout
from distdl_lite.nn.blocks import wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.options import listed
from distdl_lite.nn.value import Movement, NoRule, Value, rule
from distdl_lite.operator import Operator
from distdl_lite.transport import Team

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class CutDim:
    """A cut dim, or several, and the ranks that hold the parts of the same points along them."""

    dims: tuple[int, ...]
    team: Team
    add_up: Operator

    def top(self, x: torch.Tensor) -> torch.Tensor:
        """The global maximum along the dims, a constant to autograd: no result here depends on it."""
        shape = [1 if d in self.dims else n for d, n in enumerate(x.shape)]
        is_empty = any(x.shape[d] == 0 for d in self.dims)
        top = x.new_full(shape, -torch.inf) if is_empty else x.detach().amax(self.dims, keepdim=True)
        return self.add_up.transport.all_reduce(self.team, top.contiguous(), "max")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The global sum along the dims, on all of the team; its adjoint sums too."""
        y = x.sum(self.dims, keepdim=True)
        return self.add_up(y.reshape(self.add_up.plan.returned_shape)).view(y.shape)


def softmax(x: torch.Tensor, cut: CutDim) -> torch.Tensor:
    """Softmax along cut dims; differentiable to any order."""
    e = (x - cut.top(x)).exp()
    return e / cut.sum(e)


def log_softmax(x: torch.Tensor, cut: CutDim) -> torch.Tensor:
    """Log-softmax along cut dims; differentiable to any order."""
    z = x - cut.top(x)
    return z - cut.sum(z.exp()).log()


def log_sum_exp(x: torch.Tensor, cut: CutDim) -> torch.Tensor:
    """The logarithm of the sum of exponentials along cut dims, whose length becomes one; differentiable to any order."""
    top = cut.top(x)
    top = torch.where(top.isinf(), 0, top)
    return cut.sum((x - top).exp()).log() + top


def _cut_dim(c: Compiler, x: Value, dims: Sequence[int]) -> CutDim | None:
    axes = [a for a in x.axes(*dims) if c.grid.shape[a] > 1]
    if not axes:
        return None
    points = x.with_dims(dict.fromkeys(dims, uncut(1)))
    S = Layout(c.grid, tuple(f for factors in points for f in factors), c.free_axes(axes))
    c.movements.append(Movement(c.path, "maximum", S, S, x.dtype, False))
    # None in a program that is only looked at.
    return CutDim(tuple(dims), c.team(axes), c.between(S, S, x, "all_reduce"))  # type: ignore[arg-type]


def along(c: Compiler, whole: Function, cut: Function, x: Value, dim: Any, points: Dims) -> Value:
    """What torch's function of `whole` dims makes of cut ones, too."""
    over = _cut_dim(c, x, [d % x.ndim for d in listed(dim)])
    if over is None:
        return c.call(whole, x, dim, dims=points, dtype=x.dtype)
    return c.call(_of_parts, x, over, cut, whole, dims=points, dtype=x.dtype)


def _of_parts(x: torch.Tensor, over: CutDim, cut: Function, whole: Function) -> torch.Tensor:
    dtype = whole(x.new_empty(0), 0).dtype  # autocast decides it
    return cut(x.to(wide(x.dtype)), over).to(dtype)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax_of(c: Compiler, op: Any, x: Value, dim: int, *_: Any, **options: Any) -> Value:
    whole, cut = (torch.log_softmax, log_softmax) if "log" in op.name else (torch.softmax, softmax)
    return along(c, whole, cut, c.cast(x, op.dtype), dim, x.dims)


@rule("logsumexp")
def logsumexp(c: Compiler, op: Any, x: Value, dim: Sequence[int], keepdim: bool = False) -> Value:
    dims = tuple(d % x.ndim for d in dim) or tuple(range(x.ndim))
    if x.dtype.is_complex and x.axes(*dims):  # which have no maximum
        raise NoRule
    kept = x.with_dims(dict.fromkeys(dims, uncut(1)))
    y = along(c, _log_sum_exp, log_sum_exp, c.cast(x, op.dtype), dims, kept)
    left = tuple(factors for d, factors in enumerate(kept) if d not in dims)
    return y if keepdim else c.call(torch.squeeze, y, dims, dims=left, dtype=y.dtype)


def _log_sum_exp(x: torch.Tensor, dims: Any) -> torch.Tensor:
    return torch.logsumexp(x, dims, keepdim=True)


class DistributedSoftmax(Face, serial=torch.nn.Softmax):
    """torch's softmax and log-softmax over the tensor that the blocks over `P_x` form.

    Input of any floating dtype in blocks of any sizes; the output has the same blocks. Ranks outside `P_x` pass and get
    zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input.
    dim : int
        The dim along which the values add up to one, counted from the end if negative.

    Raises
    ------
    ValueError
        In the constructor without `dim`; at build if there is no such dim, or the blocks form no tensor product. On all
        ranks alike.
    TypeError
        At build if the dtype is not a floating one.

    Notes
    -----
    Where the dim is cut, forward is one all-reduce of the maxima and one of the sums of exponentials about them, and
    backward one of a sum, each of a number per point and among the ranks of a line along the dim. Where it is whole nothing
    is communicated.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     return dl.nn.DistributedSoftmax(P, dim=1)(P.cut(torch.zeros(1, 4))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[0.25, 0.25]], [[0.25, 0.25]]]
    """

    keeps_blocks = needs_floating = True
    operation = "softmax"
    options = ("dim",)

    def _take(self, serial: torch.nn.Module, options: Mapping[str, Any]) -> None:
        super()._take(serial, options)
        if self.dim is None:
            raise self._refuse("dim=None: torch's choice of a dim is not offered")


class DistributedLogSoftmax(DistributedSoftmax, serial=torch.nn.LogSoftmax):
    operation = "log_softmax"
