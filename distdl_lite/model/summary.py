"""What a network of layers moves, computes and holds, found by running some of its ranks without data.

Layers learn of other ranks by votes and by lengths along the axes of grids. So of a large grid it is enough that those ranks run
that have, together, every index on every axis; each has fake tensors, and its operators move nothing.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distdl_lite.factors import local_shape
from distdl_lite.grid import Grid
from distdl_lite.layout import Shape
from distdl_lite.model.compile import Axes
from distdl_lite.model.distributed import Distributed
from distdl_lite.model.dry import DryTransport, entered, without_numbers
from distdl_lite.model.dry_layers import Seen, partitions_of, seen
from distdl_lite.model.report import (
    ALL_UP_TO,
    TYPICAL,
    Machine,
    Report,
    Row,
    Traffic,
    cut_inputs,
    example,
    most,
    report,
    representatives,
    telling_order,
)
from distdl_lite.nn.module import Module
from distdl_lite.partition import CartesianPartition, Partition, integers_of, union_of_teams
from distdl_lite.transport import Team, Transport
from distdl_lite.transport.threads import ThreadTransport, World, in_turn


def summary(
    net: torch.nn.Module | Callable[[CartesianPartition], torch.nn.Module],
    inputs: Any,
    P: Partition | Sequence[int],
    *,
    in_axes: Sequence[Axes | None] | None = None,
    machine: Machine = TYPICAL,
) -> Report:
    """What a network over a grid moves, computes and holds, module by module; no data and no memory for activations are needed.

    Parameters
    ----------
    net : torch.nn.Module or callable
        A model of plain torch, or one that `distribute` has made: then this is their `report`. Or a function of a partition
        that builds a network of distributed layers over it: then no ranks are needed, and the grid may have any number of
        them. Or such a network, already built: then the ranks of its partitions and of `P` call this together.
        In evaluation mode it has no backward.
    inputs : tuple of int, torch.Tensor, or sequence of them
        As of `report`: global shapes, or tensors of global shapes.
    P : Partition or sequence of int
        The grid over which the inputs lie in balanced blocks, or its shape.
    in_axes : sequence of axes, optional
        For each input the axis of `P` that cuts each dim, as of `distribute`.
    machine : Machine
        For the predicted times.

    Returns
    -------
    Report
        Bytes and messages are those that `count` would count on the rank with the most of them, in a second step. Memory is that
        of the rank that takes most. Of a grid of more than 64 ranks, those with the second index along all axes but one are
        looked at, and where they are few, the corners and those beside them.

    Raises
    ------
    TypeError
        If `net` is neither; or if it is a network of layers already built, and `P` no partition.
    ValueError
        If the axes do not fit an input, or a compiled network lies over another grid.
    RuntimeError
        If more than 64 ranks would tell each other what follows from no axis of a grid, such as a compiled network among layers.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> import distdl_lite.nn as dnn
    >>> def build(P):
    ...     return torch.nn.Sequential(dnn.DistributedConv2d(P, 3, 8, 3, padding=1), torch.nn.ReLU())
    >>> found = dl.summary(build, (1, 3, 32000, 32000), (1, 1, 16, 16))
    >>> found.ranks, found.forward.messages, found.rows[1].path, found.rows[1].output
    (256, 8, '0', '(1, 8, 32000/16, 32000/16)')
    """
    one = isinstance(inputs, (torch.Tensor, Partition)) or (
        isinstance(inputs, tuple) and all(isinstance(n, int) for n in inputs)
    )
    given = [inputs] if one else list(inputs)
    shape = P.shape if isinstance(P, Partition) else tuple(integers_of("P", P))
    if not callable(net):
        raise TypeError(f"summary: a network, or a function that builds one, is needed, not {net!r}")

    def build() -> Any:
        named = {"periods": P.periods, "of": P.names} if isinstance(P, CartesianPartition) else {}
        try:
            return net(Partition().grid(shape, **named))
        except TypeError as error:
            if not isinstance(net, type):
                raise
            way = f"a model of plain torch is passed itself, {net.__name__}(...), not its class"
            raise TypeError(f"summary: {net.__name__}(P) cannot be built: {error}; {way}") from error

    built = net if isinstance(net, torch.nn.Module) else _on_first(build, math.prod(shape))
    if isinstance(built, Distributed):
        if built.P.shape != shape:
            raise ValueError(f"summary: the network is compiled for a grid of shape {built.P.shape}, not {shape}")
        return built.report(*given, machine=machine)
    if not any(isinstance(module, Module) for module in built.modules()):
        if isinstance(net, type):
            raise TypeError(f"summary: {net.__name__} is of plain torch: pass {net.__name__}(...), not its class")
        return report(built, shape, *given, in_axes=in_axes, train=built.training, machine=machine)
    args = [example(x, built) for x in given]
    if built is not net:
        grids = [P.grid_of_ranks for P in partitions_of(built)]
        with telling_order(shape, args):
            ranks = _of_grid(build, args, Grid(shape, range(math.prod(shape))), in_axes, grids)
    elif isinstance(P, Partition):
        ranks = _together(built, args, P, in_axes)
    else:
        raise TypeError(
            "summary: a network already built needs the partition of its input; or pass a function of a partition"
        )
    return _reported(ranks, shape, machine)


def _on_first(build: Callable[[], Any], size: int) -> torch.nn.Module:
    """The network as the first of so many ranks builds it."""

    def body() -> Any:
        with without_numbers():
            return build()

    (net,) = run(size, [0], body).values()
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"summary: a function of a partition that returns a network is needed; it returns {net!r}")
    return net


def run(size: int, present: Sequence[int] | None, body: Callable[[], Any]) -> dict[int, Any]:
    """Run a function on some ranks of a world in which no tensor moves, or on all."""

    def transport(world: World, rank: int) -> Transport:
        return DryTransport(rank, size, ThreadTransport(world, rank))

    return in_turn(World(size, present), transport, body)


def _of_grid(
    build: Callable[[], Any], args: Sequence[Any], grid: Grid, in_axes: Any, grids: Iterable[Grid]
) -> list[Seen]:
    """What the ranks of a grid do, all or some of them; `grids` are those of the network's layers."""
    present = None if grid.size <= ALL_UP_TO else sorted(_enough(grid, grids))

    def body() -> Seen:
        P = Partition().grid(grid.shape)
        return _seen(build, args, P, P.team, in_axes, present)

    return list(run(grid.size, present, body).values())


