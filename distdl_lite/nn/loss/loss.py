"""Losses: one global number.

Each rank adds up the terms of its block; the sums, the global weight they are divided by and whether any rank failed travel
in one all-reduce.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from distdl_lite.agreement import raise_together
from distdl_lite.autograd import reduce_from_team
from distdl_lite.factors import Dims, all_axes, uncut
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import connected_zeros, wide
from distdl_lite.nn.broadcasting import common_dims, fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.inputs import Inputs, agreed_inputs
from distdl_lite.nn.value import RULES, Operation, Value, rule

Function = Callable[..., torch.Tensor]
NONE, MEAN, SUM = range(3)  # torch's numbers of reductions


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss",
      "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss")  # fmt: skip
def loss(c: Compiler, op: Any, *args: Any, is_shown: bool = False, **options: Any) -> Value:
    """A loss of tensors that torch's function broadcasts."""
    options |= dict(zip([a.name for a in op.function._schema.arguments], args, strict=False))
    reduction = options.pop("reduction", MEAN)
    values = [v for v in options.values() if isinstance(v, Value)]
    dims = common_dims(c, values, tuple(torch.broadcast_shapes(*(v.shape for v in values))))
    fitted = [fit(c, v, dims) if isinstance(v, Value) else v for v in options.values()]

    def function(*given: Any, reduction: int) -> torch.Tensor:
        return op.function(**dict(zip(options, given, strict=True)), reduction=reduction)  # type: ignore[no-any-return]

    return reduced_loss(c, function, fitted, dims, reduction, op.dtype, is_shown=is_shown)


def counted(terms: torch.Tensor, *tensors: Any) -> torch.Tensor:
    """The number of terms, which a mean is divided by."""
    return torch.tensor(float(terms.numel()), dtype=torch.float64, device=terms.device)


