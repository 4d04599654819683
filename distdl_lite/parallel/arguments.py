"""What `DataParallel` may be given, and what must be the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from distdl_lite.flat import unwritable
from distdl_lite.model.replicas import checksum
from distdl_lite.parallel.deferred import DataParallelOptimizer
from distdl_lite.parallel.synchroniser import LANES, in_others, lanes_in_use
from distdl_lite.partition import Partition
from distdl_lite.transport import Team, Transport
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


def owners(optimizers: Sequence[Any], named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Which optimizer, with which hyperparameters, updates each of the parameters; the order is each rank's own."""
    found: dict[int, str] = {}
    for one in optimizers:
        kind = type(one.torch_optimizer).__name__
        for group in one.param_groups:
            text = (
                f"{kind} { ({name: value for name, value in group.items() if name not in ('params', 'param_names')}) }"
            )
            found.update((id(p), text) for p in group["params"])
    return {f"optimizer of {name}": found.get(id(p)) for name, p in named}


def order(optimizers: Sequence[torch.optim.Optimizer], named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """What optimizers must have in common on all ranks whose states are to be exchanged."""
    names = {id(p): name for name, p in named}
    found: dict[str, Any] = {"number of optimizers": len(optimizers)}
    for number, one in enumerate(optimizers):
        which = f"of optimizer {number}"
        groups = [group["params"] for group in getattr(one, "param_groups", ())]
        found[f"type {which}"] = type(getattr(one, "torch_optimizer", one)).__name__
        found[f"group sizes {which}"] = list(map(len, groups))
        for place, p in enumerate(p for group in groups for p in group):
            found[f"parameter {place} {which}"] = names.get(id(p), tuple(p.shape))
    return found


def check_same(transport: Transport, team: Team, mine: Mapping[str, Any]) -> None:
    """Raise ValueError on all of the team unless all have the same; the first that differs is named."""
    _check_options(team, transport.gather_objects(team, mine))


def _check_options(team: Team, told: Sequence[Mapping[str, Any]]) -> None:
    for rank, theirs in zip(team, told, strict=True):
        for name, a in told[0].items():
            if theirs.get(name) != a:
                raise ValueError(f"DataParallel: rank {rank} has {name}={theirs.get(name)!r}, rank {team[0]} {a!r}")


_MIXED = (
    "DataParallel: the gradient of {} is summed over the batch axis by its layer, that of {} by the container, whose "
    'average="{}" has another scale: write average="none" and a loss over P, or build the distributed layers on the ranks that '
    "share a place along the batch axis"
)


def refusal_of(
    transport: Transport,
    parameters: Sequence[tuple[str, torch.Tensor]],
    written: Iterable[tuple[str, torch.Tensor]],
    sparse: Sequence[str],
    mixed: Sequence[str],
    average: str,
) -> Exception | None:
    """An error for sparse layers, parameters of two scales or in two containers, and tensors that cannot be written to."""
    if sparse:
        return TypeError(f"DataParallel: sparse gradients are not summed; build {sparse} with sparse=False")
    if mixed:
        return ValueError(_MIXED.format(*mixed, average))
    if shared := ", ".join(in_others(transport, parameters)):
        return ValueError(
            f"DataParallel: another container has {shared} already; put both modules into one container, or delete the other"
        )
    reason = unwritable(written)
    return ValueError(f"DataParallel: {reason}") if reason else None


def check_same_module(
    transport: Transport,
    team: Team,
    tensors: Mapping[str, torch.Tensor],
    refusal: Exception | None,
    options: Mapping[str, Any],
) -> int:
    """Raise on all of the team unless all hold the same tensors, which none of them refuses; returns a free lane."""
    mine = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), *_elsewhere(t)) for name, t in tensors.items()]
    told = transport.gather_objects(team, (mine, lanes_in_use(transport, team), options, refusal))
    _check_options(team, [theirs for _, _, theirs, _ in told])
    for *_, refused in told:
        if refused is not None:
            raise refused
    first = told[0][0]
    for rank, (other, *_) in zip(team, told, strict=True):
        for a, b in zip(first, other, strict=False):
            if a != b:
                raise ValueError(
                    f"DataParallel: the ranks hold different modules: rank {rank} has {b}, rank {team[0]} {a}"
                )
        if len(first) != len(other):
            name = (first[len(other) :] or other[len(first) :])[0][0]
            raise ValueError(
                f"DataParallel: the ranks hold different modules: of ranks {team[0]} and {rank}, one lacks {name}"
            )
    if empty := [name for name, t in tensors.items() if t.is_meta]:
        raise ValueError(
            f"DataParallel: {', '.join(empty)} of all ranks is on the device meta, without data; use to_empty"
        )
    in_use = [lane for _, lanes, *_ in told for lane in lanes]
    return min(range(LANES), key=in_use.count)


def _elsewhere(tensor: torch.Tensor) -> list[str]:
    """The kind of device, if it is not the usual one."""
    return [] if tensor.device.type == "cpu" else [tensor.device.type]


def check_equal(transport: Transport, team: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError on all of the team unless all hold the same values, bit by bit."""
    told = transport.gather_objects(team, {name: checksum(t) for name, t in tensors.items()})
    names = dict.fromkeys(name for one in told for name in one)
    different = [name for name in names if len({one.get(name) for one in told}) > 1]
    if different:
        raise RuntimeError(f"DataParallel: the ranks {list(team)} hold different values of {', '.join(different)}")


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
