"""Losses: one global number, shown on every rank.

Each rank adds up the terms of its block; the sums, the global weight they are divided by and whether any rank failed travel
in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.agreement import raise_together
from distdl_lite.autograd import reduce_from_team
from distdl_lite.layout import Box, Layout, Shape
from distdl_lite.nn.blocks import anchored, connected_zeros, own_box, wide
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import booleans, numbers
from distdl_lite.partition import Partition
from distdl_lite.transport import Team


@dataclass(frozen=True)
class Block:
    """The block of the input that a rank has the terms of."""

    box: Box
    global_shape: Shape
    graph: bool  # whether any rank's input or target requires grad


class _DistributedLoss(Module):
    """A loss over the tensors that the blocks over `P_x` form, equal to torch's for every option.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input, which is cut in blocks of any sizes; the target in the same blocks.
    reduction : {"mean", "sum", "none"}
        Means divide by global counts. "none" returns the block of terms and communicates nothing.
    **options
        torch's of the same name. Those that are tensors are whole and the same on all ranks.

    Returns
    -------
    torch.Tensor
        The global value, the same on every rank of `P_x`; a 0-dim zero with a graph node outside. Its gradient is the
        serial one, since the value is one number shown on many ranks.

    Raises
    ------
    ValueError
        In the constructor for an option torch refuses; at build if the blocks of input and target do not match. On all
        ranks alike, as is what torch raises for the values of a block, except with reduction "none".
    """

    _distdl_free = frozenset(
        {"reduction", "ignore_index", "label_smoothing", "beta", "delta", "log_target", "log_input", "full", "eps"}
    )
    function: Callable[..., torch.Tensor]
    reductions: tuple[str, ...] = ("mean", "sum", "none")

    def __init__(self, P_x: Partition, reduction: str, **options: Any) -> None:
        super().__init__(P_x)
        self.P_x, self.reduction = P_x, reduction
        self._check_reduction()
        self._options = tuple(options)
        for name, value in options.items():
            if isinstance(value, torch.Tensor) or name in ("weight", "pos_weight"):
                if not isinstance(value, torch.Tensor | None):
                    raise self._refuse(f"{name}={value!r} is not a tensor", TypeError)
                if value is not None and value.requires_grad:
                    raise self._refuse(f"{name} must not require grad")
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def _check_reduction(self) -> None:
        if self.reduction not in self.reductions:
            raise self._refuse(f"reduction {self.reduction!r} is none of {', '.join(self.reductions)}")

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        self._check_reduction()  # which may have changed
        grid, rank = self.P_x.grid_of_ranks, self._distdl_transport.rank
        inputs = agreed_inputs(self, self.P_x)
        targets = agreed_inputs(self, self.P_x, position=1)
        X = lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes))
        shape, target = inputs.shapes[rank], targets.shapes[rank]
        wanted = self._target_shape(shape, target, targets.dtype)
        if target != wanted:
            raise self._refuse(
                f"rank {rank} passed a target of shape {tuple(target)}, with its input of shape {tuple(shape)} it must "
                f"be {tuple(wanted)}"
            )
        for option in self._options:
            if isinstance(weight := getattr(self, option), torch.Tensor):
                self._check_weight(option, weight, lay.global_shape_of(X))
        if self._distdl_team.size == 1:
            return type(self)._alone
        block = self._block(X, inputs.requires_grad or targets.requires_grad)
        return lambda layer, input, target: layer._reduced(input, target, block)

    def _block(self, X: Layout, graph: bool) -> Block:
        return Block(own_box(self, X), lay.global_shape_of(X), graph)

    def _target_shape(self, input: Shape, target: Shape, dtype: torch.dtype) -> Shape:
        """The shape a target block of this shape and dtype must have."""
        return input

    def _check_weight(self, name: str, weight: torch.Tensor, shape: Shape) -> None:
        """Raise ValueError unless a weight broadcasts to an input of this global shape."""
        pairs = zip(reversed(weight.shape), reversed(shape), strict=False)
        if weight.dim() > len(shape) or any(n not in (1, m) for n, m in pairs):
            raise self._refuse(f"{name} of shape {tuple(weight.shape)} does not broadcast to an input of shape {shape}")

    def _local_options(self, box: Box) -> dict[str, Any]:
        """The options for a block: of a tensor that torch would broadcast to the whole input, the part that meets it."""
        return {name: _part(getattr(self, name), box) for name in self._options}

    def _alone(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        options = {name: getattr(self, name) for name in self._options}
        return type(self).function(input, target, reduction=self.reduction, **options)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of the input's blocks, given the target's."""
        return self._distdl_run(input, target)

    def _distdl_outside(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return input
        zero = connected_zeros((), input, linear=True)
        return zero if zero.requires_grad else zero.requires_grad_(torch.is_grad_enabled())

    def _reduced(self, input: torch.Tensor, target: torch.Tensor, block: Block) -> torch.Tensor:
        input = anchored(input, block.graph)
        if self.reduction == "none":
            return self._terms(input, target, block)
        dtype = input.dtype

        def sums() -> torch.Tensor:
            nonlocal dtype
            terms = self._terms(input, target, block)
            dtype = terms.dtype
            return torch.stack([terms.sum(dtype=wide(dtype)).double(), self._weight(terms, target, block)])

        nothing = torch.zeros(2, dtype=torch.float64, device=input.device)
        value, weight = self._added_up(sums, nothing, self._distdl_team)
        if self.reduction == "mean":
            value = self._mean(value, weight.detach())
        elif self.reduction == "batchmean":
            value = value / block.global_shape[0]
        return value.to(dtype)

    def _added_up(self, parts: Callable[[], torch.Tensor], nothing: torch.Tensor, team: Team) -> torch.Tensor:
        """Sums over a team, which travel with whether any rank failed to find its parts: then all of them raise."""
        error = None
        try:
            mine = parts()
        except Exception as raised:
            error, mine = raised, nothing
        failed = mine.new_full((1,), error is not None)
        sums = reduce_from_team(torch.cat([mine.reshape(-1), failed]), team)
        if sums[-1].item():
            raise_together(team, error, self._distdl_label)
        return sums[:-1].view(mine.shape)

    def _terms(self, input: torch.Tensor, target: torch.Tensor, block: Block) -> torch.Tensor:
        """This rank's terms of the sum."""
        return type(self).function(input, target, reduction="none", **self._local_options(block.box))

    def _weight(self, terms: torch.Tensor, target: torch.Tensor, block: Block) -> torch.Tensor:
        """This rank's share of what a mean is divided by."""
        return torch.tensor(float(terms.numel()), dtype=torch.float64, device=terms.device)

    def _mean(self, total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The mean from the global sums of terms and of weights."""
        return total / weight

    def extra_repr(self) -> str:
        options = [f"{name}={getattr(self, name)}" for name in self._options if name not in self._buffers]
        return ", ".join([f"P_x={self.P_x.shape}", f"reduction={self.reduction!r}", *options])


def _part(value: Any, box: Box) -> Any:
    """The part of a tensor that broadcasting would put over the box; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    ranges = box[len(box) - value.dim() :]
    return value[tuple(slice(None) if n == 1 else slice(*r) for n, r in zip(value.shape, ranges, strict=True))]


class DistributedMSELoss(_DistributedLoss):
    function = F.mse_loss

    def __init__(self, P_x: Partition, *, reduction: str = "mean") -> None:
        super().__init__(P_x, reduction)


class DistributedL1Loss(_DistributedLoss):
    function = F.l1_loss

    def __init__(self, P_x: Partition, *, reduction: str = "mean") -> None:
        super().__init__(P_x, reduction)


class DistributedSmoothL1Loss(_DistributedLoss):
    function = F.smooth_l1_loss

    def __init__(self, P_x: Partition, *, reduction: str = "mean", beta: float = 1.0) -> None:
        numbers(self, beta=beta)
        if not beta >= 0:
            raise self._refuse(f"beta={beta} must not be negative")
        super().__init__(P_x, reduction, beta=beta)


class DistributedHuberLoss(_DistributedLoss):
    function = F.huber_loss

    def __init__(self, P_x: Partition, *, reduction: str = "mean", delta: float = 1.0) -> None:
        numbers(self, delta=delta)
        if not delta > 0:
            raise self._refuse(f"delta={delta} must be positive")
        super().__init__(P_x, reduction, delta=delta)


class DistributedBCELoss(_DistributedLoss):
    function = F.binary_cross_entropy

    def __init__(self, P_x: Partition, *, weight: torch.Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__(P_x, reduction, weight=weight)


class DistributedBCEWithLogitsLoss(_DistributedLoss):
    function = F.binary_cross_entropy_with_logits

    def __init__(
        self,
        P_x: Partition,
        *,
        weight: torch.Tensor | None = None,
        reduction: str = "mean",
        pos_weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__(P_x, reduction, weight=weight, pos_weight=pos_weight)


class DistributedKLDivLoss(_DistributedLoss):
    function = F.kl_div
    reductions = ("mean", "batchmean", "sum", "none")

    def __init__(self, P_x: Partition, *, reduction: str = "mean", log_target: bool = False) -> None:
        booleans(self, log_target=log_target)
        super().__init__(P_x, reduction, log_target=log_target)


class DistributedPoissonNLLLoss(_DistributedLoss):
    function = F.poisson_nll_loss

    def __init__(
        self,
        P_x: Partition,
        *,
        log_input: bool = True,
        full: bool = False,
        eps: float = 1e-8,
        reduction: str = "mean",
    ) -> None:
        booleans(self, log_input=log_input, full=full)
        numbers(self, eps=eps)
        super().__init__(P_x, reduction, log_input=log_input, full=full, eps=eps)
