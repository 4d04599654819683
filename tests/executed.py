"""Rules run without ranks: the programs of all ranks of a grid, line by line in one thread, their movements between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from random import Random
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distdl_lite.factors import Dims, length_of, merged, range_at, uncut
from distdl_lite.grid import Grid
from distdl_lite.layout import Dim, Shape, ranges_of
from distdl_lite.model import rules as rules  # registers them
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import RULES, Operation, Value, values_in
from distdl_lite.plan import plan
from distdl_lite.testing import simulate


class _Moves(Exception):
    """Raised where a line moves a block that the other ranks have not come to yet."""


class _Movement:
    """What stands for an operator in a rank's program."""

    result: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.result is None:
            raise _Moves(x)
        return self.result


class Recorder(Compiler):
    """The program of one rank, with what it has computed."""

    def __init__(self, grid: Grid, rank: int, *options: Any) -> None:
        super().__init__(grid, rank, *options)
        self.blocks: dict[str, Any] = {}
        self.moves: list[_Movement] = []
        self.next = 0

    def operator(self, X: Any, Y: Any, value: Value, kind: str) -> str:
        name = super().operator(X, Y, value, kind)
        self.names[name] = _Movement()
        self.moves.append(self.names[name])
        return name

    def advance(self) -> torch.Tensor | None:
        """Run up to the next movement, whose block is returned, or the end."""
        for name, thing in self.names.items():
            self.blocks.setdefault(name, thing)
        while self.next < len(self.lines):
            try:
                exec(self.lines[self.next].text, self.blocks)
            except _Moves as moves:
                return moves.args[0]
            self.next += 1
        return None


def execute(ranks: Sequence[Recorder]) -> list[Any]:
    """Run the programs of all ranks; returns the movements, which are the same on all."""
    for c in ranks[1:]:
        assert c.movements == ranks[0].movements, "the ranks do not move alike"
    for number, movement in enumerate(ranks[0].movements):
        blocks = {c.rank: c.advance() for c in ranks}
        plans = [plan(movement.X, movement.Y, c.rank) for c in ranks]
        for own in plans:
            block = blocks[own.rank]
            assert block is not None, "a rank ends before a movement"
            assert tuple(block.shape) == own.shape_in, movement
            assert block.dtype is movement.dtype, movement
            assert movement.grad or not block.requires_grad, f"the movement loses a gradient: {movement}"
        moved = simulate(plans, blocks, lambda shape, dtype=movement.dtype: torch.zeros(shape, dtype=dtype))
        for c in ranks:
            y = moved[c.rank]
            # An operator with a graph gives every rank a node, also one that receives nothing.
            c.moves[number].result = y.requires_grad_() if movement.grad and not y.requires_grad else y
    for c in ranks:
        assert c.advance() is None, "a rank moves more than was said"
    return ranks[0].movements


def block_of(whole: torch.Tensor, dims: Dims, grid: Grid, index: Sequence[int]) -> torch.Tensor:
    """A view of the points of a whole tensor that the rank at an index holds, one dim for each factor."""
    factors = [dim for of_dim in dims for dim in of_dim]
    slices = [slice(*range_at(dim, grid, index)) for dim in factors]
    return whole.view([length_of(dim) for dim in factors])[tuple(slices)]


def random_grid(rng: Random, most: int = 6) -> Grid:
    shape: list[int] = []
    for _ in range(rng.randint(1, 4)):
        shape.append(rng.choice([n for n in (1, 2, 2, 3) if n * math.prod(shape) <= most]))
    return Grid(tuple(shape), tuple(range(math.prod(shape))))


