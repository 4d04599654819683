"""What all normalisations share: their one rule, where their parameters live, and when no rank needs another's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.factors import Factors, shape_of_dims, uncut
from distdl_lite.grid import balanced, ravel
from distdl_lite.layout import Dim, Layout, Shape, ranges_of
from distdl_lite.nn.blocks import check_floating, connected_zeros, wide
from distdl_lite.nn.compiler import Compiler, Value
from distdl_lite.nn.draws import constant
from distdl_lite.nn.inputs import Inputs, weight_dtype
from distdl_lite.nn.norm.normalised import Normalise, Rows, statistics
from distdl_lite.nn.options import numbers
from distdl_lite.nn.rule_layer import RuleLayer
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.transport import Team


@dataclass(frozen=True)
class Kernel:
    """What a norm normalises together. A row is such a set of values, counted by the dims that are not in `over`."""

    eps: float | None
    numbers = 2  # per row: sums of values and of squares
    reaches_bias = False  # whether the graph of torch's second gradient leads to the bias, though with zeros
    saves_empty = True  # whether torch's saves a tensor of an input of no values, where there is no weight
    # Whether statistics are tracked before the output is there: also in a checkpoint that ends with the norm, and whose
    # recomputation ends with its saved tensors.
    tracks_early = False

    def over(self, ndim: int) -> Sequence[int]:
        """The dims whose values are in one row."""
        return range(2, ndim)

    def weighted(self, ndim: int) -> Sequence[int]:
        """The dims that weights are for."""
        return (1,)

    def check(self, shape: Shape, batch: bool) -> None:
        """Raise what torch would for an input of this global shape, whose own statistics are used if `batch`."""

    def rows(self, x: Value) -> Factors:
        """How the rows lie over the grid."""
        return tuple(f for d, factors in enumerate(x.dims) if d not in self.over(x.ndim) for f in factors)

    def count(self, shape: Shape) -> int:
        """The number of values of a row."""
        return math.prod(shape[d] for d in self.over(len(shape)))

    def row_of(self, c: Compiler, x: Value) -> torch.Tensor | None:
        """The row of each channel of this rank's block, None where each is one."""
        return None

    def as_channels(self, x: torch.Tensor) -> torch.Tensor:
        """A block as ``(B, K, *S)``; each channel of each sample apart unless a subclass says otherwise."""
        return x.reshape(1, math.prod(x.shape[:2]), math.prod(x.shape[2:]))

    def channels(self, c: Compiler, x: Value) -> Value:
        """The value in that view."""
        return c.call(self.as_channels, x, dims=x.dims, dtype=x.dtype, everywhere=True)

    def per_channel(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A weight for that view of a block `x`; unlike repeat with second gradients also for no samples."""
        return weight.expand(x.shape[0], -1).reshape(-1)

    def epsilon(self, x: torch.Tensor) -> float:
        """What is added to the variance, or to the mean square."""
        return torch.finfo(wide(x.dtype)).eps if self.eps is None else self.eps

    def per_feature(self, c: Compiler, x: Value, found: Sequence[Value]) -> Sequence[Value]:
        """From statistics of the rows to those of the channels over the whole batch."""
        return found

    def alone(self, x: torch.Tensor, batch: bool, factor: float, *held: torch.Tensor | None) -> torch.Tensor:
        """torch's own with weight, bias and running statistics, where no other rank's values count."""
        raise NotImplementedError

    def local(
        self, x: torch.Tensor, batch: bool, linear: bool, factor: Any, *held: torch.Tensor | None
    ) -> torch.Tensor:
        """The same of any block; `linear` says that torch saves nothing."""
        if x.numel():
            return self.alone(x, batch, float(factor or 0.0), *held)
        weight, bias, *_ = held
        used, added = ((weight, bias), None) if self.reaches_bias else ((weight,), bias)
        return connected_zeros(x.shape, x, *used, added=added, linear=linear)

    def by_rows(
        self, x: torch.Tensor, channels: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, rows: Rows
    ) -> torch.Tensor:
        """The normalised block by the statistics of its rows."""
        weight, bias = (None if t is None else self.per_channel(t, x) for t in (weight, bias))
        return Normalise.apply(channels, weight, bias, mean, var, self.epsilon(x), rows, x.shape)


def normalised(
    c: Compiler,
    kernel: Kernel,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    running: Sequence[Value | None] = (None, None),
    factor: float | Value | None = None,
    batch: bool = True,
    used: Callable[[str, Value | None], Value | None] = lambda name, value: value,
    team: Team | None = None,
) -> Value:
    """The rule of all norms: a value normalised by its own statistics or, if not `batch`, by the `running` ones.

    Ranks add up over the axes that cut what is in a row; copies keep each to their own. With a `factor`, the weight of the
    newest ones, the running statistics are changed in place. The gradients of the weights are summed over their copies with
    the statistics' if there is a `team` of these, else by what `used` makes of them.
    """
    kernel.check(x.shape, batch)
    dims = tuple(x.dims[d] for d in kernel.weighted(x.ndim))
    shapes = {v.shape for v in (weight, bias, *running) if v is not None} - {shape_of_dims(dims)}
    if shapes:
        raise ValueError(f"the input of shape {x.shape} has {shape_of_dims(dims)} where weights have {shapes.pop()}")
    held = [v if v is None else c.move(v, dims) for v in running]
    shared, count = _shared(c, kernel, x), kernel.count(x.shape)
    # Running statistics that are not of this rank's values alone, or not held as these are, are not left to torch.
    tracks = factor is not None and held[0] is not None
    is_common = tracks and (held[0] is not running[0] or 0 in x.shape or bool(_longer(c, x.axes(0, *range(2, x.ndim)))))
    by_rows = batch and count and (shared or is_common)
    if not (by_rows and team):
        weight, bias = used("weight", weight), used("bias", bias)
    weight, bias = (v if v is None else c.move(v, dims) for v in (weight, bias))
    if not by_rows:
        linear = weight is None and 0 in x.shape and not kernel.saves_empty
        arguments = x, batch, linear, factor, weight, bias, *held
        return c.call(kernel.local, *arguments, dims=x.dims, dtype=x.dtype, everywhere=True)
    rows = _rows(c, kernel, x, shared, any(v is not None and v.grad for v in (x, weight, bias)), team)
    channels, of_rows = kernel.channels(c, x), (kernel.rows(x),)
    pivot = held[0] if kernel.tracks_early else None
    found = c.calls(
        statistics, channels, pivot, rows, dims=[of_rows] * 2, dtypes=[torch.float64] * 2, grad=False, everywhere=True
    )
    if tracks and kernel.tracks_early:
        _track(c, kernel, x, found, held, running, factor)
    y = c.call(kernel.by_rows, x, channels, weight, bias, *found, rows, dims=x.dims, dtype=x.dtype, everywhere=True)
    if tracks and not kernel.tracks_early:
        _track(c, kernel, x, found, held, running, factor)
    return y


def _longer(c: Compiler, axes: Iterable[int]) -> list[int]:
    """Those of the axes that are longer than one."""
    return [a for a in axes if c.grid.shape[a] > 1]


def _shared(c: Compiler, kernel: Kernel, x: Value) -> list[int]:
    """The axes along which ranks hold values of the same rows."""
    across = (a for dim in kernel.rows(x) if dim.overlaps for a in dim.axes)
    return _longer(c, {*x.axes(*kernel.over(x.ndim)), *across})


def _rows(c: Compiler, kernel: Kernel, x: Value, shared: Sequence[int], grad: bool, team: Team | None) -> Rows:
    """How the ranks of those axes add up."""
    dims, keys, sizes = kernel.rows(x), c.free_axes(shared), [c.grid.shape[a] for a in sorted(shared)]
    number = c.new((), torch.float64, grad)

    def adding_up(*lengths: int) -> Operator | None:
        R = Layout(c.grid, (*map(uncut, lengths), *dims), keys)
        return c.between(R, R, number, "statistics")

    gather = adding_up(math.prod(sizes), 3) if x.dtype is torch.float64 and kernel.numbers == 2 else None
    position, shape = ravel([c.index[a] for a in sorted(shared)], sizes), c.local(tuple((dim,) for dim in dims))
    row_of, add_up = kernel.row_of(c, x), adding_up(kernel.numbers)
    return Rows(shape, kernel.numbers, kernel.count(x.shape), row_of, add_up, gather, position, team)


def _track(c: Compiler, kernel: Kernel, x: Value, found: Sequence[Value], held: Any, running: Any, factor: Any) -> None:
    """Change the running statistics, which are `held` as x's channels are, by those found of its rows."""
    count = kernel.count(x.shape)
    for new, own, place, scale in zip(
        kernel.per_feature(c, x, found), held, running, (1.0, count / (count - 1)), strict=True
    ):
        new = c.call(_blended, own, new, scale, factor, dims=own.dims, dtype=torch.float64)
        c.call(torch.Tensor.copy_, place, c.move(new, place.dims), dims=place.dims, dtype=place.dtype)


def _blended(old: torch.Tensor, new: torch.Tensor, scale: float, factor: Any) -> torch.Tensor:
    return (1 - factor) * old.double() + factor * (new * scale)


class Norm(RuleLayer):
    """Base of normalisations; a subclass places its parameters with `place_affine`, and gives its `kernel`.

    Parameters
    ----------
    P_x : Partition
        Of the input and the output, one axis per dim.
    """

    _distdl_free = frozenset({"eps"})
    keeps_blocks = True
    least_dims = 0

    def __init__(self, P_x: Partition, eps: float) -> None:
        super().__init__(P_x)
        if P_x.dim < self.least_dims:
            least = {2: "two", 3: "three"}[self.least_dims]
            raise self._refuse(
                f"P_x of shape {P_x.shape} has {P_x.dim} axes, a tensor (N, C, *space) has {least} or more"
            )
        numbers(self, eps=eps)
        if eps < 0:
            raise self._refuse(f"eps={eps} must not be negative")
        self.P_x, self.eps = P_x, eps

    def place_affine(
        self,
        shape: Shape,
        axes: Sequence[int],
        weight: bool,
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> Layout:
        """Place weight and bias in balanced blocks along the axes that cut the input's dims they are for."""
        grid = self.P_x.grid_of_ranks
        dims = (Dim(ranges_of(balanced(n, grid.shape[a])), (a,)) for n, a in zip(shape, axes, strict=True))
        held = Layout(grid, tuple(dims))
        self.place("weight", held if weight else None, constant(1.0), dtype, device)
        self.place("bias", held if weight and bias else None, constant(0.0), dtype, device)
        return held

    @property
    def kernel(self) -> Kernel:
        """What is normalised together."""
        raise NotImplementedError

    def result_dtype(self, inputs: Inputs) -> torch.dtype:
        check_floating(self, inputs)
        held = weight_dtype(self) or weight_dtype(self, "running_mean")
        if held not in (None, inputs.dtype, wide(inputs.dtype)):
            raise self._refuse(f"the input has dtype {inputs.dtype}, weights and statistics {held}", TypeError)
        return inputs.dtype

    def rule(self, c: Compiler, x: Value, weight: Value | None = None, bias: Value | None = None) -> Value:
        return normalised(c, self.kernel, x, self.used(c, "weight", weight), self.used(c, "bias", bias))


def by_kernel(kernel: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A kernel of torch applied to a block ``(N, C, *space)``, with three dims where one has length one.

    The strides of that one may hide the order of memory; in more dims the kernel then reads the gradient in another order.
    """
    return kernel(x.reshape(*x.shape[:2], -1), *arguments).view(x.shape) if 1 in x.shape else kernel(x, *arguments)
