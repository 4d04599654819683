"""Linear layers of tensor parallelism: a line of ranks cuts the output features, or the input features, of the weight.

Shoeybi et al. 2019, "Megatron-LM", section 3, and Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models", section 4.2.2, for the rows. A tensor that is whole along a line is one that each of its ranks is shown,
and so is its gradient, as in `distdl_lite.autograd.reduce_from_team`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.autograd import copy_to_team, reduce_from_team
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Dim, Layout, Shape, ranges_of
from distdl_lite.nn.blocks import Local, anchored, operator_between
from distdl_lite.nn.draws import bias_bound, kaiming_bound, uniform
from distdl_lite.nn.inputs import agreed_inputs, computing_dtype, weight_dtype, whose_blocks
from distdl_lite.nn.module import Call
from distdl_lite.nn.options import integers
from distdl_lite.nn.parameter import Layer
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import plan

Cuts = Sequence[int]


def line_of(grid: Grid, rank: int) -> tuple[int, ...]:
    """The sorted ranks that differ from this one along the last axis alone."""
    index = grid.index(rank)
    assert index is not None
    return tuple(sorted(grid.members(dict(enumerate(index[:-1])))))


def _feature_dims(n: int, grid: Grid) -> tuple[Dim, Dim]:
    """Features whole on each rank, and in balanced blocks over the last axis."""
    return Dim(((0, n),)), Dim(ranges_of(balanced(n, grid.shape[-1])), (grid.dim - 1,))


def _row_dims(cuts: Cuts, grid: Grid) -> tuple[Dim, Dim]:
    """The rows before the features whole on a line, and cut over it; `cuts` are those of all lines, one after the other.

    Lines that are cut alike count from their own first row, which lets them run as one native collective.
    """
    last = grid.dim - 1
    line = grid.shape[last]
    pieces = {tuple(c - cuts[i] for c in cuts[i : i + line + 1]) for i in range(0, len(cuts) - 1, line)}
    if len(pieces) > 1:
        return Dim(ranges_of(cuts[::line]), (last - 1,)), Dim(ranges_of(cuts), (last - 1, last))
    (piece,) = pieces
    return Dim(((0, piece[-1]),)), Dim(ranges_of(piece), (last,))


def _along_lines(grid: Grid, lead: Sequence[Cuts], *last: Dim) -> Layout:
    """A layout whose ranks meet along their line alone; `last` are its last dims, `lead` cuts the others."""
    dims = [Dim(ranges_of(cut), (d,)) for d, cut in enumerate(lead[: grid.dim - len(last)])]
    return Layout(grid, (*dims, *last), tuple(range(grid.dim - 1)))


class _ParallelLinear(Layer):
    """What the two layers share. They say where weight and bias live, and what is done before and after the product."""

    _options: tuple[str, str]

    def __init__(
        self,
        P: Partition,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(P)
        integers(self, 0, in_features=in_features, out_features=out_features)
        self.P, self.in_features, self.out_features = P, in_features, out_features
        weight_layout, bias_layout = self._places(P.grid_of_ranks)
        self.place("weight", weight_layout, uniform(kaiming_bound(in_features)), dtype, device)
        self.place("bias", bias_layout if bias else None, uniform(bias_bound(in_features)), dtype, device)

    def _places(self, grid: Grid) -> tuple[Layout, Layout]:
        """The layouts of weight and bias."""
        raise NotImplementedError

    def _steps(self, shapes: Mapping[int, Shape]) -> tuple[Local | None, Local | None]:
        """What is done before and after the product, where the line has several ranks."""
        raise NotImplementedError

    def _lines(self, shapes: Mapping[int, Shape], rows: bool, copied: bool) -> tuple[Grid, list[Cuts], Cuts]:
        """P with an axis per dim, and the checked cut points of the leading dims and of the features.

        `rows`: whether the line cuts the last leading dim; `copied`: whether each rank passes all features.
        """
        dims = len(next(iter(shapes.values())))
        if dims < self.P.dim or (dims < 2 and getattr(self, self._options[1])):
            raise self._refuse(f"an input of {dims} dims is too small for {self.extra_repr()}")
        grid = self.P.grid_of_ranks.padded(dims)
        shape = (*grid.shape[:-2], grid.shape[-2] * grid.shape[-1], 1) if rows else grid.shape
        *lead, features = lay.cuts_from_shapes(Grid(shape, grid.ranks), shapes)
        found = {s[-1] for s in shapes.values()} if copied else {features[-1]}
        if found != {self.in_features}:
            text = f"the input has {sorted(found)} features, in_features={self.in_features}"
            raise self._refuse(text + whose_blocks(1 if copied else shape[-1]))
        return grid, list(lead), features

    def _operator(self, X: Layout, Y: Layout) -> Operator:
        """Between the blocks of lines; it needs no anchor of its own, since forward anchors what it gives it."""
        return Operator(plan(X, Y, self._distdl_transport.rank), self._distdl_transport, type(self).__name__)

    def _gathered_and_kept(self, entire: Layout, parts: Layout) -> tuple[Operator, Operator]:
        """From parts to the whole that all ranks of a line are shown, and from that to one's own part.

        Each is the other's adjoint: a rank's gradient of the whole is all of it, so that its own part needs no message.
        """
        alone = tuple(range(entire.grid.dim))
        gather = self._operator(parts, entire)
        keep = self._operator(replace(entire, team_axes=alone), replace(parts, team_axes=alone))
        gather._adjoint, keep._adjoint = keep, gather
        return gather, keep

    def _over_line(self, function: Callable[..., torch.Tensor]) -> Local:
        """`reduce_from_team` or `copy_to_team` over the ranks of this rank's line."""
        transport = self._distdl_transport
        return partial(function, team=transport.team(line_of(self.P.grid_of_ranks, transport.rank)))

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P)
        computing_dtype(type(self).__name__, inputs, weight_dtype(self))
        graph = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        steps = self._steps(inputs.shapes)
        if self.P.shape[-1] == 1:
            steps = None, None
        place = self._distdl_places.get("bias")
        adds_bias = place is not None and place.layout.grid.index(self._distdl_transport.rank) is not None
        (before, after), graph_before = steps, inputs.requires_grad

        def run(layer: _ParallelLinear, x: torch.Tensor) -> torch.Tensor:
            x = anchored(x, graph_before)
            z = x if before is None else before(x)
            y = F.linear(z, layer.use("weight"), layer.use("bias") if adds_bias else None)
            return y if after is None else after(anchored(y, graph))

        return run

    def extra_repr(self) -> str:
        sizes = (f"in_features={self.in_features}", f"out_features={self.out_features}", f"P={self.P.shape}")
        return ", ".join([*sizes, *(f"{name}={getattr(self, name)}" for name in self._options)])


class DistributedColumnParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the rows of W, that is the output features, cut over the last axis of `P`.

    The ranks that differ along the last axis alone form a line. Input ``(*lead, in_features)``, the leading dims cut along the
    leading axes of `P` in blocks of any sizes. The ranks of a line pass the same block, and each gets the whole gradient of
    it; with `sequence_parallel` they pass parts, of any sizes, of its last leading dim. Output ``(*lead, out_features)``, the
    leading dims as in a line's input and the features in balanced blocks over the line. Ranks outside `P` pass and get
    zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P : Partition
        ``[*P_lead, p]``; axes of length one for leading dims may be left out in front.
    in_features, out_features, bias, device, dtype
        As in torch.nn.Linear.
    gather_output : bool
        Whether each rank of a line is shown all output features, and passes back the whole gradient.
    sequence_parallel : bool
        Whether the line cuts the dim before the features of the input, within the block that its axis of `P` gives the line.

    Raises
    ------
    ValueError, TypeError
        At set-up, on all ranks alike, if blocks or dtypes do not fit.

    Notes
    -----
    Each line communicates nothing forward, and in backward the input's gradient in one all-reduce, if some input requires
    grad; with `sequence_parallel` one all-gather forward and one reduce-scatter backward. `gather_output` adds one
    all-gather forward. Gradients of weight and bias are summed over the leading axes when backward ends. Parameters start from
    the serial layer's values for the same seed. Where each rank of a line gets the whole gradient, the adjoint of a
    `Broadcast` in front would add these up: load the same block on each rank instead.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     layer = dl.nn.DistributedColumnParallelLinear(world.grid((1, 2)), 4, 6)
    ...     return tuple(layer.weight.shape), tuple(layer(torch.zeros(5, 4)).shape)
    >>> dl.testing.spmd(2, body)
    [((3, 4), (5, 3)), ((3, 4), (5, 3))]
    """

    _options = ("gather_output", "sequence_parallel")

    def __init__(
        self,
        P: Partition,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(P, in_features, out_features, bias, device, dtype)
        self.gather_output, self.sequence_parallel = gather_output, sequence_parallel

    def _places(self, grid: Grid) -> tuple[Layout, Layout]:
        ins, outs = Dim(((0, self.in_features),)), _feature_dims(self.out_features, grid)[1]
        return Layout(grid, (outs, ins)), Layout(grid, (outs,))

    def _steps(self, shapes: Mapping[int, Shape]) -> tuple[Local | None, Local | None]:
        grid, lead, _ = self._lines(shapes, self.sequence_parallel, copied=True)
        before: Local = self._over_line(copy_to_team)
        if self.sequence_parallel:
            ins = Dim(((0, self.in_features),))
            entire, parts = (_along_lines(grid, lead, rows, ins) for rows in _row_dims(lead[-1], grid))
            before = self._operator(parts, entire)
            lead[-1] = lead[-1][:: grid.shape[-1]]
        if not self.gather_output:
            return before, None
        entire, parts = (_along_lines(grid, lead, outs) for outs in _feature_dims(self.out_features, grid))
        return before, self._gathered_and_kept(entire, parts)[0]


class DistributedRowParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the columns of W, that is the input features, cut over the last axis of `P`.

    As `DistributedColumnParallelLinear` but for these points. Input features are in blocks of any sizes over `P`; without
    `input_is_parallel` the ranks of a line pass the same block, of all features, and each gets the whole gradient of it. Each
    rank of a line is shown the whole output, and passes back the whole gradient; with `scatter_output` it gets a part of the
    last leading dim.

    Parameters
    ----------
    P, in_features, out_features, bias, device, dtype
        As there.
    input_is_parallel : bool
        Whether the line cuts the input's features.
    scatter_output : bool
        Whether the line cuts the dim before the features of the output, in balanced parts of the line's block.

    Raises
    ------
    ValueError, TypeError
        As there.

    Notes
    -----
    Each line adds up its products in one all-reduce forward and communicates nothing backward; with `scatter_output` in one
    reduce-scatter forward, and backward is one all-gather. Input features in other blocks than balanced ones are moved
    there first. Without `input_is_parallel` the input's gradient is gathered. The bias lives on the first rank of each line.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     layer = dl.nn.DistributedRowParallelLinear(world.grid((1, 2)), 6, 4)
    ...     return tuple(layer.weight.shape), tuple(layer(torch.zeros(5, 3)).shape)
    >>> dl.testing.spmd(2, body)
    [((4, 3), (5, 4)), ((4, 3), (5, 4))]
    """

    _options = ("input_is_parallel", "scatter_output")

    def __init__(
        self,
        P: Partition,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        scatter_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(P, in_features, out_features, bias, device, dtype)
        self.input_is_parallel, self.scatter_output = input_is_parallel, scatter_output

    def _places(self, grid: Grid) -> tuple[Layout, Layout]:
        ins, outs = _feature_dims(self.in_features, grid)[1], Dim(((0, self.out_features),))
        firsts = Grid((*grid.shape[:-1], 1), tuple(grid.members({grid.dim - 1: 0})))
        return Layout(grid, (outs, ins)), Layout(firsts, (outs,))

    def _steps(self, shapes: Mapping[int, Shape]) -> tuple[Local | None, Local | None]:
        grid, lead, features = self._lines(shapes, False, copied=not self.input_is_parallel)
        entire, parts = (_along_lines(grid, lead, ins) for ins in _feature_dims(self.in_features, grid))
        before: Local | None
        if self.input_is_parallel:
            X = _along_lines(grid, lead, Dim(ranges_of(features), (grid.dim - 1,)))
            before = operator_between(X, parts, self, False)
        else:
            before = self._gathered_and_kept(entire, parts)[1]
        if not self.scatter_output:
            return before, self._over_line(reduce_from_team)
        lines = ranges_of(lead[-1])
        cuts = [0, *(start + c for start, stop in lines for c in balanced(stop - start, grid.shape[-1])[1:])]
        outs = Dim(((0, self.out_features),))
        entire, parts = (_along_lines(grid, lead, rows, outs) for rows in _row_dims(cuts, grid))
        return before, self._operator(entire, parts)
