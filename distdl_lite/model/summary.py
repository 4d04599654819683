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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distdl_lite.factors import Dims, dims_of, local_shape, shape_of_dims
from distdl_lite.grid import Grid
from distdl_lite.layout import Shape
from distdl_lite.model.compile import Axes
from distdl_lite.model.distributed import Distributed
from distdl_lite.model.dry import DryTransport, Meter, entered
from distdl_lite.model.report import (
    ALL_UP_TO,
    TYPICAL,
    Both,
    Machine,
    Report,
    Row,
    Traffic,
    cut_inputs,
    cut_text,
    example,
    most,
    of_plan,
    report,
    representatives,
    summed,
)
from distdl_lite.nn.inputs import agreed_inputs, zero_volume_tensor
from distdl_lite.nn.module import Module
from distdl_lite.nn.movement import Movement
from distdl_lite.nn.rule_layer import Running
from distdl_lite.nn.work_grid import WorkGridLayer
from distdl_lite.partition import CartesianPartition, Partition, integers_of, union_of_teams
from distdl_lite.transport import Transport
from distdl_lite.transport.threads import ThreadTransport, World, in_turn

Make = Callable[[], tuple[torch.nn.Module, Sequence[Any]]]  # a network, and this rank's arguments


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
    >>> found = dl.summary(build, (1, 3, 64000, 64000), (1, 1, 32, 32))
    >>> found.ranks, found.forward.messages, found.rows[1].path, found.rows[1].output
    (1024, 8, '0', '(1, 8, 64000/32, 64000/32)')
    """
    one = isinstance(inputs, torch.Tensor) or (isinstance(inputs, tuple) and all(isinstance(n, int) for n in inputs))
    given, shape = (
        [inputs] if one else list(inputs),
        P.shape if isinstance(P, Partition) else tuple(integers_of("P", P)),
    )
    if not callable(net):
        raise TypeError(f"summary: a network, or a function that builds one, is needed, not {net!r}")
    built = net if isinstance(net, torch.nn.Module) else _on_first(net, shape)
    if isinstance(built, Distributed):
        if built.P.shape != shape:
            raise ValueError(f"summary: the network is compiled for a grid of shape {built.P.shape}, not {shape}")
        return built.report(*given, machine=machine)
    if not any(isinstance(module, Module) for module in built.modules()):
        return report(built, shape, *given, in_axes=in_axes, train=built.training, machine=machine)
    args = [example(x, built) for x in given]
    if built is not net:
        seen = _of_grid(net, args, Grid(shape, range(math.prod(shape))), in_axes, _partitions(built))
    elif isinstance(P, Partition):
        seen = _together(built, args, P, in_axes)
    else:
        raise TypeError(
            "summary: a network already built needs the partition of its input; or pass a function of a partition"
        )
    return _reported(seen, shape, machine)


def _partitions(net: torch.nn.Module) -> list[Partition]:
    return [P for module in net.modules() if isinstance(module, Module) for P in module._distdl_partitions]


def _on_first(build: Callable[..., Any], shape: Sequence[int]) -> torch.nn.Module:
    """The network as the first rank of a grid builds it."""

    def body() -> Any:
        with without_numbers():
            return build(Partition().grid(shape))

    (net,) = _run(math.prod(shape), [0], body).values()
    if not isinstance(net, torch.nn.Module):
        raise TypeError(
            f"summary: the function returns {net!r}; one that takes a partition and returns a module is needed"
        )
    return net


def _run(size: int, present: Sequence[int] | None, body: Callable[[], Any]) -> dict[int, Any]:
    """Run a function on some ranks of a world in which no tensor moves, or on all."""

    def transport(world: World, rank: int) -> Transport:
        return DryTransport(rank, size, ThreadTransport(world, rank))

    return in_turn(World(size, present), transport, body)


@contextmanager
def without_numbers() -> Iterator[Any]:
    """Let tensors that are made inside have shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def _of_grid(build: Any, args: Sequence[Any], grid: Grid, in_axes: Any, partitions: Iterable[Partition]) -> list[Seen]:
    """What the ranks of a grid do, all or some of them."""
    present = None if grid.size <= ALL_UP_TO else sorted(_enough(grid, [P.grid_of_ranks for P in partitions]))

    def body() -> Seen:
        P = Partition().grid(grid.shape)
        return seen(lambda: (build(P), _blocks(args, grid, P.world_transport.rank, in_axes)), present)

    return list(_run(grid.size, present, body).values())


def _enough(grid: Grid, others: Iterable[Grid]) -> set[int]:
    """Ranks that have, together, every index on every axis of each grid; and some that may send or hold most."""
    chosen = {rank for one in {grid, *others} for rank in _cross(one)}
    some = representatives(grid)
    return chosen | {grid.rank(index) for index in some if len(some) <= ALL_UP_TO}


def _cross(grid: Grid) -> set[int]:
    """The ranks on the lines along all axes through one that has neighbours on all sides, and a large block."""
    middle = [min(1, n - 1) for n in grid.shape]
    lines = ((*middle[:a], i, *middle[a + 1 :]) for a, n in enumerate(grid.shape) for i in range(n))
    return {grid.rank(index) for index in lines}


