"""One rank's own part of a forward and a backward whose arguments the root has."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

from distdl_lite.agreement import AUTOCAST_KINDS, TensorStructure
from distdl_lite.autograd import saved_here
from distdl_lite.operator import Operator
from distdl_lite.parallel.root.batch import Cuts, Output
from distdl_lite.parallel.root.weights import News
from distdl_lite.private import pop_saved_tensors_hooks, push_saved_tensors_hooks, top_saved_tensors_hooks


@dataclass(frozen=True)
class Call:
    """All that the root tells of a forward."""

    arguments: bytes  # pickled, with a `Slot` for each tensor
    tensors: tuple[TensorStructure, ...]
    copied: dict[int, torch.Tensor]  # those without dims, which have no rows, by number
    dim: int  # along which tensors are cut, and outputs put together
    cuts: Cuts  # of the rows over the ranks
    news: News  # of the weights
    is_grad_enabled: bool
    autocast: tuple[Any, ...]  # as `agreement.autocast` tells it


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor among arguments that are pickled."""

    number: int


@dataclass(frozen=True)
class Leaf:
    """A tensor that gets a gradient: this rank's part, and the operator that cut it, None for copies."""

    structure: TensorStructure
    cutter: Operator | None
    part: torch.Tensor


@dataclass(eq=False)
class Run:
    """A forward on one rank, as its backward needs it."""

    number: int
    leaves: list[Leaf]
    outputs: list[tuple[Output, Operator]]  # the operators' adjoints put them together
    local: list[torch.Tensor] | None  # this rank's outputs; None if it has not applied the module, or let its graph go
    returned: list[torch.Tensor]  # whole tensors, until forward has returned them


@dataclass(frozen=True)
class Result:
    """The module's return value, flattened, and the tensors in it; one without dims as a vector."""

    items: list[Any]
    nesting: Any
    tensors: list[torch.Tensor]


def slotted(leaves: Sequence[Any], nesting: Any) -> bytes:
    """The arguments in bytes, with slots for tensors."""
    numbers = iter(range(len(leaves)))
    plain = [Slot(next(numbers)) if isinstance(value, torch.Tensor) else value for value in leaves]
    file = io.BytesIO()
    _Pickler(file).dump(pytree.tree_unflatten(plain, nesting))
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Refuses what would lose its gradient."""

    def persistent_id(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise TypeError("a tensor that requires grad is inside an object that is no tuple, list or dict")


def apply(
    module: torch.nn.Module, call: Call, blocks: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> Result:
    """Apply a module to this rank's blocks under the root's modes; `weights` stand for its own of these names."""
    arguments = pickle.loads(call.arguments)
    with ExitStack() as modes:
        modes.enter_context(_no_hooks_from_outside())
        modes.enter_context(torch.set_grad_enabled(call.is_grad_enabled))
        for device, dtype in zip(AUTOCAST_KINDS, call.autocast, strict=True):
            if dtype or torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, dtype or None, enabled=bool(dtype)))
        # A module may change in place what it is passed, which it may not do with a leaf.
        passed = [saved_here(block) if block.requires_grad else block for block in blocks]
        args, kwargs = pytree.tree_map_only(Slot, lambda slot: passed[slot.number], arguments)
        given = _in_their_places(module, weights)
        items, nesting = pytree.tree_flatten(functional_call(module, given, args, kwargs, tie_weights=False))
        tensors = [item if item.dim() else item.view(1) for item in items if isinstance(item, torch.Tensor)]
    for item in items:  # no object that torch's pytree does not know: the other ranks' tensors in it would be lost
        if any(isinstance(inner, torch.Tensor) for inner in getattr(item, "__dict__", {}).values()):
            kind = type(item).__name__
            raise TypeError(f"the module returned a {kind} with tensors: register it with torch.utils._pytree")
    return Result(items, nesting, tensors)


def _in_their_places(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One name for each place: of a layer under two names torch would put the weights back wrongly."""
    found = {}
    for name, tensor in weights.items():
        path, _, own = name.rpartition(".")
        found.setdefault((id(module.get_submodule(path)), own), (name, tensor))
    return dict(found.values())


@contextmanager
def _no_hooks_from_outside() -> Iterator[None]:
    """Keep the hooks of saved tensors, such as a checkpoint's around the container, from a graph that is one rank's part.

    A checkpoint would call the container again from the middle of one rank's backward.
    """
    hooks = []
    while (top := top_saved_tensors_hooks(False)) is not None:
        hooks.append(top)
        pop_saved_tensors_hooks()
    try:
        yield
    finally:
        for pair in reversed(hooks):
            push_saved_tensors_hooks(*pair)


def local_gradients(run: Run, received: Sequence[torch.Tensor | None], keep: bool) -> list[torch.Tensor | None]:
    """The gradients of this rank's leaves, given the outputs'; the graph is let go unless kept."""
    local, leaves = run.local or [], [leaf.part for leaf in run.leaves]
    pairs = [(y, g) for y, g in zip(local, received, strict=False) if g is not None and y.requires_grad]
    if not keep:
        run.local = None
    if not pairs or not leaves:
        return [None] * len(leaves)
    outputs, gradients = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves, gradients, retain_graph=keep, allow_unused=True)
    sparse = [leaf for leaf, g in zip(run.leaves, found, strict=True) if g is not None and g.is_sparse]
    if sparse:
        shapes = ", ".join(str(leaf.structure.shape) for leaf in sparse)
        raise TypeError(f"sparse gradients (of weights of shapes {shapes}) cannot be added up over ranks")
    return list(found)
