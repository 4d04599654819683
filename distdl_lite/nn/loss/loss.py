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

from distdl_lite import layout as lay
from distdl_lite.agreement import raise_together
from distdl_lite.autograd import reduce_from_team
from distdl_lite.factors import Dims, all_axes, dims_of, shape_of_dims, uncut
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import anchored, connected_zeros, wide
from distdl_lite.nn.broadcasting import common_dims, fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call
from distdl_lite.nn.value import Value, rule

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
    """

    _distdl_free = frozenset(
        {"reduction", "ignore_index", "label_smoothing", "beta", "delta", "log_target", "log_input", "full", "eps"}
    )

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

    def _held(self, device: str) -> dict[str, Any]:
        # torch's takes for a mean what it takes for a sum, but that of a divergence warns.
        return {**super()._held(device), "reduction": "sum" if self.reduction == "mean" else self.reduction}

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        grid, rank = self.P_x.grid_of_ranks, self._distdl_transport.rank
        inputs, targets = agreed_inputs(self, self.P_x), agreed_inputs(self, self.P_x, position=1)
        shape, target = inputs.shapes[rank], targets.shapes[rank]
        wanted = self._target_dims(shape, target, targets.dtype)
        if target != tuple(shape[d] for d in wanted):
            raise self._refuse(
                f"rank {rank} passed a target of shape {tuple(target)}, with its input of shape {tuple(shape)} it must "
                f"be {tuple(shape[d] for d in wanted)}"
            )
        X = lay.blocks_from_shapes(grid, inputs.shapes)
        shape = lay.global_shape_of(X)
        self.judged((shape, inputs.dtype), (tuple(shape[d] for d in wanted), targets.dtype))
        c = Compiler(grid, rank, self._distdl_transport, self._distdl_label, inputs.device)
        dims, graph = dims_of(X.dims), inputs.requires_grad or targets.requires_grad
        x, t = c.new(dims, inputs.dtype, graph, "x"), c.new(tuple(dims[d] for d in wanted), targets.dtype, graph, "t")
        weights = {name: weight for name, weight in self._buffers.items() if weight is not None}
        held = [c.new(tuple((uncut(n),) for n in w.shape), w.dtype, False, name) for name, w in weights.items()]
        points = [tensor.new_zeros((1,) * tensor.dim()) for tensor in input]
        ones = [weight.new_ones(1) for weight in weights.values()]
        dtype = self._function(*weights)(*points, *ones, reduction="none").dtype  # which autocast may choose
        run = c.compiled([x, t, *held], [self._rule(c, x, t, dict(zip(weights, held, strict=True)), dtype)])

        def call(layer: _DistributedLoss, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return run(anchored(x, graph), t, *(getattr(layer, name) for name in weights))[0]

        return call

    def _function(self, *names: str) -> Function:
        """torch's loss of input, target and its tensors of these names."""
        serials = {reduction: self.as_serial(reduction=reduction) for reduction in ("none", self.reduction)}

        def function(x: torch.Tensor, t: torch.Tensor, *given: Any, reduction: str) -> torch.Tensor:
            serial = serials[reduction]
            serial._buffers = {**self._buffers, **dict(zip(names, given, strict=True))}
            return serial.forward(x, t)  # type: ignore[no-any-return]

        return function

    def _rule(self, c: Compiler, x: Value, t: Value, held: Mapping[str, Value], dtype: torch.dtype) -> Value:
        return pointwise_loss(c, self._function(*held), [x, t, *held.values()], self.reduction, dtype, is_shown=True)

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


class DistributedMSELoss(_DistributedLoss, serial=torch.nn.MSELoss): ...


class DistributedL1Loss(_DistributedLoss, serial=torch.nn.L1Loss): ...


class DistributedSmoothL1Loss(_DistributedLoss, serial=torch.nn.SmoothL1Loss): ...


class DistributedHuberLoss(_DistributedLoss, serial=torch.nn.HuberLoss): ...


class DistributedBCELoss(_DistributedLoss, serial=torch.nn.BCELoss): ...


class DistributedBCEWithLogitsLoss(_DistributedLoss, serial=torch.nn.BCEWithLogitsLoss): ...


class DistributedKLDivLoss(_DistributedLoss, serial=torch.nn.KLDivLoss): ...


class DistributedPoissonNLLLoss(_DistributedLoss, serial=torch.nn.PoissonNLLLoss): ...
