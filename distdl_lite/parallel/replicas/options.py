"""The arguments of `DataParallel`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.heat.deferred import DataParallelOptimizer
from distdl_lite.parallel.replicas.bucket import Bucket
from distdl_lite.partition import Partition
from distdl_lite.transport import is_communicator
from distdl_lite.transport.sums import ENGINES

BAD_WEIGHT = "DataParallel: the loss_weight of some rank is negative or not finite"
_CHOICES = {
    "average": ("samples", "sum", "ranks", "none"),
    "sync_buffers": ("root", "mean", "none"),
    "engine": ("auto", *ENGINES),
    "update": ("now", "deferred"),
    "init": ("broadcast", "check", "none"),
}


@dataclass(frozen=True)
class Options:
    """The options of a `DataParallel`, which says what each means; TypeError or ValueError for others."""

    average: str
    sync_buffers: str
    engine: str
    update: str
    overlap: bool
    init: str
    dim: int
    bucket_mb: float | None
    comm_hook: Callable[[Bucket], None] | None
    timeout: float | None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"DataParallel: {name} must be one of {', '.join(choices)}, not {value!r}")
        for name in ("bucket_mb", "timeout"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"DataParallel: {name} must be a number, not {value!r}")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"DataParallel: {name} must be positive and finite, not {value!r}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(f"DataParallel: dim must be an integer, not {self.dim!r}")
        if not isinstance(self.overlap, bool):
            raise TypeError(f"DataParallel: overlap must be a bool, not {self.overlap!r}")
        if self.comm_hook is not None and not callable(self.comm_hook):
            raise TypeError(f"DataParallel: comm_hook must be callable, not {self.comm_hook!r}")

    @property
    def bucket_bytes(self) -> int:
        return math.ceil((self.bucket_mb or 4) * 2**20)

    @property
    def seconds(self) -> float:
        """The time to wait for other ranks."""
        return 1800.0 if self.timeout is None else self.timeout

    @property
    def waits(self) -> bool:
        """Whether backward waits for the sums when it ends: until then the gradients stay as they are."""
        return self.update == "now"


def check_ranks(P: Any) -> None:
    """Raise TypeError unless `P` says which ranks hold copies."""
    if not (isinstance(P, Partition) or is_communicator(P)):
        raise TypeError(f"DataParallel: P must be a Partition or a communicator, not {P!r}")


def check_module(module: Any) -> None:
    """Raise TypeError or ValueError for a module that `DataParallel` does not take."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"DataParallel: a torch.nn.Module is needed, not {module!r}")
    if hasattr(module, "input_delta_z_buffer"):
        raise TypeError("DataParallel: a model of dl.tagi has no gradients to sum; use dl.tagi.DDPSequential")
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
        if any(isinstance(one.torch_optimizer, torch.optim.LBFGS) for one in listed(optimizer)):
            raise ValueError('DataParallel: LBFGS calls a closure; use update="now"')
    for one in listed(optimizer):
        one.blocking_parameter_updates = update == "now"
    return update


def as_weight(value: Any) -> float:
    """A rank's weight in the mean; where it is none, a number that makes the sum of all ranks' tell them so."""
    weight = float(value)
    return weight if 0 <= weight < math.inf else math.nan