def reduced_loss(
    c: Compiler,
    function: Function,
    args: Sequence[Any],
    dims: Dims,
    reduction: int,
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
        return c.call(function, *args, reduction=reduction, dims=dims if reduction == NONE else (), dtype=dtype)
    terms = terms or partial(function, reduction=NONE)
    if reduction == NONE:
        find = _added_up(c, terms, c.local(dims), wide(dtype), over, True) if over and is_shown else terms
        y = c.call(lambda *tensors: find(*tensors).to(dtype), *args, dims=dims, dtype=dtype)
        return c.sum_over(y, () if is_shown else over)

    def sums(*tensors: Any) -> torch.Tensor:
        found = terms(*tensors)
        return torch.stack([found.sum(dtype=wide(found.dtype)).to(widest), weigh(found, *tensors).to(widest)])

    widest = torch.complex128 if dtype.is_complex else torch.float64
    find = _added_up(c, sums, (2,), widest, axes, is_shown)

    def value(*tensors: Any) -> torch.Tensor:
        total, weight = find(*tensors)
        return (mean(total, weight.detach()) if reduction == MEAN else total).to(dtype)

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
        is_dry = hasattr(sums, "fake_mode")  # a tensor without numbers, of a run that only counts
        if not is_dry and sums[-1].item():
            raise_together(team, error, label)
        return sums[:-1].view(shape)

    return find


class _DistributedLoss(Face):
    """A loss over the tensors that the blocks over `P_x` form, equal to torch's for every option.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input, which is cut in blocks of any sizes; the target in the same blocks.
    reduction, **options
        As in torch's loss, by name. Means divide by global counts; "none" returns the block of terms and communicates nothing.
        Options that are tensors are whole and the same on all ranks.

    Returns
    -------
    torch.Tensor
        The global value, the same on every rank of `P_x`; a 0-dim zero with a graph node outside. Its gradient is the
        serial one, since the value is one number shown on many ranks.

    Raises
    ------
    ValueError
        At build if torch refuses the options, with its words, or the blocks of input and target do not match. On all ranks
        alike, as is what torch raises for the values of a block, except with reduction "none".

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     x, target = P.cut(torch.tensor([[1.0, 2.0, 3.0]])), P.cut(torch.zeros(1, 3))
    ...     return round(dl.nn.DistributedMSELoss(P)(x, target).item(), 4)
    >>> dl.testing.spmd(2, body)
    [4.6667, 4.6667]
    """

    _distdl_free = frozenset(
        {"reduction", "ignore_index", "label_smoothing", "beta", "delta", "log_target", "log_input", "full", "eps"}
    )
    keeps_blocks = True

    @classmethod
    def _arguments(cls) -> list[inspect.Parameter]:
        given = [p for p in super()._arguments() if p.name not in ("size_average", "reduce")]
        return [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in given]

    def _take(self, serial: torch.nn.Module, options: Mapping[str, Any]) -> None:
        super()._take(serial, options)
        for name, weight in serial.named_buffers():
            if weight.requires_grad:
                raise self._refuse(f"{name} must not require grad")
        for name, buffer in serial._buffers.items():
            self.register_buffer(name, buffer)

    def result_dtype(self, inputs: Inputs, shape: Shape) -> torch.dtype:
        return inputs.dtype

    def _held(self, device: str) -> dict[str, Any]:
        # torch's takes for a mean what it takes for a sum, but that of a divergence warns.
        return {**super()._held(device), "reduction": "sum" if self.reduction == "mean" else self.reduction}

    def others(self, c: Compiler, x: Value) -> list[Value]:
        inputs, targets = (agreed_inputs(self, self.P_x, position) for position in (0, 1))
        shape, target = inputs.shapes[c.rank], targets.shapes[c.rank]
        dims = self._target_dims(shape, target, targets.dtype)
        wanted = tuple(shape[d] for d in dims)
        if target != wanted:
            raise self._refuse(
                f"rank {c.rank} passed a target of shape {tuple(target)}, with its input of shape {tuple(shape)} it must "
                f"be {wanted}"
            )
        return [c.new(tuple(x.dims[d] for d in dims), targets.dtype, x.grad, "t")]

    def tensors(self, c: Compiler) -> dict[str, Value]:
        held = {name: weight for name, weight in self._buffers.items() if weight is not None}
        return {n: c.new(tuple((uncut(k),) for k in w.shape), w.dtype, False, n) for n, w in held.items()}

    def rule(self, c: Compiler, x: Value, t: Value, **held: Value) -> Value:  # type: ignore[override]
        self.judged((x.shape, x.dtype), (t.shape, t.dtype))
        points = [torch.zeros((1,) * v.ndim, dtype=v.dtype, device=c.device) for v in (x, t)]
        ones = {name: torch.ones(1, dtype=v.dtype, device=c.device) for name, v in held.items()}
        serial = self.as_serial(reduction="none", _buffers={**self._buffers, **ones})
        made = serial.forward(*points)  # in a dtype that autocast may choose
        op = Operation.of(self.operation, getattr(torch.ops.aten, self.operation).default, made)
        options = {a.name: getattr(self, a.name) for a in op.function._schema.arguments[2:]} | held
        options["reduction"] = {"none": NONE, "mean": MEAN}.get(self.reduction, SUM)
        y: Value = RULES[self.operation](c, op, x, t, is_shown=True, **options)
        return c.call(torch.div, y, x.shape[0], dims=(), dtype=y.dtype) if self.reduction == "batchmean" else y

    def _target_dims(self, input: Shape, target: Shape, dtype: torch.dtype) -> Sequence[int]:
        """The dims of the input that a target block of this shape and dtype must have."""
        return range(len(input))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of the input's blocks, given the target's."""
        return self._distdl_run(input, target)

    def _distdl_outside(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return input
        zero = connected_zeros((), input, linear=True)
        return zero if zero.requires_grad else zero.requires_grad_(torch.is_grad_enabled())


class DistributedMSELoss(_DistributedLoss, serial=torch.nn.MSELoss):
    operation = "mse_loss"


class DistributedL1Loss(_DistributedLoss, serial=torch.nn.L1Loss):
    operation = "l1_loss"


class DistributedSmoothL1Loss(_DistributedLoss, serial=torch.nn.SmoothL1Loss):
    operation = "smooth_l1_loss"


class DistributedHuberLoss(_DistributedLoss, serial=torch.nn.HuberLoss):
    operation = "huber_loss"


class DistributedBCELoss(_DistributedLoss, serial=torch.nn.BCELoss):
    operation = "binary_cross_entropy"


class DistributedBCEWithLogitsLoss(_DistributedLoss, serial=torch.nn.BCEWithLogitsLoss):
    operation = "binary_cross_entropy_with_logits"


class DistributedKLDivLoss(_DistributedLoss, serial=torch.nn.KLDivLoss):
    operation = "kl_div"


class DistributedPoissonNLLLoss(_DistributedLoss, serial=torch.nn.PoissonNLLLoss):
    operation = "poisson_nll_loss"
