"""Softmax and log-softmax, also along a cut dim: its ranks share maxima and sums of exponentials, no values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.nn.blocks import check_floating, wide
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import integers
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.transport import Team


@dataclass(frozen=True)
class CutDim:
    """A cut dim, and the ranks that hold the parts of the same points along it."""

    dim: int
    team: Team
    add_up: Operator

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        """`x` less its global maximum along the dim, which is a constant to autograd: what follows does not depend on it."""
        shape = [1 if d == self.dim else n for d, n in enumerate(x.shape)]
        top = x.detach().amax(self.dim, keepdim=True) if x.shape[self.dim] else x.new_full(shape, -torch.inf)
        return x - self.add_up.transport.all_reduce(self.team, top.contiguous(), "max")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The global sum along the dim, on all of the team; its adjoint sums too."""
        return self.add_up(x.sum(self.dim, keepdim=True))


def cut_dim(layer: Module, X: lay.Layout, dim: int, graph: bool) -> CutDim | None:
    """A dim of the blocks of `X`; None where it is whole."""
    grid, transport = X.grid, layer._distdl_transport
    if grid.shape[dim] == 1:
        return None
    points = [lay.Dim(((0, 1),)) if d == dim else blocks for d, blocks in enumerate(X.dims)]
    S = lay.Layout(grid, tuple(points), tuple(d for d in range(grid.dim) if d != dim))
    add_up = Operator(plan(S, S, transport.rank), transport, type(layer).__name__, graph)
    return CutDim(dim, transport.team(S.replicas(transport.rank)), add_up)


def softmax(x: torch.Tensor, cut: CutDim) -> torch.Tensor:
    """Softmax along a cut dim; differentiable to any order."""
    e = cut.shifted(x).exp()
    return e / cut.sum(e)


def log_softmax(x: torch.Tensor, cut: CutDim) -> torch.Tensor:
    """Log-softmax along a cut dim; differentiable to any order."""
    z = cut.shifted(x)
    return z - cut.sum(z.exp()).log()


class DistributedSoftmax(Module):
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
        In the constructor if `P_x` has no such axis; at build if the blocks form no tensor product. On all ranks alike.
    TypeError
        At build if the dtype is not a floating one.

    Notes
    -----
    Where the dim is cut, forward is one all-reduce of the maxima and one of the sums of exponentials about them, and
    backward one of a sum, each of a number per point and among the ranks of a line along the dim. Where it is whole nothing
    is communicated.
    """

    _whole: Callable[..., torch.Tensor] = staticmethod(torch.softmax)
    _cut: Callable[..., torch.Tensor] = staticmethod(softmax)

    def __init__(self, P_x: Partition, dim: int) -> None:
        super().__init__(P_x)
        integers(self, dim=dim)
        if not -P_x.dim <= dim < P_x.dim:
            raise self._refuse(f"dim={dim} is no axis of P_x of shape {P_x.shape}")
        self.P_x, self.dim = P_x, dim

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        check_floating(self, inputs)
        X = lay.blocks(self.P_x.grid_of_ranks, lay.cuts_from_shapes(self.P_x.grid_of_ranks, inputs.shapes))
        cut = cut_dim(self, X, self.dim % self.P_x.dim, inputs.requires_grad)
        if cut is None:
            return lambda layer, x: layer._whole(x, layer.dim)

        def run(layer: DistributedSoftmax, x: torch.Tensor) -> torch.Tensor:
            dtype = layer._whole(x.new_empty(0), 0).dtype  # autocast decides it
            return layer._cut(x.to(wide(x.dtype)), cut).to(dtype)

        return run

    def extra_repr(self) -> str:
        return f"dim={self.dim}, P_x={self.P_x.shape}"


class DistributedLogSoftmax(DistributedSoftmax):
    _whole = staticmethod(torch.log_softmax)
    _cut = staticmethod(log_softmax)
