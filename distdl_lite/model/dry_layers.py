"""One rank of a network of layers run without data: what it moves, computes and holds in each module.

As in `dry`, its tensors have shapes alone and its operators move nothing. It agrees with other ranks as ever.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from distdl_lite.factors import Dims, Factors, blocks, cut, dims_of, local_shape, merged, shape_of_dims, uncut
from distdl_lite.grid import Grid
from distdl_lite.layout import Shape
from distdl_lite.model.distributed import Distributed
from distdl_lite.model.dry import DryTransport, Meter, without_numbers
from distdl_lite.model.report import Both, Cuts, Traffic, cut_text, cuts_of, of_plan, summed
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.linear.embedding import DistributedEmbedding
from distdl_lite.nn.linear.parallel_linear import DistributedColumnParallelLinear, DistributedRowParallelLinear
from distdl_lite.nn.module import Module
from distdl_lite.nn.movement import Movement
from distdl_lite.nn.rule_layer import Running
from distdl_lite.nn.shape.flatten import DistributedFlatten
from distdl_lite.nn.value import Value
from distdl_lite.nn.work_grid import WorkGridLayer
from distdl_lite.partition import Partition
from distdl_lite.reducer import EARLY_BYTES
from distdl_lite.transport import Team

Lies = tuple[Grid, Dims]  # how a tensor lies over a grid


@dataclass
class Seen:
    """What one rank does in a step, by the paths of modules."""

    layers: dict[str, Counter[str]] = field(default_factory=dict)  # those called: of which class, and how often
    # In words, with elements here and in all, and how each dim is cut; both nothing where that is not known.
    outputs: dict[str, tuple[str, int, int, Cuts]] = field(default_factory=dict)
    sent: dict[str, Both] = field(default_factory=dict)
    movements: dict[str, Counter[str]] = field(default_factory=dict)
    multiply_adds: Counter[str | None] = field(default_factory=Counter)  # None in backward
    weights: Counter[str] = field(default_factory=Counter)
    kept: Counter[str | None] = field(default_factory=Counter)
    gradients: int = 0
    touched: int = 0
    peak: int = 0  # without weights


def partitions_of(net: torch.nn.Module) -> list[Partition]:
    """The partitions of a network's layers."""
    return [P for module in net.modules() if isinstance(module, Module) for P in module._distdl_partitions]


def seen(
    make: Callable[[], tuple[torch.nn.Module, Sequence[Any]]],
    team: Team,
    feeds: Sequence[Lies] = (),
    present: Sequence[int] | None = None,
) -> Seen:
    """What this rank does in a step of the network that `make` returns with its arguments, from the second step on.

    Parameters
    ----------
    make : callable
        Makes layers over the ambient world, in which no tensor moves.
    team : Team
        The ranks that call this together.
    feeds : sequence of (Grid, Dims)
        How tensors among the arguments lie.
    present : sequence of int, optional
        The world's ranks that run, if not all.

    Raises
    ------
    RuntimeError
        If a layer needs to know of ranks that do not run.
    """
    with without_numbers():
        net, args = make()
        for P in partitions_of(net) if present is not None else ():
            _check_covered(P, present)
        watched = _Watched(net, team.world, feeds)
        found = watched.step(args)
        # Sums of many gradients begin early from the second step on.
        size = sum(parameter.nbytes for parameter in net.parameters())
        return watched.step(args) if team.world.agree(team, int(size >= EARLY_BYTES)) else found


def _check_covered(P: Partition, present: Sequence[int]) -> None:
    """Raise RuntimeError unless the ranks that run have every index on every axis of a partition."""
    indices = [index for rank in present if (index := P.grid_of_ranks.index(rank)) is not None]
    if any(len({index[axis] for index in indices}) < n for axis, n in enumerate(P.shape if P.size else ())):
        raise RuntimeError(
            f"too many ranks for a network with {P}, of which the first rank has no partition: ask for fewer"
        )