def _enough(grid: Grid, grids: Iterable[Grid]) -> set[int]:
    """Ranks that have, together, every index on every axis of each grid; and some that may send or hold most."""
    chosen, some = {rank for one in (grid, *grids) for rank in _cross(one)}, representatives(grid)
    return chosen | {grid.rank(index) for index in some if len(some) <= ALL_UP_TO}


def _cross(grid: Grid) -> Iterator[int]:
    """The ranks on the lines along all axes through one that has neighbours on all sides, and a large block."""
    middle = [min(1, n - 1) for n in grid.shape]
    for axis, n in enumerate(grid.shape if grid.size else ()):
        yield from (grid.rank((*middle[:axis], i, *middle[axis + 1 :])) for i in range(n))


def _together(net: torch.nn.Module, args: Sequence[Any], P: Partition, in_axes: Any) -> list[Seen]:
    """What the ranks do on which the network runs; each copies its own part, without numbers."""
    world, team = P.world_transport, union_of_teams(P, *partitions_of(net))
    dry = DryTransport(world.rank, world.size, world)
    with entered(dry):
        mine = _seen(lambda: copied(net), args, P, dry.team(team.ranks), in_axes)
    return world.gather_objects(team, mine)  # type: ignore[no-any-return]


def _seen(
    make: Callable[[], Any], args: Sequence[Any], P: Partition, team: Team, in_axes: Any, present: Any = None
) -> Seen:
    """What this rank does with its blocks over the grid of `P` of whole arguments."""
    grid, (leaves, spec) = P.grid_of_ranks, pytree.tree_flatten(list(args))
    cuts = cut_inputs(args, grid, in_axes)

    def made() -> tuple[torch.nn.Module, Any]:
        for number, (dims, requires_grad) in cuts.items():
            shape = (0,) if P.index is None else local_shape(dims, grid, P.index)
            leaves[number] = torch.empty(shape, dtype=leaves[number].dtype).requires_grad_(requires_grad)
        return make(), pytree.tree_unflatten(leaves, spec)

    return seen(made, team, [(grid, dims) for dims, _ in cuts.values()], present)


