"""What a program has to keep: boxes of tensors under serial names, and what is plain or a rank's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distdl_lite.agreement import check_alike
from distdl_lite.checkpoint.files import box_of
from distdl_lite.checkpoint.plain import encoded
from distdl_lite.heat.deferred import DataParallelOptimizer
from distdl_lite.layout import Box, Shape
from distdl_lite.model.gradient_norm import check_optimizer
from distdl_lite.model.weights import entries_of, replaced_weight, team_of
from distdl_lite.optim.local_sgd import LocalSGD
from distdl_lite.transport import Team


@dataclass(frozen=True)
class Part:
    """This rank's box of a tensor.

    Attributes
    ----------
    name : str
        Of the whole tensor in the checkpoint.
    tensor : torch.Tensor
    box : Box or None
        None where this rank holds no elements of it.
    shape : tuple of int
        Of the whole tensor.
    team : Team
        The ranks that hold the same box.
    line : int
        The first rank of those that hold the whole tensor together.
    may_be_elsewhere : bool
        Whether another rank, of the team or of another line, may hold the same.
    """

    name: str
    tensor: torch.Tensor
    box: Box | None
    shape: Shape
    team: Team
    line: int
    may_be_elsewhere: bool

    def like(self, name: str, tensor: torch.Tensor) -> Part:
        """The same box of another tensor."""
        return replace(self, name=name, tensor=tensor)


Things = list[tuple[str, Any]]  # each with the name that stands before its tensors' in a checkpoint


@dataclass(frozen=True)
class Program:
    """The parts of a program that a checkpoint holds, by kind; each may be one thing, or several by name."""

    models: Things
    optimizers: Things  # of torch
    averaging: Things  # optimizers whose ranks step apart
    others: Things

    @staticmethod
    def of(**kinds: Any) -> Program:
        """Raises TypeError or ValueError if something cannot be saved; communicates nothing."""
        models = list(_named("model", kinds.pop("model")))
        for name, model in models:
            if not isinstance(model, torch.nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, not {type(model).__name__}")
        optimizers = list(_named("optimizer", kinds.pop("optimizer")))
        others = [pair for kind, things in kinds.items() for pair in _named(kind, things)]
        for name, thing in others:
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                hint = "; distdl_lite.data.Loader has one" if name.startswith("data") else ""
                raise TypeError(f"{name}, a {type(thing).__name__}, has no state_dict{hint}")
        averaging = [pair for pair in optimizers if isinstance(pair[1], LocalSGD)]
        plain = [(name, _torch_optimizer(one)) for name, one in optimizers if not isinstance(one, LocalSGD)]
        return Program(models, plain, averaging, others)

    @property
    def names(self) -> list[str]:
        """Of all that is there."""
        return [name for things in (self.models, self.optimizers, self.averaging, self.others) for name, _ in things]

    def parts(self, callers: Team) -> list[Part]:
        """The models' tensors on this rank. Raises ValueError if one cannot be kept."""
        parts = [part for name, model in self.models for part in _parts_of_model(name, model, callers)]
        if twice := [name for name, count in Counter(part.name for part in parts).items() if count > 1]:
            raise ValueError(f"several tensors have the name {twice[0]}")
        return parts


def _named(kind: str, things: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(things, Mapping) and not isinstance(things, torch.nn.Module):
        yield from ((f"{kind}.{name}", thing) for name, thing in things.items())
    elif things is not None:
        yield kind, things


def _parts_of_model(prefix: str, module: torch.nn.Module, callers: Team) -> list[Part]:
    """The model's tensors, of which a rank outside its team holds nothing."""
    team = team_of(module, callers)
    if team.world is not callers.world or not team.is_inside(callers):
        raise ValueError(f"{prefix} lies on ranks {list(team)}, ranks {list(callers)} call: P must hold all of them")
    if error := replaced_weight(module):
        raise error
    rank, entries = team.world.rank, list(entries_of(module))
    known = {name for name, _, _ in entries}
    strange = [name for name, value in module.state_dict().items() if name not in known and value is not None]
    if strange:
        raise ValueError(f"{prefix}.{strange[0]} is in its state_dict, but is none of its parameters and buffers")
    parts = []
    for name, tensor, place in entries:
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{prefix}.{name} is no dense tensor with values")
        if hasattr(tensor, "device_mesh"):
            raise ValueError(f"{prefix}.{name} is a DTensor: torch.distributed.checkpoint saves these")
        shape = place.global_shape if place else tuple(tensor.shape)
        box = place.layout.box(rank) if place else box_of(shape)
        box = box if rank in team and tensor.numel() else None
        line = place.layout.grid.ranks if place else team
        holders = place.replicas.team if place else team
        may_be_elsewhere = holders.size > 1 or bool(place and place.line)
        parts.append(Part(f"{prefix}.{name}", tensor, box, shape, holders, line[0], may_be_elsewhere))
    return parts


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside one that puts its updates off; refuses one that looks across tensors."""
    if isinstance(optimizer, DataParallelOptimizer):
        optimizer = optimizer.torch_optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"an optimizer is needed, not {type(optimizer).__name__}")
    check_optimizer(optimizer)
    return optimizer


def groups_of(optimizer: torch.optim.Optimizer, parts: Sequence[Part]) -> list[list[tuple[torch.Tensor, Part]]]:
    """The optimizer's parameters by group, each with its part of a model; a tied weight has its first name's."""
    found = {id(part.tensor): part for part in reversed(parts)}
    groups = [group["params"] for group in optimizer.param_groups]
    missing = [number for number, p in enumerate(p for group in groups for p in group) if id(p) not in found]
    if missing:
        raise ValueError(f"{type(optimizer).__name__}: parameters {missing} are none of the model's")
    return [[(p, found[id(p)]) for p in group] for group in groups]


def serial_name(part: Part) -> str:
    return part.name.partition(".")[2]


def state_of_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer, parts: Sequence[Part]
) -> tuple[list[Part], dict[str, Any]]:
    """States that are cut like their weights, and what is plain: numbers by weight, and groups by name.

    A rank without elements of a weight tells nothing of it.
    """
    cut, plain, groups = [], {}, []
    for group, members in zip(optimizer.param_groups, groups_of(optimizer, parts), strict=True):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**options, "params": [serial_name(part) for _, part in members]})
        for parameter, part in members:
            for key, value in optimizer.state.get(parameter, {}).items() if part.box is not None else ():
                name = f"{prefix}.state.{serial_name(part)}.{key}"
                if isinstance(value, torch.Tensor) and value.dim():
                    if value.shape != parameter.shape:
                        raise ValueError(f"{name} is neither a number nor of its weight's shape")
                    cut.append(part.like(name, value))
                else:
                    plain[name] = encoded(value, name)
    kind = type(optimizer).__name__
    return cut, {**plain, f"{prefix}.type": kind, f"{prefix}.groups": encoded(groups, f"{prefix}.groups")}


def generators() -> dict[str, torch.Tensor]:
    """The states of torch's generators: the CPU's, and that of the GPU in use if there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def merged(told: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What ranks tell by name, which must be the same where several tell it."""
    names = dict.fromkeys(name for plain in told.values() for name in plain)
    for name in names:  # as texts: nan is not equal to itself
        check_alike(name, {rank: json.dumps(plain[name]) for rank, plain in told.items() if name in plain}, "save")
    return {name: next(plain[name] for plain in told.values() if name in plain) for name in names}
