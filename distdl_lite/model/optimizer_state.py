"""The state of an optimizer in and out of the serial model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from distdl_lite.agreement import check_alike, raise_together
from distdl_lite.layout import Layout, global_shape_of
from distdl_lite.model.gradient_norm import check_optimizer
from distdl_lite.model.weights import Spread, callers, gathered_from, spread

State = dict[str, Any]  # of an optimizer, or of one of its parameters by name
Weight = tuple[torch.Tensor, str, tuple[Layout, ...]]  # a parameter, its name and where it lies


@dataclass(frozen=True)
class _Block:
    """Tells of a state that is a tensor; numbers are told as they are."""

    dtype: torch.dtype
    fits: bool  # whether it has its weight's shape, and is cut like it


def serial_optimizer_state_dict(module: torch.nn.Module, optimizer: torch.optim.Optimizer, root: int = 0) -> State:
    """The ``state_dict()`` of the serial model's optimizer, put together on one rank.

    Parameters
    ----------
    module : torch.nn.Module
        The distributed model; the ranks of its layers and the root call this together, where each line of a grid has
        layers of its own those of all lines.
    optimizer : torch.optim.Optimizer
        Of parameters of the model, in the groups and order of the serial one, whose numbers they get.
    root : int
        A rank of the world. Of lines of a grid the root's counts.

    Returns
    -------
    dict
        On the root what torch's optimizer of the serial model loads: states of a weight's shape whole, numbers such as
        ``step`` as they are. Empty elsewhere.

    Raises
    ------
    ValueError
        On all ranks, if the optimizer is not elementwise, if it has a parameter that the module has not or a state that
        is neither a number nor of its weight's shape, or if ranks that share a weight have different numbers.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 2, 1)), 4, 6, 3)
    ...     optimizer = torch.optim.Adam(net.parameters())
    ...     net(torch.ones(1, 2, 5)).sum().backward()
    ...     optimizer.step()
    ...     state = dl.serial_optimizer_state_dict(net, optimizer)
    ...     return tuple(state["state"][0]["exp_avg"].shape) if world.rank == 0 else state
    >>> dl.testing.spmd(2, body)
    [(6, 4, 3), {}]
    """
    check_optimizer(optimizer)
    team, entries = callers(module, root)
    transport = team.world
    if transport.rank not in team:
        return {}
    weights = _weights(optimizer, entries)
    mine = [(p.numel(), _told(optimizer.state.get(p, {}), p.shape)) for p, _, _ in weights]
    passed = dict(zip(team, transport.gather_objects(team, mine), strict=True))
    state = {}
    for number, (parameter, name, layouts) in enumerate(weights):
        held = {rank: passed[rank][number] for rank in (layouts[0].grid.ranks if layouts else (root,))}
        parts = _agreed(f"{type(optimizer).__name__}: state of {name}", held)
        own = optimizer.state.get(parameter, {})
        whole = {}
        for key, part in parts.items():
            if isinstance(part, _Block):
                block = own[key] if key in own else torch.empty_like(parameter, dtype=part.dtype, requires_grad=False)
                part = gathered_from(transport, root, block, layouts[0]) if layouts else block.clone()
            whole[key] = part
        if whole:
            state[number] = whole
    if transport.rank != root:
        return {}
    return {"state": state, "param_groups": copy.deepcopy(optimizer.state_dict()["param_groups"])}


def load_serial_optimizer_state_dict(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None, root: int = 0
) -> None:
    """Cut the state of the serial model's optimizer over the ranks, which then go on as the serial model would.

    Parameters
    ----------
    module : torch.nn.Module
        The distributed model, on any grid; who calls this together is as in `serial_optimizer_state_dict`.
    optimizer : torch.optim.Optimizer
        Of parameters of the model, in the groups and order of the serial one.
    state : mapping or None
        The serial ``state_dict()`` on the root; what other ranks pass is not read.
    root : int
        A rank of the world.

    Raises
    ------
    ValueError
        On all ranks, if the optimizer is not elementwise or has a parameter that the module has not, or if groups or
        shapes of the state do not fit.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> serial = torch.nn.Conv1d(4, 6, 3)
    >>> adam = torch.optim.Adam(serial.parameters())
    >>> serial(torch.ones(1, 4, 5)).sum().backward()
    >>> adam.step()
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 2, 1)), 4, 6, 3)
    ...     optimizer = torch.optim.Adam(net.parameters())
    ...     dl.load_serial_optimizer_state_dict(net, optimizer, adam.state_dict() if world.rank == 0 else None)
    ...     return tuple(optimizer.state[net.weight]["exp_avg"].shape)
    >>> dl.testing.spmd(2, body)
    [(3, 4, 3), (3, 4, 3)]
    """
    check_optimizer(optimizer)
    team, entries = callers(module, root)
    transport = team.world
    if transport.rank not in team:
        return
    weights = _weights(optimizer, entries)
    groups, states, error = [], [], None
    if transport.rank == root:
        try:
            groups, states = _by_weight(optimizer, weights, state)
        except Exception as raised:
            error = raised
    raise_together(team, error, type(optimizer).__name__)
    mine = groups, [_told(states_of_one, None) for states_of_one in states]
    groups, told = transport.gather_objects(team, mine)[team.index(root)]
    own: dict[int, State] = {}
    for number, (parameter, _, layouts) in enumerate(weights):
        for key, part in told[number].items():
            if isinstance(part, _Block):
                like = torch.empty_like(parameter, dtype=part.dtype, requires_grad=False)
                source = states[number][key] if transport.rank == root else None
                part = spread(team, root, like, layouts, source)
            own.setdefault(number, {})[key] = part
    numbers = count()
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": own, "param_groups": groups})


def _weights(optimizer: torch.optim.Optimizer, entries: Sequence[Spread]) -> list[Weight]:
    """The optimizer's parameters in its order, each with its name and layouts; a tied weight has its first name's."""
    found = {id(tensor): (tensor, name, layouts) for name, tensor, _, layouts in reversed(entries)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [number for number, parameter in enumerate(parameters) if id(parameter) not in found]
    if missing:
        raise ValueError(f"{type(optimizer).__name__}: parameters {missing} are none of the module's")
    return [found[id(parameter)] for parameter in parameters]


def _told(state: Mapping[str, Any], shape: torch.Size | None) -> State:
    """What other ranks are told of a weight's states, whose shape is checked if it is given."""
    return {
        key: _Block(value.dtype, shape in (None, value.shape))
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for key, value in state.items()
    }