def random_cuts(rng: Random, length: int, parts: int) -> list[int]:
    """Balanced, or anywhere, with empty parts too."""
    if rng.random() < 0.5:
        return [length * i // parts for i in range(parts + 1)]
    return [0, *sorted(rng.randint(0, length) for _ in range(parts - 1)), length]


def random_dims(rng: Random, grid: Grid, shape: Shape) -> Dims:
    """How a tensor may lie: axes that cut no dim, several that cut one, dims of two factors."""
    axes_by_dim: list[list[int]] = [[] for _ in shape]
    for axis, n in enumerate(grid.shape):
        if n > 1 and shape and rng.random() < 0.8:
            home = axis < len(shape) and rng.random() < 0.5
            axes_by_dim[axis if home else rng.randrange(len(shape))].append(axis)
    dims = []
    for length, axes in zip(shape, axes_by_dim, strict=True):
        rng.shuffle(axes)
        factors = [(length, axes)]
        divisors = [m for m in range(2, length) if length % m == 0]
        if axes and divisors and rng.random() < 0.3:
            outer, at = rng.choice(divisors), rng.randint(0, len(axes))
            factors = [(outer, axes[:at]), (length // outer, axes[at:])]
        dims.append(merged(_factor(rng, grid, n, own) for n, own in factors))
    return tuple(dims)


def _factor(rng: Random, grid: Grid, length: int, axes: Sequence[int]) -> Dim:
    if not axes:
        return uncut(length)
    return Dim(ranges_of(random_cuts(rng, length, math.prod(grid.shape[a] for a in axes))), tuple(axes))


def in_some_order(rng: Random, block: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order of memory, or with gaps."""
    order = list(range(block.dim()))
    rng.shuffle(order)
    if rng.random() < 0.5:
        return block.permute(order).contiguous().permute([order.index(d) for d in range(block.dim())])
    if block.dim() and rng.random() < 0.5:
        return torch.cat([block, block], -1)[..., : block.shape[-1]]
    return block.contiguous()


def has_gradient(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


class Case:
    """One operation on whole tensors, and on blocks of them that lie over a grid.

    `made` is what the rule gives; it may raise NoRule.
    """

    def __init__(self, rng: Random, overload: Any, *args: Any, grads: bool = True, **options: Any) -> None:
        self.rng, self.grid = rng, random_grid(rng)
        leaves, spec = pytree.tree_flatten((list(args), options))
        self.whole = [
            leaf.detach().clone(memory_format=torch.contiguous_format)
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
        ]
        self.grad = [grads and has_gradient(t) and rng.random() < 0.8 for t in self.whole]
        for t, grad in zip(self.whole, self.grad, strict=True):
            t.requires_grad_(grad)
        wholes = iter(self.whole)
        args, options = pytree.tree_unflatten(
            [next(wholes) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
        )
        serial = overload(*args, **options)
        is_one = isinstance(serial, torch.Tensor)
        self.serial = [serial] if is_one else list(serial)
        outputs = tuple((tuple(t.shape), t.dtype, t.stride()) for t in self.serial)
        self.op = Operation(overload.overloadpacket.__name__, overload, outputs, is_one)
        self.lies = [random_dims(rng, self.grid, tuple(t.shape)) for t in self.whole]
        self.ranks = [Recorder(self.grid, rank) for rank in self.grid.ranks]
        self.inputs = [
            [c.new(d, t.dtype, g, "x") for d, t, g in zip(self.lies, self.whole, self.grad, strict=True)]
            for c in self.ranks
        ]
        rule = RULES.get(self.op.name) or RULES["pointwise"]
        self.made: list[list[Value]] = []
        for c, values in zip(self.ranks, self.inputs, strict=True):
            given = iter(values)
            own, named = pytree.tree_unflatten(
                [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
            )
            made = rule(c, self.op, *own, **named)
            self.made.append([made] if isinstance(made, Value) else list(made))
            for value in values_in(self.made[-1]):
                c._materialise(value)

    def check(self, exact: bool = True) -> list[Any]:
        """Compare outputs and gradients with the serial ones; returns the movements."""
        leaves = [
            [in_some_order(self.rng, block_of(t.detach(), d, self.grid, c.index).reshape(c.local(d))).requires_grad_(g)
             for t, d, g in zip(self.whole, self.lies, self.grad, strict=True)] for c in self.ranks
        ]  # fmt: skip
        for c, blocks, values in zip(self.ranks, leaves, self.inputs, strict=True):
            # As inside a network, where no block is a leaf that a local call could not change in place.
            c.blocks |= {v.name: t.view_as(t) for v, t in zip(values, blocks, strict=True)}
        movements = execute(self.ranks)
        assert len({len(made) for made in self.made}) == 1
        assert len(self.made[0]) == len(self.serial)
        outputs, gradients, serial_gradients = [], [], []
        for number, whole in enumerate(self.serial):
            if self.made[0][number] is None:
                continue
            parts = None
            if whole.requires_grad:
                serial_gradients.append(
                    (whole, torch.randint(-3, 4, whole.shape, generator=_generator(self.rng)).to(whole.dtype))
                )
                parts = self._parts(serial_gradients[-1][1], self.made[0][number].dims)
            for c, made in zip(self.ranks, self.made, strict=True):
                value = made[number]
                y = self._compared(c, value, self.made[0][number], whole, exact)
                if parts is not None and y.requires_grad:
                    outputs.append(y)
                    gradients.append(parts[c.rank].reshape(y.shape))
        self._compare_gradients(leaves, outputs, gradients, serial_gradients, exact)
        return movements

    def _compared(self, c: Recorder, value: Value, first: Value, whole: torch.Tensor, exact: bool) -> torch.Tensor:
        y = c.blocks[value.name]
        assert (value.dims, value.dtype, value.grad) == (first.dims, first.dtype, first.grad)
        assert value.shape == tuple(whole.shape), (value.shape, whole.shape)
        assert tuple(y.shape) == c.local(value.dims), (tuple(y.shape), value.dims)
        assert y.dtype is value.dtype is whole.dtype, (y.dtype, value.dtype, whole.dtype)
        assert value.grad == y.requires_grad == whole.requires_grad, (value.grad, y.requires_grad, whole.requires_grad)
        expected = block_of(whole.detach().contiguous(), value.dims, self.grid, c.index).reshape(y.shape)
        compared(y.detach(), expected, exact)
        return y

    def _parts(self, gradient: torch.Tensor, dims: Dims) -> list[torch.Tensor]:
        """The gradients of the ranks' blocks, of which copies have parts that add up."""
        parts = []
        last: dict[Any, int] = {}
        for rank in self.grid.ranks:
            last[self._place(dims, rank)] = rank
        left: dict[Any, torch.Tensor] = {}
        for rank in self.grid.ranks:
            index, place = self.grid.index(rank), self._place(dims, rank)
            full = block_of(gradient, dims, self.grid, index)
            rest = left.setdefault(place, full.clone())
            part = (
                rest.clone()
                if last[place] == rank
                else torch.randint(-2, 3, full.shape, generator=_generator(self.rng)).to(full.dtype)
            )
            left[place] = rest - part
            parts.append(part)
        return parts

    def _place(self, dims: Dims, rank: int) -> tuple[int, ...]:
        """The index of a rank along the axes that cut."""
        index = self.grid.index(rank)
        return tuple(index[a] for a in sorted({a for dim in chain(*dims) for a in dim.axes}))

    def _compare_gradients(self, leaves: Any, outputs: Any, gradients: Any, serial: Any, exact: bool) -> None:
        chosen = [i for i, grad in enumerate(self.grad) if grad]
        if not chosen or not serial:
            return
        wanted = torch.autograd.grad(
            [y for y, _ in serial], [self.whole[i] for i in chosen], [g for _, g in serial], allow_unused=True
        )
        mine = [blocks[i] for blocks in leaves for i in chosen]
        found = torch.autograd.grad(outputs, mine, gradients, allow_unused=True)
        for k, (i, expected) in enumerate(zip(chosen, wanted, strict=True)):
            total = torch.zeros_like(self.whole[i], requires_grad=False)
            for rank, own in zip(self.grid.ranks, found[k :: len(chosen)], strict=True):
                if own is not None:
                    place = block_of(total, self.lies[i], self.grid, self.grid.index(rank))
                    place += own.reshape(place.shape)
            compared(total, torch.zeros_like(total) if expected is None else expected, exact)


def compared(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    tolerance = (
        0.0
        if exact
        else 2e-2
        if found.dtype in (torch.bfloat16, torch.float16)
        else 1e-4
        if found.dtype is torch.float32
        else 1e-9
    )
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _generator(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))
