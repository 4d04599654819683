"""The private calls of torch that the library uses, but for those of torch.distributed; tests/test_private.py asks for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch._C._functorch import is_legacy_batchedtensor as is_legacy_batchedtensor  # type: ignore[import-not-found]

any_autocast_is_enabled = torch._C._is_any_autocast_enabled
transforms_are_active = torch._C._are_functorch_transforms_active

running_backward = torch._C._current_graph_task_id  # its number, -1 outside one
running_node = torch._C._current_autograd_node
next_node = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]  # the number of the node that is made next
engine_will_run = torch._C._will_engine_execute_node  # whether the backward that runs comes to a node
backward_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # type: ignore[attr-defined]
top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks  # type: ignore[attr-defined]
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks  # type: ignore[attr-defined]

flattened = torch._C._nn.flatten_dense_tensors  # type: ignore[attr-defined]  # one flat tensor of their elements
unflattened = torch._C._nn.unflatten_dense_tensors  # type: ignore[attr-defined]  # views of a flat one, of these shapes

Function = TypeVar("Function", bound=Callable[..., Any])


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call something when the backward that runs has ended; the engine alone keeps it until then, or until an error."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def is_composite(operation: Any) -> bool:
    """Whether torch defines an operation by others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")  # type: ignore[attr-defined, no-any-return]


def holders(tensor: torch.Tensor) -> int:
    """How many tensors share the memory, one more or less; see tests/parallel/test_buckets.py."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def gradients_leave_early(module: torch.nn.Module) -> bool:
    """Whether torch's DDP or FSDP2 takes a module's gradients while backward runs: sums at its end would come too late."""
    if torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None:
        return True
    is_loaded = "torch.distributed.fsdp" in sys.modules
    return is_loaded and any("_is_fsdp_managed_module" in vars(inner) for inner in module.modules())


def untraced(function: Function) -> Function:
    """Let torch.compile call a function, and all that this calls, as it is: what communicates is not for it to trace.

    It does as torch.compiler.disable, without its import of Dynamo, of seconds, and its 1 us a call.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    if hasattr(eval_frame, "_FrameExecStrategy"):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