def copied(net: torch.nn.Module) -> torch.nn.Module:
    """A copy over the ambient world. Tensors are made anew, without values; functions and classes are shared."""
    shared: list[Any] = []

    class Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, (torch.Tensor, type, FunctionType)):
                return None
            if isinstance(value, torch.Tensor):
                known = memo.get(id(value))
                new = torch.empty_like(value, requires_grad=value.requires_grad) if known is None else known
                is_parameter = isinstance(value, torch.nn.Parameter)
                value = memo[id(value)] = torch.nn.Parameter(new, value.requires_grad) if is_parameter else new
            shared.append(value)
            return len(shared) - 1

    class Reader(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            return shared[number]

    memo, written = dict[int, torch.Tensor](), io.BytesIO()
    Writer(written).dump(net)
    return Reader(io.BytesIO(written.getvalue())).load()  # type: ignore[no-any-return]


def _reported(ranks: Sequence[Seen], shape: Shape, machine: Machine) -> Report:
    """The report of the ranks that were looked at."""
    fullest = max(ranks, key=lambda one: one.weights.total() + int(machine.optimizer * one.gradients) + one.peak)
    busiest = max(ranks, key=lambda one: one.multiply_adds.total())
    work, weights = busiest.multiply_adds, fullest.weights.total()
    optimizer = int(machine.optimizer * fullest.gradients)
    outputs = {path: laid for one in ranks for path, laid in one.outputs.items() if laid[2]}
    known = [sum(one.outputs[path][1] for path in outputs if path in one.outputs) for one in ranks]
    total = sum(whole for _, _, whole, _ in outputs.values())
    sides = [[sum((both[side] for both in one.sent.values()), Traffic()) for one in ranks] for side in (0, 1)]
    return Report(
        grid=shape,
        rows=tuple(_rows(ranks, fullest, busiest)),
        forward=most(sides[0]),
        backward=most(sides[1]),
        multiply_adds=work.total() - work[None],
        backward_multiply_adds=work[None],
        touched=busiest.touched,
        weights=weights,
        gradients=fullest.gradients,
        optimizer=optimizer,
        kept=fullest.kept.total(),
        peak=weights + optimizer + fullest.peak,
        ratio=max(known) * math.prod(shape) / total if total else 1.0,
        machine=machine,
    )


def _rows(ranks: Sequence[Seen], fullest: Seen, busiest: Seen) -> Iterator[Row]:
    """Those of modules that do something themselves or hold nothing that does, in the order of their first calls."""
    layers = {path: called for one in ranks for path, called in one.layers.items()}
    for path in ["inputs", *layers, "gradients"]:
        sent = [one.sent[path] for one in ranks if path in one.sent]
        mine = (sent, busiest.multiply_adds[path], fullest.weights[path], fullest.kept[path])
        is_leaf = path in layers and not any(
            other != path and other.startswith(path and f"{path}.") for other in layers
        )
        if is_leaf or any(mine):
            laid = [one.outputs[path] for one in ranks if path in one.outputs]
            output, *_, cuts = max(laid, key=lambda one: one[1:3], default=("", 0, 0, ()))
            moved = Counter[str]()
            for one in ranks:
                moved |= one.movements.get(path, Counter())
            yield Row(
                path=path,
                operations=tuple(f"{n} {name}" if n > 1 else name for name, n in layers.get(path, Counter()).items()),
                output=output,
                movements=dict(moved),
                forward=most([forward for forward, _ in sent]),
                backward=most([backward for _, backward in sent]),
                multiply_adds=mine[1],
                weights=mine[2],
                kept=mine[3],
                gathered=(),
                cuts=cuts,
            )