def _blocks(args: Sequence[Any], grid: Grid, rank: int, in_axes: Any) -> list[Any]:
    """This rank's blocks of the tensors among the arguments."""
    index, (leaves, spec) = grid.index(rank), pytree.tree_flatten(list(args))
    for number, (dims, requires_grad) in cut_inputs(args, grid, in_axes).items():
        x = leaves[number]
        made = zero_volume_tensor(dtype=x.dtype)
        if index is not None:
            made = torch.empty(local_shape(dims, grid, index), dtype=x.dtype)
        leaves[number] = made.requires_grad_(requires_grad)
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def _together(net: torch.nn.Module, args: Sequence[Any], P: Partition, in_axes: Any) -> list[Seen]:
    """What the ranks that call this do, on which the network runs, each of which copies its own part without numbers."""
    world, team = P.world_transport, union_of_teams(P, *_partitions(net))
    with entered(DryTransport(world.rank, world.size, world)):
        mine = seen(lambda: (_copied(net), _blocks(args, P.grid_of_ranks, world.rank, in_axes)))
    return world.gather_objects(team, mine)  # type: ignore[no-any-return]


def _copied(net: torch.nn.Module) -> torch.nn.Module:
    """A copy over the ambient world, whose tensors have no numbers; functions and classes need no name to be copied."""
    shared: list[Any] = []

    class Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, (torch.Tensor, type, type(lambda: 0))):
                return None
            shared.append(value)
            return len(shared) - 1

    class Reader(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            value = shared[number]
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in made:
                new = torch.empty_like(value, requires_grad=value.requires_grad)
                made[id(value)] = (
                    torch.nn.Parameter(new, value.requires_grad) if isinstance(value, torch.nn.Parameter) else new
                )
            return made[id(value)]

    made: dict[int, torch.Tensor] = {}
    written = io.BytesIO()
    Writer(written).dump(net)
    return Reader(io.BytesIO(written.getvalue())).load()  # type: ignore[no-any-return]


# One rank


@dataclass
class Seen:
    """What one rank does in a step, by the path of the module."""

    layers: dict[str, Counter[str]] = field(
        default_factory=dict
    )  # the modules called, in order: of which class, and how often
    outputs: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # how they lie; elements here and in all
    sent: dict[str, Both] = field(default_factory=dict)
    movements: dict[str, Counter[str]] = field(default_factory=dict)
    multiply_adds: Counter[str | None] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    kept: Counter[str | None] = field(default_factory=Counter)
    gradients: int = 0
    touched: int = 0
    peak: int = 0  # without weights

    def elements_of(self, paths: Iterable[str]) -> int:
        """How many elements modules of these paths have put out."""
        return sum(self.outputs[path][1] for path in paths if path in self.outputs)


def seen(make: Make, present: Sequence[int] | None = None) -> Seen:
    """What the rank that calls this does in the second of two steps, in a world in which no tensor moves."""
    with without_numbers() as mode:
        net, args = make()
        transport: Any = _partitions(net)[0].world_transport
        for P in _partitions(net):
            _check_covered(P, present)
        watched = _Watched(net, transport, mode)
        for _ in range(2):  # sums of gradients that begin early are planned by the first
            found = watched.step(args)
    return found


def _check_covered(P: Partition, present: Sequence[int] | None) -> None:
    """Raise RuntimeError unless the ranks that run have every index on every axis of a partition that this rank is in."""
    if present is None or not P.active:
        return
    here = [P.cartesian_index(P.ranks.index(rank)) for rank in present if rank in P.ranks]  # type: ignore[attr-defined]
    if any(len(set(indices)) < n for n, indices in zip(P.shape, zip(*here, strict=True), strict=True)):
        raise RuntimeError(
            f"{P} is not one of the few grids that the first rank has; ask for at most {ALL_UP_TO} ranks"
        )


class _Watched:
    """A network of which is known what it does in which module."""

    def __init__(self, net: torch.nn.Module, transport: DryTransport, mode: Any) -> None:
        self.net, self.transport = net, transport
        self.found, self.lies = Seen(), dict[tuple[int, ...], tuple[Grid, Dims]]()  # the latest of a local shape
        for path, module in net.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: self.transport.enter(path))
            module.register_forward_hook(partial(self._left, path))
            if isinstance(module, Module):  # geometry needs numbers
                module.__dict__["_distdl_module_setup"] = partial(_with_numbers, module._distdl_module_setup)

    def _left(self, path: str, module: torch.nn.Module, args: Any, made: Any) -> None:
        self.transport.leave()
        self.found.layers.setdefault(path, Counter())[type(module).__name__] += 1
        y = next((leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)), None)
        if y is None:
            return
        shape = tuple(y.shape)
        lies = _lies(module) or (None if isinstance(module, Module) else self.lies.get(shape))
        if lies is None:
            self.found.outputs[path] = f"block {shape}", y.numel(), 0
        elif y.numel() or lies[0].index(self.transport.rank) is not None:
            self.lies[shape] = lies
            self.found.outputs[path] = cut_text(lies[1], lies[0]), y.numel(), math.prod(shape_of_dims(lies[1]))

    def step(self, args: Sequence[Any]) -> Seen:
        """Forward and, in training, backward."""
        net, transport = self.net, self.transport
        found = self.found = Seen()
        meter = Meter(transport)
        net.zero_grad()
        transport.moves, transport.sums = [], []
        named = dict(net.named_parameters()) | dict(net.named_buffers())
        for tensor in named.values():
            meter.hold(tensor, "", counts=False)
        args = pytree.tree_map_only(torch.Tensor, lambda x: torch.empty_like(x).requires_grad_(x.requires_grad), args)
        for x in pytree.tree_leaves(args):
            meter.hold(x, "inputs")
        transport.path = ""
        with meter, torch.set_grad_enabled(net.training):
            made = net(*args)
            found.kept = meter.by_path()
            transport.path = None
            roots = [y for y in pytree.tree_leaves(made) if isinstance(y, torch.Tensor) and y.requires_grad]
            if roots:
                torch.autograd.backward(roots, [torch.empty_like(y) for y in roots])
        self._account(meter)
        return found

    def _account(self, meter: Meter) -> None:
        """Put together what the step has left with the meter, the transport and the weights."""
        found, transport = self.found, self.transport
        found.multiply_adds, found.touched, found.peak = meter.multiply_adds, meter.touched, meter.peak
        moved = [
            (path, is_back, of_plan(plan, dtype), plan.pattern.value) for path, is_back, plan, dtype in transport.moves
        ]
        moved += [(path, is_back, summed(size, ranks), "all_reduce") for path, is_back, size, ranks in transport.sums]
        for path, is_back, traffic, kind in moved:
            forward, backward = found.sent.get(path, (Traffic(), Traffic()))
            found.sent[path] = (forward, backward + traffic) if is_back else (forward + traffic, backward)
            if traffic.messages and (not is_back or path == "gradients"):
                found.movements.setdefault(path, Counter())[kind] += 1
        held = set[int]()
        for path, module in self.net.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in held:
                    held.add(id(tensor))
                    found.weights[path] += tensor.nbytes
        found.gradients = sum(p.grad.nbytes for p in self.net.parameters() if p.grad is not None)
        largest = max((size for path, _, size, _ in transport.sums if path == "gradients"), default=0)
        found.peak = max(found.peak, found.gradients + largest)


