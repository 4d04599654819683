"""What rules talk to: values whose layout all ranks know, movements between layouts, and calls on this rank's blocks.

A rule says for one operation in which layout it needs its inputs, in which layout its output is, and which local call makes
the output's block. A layer is a program of one operation, a network one of many; both are compiled here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distdl_lite.autograd import reduce_from_team
from distdl_lite.factors import (
    Dims,
    Factors,
    all_axes,
    axes_of,
    common_lengths,
    cut,
    feature_axes,
    is_inside,
    length_of,
    local_shape,
    merged,
    range_at,
    refined,
    size_of,
    uncut,
)
from distdl_lite.grid import Grid
from distdl_lite.layout import Dim, Layout, Range, Shape
from distdl_lite.nn.blocks import connected_zeros
from distdl_lite.nn.source import Source
from distdl_lite.nn.value import Movement, Parameter, Value, values_in
from distdl_lite.operator import Operator
from distdl_lite.plan import Plan, plan
from distdl_lite.reducer import replicated
from distdl_lite.transport import Team, Transport


class Compiler(Source):
    """A program of one rank in the making.

    Parameters
    ----------
    grid : Grid
        Over which all values lie.
    rank : int
        A rank of the grid, whose program this is.
    transport : Transport or None
        What its movements run on; None for a program that is only looked at.
    label : str
        Of the movements, for counts and errors, where no module is known.
    device : str
        The kind of device that values are on.
    """

    def __init__(
        self, grid: Grid, rank: int, transport: Transport | None = None, label: str = "", device: str = "cpu"
    ) -> None:
        super().__init__()
        index = grid.index(rank)
        assert index is not None
        self.grid, self.rank, self.index, self.transport = grid, rank, index, transport
        self.label, self.device = label, device
        self.now = ""  # the operation that is compiled
        self.wishes: dict[str, tuple[tuple[int, ...], int]] = {}  # how outputs of products shall be cut, see `features`
        self.copies_few = False  # whether sums of fewer points than ranks are given to all of them
        self.movements: list[Movement] = []
        self.values: dict[str, Value] = {}  # by the names of variables
        self._plans: dict[tuple[Layout, Layout], Plan] = {}
        self.shared: dict[str, Any] = {}  # what operations of one program share, by a word of their family's
        self._moved: dict[tuple[Value, Dims], Value] = {}

    def mark(self, path: str, value: Any = None) -> None:
        trace = self.transport and self.transport.local.get("trace")
        if trace:
            trace.mark(path, value)

    # Names

    def new(self, dims: Dims, dtype: torch.dtype, grad: bool, name: str = "v") -> Value:
        """A value under a name of its own."""
        value = Value(self._unique(name), tuple(map(merged, dims)), dtype, grad)
        assert len(all_axes(value.dims)) == len(value.axes(*range(value.ndim))), (
            "an axis cuts twice: points are missing"
        )
        self.values[value.name] = value
        return value

    def local(self, dims: Dims) -> Shape:
        """The shape of this rank's block."""
        return local_shape(dims, self.grid, self.index)

    def range(self, dim: Dim) -> Range:
        """This rank's range of a factor."""
        return range_at(dim, self.grid, self.index)

    def parts(self, axes: Iterable[int]) -> int:
        """Into how many parts the axes cut."""
        return math.prod(self.grid.shape[a] for a in axes)

    # Calls

    def call(self, function: Callable[..., Any], *args: Any, dims: Dims, dtype: torch.dtype, **options: Any) -> Value:
        """The value that a local call makes of others; see `calls`."""
        return self.calls(function, *args, dims=[dims], dtypes=[dtype], one=True, **options)[0]

    def apply(self, op: Any, *args: Any, dims: Dims | list[Dims], **options: Any) -> Any:
        """The values that an operation of torch makes of others on each rank; `dims` of each output, or of all."""
        each = dims if isinstance(dims, list) else [dims] * len(op.outputs)
        made = self.calls(op.function, *args, dims=each, dtypes=[t for _, t, _ in op.outputs], one=op.is_one, **options)
        return made[0] if op.is_one else made

    def calls(
        self,
        function: Callable[..., Any],
        *args: Any,
        dims: Sequence[Dims],
        dtypes: Sequence[torch.dtype],
        one: bool = False,
        grad: bool | None = None,
        linear: bool = False,
        everywhere: bool = True,
        **options: Any,
    ) -> list[Value]:
        """The values that a local call makes of others.

        Unless the call is made `everywhere`, a rank whose blocks of all outputs are empty gets zeros, whose graph leads to
        where the others' leads.

        Parameters
        ----------
        function : callable
            Of blocks; differentiable. It returns `one` tensor or a tuple of them.
        *args, **options
            Values, lists of them, and constants.
        dims, dtypes : sequence
            Of the outputs.
        grad : bool, optional
            Whether autograd records the outputs; by default if it does an input.
        linear : bool
            Of one that is not made everywhere: whether its backward does without its inputs, and saves no tensor.
        everywhere : bool
            Whether the function takes empty blocks too; it must, if it communicates.
        """
        values = list(values_in((args, tuple(options.values()))))
        for value in values:
            self._materialise(value)
        grad = any(v.grad for v in values) if grad is None else grad
        outputs = [
            self.new(d, t, grad and (t.is_floating_point or t.is_complex)) for d, t in zip(dims, dtypes, strict=True)
        ]
        shapes, reads = [self.local(v.dims) for v in outputs], list[str]()
        if not everywhere and all(0 in shape for shape in shapes):
            for value, shape in zip(outputs, shapes, strict=True):
                used, dtype = [v.name for v in values], self._word(value.dtype, [])
                call = f"{self._shared(nothing)}([{', '.join(used)}], {shape}, {dtype}, {value.grad}, {linear})"
                self.emit(f"{value.name} = {call}", used)
            return outputs
        words = [self._word(a, reads) for a in args] + [f"{k}={self._word(v, reads)}" for k, v in options.items()]
        left = outputs[0].name if one else "".join(f"{v.name}, " for v in outputs)
        self.emit(f"{left} = {self.constant(function)}({', '.join(words)})", reads)
        return outputs

    def _shared(self, function: Callable[..., Any]) -> str:
        name = function.__name__.strip("_")
        self.names[name] = function
        return name

    def _materialise(self, value: Value) -> None:
        """Let the program make the value, if it is one that is made late."""
        if value.make is not None:
            self.emit(f"{value.name} = {self.constant(value.make, 'make')}({self.local(value.dims)})")
            value.make = None
        held = value.parameter
        if held is not None and not held.is_used:
            held.is_open, held.is_used = False, True
            if value.grad:
                replicas = self.constant(held.replicas(value.dims), f"replicas_{held.raw}")
                self.emit(f"{value.name} = {self._shared(replicated)}({held.raw}, {replicas})", [held.raw])

    def parameter(
        self, raw: str, dims: Dims, dtype: torch.dtype, grad: bool, replicas: Any, is_open: bool = False
    ) -> Value:
        """An input of the program that is a parameter."""
        raw = self._unique(raw)
        value = self.new(dims, dtype, grad, f"{raw}_used")
        value.name = value.name if grad else raw
        value.parameter = Parameter(raw, replicas, is_open)
        return value

    def placed_at(self, value: Value, dims: Dims, axes: Iterable[int]) -> Value:
        """A weight laid out so; one that nobody has used yet is cut that way for good, if these axes may cut weights."""
        held, dims = value.parameter, tuple(map(merged, dims))
        if held is not None and held.is_open and all_axes(dims) <= set(axes) and all(len(f) == 1 for f in dims):
            held.is_open, value.dims = False, dims
        return self.move(value, dims)

    def made_later(self, make: Callable[[Shape], torch.Tensor], dims: Dims, dtype: torch.dtype) -> Value:
        """A constant that is made of the shape of a block, where and in the layout in which it is needed."""
        return replace(self.new(dims, dtype, False), make=make)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """The value in a dtype."""
        return value if value.dtype is dtype else self.call(torch.Tensor.to, value, dtype, dims=value.dims, dtype=dtype)

    def renamed(self, value: Value, dims: Dims) -> Value:
        """The same blocks as those of other dims."""
        self._materialise(value)
        return replace(value, dims=tuple(map(merged, dims)))

    # Movements

    def move(self, value: Value, dims: Dims, why: str = "") -> Value:
        """The value in another layout."""
        dims = tuple(map(merged, dims))
        if value.dims == dims:
            return value
        known = self._moved.get((value, dims))
        if known is None:
            known = self._moved[value, dims] = self._move(value, dims, why)
        return known

    def _move(self, value: Value, dims: Dims, why: str) -> Value:
        if value.make is not None:
            return self.made_later(value.make, dims, value.dtype)
        pairs = [_alike(h, w) for h, w in zip(value.dims, dims, strict=True)]
        if None in pairs:  # the cuts of some dims have no factors in common
            between = list(value.dims)
            for d, pair in enumerate(pairs):
                if pair is None:
                    others = all_axes((*between[:d], *between[d + 1 :]))
                    between[d] = _between(between[d], dims[d], others, self.grid)
            return self.move(self.move(value, tuple(between), why), dims, why)
        held, wanted = (tuple(dim for pair in pairs for dim in pair[side]) for side in (0, 1))  # type: ignore[index]
        if held == wanted:
            return self.renamed(value, dims)
        if not all(map(is_inside, held, wanted)):
            return self._moved_between(value, dims, *self.layouts(held, wanted), why or _kind(held, wanted))
        pieces = [(self.range(h), self.range(w)) for h, w in zip(held, wanted, strict=True)]
        if all(h == w for h, w in pieces):
            return self.renamed(value, dims)
        slices = ", ".join(":" if h == w else f"{w[0] - h[0]}:{max(w[1], w[0]) - h[0]}" for h, w in pieces)
        return self._by_factors(value, dims, held, wanted, lambda block: f"{block}[{slices}]")

    def _by_factors(
        self, value: Value, dims: Dims, held: Factors, wanted: Factors, step: Callable[[str], str]
    ) -> Value:
        """What a step makes of the value's block, seen with a dim for each factor."""
        self._materialise(value)
        made = self.new(dims, value.dtype, value.grad)
        inside, outside = (local_shape(tuple((d,) for d in f), self.grid, self.index) for f in (held, wanted))
        text = step(value.name if inside == self.local(value.dims) else f"{value.name}.reshape({inside})")
        back = "" if outside == self.local(made.dims) else f".reshape({self.local(made.dims)})"
        self.emit(f"{made.name} = {text}{back}", [value.name])
        return made

    def _moved_between(self, value: Value, dims: Dims, X: Layout, Y: Layout, kind: str) -> Value:
        """The value that the operator between two layouts of factors makes."""
        return self._by_factors(
            value, dims, X.dims, Y.dims, lambda block: f"{self.operator(X, Y, value, kind)}({block})"
        )

    def layouts(self, held: tuple[Dim, ...], wanted: tuple[Dim, ...]) -> tuple[Layout, Layout]:
        """Source and target of a movement; ranks that differ along an axis whose cuts stay, or hold other copies, keep apart."""
        moved = {a for h, w in zip(held, wanted, strict=True) if h != w or h.overlaps for a in h.axes}
        keys = tuple(a for a, n in enumerate(self.grid.shape) if n > 1 and a not in moved)
        return Layout(self.grid, held, keys), Layout(self.grid, wanted, keys)

    def between(self, X: Layout, Y: Layout, value: Value, kind: str) -> Operator | None:
        """The operator between two layouts, for blocks such as those of the value; None in a program that is only looked at."""
        operator = None
        if self.transport is not None:
            if (X, Y) not in self._plans:
                self._plans[X, Y] = plan(X, Y, self.rank)
            operator = Operator(self._plans[X, Y], self.transport, self.path or self.label, graph=value.grad)
        self.movements.append(Movement(self.path, kind, X, Y, value.dtype, value.grad, operator))
        return operator

    def operator(self, X: Layout, Y: Layout, value: Value, kind: str) -> str:
        """The name in the program of the operator between two layouts."""
        operator = self.between(X, Y, value, kind)
        return self.constant(operator and (operator if value.grad else operator.apply), kind)

    def received(self, value: Value, dims: Dims) -> int:
        """The bytes that the fullest of up to 16 ranks gets from others when a value is moved, the same on all ranks."""
        if value.make is not None:
            return 0
        pairs = [_alike(h, w) or ((), (uncut(size_of(w)),)) for h, w in zip(value.dims, dims, strict=True)]
        found, grid = 0, self.grid
        for rank in grid.ranks[:: -(-grid.size // 16)]:
            index = grid.index(rank)
            assert index is not None
            block = common = 1
            for held, wanted in pairs:
                for i, dim in enumerate(wanted):
                    start, stop = range_at(dim, grid, index)
                    low, high = range_at(held[i], grid, index) if held else (stop, start)
                    block *= max(stop - start, 0)
                    common *= max(min(stop, high) - max(start, low), 0)
            found = max(found, block - common)
        return found * value.dtype.itemsize

    def add_up(self, value: Value, dims: Dims) -> Value:
        """The value in a layout, of parts: points that several ranks hold in theirs are added up."""
        if value.dims == dims:
            return value
        held, wanted = (tuple(dim for factors in d for dim in factors) for d in (value.dims, dims))
        kind = "all_reduce" if all_axes(dims) < all_axes(value.dims) else "sum"
        return self._moved_between(value, dims, *self.layouts(held, wanted), kind)

    def sum_over(self, value: Value, axes: Iterable[int], dims: Dims | None = None, is_shown: bool = False) -> Value:
        """The sum over axes along which the ranks hold parts: a copy along them, or in a layout that they cut.

        If `is_shown` the gradient that each rank has of a copy is the whole one, and backward does not communicate.
        """
        axes = [a for a in axes if self.grid.shape[a] > 1]
        dims = value.dims if dims is None else tuple(map(merged, dims))
        if not axes:
            return self.move(value, dims)
        pairs = [_alike(h, w) for h, w in zip(value.dims, dims, strict=True)]
        if None in pairs:
            return self.move(self.sum_over(value, axes), dims)
        held, wanted = (tuple(dim for pair in pairs for dim in pair[side]) for side in (0, 1))  # type: ignore[index]
        moved = {a for h, w in zip(held, wanted, strict=True) if not _is_within(h, w) for a in h.axes}
        keys = tuple(a for a, n in enumerate(self.grid.shape) if n > 1 and a not in {*axes, *moved})
        X, Y = Layout(self.grid, held, keys), Layout(self.grid, wanted, keys)
        kind = "all_reduce" if X == Y else "reduce_scatter"
        if not is_shown:
            return self._moved_between(value, dims, X, Y, kind)
        self.movements.append(Movement(self.path, kind, X, Y, value.dtype, False, None))
        team, reduce = self.constant(self.team(axes), "team"), self._shared(reduce_from_team)
        return self._by_factors(value, dims, X.dims, Y.dims, lambda block: f"{reduce}({block}, {team})")

    @property
    def feature_axes(self) -> tuple[int, ...]:
        """The axes that may cut channels of weights."""
        return feature_axes(self.grid)

    def free_features(self, value: Value) -> tuple[int, ...]:
        """Those of them along which the ranks hold copies of a value."""
        return tuple(a for a in self.free_axes(all_axes(value.dims)) if a in self.feature_axes)

    def team(self, axes: Iterable[int]) -> Team | None:
        """The ranks that differ from this one along some axes alone; None for a program that is only looked at."""
        fixed = {a: i for a, i in enumerate(self.index) if a not in set(axes)}
        return None if self.transport is None else self.transport.team(self.grid.members(fixed))

    # Layouts

    def free_axes(self, used: Iterable[int]) -> tuple[int, ...]:
        """The axes longer than one that are not used."""
        used = set(used)
        return tuple(a for a, n in enumerate(self.grid.shape) if n > 1 and a not in used)

    def whole(self, value: Value, why: str = "") -> Value:
        """The value whole on every rank."""
        return self.move(value, tuple((uncut(n),) for n in value.shape), why)

    def wholly(self, value: Value, dims: Iterable[int], why: str = "", spread: bool = True) -> Value:
        """The value with some dims whole; the axes that cut them go to cut others, if they can and `spread`."""
        chosen = {d % value.ndim for d in dims}
        loose = value.axes(*sorted(chosen))
        wanted = value.with_dims({d: uncut(size_of(value.dims[d])) for d in chosen})
        for axis in loose if spread else ():
            wanted = self.placed(wanted, axis, chosen)
        return self.move(value, wanted, why)

    def placed(self, dims: Dims, axis: int, taboo: Iterable[int] = (), crowded: bool = False) -> Dims:
        """The dims, one of which the axis cuts too: that of its number, or else that with most points a part.

        Each part has a point, unless it is `crowded`.
        """
        best: tuple[tuple[bool, float], int] | None = None
        for d, factors in enumerate(dims):
            parts = self.parts((*axes_of(factors), axis))
            is_full = size_of(factors) >= parts
            if d in taboo or len(factors) > 1 or not (is_full or crowded):
                continue
            is_home = is_full and len(dims) == self.grid.dim and d == axis and not axes_of(factors)
            score = is_home, size_of(factors) / parts
            if best is None or score > best[0]:
                best = score, d
        if best is None:
            return dims
        (factor,) = dims[best[1]]
        changed = (cut(length_of(factor), (*factor.axes, axis), self.grid),)
        return tuple(changed if d == best[1] else factors for d, factors in enumerate(dims))

    def even(self, dims: Dims) -> Dims:
        """The dims in balanced blocks, but for those of several factors."""
        return tuple((cut(length_of(f[0]), f[0].axes, self.grid),) if len(f) == 1 else f for f in dims)

    def spread_home(self, value: Value, dims: Iterable[int]) -> Value:
        """The value, whose whole dims are cut along the axes of their numbers if these cut nothing: a slice."""
        free = self.free_axes(all_axes(value.dims)) if value.ndim == self.grid.dim else ()
        chosen = [d for d in dims if d in free and not value.axes(d) and value.shape[d] >= self.grid.shape[d]]
        return self.move(value, value.with_dims({d: cut(value.shape[d], (d,), self.grid) for d in chosen}), "slice")

    def spread(self, value: Value, taboo: Iterable[int] = (), least: int = 2**14) -> Value:
        """A large value that is copied along some axes, cut along them too: each rank keeps a slice."""
        dims = value.dims
        if math.prod(value.shape) >= least:
            for axis in self.free_axes(all_axes(dims)):
                dims = self.placed(dims, axis, {d % value.ndim for d in taboo})
        return self.move(value, dims, "slice")

    def plain(self, value: Value, dims: Iterable[int] | None = None) -> Value:
        """The value with some dims (None: all) of one factor each."""
        chosen = range(value.ndim) if dims is None else dims
        many = [d for d in chosen if len(value.dims[d]) > 1]
        return self.wholly(value, many) if many else value


def nothing(values: Sequence[torch.Tensor], shape: Shape, dtype: torch.dtype, grad: bool, linear: bool) -> torch.Tensor:
    """An empty block of a local call's output."""
    used = [t for t in values if t.requires_grad] if grad and torch.is_grad_enabled() else []
    if used:
        return connected_zeros(shape, *used, linear=linear).to(dtype)
    return torch.zeros(shape, dtype=dtype, device=values[0].device if values else None)


def _alike(held: Factors, wanted: Factors) -> tuple[Factors, Factors] | None:
    """The factors of one dim before and after a movement, of the same lengths; None where there are none."""
    if len(held) == len(wanted) == 1 or tuple(map(length_of, held)) == tuple(map(length_of, wanted)):
        return held, wanted
    lengths = common_lengths([length_of(d) for d in held], [length_of(d) for d in wanted])
    both = lengths and (refined(held, lengths), refined(wanted, lengths))
    return both if both and None not in both else None  # type: ignore[return-value]


def _is_within(held: Dim, wanted: Dim) -> bool:
    """Whether each range that is wanted is a part of the one that is held at the same index along the axes of both."""
    each, rest = divmod(len(wanted.ranges), len(held.ranges))
    if rest or wanted.axes[: len(held.axes)] != held.axes:
        return False
    whole = (held.ranges[i // each] for i in range(len(wanted.ranges)))
    return all(a >= b or (low <= a and b <= high) for (a, b), (low, high) in zip(wanted.ranges, whole, strict=True))


def _between(held: Factors, wanted: Factors, others: Iterable[int], grid: Grid) -> Factors:
    """One dim on the way between cuts without common factors: along the first axes of one of them, whole if need be.

    Not along axes that cut the tensor's other dims.
    """
    n = size_of(held)
    for axes in (axes_of(held), axes_of(wanted)):
        for k in range(len(axes) - 1, 0, -1):
            dim = (cut(n, axes[:k], grid),)
            if not set(others) & set(axes[:k]) and _alike(held, dim) and _alike(dim, wanted):
                return dim
    return (uncut(n),)


def _kind(held: Sequence[Dim], wanted: Sequence[Dim]) -> str:
    """A word for a movement."""
    if all(h.axes == w.axes for h, w in zip(held, wanted, strict=True)):
        return "halo" if any(w.overlaps for w in wanted) else "shift"
    before, after = ({a for dim in dims for a in dim.axes} for dims in (held, wanted))
    return "gather" if after < before else "recut"
