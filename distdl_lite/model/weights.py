"""Serial weights in and out: a model's tensors by the serial model's names, cut over the ranks or put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from distdl_lite.agreement import check_alike, raise_together
from distdl_lite.grid import Grid
from distdl_lite.layout import Layout, global_shape_of, whole
from distdl_lite.nn.module import Module
from distdl_lite.nn.parameter import Place
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition, union_of_teams
from distdl_lite.plan import plan
from distdl_lite.transport import Team, Transport

Entry = tuple[str, torch.Tensor, Place | None]


def entries_of(module: torch.nn.Module) -> Iterator[Entry]:
    """The names and tensors of ``state_dict()`` with their places; the same names in the same order on all ranks.

    It is asked itself, since containers leave their prefix out of it, and do first what they have deferred.
    """
    places: dict[int, Place | None] = {}
    for inner in module.modules():
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            places[id(tensor)] = getattr(inner, "_distdl_places", {}).get(name) or places.get(id(tensor))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in places:  # and not what a layer adds of its own
            yield name, tensor, places[id(tensor)]


def team_of(module: torch.nn.Module, callers: Team | None = None) -> Team:
    """The ranks of the distributed layers inside a module; if there are none, those that call, or the whole ambient world."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"the model is needed, a torch.nn.Module, not {type(module).__name__}")
    partitions = [P for inner in module.modules() if isinstance(inner, Module) for P in inner._distdl_partitions]
    return callers if callers and not partitions else union_of_teams(*(partitions or [Partition()]))


def check_cut_weights(module: torch.nn.Module, team: Team) -> None:
    """Raise ValueError on all ranks if another tensor is in the place of a cut weight, as after a parametrization or pruning."""
    raise_together(team, replaced_weight(module))


def replaced_weight(module: torch.nn.Module) -> ValueError | None:
    """An error if another tensor is in the place of a cut weight.

    Of the tensors from which the weight is made now nobody knows how they are cut. Those of a weight that every rank holds
    whole are whole too.
    """
    missing = (
        f"{path}.{name}".lstrip(".") + f" of shape {place.global_shape}"
        for path, inner in module.named_modules()
        for name, place in getattr(inner, "_distdl_places", {}).items()
        if name not in {*inner._parameters, *inner._buffers}
        and any(len(set(dim.ranges)) > 1 for dim in place.layout.dims)
    )
    text = next(missing, "")
    error = (
        f"{text} is cut over ranks, and is no parameter any more: how what a parametrization or pruning has put in its "
        "place is cut is not known"
    )
    return ValueError(error) if text else None


def load_serial_state_dict(module: torch.nn.Module, state: Mapping[str, torch.Tensor] | None, root: int = 0) -> None:
    """Cut the serial model's weights and buffers over the ranks.

    Parameters
    ----------
    module : torch.nn.Module
        The distributed model; the ranks of its layers and the root call this together. Where each line of a grid has
        layers of its own, all lines call together and get the same values, or each line names a root of its own.
    state : mapping or None
        The serial ``state_dict()`` on the root; what other ranks pass is not read.
    root : int
        A rank of the world; one that the module does not lie on calls with this module, too. Where teams made from lists of
        ranks have a model each, it is one of the team: ranks that name a root which is busy with another model wait for it
        for ever, as no rank can know that.

    Raises
    ------
    ValueError
        On all ranks, if names or shapes differ from the module's, or between lines that name the same root.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> serial = torch.nn.Conv1d(4, 6, 3)
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 2, 1)), 4, 6, 3)
    ...     dl.load_serial_state_dict(net, serial.state_dict() if world.rank == 0 else None)
    ...     return tuple(net.bias.shape), torch.equal(net.bias, serial.bias.chunk(2)[world.rank])
    >>> dl.testing.spmd(2, body)
    [((3,), True), ((3,), True)]
    """
    team, entries = callers(module, root)
    if team.world.rank not in team:
        return
    at_root = team.world.rank == root
    raise_together(team, _mismatch(entries, state) if at_root else None)
    for name, tensor, _, layouts in entries:
        source = state[name].detach() if at_root and state is not None else None
        with torch.no_grad():
            tensor.copy_(spread(team, root, tensor, layouts, source))


Spread = tuple[str, torch.Tensor, Place | None, tuple[Layout, ...]]  # an entry and its layouts, the root's line's first


def callers(module: torch.nn.Module, root: int, of_all_lines: bool = True) -> tuple[Team, list[Spread]]:
    """Who calls what works between a root and a module: its ranks and the root, of all lines that name this root.

    Where each line of a grid has layers of its own, all lines must call, unless only the root's count. Beside layers over
    all ranks, lines made from lists of ranks may have layers of their own, too.
    """
    team = team_of(module)
    world = team.world
    entries = list(entries_of(module))
    if not of_all_lines and _is_of_other_lines(root, team, entries):
        return world.team(()), []
    others = {rank for _, _, place in entries if place and place.line for rank in place.line.everywhere}
    team = world.team({*team, root, *(others if of_all_lines else ())})
    if world.rank not in team:
        return team, []
    check_cut_weights(module, team)
    mine = root, [(name, place.layout if place else tuple(tensor.shape)) for name, tensor, place in entries]
    passed = dict(zip(team, world.gather_objects(team, mine), strict=True))
    team = world.team(rank for rank in team if passed[rank][0] == root)
    if root not in team:
        raise ValueError(f"ranks {list(team)} name root {root}, which names root {passed[root][0]}")
    check_alike("weights and buffers", {rank: [name for name, _ in passed[rank][1]] for rank in team})
    order = sorted(team, key=lambda rank: rank != root)
    seen = [{rank: passed[rank][1][number][1] for rank in order} for number in range(len(entries))]
    return team, [(*entry, _over_lines(entry, held, root)) for entry, held in zip(entries, seen, strict=True)]


