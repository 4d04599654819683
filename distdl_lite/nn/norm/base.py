"""What all normalisations share: where their parameters live, who adds up statistics, and when nobody has to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.autograd import ANCHOR
from distdl_lite.grid import balanced, ravel
from distdl_lite.layout import Box, Dim, Layout, Shape, ranges_of
from distdl_lite.nn.blocks import check_floating, connected_zeros, operator_between, wide
from distdl_lite.nn.draws import constant
from distdl_lite.nn.inputs import Inputs, agreed_inputs, weight_dtype
from distdl_lite.nn.norm.normalised import Normalise, Rows
from distdl_lite.nn.options import numbers
from distdl_lite.nn.parameter import Layer
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.transport import Team


@dataclass(frozen=True)
class Built:
    """The call of a norm for one structure."""

    rows: Rows | None  # None where each rank computes alone
    fit: Operator | None  # from parameters as they are held to parameters as the input is cut
    team: Team  # the ranks with the same block of parameters

    def __call__(self, layer: Norm, x: torch.Tensor) -> torch.Tensor:
        return layer._run(x, self)


class Norm(Layer):
    """Base of normalisations.

    A subclass places its parameters with `place_affine` and says what a row is, the values that are normalised together:
    which dims it is counted by (`rows`), how a block is seen as channels of rows (`as_channels`, `per_channel`, `row_of`), and
    what torch computes where no row is cut (`alone`).

    Parameters
    ----------
    P_x : Partition
        Of the input and the output, one axis per dim.
    """

    _distdl_free = frozenset({"eps"})
    numbers = 2  # per row: sums of values and of squares
    reaches_bias = False  # whether the graph of torch's second gradient leads to the bias, though with zeros
    weights_are_per_row = False  # then their gradients are among the sums
    # Whether statistics are tracked before the output is there: also in a checkpoint that ends with the layer, and whose
    # recomputation ends with the layer's saved tensors.
    tracks_early = True
    uses_batch = True  # whether the input's own statistics are used
    tracks = False  # whether running statistics are updated
    may_track = False  # whether they may be in this mode, as `track_running_stats` can be switched
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
    ) -> None:
        """Place weight and bias in balanced blocks along the axes that cut the input's dims they are for."""
        grid = self.P_x.grid_of_ranks
        dims = (Dim(ranges_of(balanced(n, grid.shape[a])), (a,)) for n, a in zip(shape, axes, strict=True))
        self._held, self._held_axes = Layout(grid, tuple(dims)), tuple(axes)
        self.place("weight", self._held if weight else None, constant(1.0), dtype, device)
        self.place("bias", self._held if weight and bias else None, constant(0.0), dtype, device)

    def blocks(self, shapes: Mapping[int, Shape]) -> Layout:
        """How the input lies over the grid, from the ranks' local shapes."""
        grid = self.P_x.grid_of_ranks
        return lay.blocks(grid, lay.cuts_from_shapes(grid, shapes))

    def check_shape(self, shape: Shape) -> None:
        """Raise what torch would for an input of this global shape."""

    def rows(self, X: Layout) -> tuple[tuple[Dim, ...], int]:
        """How the rows lie over the grid, and the number of values of each."""
        raise NotImplementedError

    def row_of(self, box: Box, device: torch.device) -> torch.Tensor | None:
        """The row of each channel of a block, None where each is one."""
        return None

    def as_channels(self, x: torch.Tensor) -> torch.Tensor:
        """A block as ``(B, K, *S)``; each channel of each sample apart unless a subclass says otherwise."""
        return x.reshape(1, math.prod(x.shape[:2]), math.prod(x.shape[2:]))

    def per_channel(self, parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A parameter for that view of a block `x`; unlike repeat with second gradients also for no samples."""
        return parameter.expand(x.shape[0], -1).reshape(-1)

    def saves_nothing(self) -> bool:
        """Whether torch's saves no tensor of such an input, so that a checkpoint does not run it again."""
        return False

    def alone(self, x: torch.Tensor, *held: torch.Tensor | None) -> torch.Tensor:
        """torch's own with weight, bias and running statistics, where no other rank's values count."""
        raise NotImplementedError

    def running(self, built: Built) -> tuple[torch.Tensor | None, ...]:
        """The running statistics that `alone` takes."""
        return ()

    def epsilon(self, x: torch.Tensor) -> float:
        """What is added to the variance."""
        return self.eps

    def pivot(self, x: torch.Tensor, built: Built) -> torch.Tensor:
        """Near the mean of each row, and the same on all ranks of it; in float64."""
        return torch.zeros((), dtype=torch.float64, device=x.device)

    def track(self, built: Built, mean: torch.Tensor, var: torch.Tensor) -> None:
        """Update running statistics by those of the rows."""

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Built:
        (x,) = input
        inputs = agreed_inputs(self, self.P_x)
        X = self.blocks(inputs.shapes)
        grid = X.grid
        check_floating(self, inputs)
        self._check_dtype(inputs)
        self.check_shape(lay.global_shape_of(X))
        fit, index = self._fit(X), grid.index(self._distdl_transport.rank)
        assert index is not None
        team = self._distdl_transport.team(grid.members({a: index[a] for a in self._held_axes}))
        dims, count = self.rows(X)
        R = Layout(grid, (Dim(((0, self.numbers),)), *dims), tuple(a for d in dims for a in d.axes if not d.overlaps))
        is_empty = 0 in lay.global_shape_of(X)  # where the running statistics become nan, as torch's
        needed = R.free_axes or (self.may_track and (fit is not None or team.size > 1 or is_empty))
        if not (self.uses_batch and count and needed):
            return Built(None, fit, team)
        sizes = [grid.shape[a] for a in R.free_axes]
        gather = None
        if inputs.dtype is torch.float64 and self.numbers == 2:
            gather = self._sum_over(replace(R, dims=(Dim(((0, math.prod(sizes)),)), Dim(((0, 3),)), *dims)))
        position = ravel([index[a] for a in R.free_axes], sizes)
        row_of = self.row_of(X.box_at(index), x.device)
        summed = team if self.weights_are_per_row else self._distdl_transport.team((self._distdl_transport.rank,))
        graph = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        return Built(Rows(self._sum_over(R), gather, position, count, row_of, summed, graph), fit, team)

    def _fit(self, X: Layout) -> Operator | None:
        """Each line of ranks along the held axes moves its one copy of a parameter to the input's cuts."""
        held = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]
        if not held:
            return None
        wanted = tuple(X.dims[a] for a in self._held_axes)
        shape, given = lay.global_shape_of(self._held), tuple(max(r[1] for r in dim.ranges) for dim in wanted)
        if given != shape:
            raise self._refuse(f"the input of shape {lay.global_shape_of(X)} has {given} where weights have {shape}")
        others = tuple(a for a in range(X.grid.dim) if a not in self._held_axes)
        graph = any(p.requires_grad for p in self.parameters())
        return operator_between(Layout(X.grid, self._held.dims, others), Layout(X.grid, wanted, others), self, graph)

    def _sum_over(self, R: Layout) -> Operator:
        """The sum of the numbers of each row over all ranks that have it."""
        transport = self._distdl_transport
        return Operator(plan(R, R, transport.rank), transport, type(self).__name__, graph=True)

    def _check_dtype(self, inputs: Inputs) -> None:
        held, statistics = weight_dtype(self), self._buffers.get("running_mean")
        if held is None and statistics is not None:
            held = statistics.dtype
        if held in (None, inputs.dtype, wide(inputs.dtype)):
            return
        raise self._refuse(f"the input has dtype {inputs.dtype}, weights and statistics {held}", TypeError)

    def _run(self, x: torch.Tensor, built: Built) -> torch.Tensor:
        rows = built.rows
        if rows is None:
            return self._without_others(x, built)
        # The gradients of both are summed over the replicas, here or with the statistics'.
        weight, bias = self._fitted(self.held if rows.team.size > 1 else self.use, built)
        weight, bias = (None if t is None else self.per_channel(t, x) for t in (weight, bias))
        late: list[tuple[torch.Tensor, torch.Tensor]] = []
        track = partial(self.track, built) if self.tracks_early else lambda *statistics: late.append(statistics)
        seen = track if self.tracks else None
        anchor, pivot, eps = ANCHOR if rows.graph else None, self.pivot(x, built), self.epsilon(x)
        y = Normalise.apply(self.as_channels(x), weight, bias, anchor, pivot, eps, rows, x.shape, seen)
        for statistics in late:
            self.track(built, *statistics)
        return y

    def _without_others(self, x: torch.Tensor, built: Built) -> torch.Tensor:
        """torch's own function of the block."""
        weight, bias = self._fitted(self.use, built)
        running = self.running(built)  # also on a rank with an empty block: this may communicate
        if x.numel():
            return self.alone(x, weight, bias, *running)
        used, added = ((weight, bias), None) if self.reaches_bias else ((weight,), bias)
        return connected_zeros(x.shape, x, *used, added=added, linear=self.saves_nothing())

    def _fitted(self, read: Callable[[str], torch.Tensor | None], built: Built) -> tuple[torch.Tensor | None, ...]:
        """Weight and bias as the input is cut."""
        weight, bias = read("weight"), read("bias")
        return (weight, bias) if built.fit is None else tuple(t if t is None else built.fit(t) for t in (weight, bias))


def by_kernel(kernel: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A kernel of torch applied to a block ``(N, C, *space)``, with three dims where one has length one.

    The strides of that one may hide the order of memory; in more dims the kernel then reads the gradient in another order.
    """
    return kernel(x.reshape(*x.shape[:2], -1), *arguments).view(x.shape) if 1 in x.shape else kernel(x, *arguments)
