"""From a model's operations to one rank's program: a rule for each, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from distdl_lite.factors import Dims, all_axes, blocks, feature_axes, uncut
from distdl_lite.grid import Grid
from distdl_lite.model.capture import Captured, Feed, name_of, operation_of, path_of, place_of
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import RULES, NoRule, Operation, Rule, Value, values_in
from distdl_lite.transport import Transport

Axes = Sequence[int | None]  # the grid's axis that cuts each dim of a tensor


def default_axes(dims: int, dtype: torch.dtype, grid: Grid) -> Axes:
    """The axes along which a tensor of the user's of so many dims is cut where nobody says.

    One to one if it has a dim for each axis; of integers with one dim fewer, such as class indices, all but the channels';
    of any other the first dim alone, along the batch axis.
    """
    if dims == grid.dim:
        return tuple(range(dims))
    if dims == grid.dim - 1 and dims > 1 and not (dtype.is_floating_point or dtype.is_complex):
        return (0, *range(2, grid.dim))
    return (0, *[None] * (dims - 1)) if dims else ()


def fitting_axes(axes: Axes | None, dims: int, dtype: torch.dtype, grid: Grid) -> Axes:
    """The axes of a tensor, or those of `default_axes` for None. Raises ValueError if they do not fit it."""
    if axes is None:
        return default_axes(dims, dtype, grid)
    cutting = [a for a in axes if a is not None] if isinstance(axes, (tuple, list)) and len(axes) == dims else [-1]
    if not set(cutting) <= set(range(grid.dim)) or len(set(cutting)) < len(cutting):
        shape = f"a tensor of {dims} dims over a grid of shape {grid.shape}"
        raise ValueError(f"the axes {axes!r} do not fit {shape}: an axis or None for each dim, no axis twice")
    return axes


def check_used(axes: Iterator[Axes | None]) -> None:
    """Raise ValueError if `in_axes` goes on after the last tensor."""
    if left := list(axes):
        raise ValueError(f"in_axes has {left}, for which no tensor was passed")


@dataclass
class Program:
    """What one rank does for one structure.

    Attributes
    ----------
    compiler : Compiler
    feeds : list of (Feed, Value)
        The inputs that the program takes, in order.
    outputs : list of (name of a buffer that it is for, or None, Value or plain value)
    operations : list of (path, name, Value)
        Those of the model, with their first output.
    gathered : list of (path, name, place)
        Those that have no rule, or decline the case: their inputs are made whole.
    """

    compiler: Compiler
    feeds: list[tuple[Feed, Value]] = field(default_factory=list)
    outputs: list[tuple[str | None, Any]] = field(default_factory=list)
    operations: list[tuple[str, str, Any]] = field(default_factory=list)
    gathered: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def arguments(self) -> tuple[list[Value], list[Value]]:
        """The values that the program takes, and those that it returns."""
        return [v for _, v in self.feeds], [v for _, v in self.outputs if isinstance(v, Value)]


def compiled(
    captured: Captured,
    grid: Grid,
    rank: int,
    transport: Transport | None,
    inputs: Sequence[tuple[Dims, bool] | None],
    *,
    frozen: frozenset[str] = frozenset(),
    placed: Mapping[str, Dims] = MappingProxyType({}),
    replicas: Callable[[str, Dims], Any] | None = None,
    grads: bool = True,
    strict: bool = False,
    out_axes: Sequence[Axes | None] | None = None,
    cut: Mapping[str, Axes] | None = None,
    rules: Mapping[str, Rule] | None = None,
    device: str = "cpu",
) -> Program:
    """The program of one rank of a grid.

    Parameters
    ----------
    captured : Captured
    inputs : sequence of (dims, requires_grad), None for a leaf that is no tensor
    frozen : frozenset of str
        Names of parameters that require no gradient.
    placed : mapping from name to dims
        How parameters lie that an earlier program has laid out.
    replicas : callable
        From a parameter's name and dims to the ranks that hold the same block.
    grads : bool
        Whether autograd records.
    strict : bool
        Whether an operation without a rule is refused.
    out_axes : sequence of axes, optional
        How each output is cut; None as `default_axes` says.
    cut : mapping from a module's path to axes, optional
        How the outputs of modules are cut.
    rules : mapping from an operation's name to a rule, optional
        In place of the registered ones.
    device : str
        The kind of device that it runs on.

    Raises
    ------
    RuntimeError
        If an operation cannot be run, or without a rule under `strict`; the text names module and line.
    """
    ends, by_name = _ends(captured, cut or {}), {**RULES, **(rules or {})}

    def value_of(c: Compiler, feed: Feed) -> Any:
        """What an input of the graph is in the program; None if nobody uses it."""
        example, kind, name = feed.node.meta.get("val"), feed.kind, feed.target
        if not isinstance(example, torch.Tensor):
            return example
        dims: Dims = tuple((uncut(n),) for n in example.shape)
        if kind == "user_input":
            dims, grad = inputs[name]  # type: ignore[misc]
            return c.new(dims, example.dtype, grads and grad, feed.node.name)
        if not feed.node.users and not any(node is feed.node for _, node in captured.outputs):
            return None
        if kind != "parameter":
            return c.new(dims, example.dtype, False, feed.node.name)
        grad = grads and name not in frozen and (example.is_floating_point() or example.is_complex())
        find = partial(replicas, name) if c.transport else _no_replicas
        return c.parameter(feed.node.name, placed.get(name, dims), example.dtype, grad, find, name not in placed)

    def in_turn(transport: Transport | None, wishes: Mapping[str, Any]) -> Program:
        """The program that rules make of one operation after the other."""
        c = Compiler(grid, rank, transport, "distribute", device)
        c.copies_few = True
        c.wishes.update(wishes)
        program, known = Program(c), {feed.node: value_of(c, feed) for feed in captured.feeds}
        program.feeds += [(feed, v) for feed in captured.feeds if isinstance(v := known[feed.node], Value)]
        for node in captured.nodes:
            c.path, c.now = path_of(node), node.name
            args, kwargs = (map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
            made = _step(program, node, args, dict(kwargs), strict, by_name)
            known[node] = c.move(made, blocks(made.shape, ends[node], grid), "cut") if node in ends else made
        c.path = "outputs"
        axes_of_outputs = iter(out_axes or ())
        for buffer, node in captured.outputs:
            value = known[node] if isinstance(node, Node) else node
            if isinstance(value, Value) and buffer is not None:
                value = c.whole(value)
            elif isinstance(value, Value):
                axes = fitting_axes(next(axes_of_outputs, None), value.ndim, value.dtype, grid)
                value = c.move(value, blocks(value.shape, axes, grid), "output")
            program.outputs.append((buffer, value))
        return program

    wishes: dict[str, Any] = {}
    # Looked at first if weights may be cut, as what comes later may wish that products before it were cut otherwise.
    for _ in range(4 if feature_axes(grid) else 0):
        wished = in_turn(None, wishes).compiler.wishes
        if wished == wishes:
            break
        wishes = wished
    return in_turn(transport, wishes)


def _ends(captured: Captured, cut: Mapping[str, Axes]) -> dict[Node, Axes]:
    """The last operations of the modules whose outputs the user cuts."""
    ends: dict[str, Node] = {}
    for node in captured.nodes:
        ends.update({path: node for path in cut if f"{path_of(node)}.".startswith(f"{path}.")})
    if missing := sorted(cut.keys() - ends.keys()):
        raise ValueError(f"cut: the model has no modules {missing}, or they do nothing")
    return {node: cut[path] for path, node in ends.items()}


def _no_replicas(dims: Dims) -> None:
    """In a program that is only looked at."""


def _step(
    program: Program, node: Node, args: Any, kwargs: dict[str, Any], strict: bool, rules: Mapping[str, Rule]
) -> Any:
    """The values that one operation makes."""
    c, name = program.compiler, name_of(node)
    if name == "getitem":
        return args[0][args[1]]
    if name.startswith(("_assert", "sym_")):
        return None
    if not isinstance(node.target, torch._ops.OpOverload):
        raise RuntimeError(f"{place_of(node)}: {name} is not supported")
    args = [list(a) if isinstance(a, (list, tuple)) else a for a in args]
    op = operation_of(node)
    rule = rules.get(name) or (rules["pointwise"] if torch.Tag.pointwise in node.target.tags else None)
    made: Any = None
    if rule is not None:
        with suppress(NoRule):
            made = rule(c, op, *args, **kwargs)
    if made is None:
        made = _gathered(program, node, op, args, kwargs, strict)
    first = made[0] if isinstance(made, (list, tuple)) else made
    program.operations.append((c.path, name, first))
    return made


def _gathered(program: Program, node: Node, op: Operation, args: Any, kwargs: dict[str, Any], strict: bool) -> Any:
    """An operation without a rule: its inputs are made whole, if they are not, and every rank runs all of it."""
    c = program.compiler
    given = dict(zip((a.name for a in node.target._schema.arguments), args, strict=False))
    # A recurrent network draws between its layers alone.
    draws = bool(given.get("dropout", 1) and given.get("train", True))
    if torch.Tag.nondeterministic_seeded in node.target.tags and draws:
        raise RuntimeError(f"{place_of(node)}: {op.name} draws random numbers, and has no rule")
    if any(all_axes(value.dims) for value in values_in((args, tuple(kwargs.values())))):
        if strict:
            raise RuntimeError(f"{place_of(node)}: {op.name} has no rule for this case, and would be gathered")
        program.gathered.append((c.path, op.name, place_of(node)))

    def pull(value: Any) -> Any:
        if isinstance(value, Value):
            return c.whole(value, "gather")
        return [pull(v) for v in value] if isinstance(value, (list, tuple)) else value

    dims = [tuple((uncut(n),) for n in shape) for shape, *_ in op.outputs]
    made = c.calls(
        node.target, *map(pull, args), dims=dims, dtypes=[t for _, t, _ in op.outputs], one=op.is_one,
        **{k: pull(v) for k, v in kwargs.items()},
    )  # fmt: skip
    return made[0] if op.is_one else made
