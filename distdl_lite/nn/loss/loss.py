"""Losses: one global number.

Each rank adds up the terms of its block; the sums, the global weight they are divided by and whether any rank failed travel
in one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.agreement import raise_together
from distdl_lite.autograd import reduce_from_team
from distdl_lite.factors import Dims, all_axes, shape_of_dims, uncut
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import anchored, connected_zeros, wide
from distdl_lite.nn.broadcasting import common_dims, fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import booleans, numbers
from distdl_lite.nn.rule_layer import dims_of
from distdl_lite.nn.value import Value, rule
from distdl_lite.partition import Partition

Function = Callable[..., torch.Tensor]
REDUCTIONS = ("none", "mean", "sum")  # by torch's numbers


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss",
      "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss")  # fmt: skip
def loss(c: Compiler, op: Any, *args: Any, **options: Any) -> Value:
    names = [argument.name for argument in op.function._schema.arguments]
    options |= dict(zip(names, args, strict=False))
    reduction = REDUCTIONS[options.pop("reduction", 1)]

    def function(*tensors: Any, reduction: str) -> torch.Tensor:
        given = dict(zip(options, tensors, strict=True))
        return op.function(**given, reduction=REDUCTIONS.index(reduction))

    return pointwise_loss(c, function, list(options.values()), reduction, op.dtype)


def pointwise_loss(
    c: Compiler, function: Function, args: Sequence[Any], reduction: str, dtype: torch.dtype, is_shown: bool = False
) -> Value:
    """A loss of tensors that torch's function broadcasts."""
    values = [v for v in args if isinstance(v, Value)]
    dims = common_dims(c, values, tuple(torch.broadcast_shapes(*(v.shape for v in values))))
    args = [fit(c, v, dims) if isinstance(v, Value) else v for v in args]
    return reduced_loss(c, function, args, dims, reduction, dtype, is_shown=is_shown)


def counted(terms: torch.Tensor, *tensors: Any) -> torch.Tensor:
    """The number of terms, which a mean is divided by."""
    return torch.tensor(float(terms.numel()), dtype=torch.float64, device=terms.device)


def reduced_loss(
    c: Compiler,
    function: Function,
    args: Sequence[Any],
    dims: Dims,
    reduction: str,
    dtype: torch.dtype,
    terms: Function | None = None,
    weigh: Function = counted,
    mean: Function = torch.div,
    over: Sequence[int] = (),
    is_shown: bool = False,
) -> Value:
    """A loss of torch's, whose terms lie as `dims` say.

    Along the axes `over` ranks have parts of the same `terms`, which they find from their blocks; `mean` divides their sum by
    that of what they `weigh`. If `is_shown` each rank will have the whole gradient, and backward does not communicate.
    """
    axes = all_axes(dims).union(over)
    if not axes:
        return c.call(function, *args, reduction=reduction, dims=dims if reduction == "none" else (), dtype=dtype)
    terms = terms or partial(function, reduction="none")
    if reduction == "none":
        find = _added_up(c, terms, c.local(dims), wide(dtype), over, True) if over and is_shown else terms
        y = c.call(lambda *tensors: find(*tensors).to(dtype), *args, dims=dims, dtype=dtype)
        return c.sum_over(y, () if is_shown else over)

    def sums(*tensors: Any) -> torch.Tensor:
        found = terms(*tensors)
        return torch.stack([found.sum(dtype=wide(found.dtype)).double(), weigh(found, *tensors)])

    find = _added_up(c, sums, (2,), torch.float64, axes, is_shown)
    batch = shape_of_dims(dims)[0] if reduction == "batchmean" else 1

    def value(*tensors: Any) -> torch.Tensor:
        total, weight = find(*tensors)
        return (mean(total, weight.detach()) if reduction == "mean" else total / batch).to(dtype)

    return c.call(value, *args, dims=(), dtype=dtype)


