"""The hooks by which autograd tells a container of a backward."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from distdl_lite.autograd import ANCHOR
from distdl_lite.parallel.replicas.options import BAD_WEIGHT, as_weight
from distdl_lite.private import engine_will_run, running_backward, running_node

if TYPE_CHECKING:
    from distdl_lite.parallel.replicas.data_parallel import DataParallel


def with_graph(output: Any) -> Any:
    """The output of a module; one that depends on no parameter gets a graph, so that its backward meets the other ranks."""
    if any(tensor.requires_grad for tensor in tensors_in(output)):
        return output
    return tree_map_only(torch.Tensor, lambda x: _Joined.apply(x, ANCHOR), output)


class _Joined(torch.autograd.Function):
    """A copy, which requires grad and leads nowhere: an inference tensor, or one that is refilled later, can have no graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


class OutputHook:
    """Tells a container that backward has reached an output of a forward, once in each backward."""

    def __init__(self, container: weakref.ref[DataParallel], rows: int) -> None:
        self._container, self._rows, self._backward, self._share = container, rows, -1, 1.0

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        container, backward = self._container(), running_backward()
        if container is None:
            return None
        if backward != self._backward:
            self._backward = backward
            container._awaited.discard(self)
            container._began(self._rows)
            self._share = _share(container, self._rows) if container._couples else 1.0
        if self._share == 1:
            return None
        return gradient * self._share if self._share else torch.zeros_like(gradient)


def _share(container: DataParallel, rows: int) -> float:
    """The weight in the mean of a forward's gradients; the ranks along the batch axis call together."""
    sync, average = container._sync, container._options.average
    if average == "ranks":
        return 1 / sync.team.size
    if average == "sum" and not container._syncs:
        raise RuntimeError('DataParallel: with SyncBatchNorm inside, average="sum" allows no no_sync')
    weight = float(rows) if container.loss_weight is None else as_weight(container.loss_weight)
    total = sync.team.world.all_reduce(sync.team, torch.tensor([weight], dtype=torch.float64)).item()
    if not math.isfinite(total):
        container.loss_weight = None
        raise ValueError(BAD_WEIGHT)
    return 0.0 if not (weight and total) else (weight if average == "samples" else 1.0) / total


class WeakHook:
    """A hook that calls something with an owner that it does not keep alive; a copy of it calls nothing."""

    def __init__(self, owner: Any = None, call: Callable[..., None] | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._call = call

    def __call__(self, *args: Any) -> None:
        owner = self._owner and self._owner()
        if owner is not None and self._call is not None:
            self._call(owner, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, ()


def rows_of(arguments: Any, dim: int) -> int:
    """The size along a dim of the first tensor that has it."""
    return next((t.shape[dim] for t in tensors_in(arguments) if -t.dim() <= dim < t.dim()), 1)


def tensors_in(value: Any, seen: tuple[Any, ...] = ()) -> Iterator[torch.Tensor]:
    """The tensors in a structure of lists, dictionaries and objects."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif not isinstance(leaf, (type, torch.nn.Module)) and not any(leaf is other for other in seen):
            inside = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
            for part in inside.values():
                yield from tensors_in(part, (*seen, leaf))


def running_backward_accumulates(leaves: Sequence[torch.Tensor]) -> bool:
    """Inside a hook: whether the backward that runs adds to ``.grad`` of any of the leaves, unlike `torch.autograd.grad`.

    Where the hook's node leads to none of them, what becomes of another leaf below it tells.
    """
    nodes = (torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves if leaf.requires_grad)
    try:
        return any(map(engine_will_run, nodes)) or _runs_into_others(running_node(), leaves)
    except RuntimeError:  # a leaf's gradient is returned
        return False


def _runs_into_others(node: Any, leaves: Sequence[torch.Tensor]) -> bool:
    ids, seen, left, other = {id(leaf) for leaf in leaves}, set(), [node], None
    while left:
        node = left.pop()
        if id(getattr(node, "variable", None)) in ids:
            return False
        if hasattr(node, "variable"):
            other = node
        below = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= below
        left += below
    return other is not None and engine_will_run(other)