def _agreed(what: str, held: Mapping[int, tuple[int, State]]) -> State:
    """A weight's states from what its ranks tell; those without elements of it may have none."""
    told = {rank: parts for rank, (elements, parts) in held.items() if elements}
    if not told:
        return {}
    for rank, parts in told.items():
        for key, part in parts.items():
            if isinstance(part, _Block) and not part.fits:
                raise ValueError(f"{what}: {key!r} on rank {rank} is neither a number nor of the weight's shape")
    check_alike(what, {rank: str(parts) for rank, parts in told.items()})
    return next(iter(told.values()))


def _by_weight(
    optimizer: torch.optim.Optimizer, weights: Sequence[Weight], state: Mapping[str, Any] | None
) -> tuple[list[State], list[State]]:
    """The groups of a serial state, and the states of each weight. Raises if it does not fit."""
    groups = [] if state is None else state["param_groups"]
    wanted, given = ([len(group["params"]) for group in those] for those in (optimizer.param_groups, groups))
    if state is None or given != wanted:
        raise ValueError(f"the optimizer has groups of {wanted} parameters, the state of {given}")
    states = [state["state"].get(number, {}) for group in groups for number in group["params"]]
    for (parameter, name, layouts), own in zip(weights, states, strict=True):
        shape = torch.Size(global_shape_of(layouts[0])) if layouts else parameter.shape
        for key, part in _told(own, shape).items():
            if isinstance(part, _Block) and not part.fits:
                raise ValueError(f"{key!r} of {name} has shape {tuple(own[key].shape)}, the weight {tuple(shape)}")
    return groups, states
