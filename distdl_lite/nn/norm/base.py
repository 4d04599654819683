"""What all normalisations share: their one rule, and where their parameters live."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distdl_lite.factors import Factors, uncut
from distdl_lite.grid import balanced, ravel
from distdl_lite.layout import Dim, Layout, Shape, ranges_of
from distdl_lite.nn.blocks import connected_zeros, wide
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.draws import constant
from distdl_lite.nn.face import Face
from distdl_lite.nn.inputs import Inputs, weight_dtype
from distdl_lite.nn.norm.normalised import Normalise, Rows, statistics
from distdl_lite.nn.value import Operation, Value
from distdl_lite.operator import Operator
from distdl_lite.transport import Team


@dataclass(frozen=True)
class Kernel:
    """What a norm normalises together. A row is such a set of values."""

    alone: Callable[..., torch.Tensor]  # torch's, of a block, `factor`, weights and running statistics
    eps: float
    over: tuple[int, ...]  # the dims of a row
    weighted: tuple[int, ...] = (1,)  # the dims that weights are for
    size: int = 1  # how many channels are in one row
    numbers: int = 2  # of sums per row: of values and of squares, or of squares alone
    reaches_bias: bool = False  # whether the graph of torch's second gradient leads to the bias, though with zeros

    @property
    def is_batch(self) -> bool:
        """Whether a row goes over all samples, so that a block is one of channels as it is."""
        return 0 in self.over and 0 not in self.weighted

    def count(self, shape: Shape) -> int:
        """The number of values of a row."""
        return self.size * math.prod(shape[d] for d in self.over)

    def rows(self, x: Value) -> Factors:
        """How the rows lie over the grid."""
        if self.size == 1:
            return tuple(f for d, factors in enumerate(x.dims) if d not in self.over for f in factors)
        (channels,) = x.dims[1]
        groups = ((a // self.size, -(-b // self.size) if a < b else a // self.size) for a, b in channels.ranges)
        return (*x.dims[0], Dim(tuple(groups), channels.axes))

    def row_of(self, c: Compiler, x: Value) -> torch.Tensor | None:
        """The row of each channel of this rank's block, None where each is one."""
        if self.size == 1:
            return None
        groups = torch.arange(*c.range(x.dims[1][0]), device=c.device) // self.size
        groups = groups - groups[:1]
        samples = torch.arange(c.local(x.dims)[0], device=c.device).unsqueeze(1)
        return (samples * (groups[-1:] + 1) + groups).view(-1)

    def as_channels(self, x: torch.Tensor) -> torch.Tensor:
        """A block as ``(B, K, *S)``: each channel of each sample apart, or what else counts the rows."""
        lead = x.dim() - len(self.over)
        return x if self.is_batch else x.reshape(1, math.prod(x.shape[:lead]), math.prod(x.shape[lead:]))

    def per_channel(self, weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        """A weight for that view of a block `x`; unlike repeat with second gradients also for no samples."""
        if weight is None or self.is_batch:
            return weight
        return weight.reshape(1, 1, -1) if self.over == self.weighted else weight.expand(x.shape[0], -1).reshape(-1)

    def by_rows(self, x: torch.Tensor, channels: torch.Tensor, weight: Any, bias: Any, *found: Any) -> torch.Tensor:
        """The normalised block by the mean and variance of its rows."""
        weight, bias = self.per_channel(weight, x), self.per_channel(bias, x)
        return Normalise.apply(channels, weight, bias, *found, self.eps, x.shape)

    def by_torch(self, x: torch.Tensor, linear: bool, factor: Any, *held: torch.Tensor | None) -> torch.Tensor:
        """The same by torch, which saves no tensor if `linear`."""
        if x.numel():
            return self.alone(x, float(factor or 0.0), *held)
        used, added = (held[:2], None) if self.reaches_bias else (held[:1], held[1])
        return connected_zeros(x.shape, x, *used, added=added, linear=linear)


def normalised(
    c: Compiler,
    kernel: Kernel,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    running: Sequence[Value | None] = (None, None),
    factor: float | Value | None = None,
    batch: bool = True,
    team: Team | None = None,
) -> Value:
    """The rule of all norms: a value normalised by its own statistics or, if not `batch`, by the `running` ones.

    Ranks add up over the axes that cut what is in a row; copies keep each to their own. With a `factor`, the weight of the
    newest ones, the running statistics are changed in place. The gradients of the weights are summed over their copies with
    the statistics' if there is a `team` of these, else as of any parameter.
    """
    dims = tuple(x.dims[d] for d in kernel.weighted)
    held = [v if v is None else c.move(v, dims) for v in running]
    tracks, shared = factor is not None and held[0] is not None, _shared(c, kernel, x)
    # Running statistics that are not of this rank's values alone, or not held as these are, are not left to torch.
    is_common = tracks and (held[0] is not running[0] or 0 in x.shape or c.parts(x.axes(0, *range(2, x.ndim))) > 1)
    by_rows = batch and kernel.count(x.shape) and (shared or is_common)
    if by_rows and team:
        weight, bias = (v if v is None else replace(v, name=v.given, parameter=None) for v in (weight, bias))
    weight, bias = (v if v is None else c.move(v, dims) for v in (weight, bias))
    as_x: dict[str, Any] = {"dims": x.dims, "dtype": x.dtype}
    if not by_rows:
        linear = kernel.is_batch and 0 in x.shape and weight is None
        return c.call(kernel.by_torch, x, linear, factor, weight, bias, *held, **as_x)
    rows = _rows(c, kernel, x, shared, any(v is not None and v.grad for v in (x, weight, bias)), team)
    channels, pivot = (x, held[0]) if kernel.is_batch else (c.call(kernel.as_channels, x, **as_x), None)
    of_rows: dict[str, Any] = {"dims": [(kernel.rows(x),)] * 2, "dtypes": [torch.float64] * 2}
    found = c.calls(statistics, channels, pivot, rows, grad=False, **of_rows)
    # torch's batch norm tracks before the output is there: also in a checkpoint that ends with the norm, and whose
    # recomputation ends with its saved tensors.
    if tracks and kernel.is_batch:
        _track(c, rows.count, found, held, running, factor)
    y = c.call(kernel.by_rows, x, channels, weight, bias, *found, rows, **as_x)
    if tracks and not kernel.is_batch:
        _track(c, rows.count, _over_samples(c, x, found), held, running, factor)
    return y


def _shared(c: Compiler, kernel: Kernel, x: Value) -> list[int]:
    """The axes along which ranks hold values of the same rows."""
    across = {a for dim in kernel.rows(x) if dim.overlaps for a in dim.axes}
    return [a for a, n in enumerate(c.grid.shape) if n > 1 and a in {*x.axes(*kernel.over), *across}]


def _rows(c: Compiler, kernel: Kernel, x: Value, shared: Sequence[int], grad: bool, team: Team | None) -> Rows:
    """How the ranks of those axes add up."""
    dims, keys, sizes = kernel.rows(x), c.free_axes(shared), [c.grid.shape[a] for a in shared]

    def adding_up(*lengths: int) -> Operator | None:
        R = Layout(c.grid, (*map(uncut, lengths), *dims), keys)
        return c.between(R, R, c.new((), torch.float64, grad), "statistics")

    gather = adding_up(math.prod(sizes), 3) if x.dtype is torch.float64 and kernel.numbers == 2 else None
    position, shape = ravel([c.index[a] for a in shared], sizes), c.local(tuple((dim,) for dim in dims))
    sums = kernel.numbers, kernel.count(x.shape), kernel.row_of(c, x), adding_up(kernel.numbers)
    return Rows(shape, *sums, gather, position, team)


def _over_samples(c: Compiler, x: Value, found: Sequence[Value]) -> list[Value]:
    """From statistics of each sample to their averages.

    All ranks with the channels take part, so that the copies stay bitwise equal. Each sample is there once per block of space,
    which the mean does not feel.
    """

    def added(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return torch.stack([mean, var, torch.ones_like(mean)]).view(3, *shape).sum(1)

    shape = c.local(x.dims)[:2]
    parts = c.call(added, *found, dims=((uncut(3),), x.dims[1]), dtype=torch.float64)
    parts = c.sum_over(parts, x.axes(0, *range(2, x.ndim)))
    return c.calls(lambda t: tuple(t[:2] / t[2]), parts, dims=[(x.dims[1],)] * 2, dtypes=[torch.float64] * 2)


def _track(c: Compiler, count: int, latest: Sequence[Value], held: Any, running: Any, factor: Any) -> None:
    """Change the running statistics, which are `held` as x's channels are, by the latest ones of so many values each."""

    def blended(old: torch.Tensor, new: torch.Tensor, scale: float, factor: Any) -> torch.Tensor:
        return (1 - factor) * old.double() + factor * (new * scale)

    for new, own, place, scale in zip(latest, held, running, (1.0, count / (count - 1)), strict=True):
        new = c.call(blended, own, new, scale, factor, dims=own.dims, dtype=torch.float64)
        c.call(torch.Tensor.copy_, place, c.move(new, place.dims), dims=place.dims, dtype=place.dtype)


class Norm(Face):
    """Base of normalisations; weights and statistics are in balanced blocks along the axes of the dims that they are for."""

    _distdl_free = frozenset({"eps"})
    keeps_blocks = True
    least_dims = 2

    def weighted(self) -> Sequence[int]:
        """The dims that weights are for."""
        return (1,)

    def _take(self, serial: torch.nn.Module, options: Mapping[str, Any]) -> None:
        super()._take(serial, options)
        grid, axes = self.P_x.grid_of_ranks, self.weighted()
        if grid.dim < self.least_dims or min(axes, default=0) < 0:
            raise self._refuse(f"P_x of shape {grid.shape} has too few axes for {self.extra_repr()}")
        for name, tensor in (*serial._parameters.items(), *serial._buffers.items()):
            sizes = () if tensor is None else zip(tensor.shape, axes, strict=False)  # those of a number are none
            layout = Layout(grid, tuple(Dim(ranges_of(balanced(n, grid.shape[a])), (a,)) for n, a in sizes))
            start = constant(float(name in ("weight", "running_var")))
            held = None if tensor is None else layout
            dtype = None if tensor is None else tensor.dtype
            self.place(name, held, start, dtype, options.get("device"), buffer=name in serial._buffers)

    def result_dtype(self, inputs: Inputs, shape: Shape) -> torch.dtype:
        if not inputs.dtype.is_floating_point:
            raise TypeError(f"the input has dtype {inputs.dtype}, a floating dtype is needed")
        if self._held_dtype not in (None, inputs.dtype, wide(inputs.dtype)):
            raise TypeError(f"the input has dtype {inputs.dtype}, weights and statistics {self._held_dtype}")
        self.judged((shape, inputs.dtype))
        return inputs.dtype

    @property
    def _held_dtype(self) -> torch.dtype | None:
        return weight_dtype(self) or weight_dtype(self, "running_mean")

    def judged(self, *inputs: tuple[Shape, torch.dtype], device: str = "meta") -> Operation:
        # Of two dtypes torch's would warn.
        return super().judged(*((shape, self._held_dtype or dtype) for shape, dtype in inputs), device=device)


def by_kernel(kernel: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A kernel of torch applied to a block ``(N, C, *space)``, with three dims where one has length one.

    The strides of that one may hide the order of memory; in more dims the kernel then reads the gradient in another order.
    """
    return kernel(x.reshape(*x.shape[:2], -1), *arguments).view(x.shape) if 1 in x.shape else kernel(x, *arguments)