def _added_up(
    c: Compiler, parts: Function, shape: Shape, dtype: torch.dtype, axes: Iterable[int], is_shown: bool
) -> Function:
    """The sum over axes of what the ranks find; it travels with whether any of them failed, and then all of them raise."""
    team, label = c.team(axes), c.label
    add: Function = partial(reduce_from_team, team=team)
    if not is_shown:
        R = Layout(c.grid, (uncut(math.prod(shape) + 1),), c.free_axes(axes))
        add = c.names[c.operator(R, R, c.new((R.dims,), dtype, True), "all_reduce")]

    def find(*tensors: Any) -> torch.Tensor:
        error = None
        try:
            mine = parts(*tensors).to(dtype)
        except Exception as raised:
            error, mine = raised, torch.zeros(shape, dtype=dtype, device=c.device)
        sums = add(torch.cat([mine.reshape(-1), mine.new_full((1,), error is not None)]))
        if sums[-1].item():
            raise_together(team, error, label)
        return sums[:-1].view(shape)

    return find


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
        inputs, targets = agreed_inputs(self, self.P_x), agreed_inputs(self, self.P_x, position=1)
        shape, target = inputs.shapes[rank], targets.shapes[rank]
        wanted = self._target_dims(shape, target, targets.dtype)
        if target != tuple(shape[d] for d in wanted):
            raise self._refuse(
                f"rank {rank} passed a target of shape {tuple(target)}, with its input of shape {tuple(shape)} it must "
                f"be {tuple(shape[d] for d in wanted)}"
            )
        X = lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes))
        options = {name: getattr(self, name) for name in self._options}
        weights = {name: option for name, option in options.items() if isinstance(option, torch.Tensor)}
        for name, weight in weights.items():
            self._check_weight(name, weight, lay.global_shape_of(X))
        c = Compiler(grid, rank, self._distdl_transport, self._distdl_label, inputs.device)
        dims, graph = dims_of(X), inputs.requires_grad or targets.requires_grad
        x, t = c.new(dims, inputs.dtype, graph, "x"), c.new(tuple(dims[d] for d in wanted), targets.dtype, graph, "t")
        held = {name: c.new(tuple((uncut(n),) for n in w.shape), w.dtype, False, name) for name, w in weights.items()}
        y = self._rule(c, x, t, {**options, **held}, self._dtype(input, weights))
        run = c.compiled([x, t, *held.values()], [y])

        def call(layer: _DistributedLoss, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return run(anchored(x, graph), t, *(getattr(layer, name) for name in held))[0]

        return call

    def _dtype(self, input: tuple[torch.Tensor, ...], weights: Mapping[str, torch.Tensor]) -> torch.dtype:
        """That of torch's loss."""
        one = {name: weight.new_ones(1) for name, weight in weights.items()}
        x, t = (tensor.new_zeros((1,) * tensor.dim()) for tensor in input)
        return type(self).function(x, t, reduction="none", **one).dtype

    def _rule(self, c: Compiler, x: Value, t: Value, options: Mapping[str, Any], dtype: torch.dtype) -> Value:
        def function(x: torch.Tensor, t: torch.Tensor, *given: Any, reduction: str) -> torch.Tensor:
            return type(self).function(x, t, reduction=reduction, **dict(zip(options, given, strict=True)))

        return pointwise_loss(c, function, [x, t, *options.values()], self.reduction, dtype, is_shown=True)

    def _target_dims(self, input: Shape, target: Shape, dtype: torch.dtype) -> Sequence[int]:
        """The dims of the input that a target block of this shape and dtype must have."""
        return range(len(input))

    def _check_weight(self, name: str, weight: torch.Tensor, shape: Shape) -> None:
        """Raise ValueError unless a weight broadcasts to an input of this global shape."""
        pairs = zip(reversed(weight.shape), reversed(shape), strict=False)
        if weight.dim() > len(shape) or any(n not in (1, m) for n, m in pairs):
            raise self._refuse(f"{name} of shape {tuple(weight.shape)} does not broadcast to an input of shape {shape}")

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of the input's blocks, given the target's."""
        return self._distdl_run(input, target)

    def _distdl_outside(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return input
        zero = connected_zeros((), input, linear=True)
        return zero if zero.requires_grad else zero.requires_grad_(torch.is_grad_enabled())

    def extra_repr(self) -> str:
        options = [f"{name}={getattr(self, name)}" for name in self._options if name not in self._buffers]
        return ", ".join([f"P_x={self.P_x.shape}", f"reduction={self.reduction!r}", *options])


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
