"""Checks of the arguments of `LocalSGD`, and that they are the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from distdl_lite.buckets import HALVES, unwritable
from distdl_lite.optim.flight import MERGES
from distdl_lite.optim.schedule import check_int
from distdl_lite.transport import Team
from distdl_lite.transport.sums import ENGINES


def check_tensors(optimizer: Any, buffers: Iterable[Any]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}")
    for buffer in buffers:
        if not isinstance(buffer, torch.Tensor) or not (buffer.is_floating_point() or buffer.is_complex()):
            raise TypeError(f"buffers must be floating-point tensors, not {buffer!r}")
    if reason := unwritable((f"buffer {number}", buffer) for number, buffer in enumerate(buffers)):
        raise ValueError(reason)


def check_settings(schedule: Any, outer: Any, merge: Any, wire: Any, engine: Any) -> None:
    if not callable(schedule):
        raise TypeError(f"schedule must be a number of steps or a function, not {schedule!r}")
    if outer is not None and not callable(outer) and not isinstance(outer, torch.optim.Optimizer):
        raise TypeError(f"outer must be an optimizer or a function that makes one, not {outer!r}")
    for name, value, known in (
        ("merge", merge, tuple(MERGES)),
        ("wire", wire, (None, torch.float32, *HALVES)),
        ("engine", engine, ("auto", *ENGINES)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, not {value!r}")


def check_numbers(delay: Any, chunk: Any, ranks_per_node: Any, timeout: Any) -> None:
    check_int("delay", delay, 0)
    for name, value in (("chunk", chunk), ("ranks_per_node", ranks_per_node)):
        if value is not None:
            check_int(name, value, 1)
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {timeout!r}")


def told_of(
    optimizer: torch.optim.Optimizer, learning: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """A rank's tensors that are averaged: their number, shapes, dtypes and names."""
    groups = optimizer.param_groups
    names = {id(p): name for g in groups for p, name in zip(g["params"], g.get("param_names", ()), strict=False)}
    return {
        "number of tensors": len(learning) + len(buffers),
        **{f"tensor {n}": (tuple(t.shape), t.dtype) for n, t in enumerate((*learning, *buffers))},
        **{f"the name of tensor {n}": names.get(id(p)) for n, p in enumerate(learning)},
    }


def check_same(team: Team, told: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise ValueError unless all ranks of a team have told the same; the text is formatted with what differs first."""
    for rank, other in zip(team, told, strict=True):
        for name, usual in told[0].items():
            if (value := other.get(name)) != usual:
                raise ValueError(text.format(rank=rank, name=name, value=value, first=team[0], usual=usual))


def form_of(value: Any) -> Any:
    """A description of a part of a state, the same in all states of the same plan."""
    if isinstance(value, list):
        return [None if vector is None else tuple(vector.shape) for vector in value]
    return None if value is None else "an optimizer"