def _with_numbers(set_up: Callable[..., Any], *args: Any) -> Any:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return set_up(*args)


def _lies(module: torch.nn.Module) -> tuple[Grid, Dims] | None:
    """How the output of a layer of ours, which was called last with its structure, lies over a grid; None if nobody knows."""
    call = module._distdl_plan if isinstance(module, Module) else None
    if isinstance(call, Running):
        return call.compiler.grid, call.outputs[0].dims
    if call is not None and isinstance(module, (Movement, WorkGridLayer)):
        with suppress(TypeError):  # it was asked for an output of some size
            *_, Y = module.layouts(agreed_inputs(module, module.P_x).shapes)
            return Y.grid, dims_of(Y.dims)
    return None


# All of them


def _reported(ranks: Sequence[Seen], shape: Shape, machine: Machine) -> Report:
    """The report of the ranks that were looked at."""
    fullest = max(ranks, key=lambda one: one.weights.total() + int(machine.optimizer * one.gradients) + one.peak)
    busiest = max(ranks, key=lambda one: one.multiply_adds.total())
    work, weights = busiest.multiply_adds, fullest.weights.total()
    optimizer = int(machine.optimizer * fullest.gradients)
    outputs = {path: laid for one in ranks for path, laid in one.outputs.items() if laid[2]}
    known = [one.elements_of(outputs) for one in ranks]
    total = sum(whole for _, _, whole in outputs.values())
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
    paths = [path for path in layers if path]
    for path in ["inputs", *layers, "gradients"]:
        sent = [one.sent[path] for one in ranks if path in one.sent]
        mine = (sent, busiest.multiply_adds[path], fullest.weights[path], fullest.kept[path])
        is_leaf = path in layers and not any(other.startswith(f"{path}.") or not path for other in paths)
        if is_leaf or any(mine):
            laid = [one.outputs[path] for one in ranks if path in one.outputs]
            moved = Counter[str]()
            for one in ranks:
                moved |= one.movements.get(path, Counter())
            yield Row(
                path=path,
                operations=tuple(f"{n} {name}" if n > 1 else name for name, n in layers.get(path, Counter()).items()),
                output=max(laid, key=lambda one: one[1:])[0] if laid else "",
                movements=dict(moved),
                forward=most([forward for forward, _ in sent]),
                backward=most([backward for _, backward in sent]),
                multiply_adds=mine[1],
                weights=mine[2],
                kept=mine[3],
                gathered=(),
            )