class _Watched:
    """A network of which is noted what it does in which module."""

    def __init__(self, net: torch.nn.Module, transport: Any, feeds: Sequence[Lies]) -> None:
        self.net, self.found = net, Seen()
        self.transport: DryTransport = transport
        self.lies: dict[Shape, Lies] = {}  # of the latest tensor of which a block has the shape
        for grid, dims in feeds:
            if (index := grid.index(transport.rank)) is not None:
                self.lies[local_shape(dims, grid, index)] = grid, dims
        compiled = [f"{path}." for path, module in net.named_modules() if isinstance(module, Distributed)]
        for path, module in net.named_modules():
            if path.startswith(tuple(compiled)):  # it is not called: the program is
                continue
            module.register_forward_pre_hook(lambda module, args, path=path: transport.enter(path))
            module.register_forward_hook(partial(self._left, path), always_call=True)
            if isinstance(module, Module):
                module.__dict__["_distdl_module_setup"] = partial(_with_numbers, module._distdl_module_setup)

    def _left(self, path: str, module: torch.nn.Module, args: Any, made: Any) -> None:
        """Note what a module has returned."""
        self.transport.leave()
        self.found.layers.setdefault(path, Counter())[type(module).__name__] += 1
        x, y = (next((t for t in pytree.tree_leaves(of) if isinstance(t, torch.Tensor)), None) for of in (args, made))
        if y is None:
            return
        shape, is_layer = tuple(y.shape), isinstance(module, Module) and not module._modules
        lies = _lies(module, None if x is None else self.lies.get(tuple(x.shape)), shape)
        lies = lies if lies or is_layer else self.lies.get(shape)
        index = lies and lies[0].index(self.transport.rank)
        if lies and index is not None and local_shape(lies[1], lies[0], index) == shape:
            self.lies[shape] = lies
            whole = math.prod(shape_of_dims(lies[1]))
            self.found.outputs[path] = cut_text(lies[1], lies[0]), y.numel(), whole, cuts_of(lies[1])
        elif y.numel() or not lies:
            self.found.outputs[path] = f"block {shape}", y.numel(), 0, ()

    def step(self, args: Sequence[Any]) -> Seen:
        """Forward and, in training, backward."""
        net, transport, meter = self.net, self.transport, Meter(self.transport)
        found = self.found = Seen()
        net.zero_grad()
        transport.moves, transport.sums, transport.path = [], [], ""
        for tensor in (*net.parameters(), *net.buffers()):
            meter.hold(tensor, "", counts=False)
        args = pytree.tree_map_only(torch.Tensor, lambda x: torch.empty_like(x).requires_grad_(x.requires_grad), args)
        for x in pytree.tree_leaves(args):
            if isinstance(x, torch.Tensor):
                meter.hold(x, "inputs")
        with meter, torch.set_grad_enabled(net.training):
            made = pytree.tree_leaves(net(*args))
            found.kept = meter.by_path()
            transport.path = None
            roots = [y for y in made if isinstance(y, torch.Tensor) and y.requires_grad]
            if roots:
                torch.autograd.backward(roots, [torch.empty_like(y) for y in roots])
        found.multiply_adds, found.touched = meter.multiply_adds, meter.touched
        self._note_traffic()
        self._note_weights(meter.peak)
        return found

    def _note_traffic(self) -> None:
        found, transport = self.found, self.transport
        moved = [(path, is_back, of_plan(p, dtype), p.pattern.value) for path, is_back, p, dtype in transport.moves]
        moved += [(path, is_back, summed(size, n), "all_reduce") for path, is_back, size, n in transport.sums]
        for path, is_back, traffic, kind in moved:
            forward, backward = found.sent.get(path, (Traffic(), Traffic()))
            found.sent[path] = (forward, backward + traffic) if is_back else (forward + traffic, backward)
            if traffic.messages and (not is_back or path == "gradients"):
                found.movements.setdefault(path, Counter())[kind] += 1

    def _note_weights(self, peak: int) -> None:
        """Bytes of weights and gradients; those of a module that was not called count where one around it was."""
        found, held = self.found, set[int]()
        for path, module in self.net.named_modules():
            while path and path not in found.layers:
                path = path.rpartition(".")[0]
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in held:
                    held.add(id(tensor))
                    found.weights[path] += tensor.nbytes
        found.gradients = sum(p.grad.nbytes for p in self.net.parameters() if p.grad is not None)
        largest = max((size for path, _, size, _ in self.transport.sums if path == "gradients"), default=0)
        found.peak = max(peak, found.gradients + largest)


def _with_numbers(set_up: Callable[..., Any], *args: Any) -> Any:
    """Set a layer up, of which some ask small tensors of their geometry for numbers."""
    with _disable_current_modes():
        return set_up(*args)


def _lies(module: torch.nn.Module, x: Lies | None, shape: Shape) -> Lies | None:
    """How the output of a layer of ours lies, whose input lies as `x` does and whose block has a shape; None if nobody knows."""
    call = module._distdl_plan if isinstance(module, Module) else None
    if isinstance(call, Running):
        return call.compiler.grid, call.outputs[0].dims
    if call is not None and isinstance(module, Distributed):
        made = next((value for buffer, value in call.program.outputs if buffer is None), None)
        return (module.P.grid_of_ranks, made.dims) if isinstance(made, Value) else None
    if call is not None and isinstance(module, (Movement, WorkGridLayer)):
        *_, Y = module.layouts(agreed_inputs(module, module.P_x).shapes)
        return Y.grid, dims_of(Y.dims)
    if x is not None and isinstance(module, DistributedFlatten):
        first, last, grid, dims = module._first, module._last, x[0], x[1]
        if module.P_y is not None:
            grid, ones = module.P_y.grid_of_ranks, [None] * (last - first)
            axes = [*range(first + 1), *ones, *range(first + 1, grid.dim)]
            dims = blocks(shape_of_dims(dims), axes, grid)
        return grid, (*dims[:first], merged(f for of_dim in dims[first : last + 1] for f in of_dim), *dims[last + 1 :])
    if x is not None and isinstance(module, DistributedEmbedding):
        return x[0], (*x[1], _features(module.embedding_dim, x[0], shape))
    if x is not None and isinstance(module, (DistributedColumnParallelLinear, DistributedRowParallelLinear)):
        return x[0], (*x[1][:-1], _features(module.out_features, x[0], shape))
    return None


def _features(n: int, grid: Grid, shape: Shape) -> Factors:
    """The last dim of a tensor, which a rank holds whole, or which is cut over the last axis."""
    return (uncut(n) if shape[-1:] == (n,) else cut(n, (grid.dim - 1,), grid),)
