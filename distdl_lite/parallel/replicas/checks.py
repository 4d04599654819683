"""What `DataParallel` may be given."""

from __future__ import annotations

import math
from typing import Any

import torch

from distdl_lite.heat.deferred import DataParallelOptimizer
from distdl_lite.partition import Partition
from distdl_lite.transport.sums import ENGINES


def check_ranks(P: Any) -> None:
    """Raise TypeError unless `P` says which ranks hold copies."""
    if not (P is None or isinstance(P, Partition) or hasattr(P, "Is_inter")):
        raise TypeError(f"DataParallel: P must be a Partition or an mpi4py communicator, not {P!r}")


def check_arguments(
    module: Any,
    average: Any,
    sync_buffers: Any,
    engine: Any,
    update: Any,
    overlap: Any,
    init: Any,
    dim: Any,
    bucket_mb: Any,
    comm_hook: Any,
    timeout: Any,
) -> None:
    """Raise TypeError or ValueError for what `DataParallel` does not take."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"DataParallel: a torch.nn.Module is needed, not {module!r}")
    if hasattr(module, "input_delta_z_buffer"):
        raise TypeError("DataParallel: a model of dl.tagi has no gradients to sum; use dl.tagi.DDPSequential")
    _check_choice("average", average, ("samples", "sum", "ranks", "none"))
    _check_choice("sync_buffers", sync_buffers, ("root", "mean", "none"))
    _check_choice("engine", engine, ("auto", *ENGINES))
    _check_choice("update", update, ("now", "deferred"))
    _check_choice("init", init, ("broadcast", "check", "none"))
    _check_positive("bucket_mb", bucket_mb)
    _check_positive("timeout", timeout)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"DataParallel: dim must be an integer, not {dim!r}")
    if not isinstance(overlap, bool):
        raise TypeError(f"DataParallel: overlap must be a bool, not {overlap!r}")
    if comm_hook is not None and not callable(comm_hook):
        raise TypeError(f"DataParallel: comm_hook must be callable, not {comm_hook!r}")
    if any(torch.nn.parameter.is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise ValueError("DataParallel: the module has lazy parameters; call its forward once before")


def listed(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def update_of(optimizer: Any, blocking: bool | None, update: str) -> str:
    """When parameters are updated; raises unless the arguments fit."""
    for one in listed(optimizer):
        if type(one).__name__ == "DASO":
            raise TypeError("DataParallel: DASO steps by itself; use DataParallelMultiGPU")
        if not isinstance(one, DataParallelOptimizer):
            raise TypeError(
                f"DataParallel: optimizer must be a DataParallelOptimizer or a sequence of them, not {one!r}"
            )
    if blocking is not None and not isinstance(blocking, bool):
        raise TypeError(f"DataParallel: blocking_parameter_updates must be a bool, not {blocking!r}")
    if blocking is False:
        update = "deferred"
    if update == "deferred":
        if blocking:
            raise ValueError('DataParallel: blocking_parameter_updates=True is update="now"')
        if not listed(optimizer):
            raise ValueError('DataParallel: update="deferred" needs the optimizer')
        for one in listed(optimizer):
            if isinstance(one.torch_optimizer, torch.optim.LBFGS):
                raise ValueError('DataParallel: LBFGS calls a closure; use update="now"')
    for one in listed(optimizer):
        one.blocking_parameter_updates = update == "now"
    return update


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"DataParallel: {name} must be one of {', '.join(choices)}, not {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"DataParallel: {name} must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"DataParallel: {name} must be positive and finite, not {value!r}")
