"""The backward that runs, by the private calls of torch that tell of it; tests/test_backward.py checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def engine_will_run(node: Any) -> bool:
    return torch._C._will_engine_execute_node(node)


def running_backward() -> int:
    return torch._C._current_graph_task_id()


def running_backward_accumulates(leaves: Sequence[torch.Tensor]) -> bool:
    """Inside a hook: whether the backward that runs adds to ``.grad`` of any of the leaves, unlike `torch.autograd.grad`.

    Where the hook's node leads to none of them, what becomes of another leaf below it tells.
    """
    nodes = (torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves if leaf.requires_grad)
    try:
        return any(map(engine_will_run, nodes)) or _runs_into_others(torch._C._current_autograd_node(), leaves)
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


def at_end_of_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
