"""Checks that all ranks that hold copies of a module have the same parameters, buffers, options and optimizers."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from distdl_lite.buckets import broadcast, unwritable
from distdl_lite.model.replicas import checksum
from distdl_lite.nn.parameter import Layer
from distdl_lite.optim.checks import check_same
from distdl_lite.parallel.replicas.options import Options
from distdl_lite.parallel.replicas.synchroniser import synchronisers
from distdl_lite.transport import Team


def told_of(options: Options, optimizers: Sequence[Any], module: torch.nn.Module) -> dict[str, Any]:
    """A rank's options, and which optimizer updates each of the parameters; the optimizer's order is each rank's own."""
    hook = options.comm_hook
    owners: dict[int, str] = {}
    for one in optimizers:
        for group in one.param_groups:
            settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            owners.update((id(p), f"{type(one.torch_optimizer).__name__} {settings}") for p in group["params"])
    return {
        **vars(options),
        "bucket_mb": options.bucket_bytes / 2**20,
        "comm_hook": hook and getattr(hook, "__qualname__", type(hook).__qualname__),
        **{f"optimizer of {name}": owners.get(id(p)) for name, p in module.named_parameters()},
    }


def order(optimizers: Sequence[torch.optim.Optimizer], named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """A description of optimizers, the same on all ranks that may exchange their states."""
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


DIFFERENT = "DataParallel: rank {rank} has {name}={value!r}, rank {first} {usual!r}"
LANES = 8  # containers whose sums may be under way at once; communicators are few
_MIXED = (
    "DataParallel: the gradient of {} is summed over the batch axis by its layer, that of {} by the container, whose "
    'average="{}" has another scale: write average="none" and a loss over P, or build the distributed layers on the ranks that '
    "share a place along the batch axis"
)


def summed_by_layers(module: torch.nn.Module, team: Sequence[int]) -> dict[int, bool]:
    """The parameters of distributed layers, and whether their sum covers the team."""
    found, line = {}, set(team)
    for name, layer in module.named_modules():
        for key, place in layer._distdl_places.items() if isinstance(layer, Layer) else ():
            replicas = set(place.replicas.team)
            if line - replicas and len(line & replicas) > 1:
                raise ValueError(
                    f"DataParallel: {name}.{key} has replicas on ranks {sorted(replicas)}, some of the ranks "
                    f"{sorted(line)} of the batch axis; they must be all of them, or one"
                )
            if layer._parameters.get(key) is not None:
                found[id(layer._parameters[key])] = not line - replicas
    return found


def summed_by_container(module: torch.nn.Module, by_layers: Mapping[int, bool]) -> list[tuple[str, torch.nn.Parameter]]:
    """The other parameters, and those of which a layer's sum does not cover the team."""
    return [(name, p) for name, p in module.named_parameters() if not by_layers.get(id(p))]


def _of_two_scales(module: torch.nn.Module, by_layers: Mapping[int, bool]) -> list[str]:
    """A parameter that its layer sums over the batch axis and one that gets the mean, if both are trained."""
    trained = [(n, by_layers.get(id(p), False)) for n, p in module.named_parameters() if p.requires_grad]
    found = [next((n for n, covers in trained if covers is by_layer), None) for by_layer in (True, False)]
    return [n for n in found if n is not None] if None not in found else []


def in_others(team: Team, named: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
    """The names of parameters that another container of this rank has."""

    def found() -> list[str]:
        held = {id(p) for other in synchronisers(team.world) for p in other.parameters}
        return [name for name, p in named if id(p) in held]

    if found():
        gc.collect()  # it may be one that nobody uses any more
    return found()


def lanes_in_use(team: Team) -> list[int]:
    """The numbers of the lanes that a new container of the team should leave to others, as far as this rank knows."""
    alive = [(other.team, other.lane) for other in synchronisers(team.world)]
    used = [*alive, *team.world.local.get("spoilt lanes", [])]
    return [int(lane.split()[-1]) for others, lane in used if others == team]


def agreed(
    module: torch.nn.Module, team: Team, options: Mapping[str, Any], writes_buffers: bool, weighs_late: bool
) -> tuple[list[tuple[str, torch.nn.Parameter]], list[int], int]:
    """The parameters that the container sums, the numbers of those that come late, and a free lane.

    The team calls together. `weighs_late` says that gradients get their weights in the container's sum, and not before.
    """
    by_layers = summed_by_layers(module, team)
    named = summed_by_container(module, by_layers)
    late = [number for number, (_, p) in enumerate(named) if id(p) in by_layers]
    if team.size == 1:
        if refusal := _refusal_of(module, team, named):
            raise refusal
        return named, late, 0
    tensors = {**dict(named), **dict(module.named_buffers())}
    alike = tensors if writes_buffers else dict(named)
    mixed = _of_two_scales(module, by_layers) if weighs_late else []
    refusal = _refusal_of(module, team, named, alike.items(), mixed, options["average"])
    lane = _check_same_module(team, tensors, refusal, options)
    if options["init"] == "broadcast":
        broadcast(team, list(alike.values()))
    elif options["init"] == "check":
        check_equal(team, alike)
    return named, late, lane


def _refusal_of(
    module: torch.nn.Module,
    team: Team,
    parameters: Sequence[tuple[str, torch.Tensor]],
    written: Iterable[tuple[str, torch.Tensor]] = (),
    mixed: Sequence[str] = (),
    average: str = "",
) -> Exception | None:
    """An error for sparse layers, parameters of two scales or in two containers, and tensors that cannot be written to."""
    named = module.named_modules()
    if sparse := [name or type(m).__name__ for name, m in named if getattr(m, "sparse", False) is True]:
        return TypeError(f"DataParallel: sparse gradients are not summed; build {sparse} with sparse=False")
    if mixed:
        return ValueError(_MIXED.format(*mixed, average))
    if shared := ", ".join(in_others(team, parameters)):
        return ValueError(
            f"DataParallel: another container has {shared} already; put both modules into one container, or delete the other"
        )
    reason = unwritable(written)
    return ValueError(f"DataParallel: {reason}") if reason else None


def _check_same_module(
    team: Team,
    tensors: Mapping[str, torch.Tensor],
    refusal: Exception | None,
    options: Mapping[str, Any],
) -> int:
    """Raise on all of the team unless all hold the same tensors, which none of them refuses; returns a free lane."""
    mine = [
        (name, tuple(t.shape), str(t.dtype).removeprefix("torch."), *({t.device.type} - {"cpu"}))
        for name, t in tensors.items()
    ]
    told = team.world.gather_objects(team, (mine, lanes_in_use(team), options, refusal))
    check_same(team, [theirs for _, _, theirs, _ in told], DIFFERENT)
    for *_, refused in told:
        if refused is not None:
            raise refused
    first = told[0][0]
    for rank, (other, *_) in zip(team, told, strict=True):
        a, b = next(((a, b) for a, b in zip_longest(first, other) if a != b), (None, None))
        if a or b:
            lacking = f"of ranks {team[0]} and {rank}, one lacks {(a or b)[0]}"
            text = f"rank {rank} has {b}, rank {team[0]} {a}" if a and b else lacking
            raise ValueError(f"DataParallel: the ranks hold different modules: {text}")
    if empty := [name for name, t in tensors.items() if t.is_meta]:
        raise ValueError(
            f"DataParallel: {', '.join(empty)} of all ranks is on the device meta, without data; use to_empty"
        )
    in_use = [lane for _, lanes, *_ in told for lane in lanes]
    return min(range(LANES), key=in_use.count)


def check_equal(team: Team, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError on all of the team unless all hold the same values, bit by bit."""
    told = team.world.gather_objects(team, {name: checksum(t) for name, t in tensors.items()})
    names = dict.fromkeys(name for one in told for name in one)
    different = [name for name in names if len({one.get(name) for one in told}) > 1]
    if different:
        raise RuntimeError(f"DataParallel: the ranks {list(team)} hold different values of {', '.join(different)}")