def _over_lines(entry: Entry, held: Mapping[int, Any], root: int) -> tuple[Layout, ...]:
    """The layouts of a tensor over all lines, from what every rank says of its own."""
    name, _, place = entry
    if place is None:
        check_alike(f"shape of {name}", held)
        return ()
    check_alike(f"shape of {name}", {rank: global_shape_of(layout) for rank, layout in held.items()})
    layouts = tuple(dict.fromkeys(held.values()))
    for layout in layouts:
        if any(held.get(rank) != layout for rank in layout.grid.ranks):
            raise ValueError(f"{name} lies on ranks {list(layout.grid.ranks)}, but not all of them name root {root}")
    return layouts


def _mismatch(entries: Sequence[Spread], state: Any) -> Exception | None:
    if not isinstance(state, Mapping):
        return ValueError(f"the serial model's state_dict() is needed on the root, not {type(state).__name__}")
    wanted = {name: tuple(place.global_shape if place else tensor.shape) for name, tensor, place, _ in entries}
    given = {name: getattr(value, "shape", type(value).__name__) for name, value in state.items()}
    given = {name: tuple(shape) if isinstance(shape, torch.Size) else shape for name, shape in given.items()}
    if wanted == given:
        return None
    names = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
    texts = [f"{name}: module {wanted.get(name, 'has none')}, state {given.get(name, 'has none')}" for name in names]
    return ValueError(f"the serial state does not fit the module: {'; '.join(texts)}")


def spread(
    team: Team, root: int, like: torch.Tensor, layouts: Sequence[Layout], source: torch.Tensor | None
) -> torch.Tensor:
    """This rank's part of the root's `source`, of the shape and kind of `like`; without layouts it is whole everywhere."""
    if not layouts:
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        if source is not None:
            received.copy_(source)
        team.world.broadcast(team, received, root)
        return received
    transport, mine = team.world, like  # where there is nothing to get
    for layout in layouts:
        if transport.rank != root and layout.box(transport.rank) is None:
            continue
        alone = whole(Grid((1,), (root,)), global_shape_of(layout))
        move = Operator(plan(alone, layout, transport.rank), transport, "load_serial_state_dict")
        block = move.apply(like.new_empty(0) if source is None else source.to(like))
        if move.plan.shape_out is not None:
            mine = block.view(like.shape)
    return mine


def serial_state_dict(module: torch.nn.Module, root: int = 0) -> dict[str, torch.Tensor]:
    """The serial model's ``state_dict()``, put together on one rank.

    Parameters
    ----------
    module : torch.nn.Module
        The distributed model; the ranks of its layers and the root call this together.
    root : int
        A rank of the world, as in `load_serial_state_dict`. Where each line of a grid has layers of its own, those of the
        root's line count.

    Returns
    -------
    dict
        On the root the whole tensors by name; of a parameter of a plain torch layer the root's own. Empty elsewhere.

    Raises
    ------
    ValueError
        On all ranks, if each line of a grid has layers of its own and the root is in none.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 2, 1)), 4, 6, 3)
    ...     return {name: tuple(x.shape) for name, x in dl.serial_state_dict(net).items()}
    >>> dl.testing.spmd(2, body)
    [{'weight': (6, 4, 3), 'bias': (6,)}, {}]
    """
    team, entries = callers(module, root, of_all_lines=False)
    transport = team.world
    if transport.rank not in team:
        return {}
    state = {}
    for name, tensor, _, layouts in entries:
        held = tensor.detach()
        state[name] = gathered_from(transport, root, held, layouts[0]) if layouts else held.clone()
    return state if transport.rank == root else {}


def _is_of_other_lines(root: int, team: Team, entries: Sequence[Entry]) -> bool:
    """Whether the module is on lines of a grid alone, and the root on none of this rank's. Raises if it is on no line."""
    lines = [(name, place.line) for name, _, place in entries if place is not None and place.line is not None]
    for name, line in lines:
        if root not in line.everywhere:
            raise ValueError(
                f"each line of a grid over ranks {list(line.everywhere)} has a {name} of its own: root {root} must be "
                f"one of these ranks, to tell whose is meant"
            )
    return bool(lines) and root not in team


def gathered_from(transport: Transport, root: int, block: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The whole tensor whose boxes the ranks hold, on the root; of no use elsewhere."""
    if transport.rank not in {root, *layout.grid.ranks}:
        return block
    alone = whole(Grid((1,), (root,)), global_shape_of(layout))
    move = plan(layout.first_holders(), alone, transport.rank)
    return Operator(move, transport, "serial_state_dict").apply(block)
