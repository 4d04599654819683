"""Where weights live: each rank holds the block it computes with, replicas stay equal, names and values are torch's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.agreement import CALL, check_alike, check_present, raise_together
from distdl_lite.grid import Grid
from distdl_lite.layout import Layout, Shape, global_shape_of, shape_of, whole
from distdl_lite.nn.kernel import connected_zeros
from distdl_lite.nn.module import Module
from distdl_lite.nn.replaced import replaced_cut_weight
from distdl_lite.operator import Operator
from distdl_lite.partition import Line, Partition, line_of
from distdl_lite.plan import plan
from distdl_lite.reducer import Replicas, replicated
from distdl_lite.transport import Transport, current

Draw = Callable[[torch.Tensor], Any]
_DRAWN_AT_ONCE = 2**20  # elements: a large weight is never whole in memory


@dataclass(frozen=True)
class Place:
    """Where a parameter or buffer lives.

    Attributes
    ----------
    layout : Layout
        Which box of the serial layer's tensor each rank holds; ranks with the same box are replicas.
    replicas : Replicas
        Of this rank's box.
    line : Line or None
        If each line of a grid has a layer of its own, whose layout is that of this rank's line.
    """

    layout: Layout
    replicas: Replicas
    line: Line | None = None

    @property
    def global_shape(self) -> Shape:
        return global_shape_of(self.layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        return self


def uniform(bound: float) -> Draw:
    """Draw from U(-bound, bound), block by block bit-equal to one call."""
    return lambda block: block.uniform_(-bound, bound)


def normal(total: int) -> Draw:
    """Draw `total` numbers from N(0, 1), block by block bit-equal to one call.

    torch draws normal numbers in groups of 16, and the last 16 once more where the total is no multiple of it: so blocks but
    the last must be multiples of 16, and no last one shorter.
    """
    left, drawn = total, torch.empty(0)

    def draw(block: torch.Tensor) -> torch.Tensor:
        nonlocal left, drawn
        drawn = drawn.to(block)
        while drawn.numel() < block.numel():
            n = _DRAWN_AT_ONCE if left >= _DRAWN_AT_ONCE + 16 else left
            drawn, left = torch.cat([drawn, block.new_empty(n).normal_()]), left - n
        taken, drawn = drawn[: block.numel()], drawn[block.numel() :]
        return block.copy_(taken.view(block.shape))

    return draw


def constant(value: float) -> Draw:
    """Fill without drawing."""
    return lambda block: block.fill_(value)


def kaiming_bound(fan_in: int) -> float:
    """The bound of ``kaiming_uniform_(a=sqrt(5))``, torch's start value of linear and convolution weights."""
    gain = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    return math.sqrt(3.0) * (gain / math.sqrt(fan_in)) if fan_in else 0.0


def bias_bound(fan_in: int) -> float:
    """The bound of torch's start value of linear and convolution biases."""
    return 1 / math.sqrt(fan_in) if fan_in else 0.0


class Layer(Module):
    """Base of layers with parameters.

    A layer calls `place` for each parameter and buffer in the order of the serial layer's constructor, and `use` where
    forward needs a parameter.
    """

    def __init__(self, *partitions: Partition | None) -> None:
        super().__init__(*partitions)
        self._distdl_places: dict[str, Place] = {}

    def place(
        self,
        name: str,
        layout: Layout | None,
        draw: Draw,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffer: bool = False,
    ) -> None:
        """Register this rank's box of a parameter (None: the layer has none of that name).

        Every rank draws all of it, so that its generator moves on as the serial constructor's; then replicas take the
        values of the first of their team, so that ranks with different seeds agree too. The layer's ranks call together.
        """
        if not self._distdl_partitions:
            raise self._refuse("a Layer needs a Partition: super().__init__(P_x)", TypeError)
        if layout is None:
            (self.register_buffer if buffer else self.register_parameter)(name, None)
            return
        transport = self._distdl_partitions[0].world_transport
        box = layout.box(transport.rank)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not (buffer or dtype.is_floating_point or dtype.is_complex):
            raise self._refuse(f"dtype={dtype!r} is neither a floating nor a complex one of torch", TypeError)
        block = _drawn(global_shape_of(layout), box, draw, dtype).to(device=device)
        team = layout.replicas(transport.rank)
        label = type(self).__name__
        if len(team) > 1:  # before it is numbered, lest ranks that go on after an error number otherwise
            _check_placed_alike(transport, team, f"{label}.{name} of shape {global_shape_of(layout)}, {dtype}", label)
        orders = transport.local.setdefault("orders", {})
        orders[team] = orders.get(team, 0) + 1
        replicas = Replicas(team, orders[team], f"{label}.{name}")
        self._distdl_places[name] = Place(layout, replicas, line_of(*self._distdl_partitions))
        if len(team) > 1:
            transport.broadcast(team, block, min(team))
        if buffer:
            self.register_buffer(name, block)
        else:
            self.register_parameter(name, torch.nn.Parameter(block))

    def _distdl_check_weights(self) -> None:
        if len(self._distdl_team) == 1:  # where torch's function takes what it takes
            return
        rank = self._distdl_transport.rank
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            place = self._distdl_places.get(name)
            if place is None or tensor is None:
                continue
            box = place.layout.box(rank)
            if tensor.numel() if box is None else tensor.shape != shape_of(box):
                raise self._refuse(
                    f"rank {rank} has a {name} of shape {tuple(tensor.shape)}; its part of the whole, of shape "
                    f"{place.global_shape}, is {'nothing' if box is None else f'of shape {shape_of(box)}'}"
                )

    def use(self, name: str) -> torch.Tensor | None:
        """A parameter for this forward, whose gradient will be the sum over its replicas."""
        parameter = self.held(name)
        if parameter is None:
            return None
        return replicated(parameter, self._distdl_places[name].replicas, self._distdl_transport)

    def given(self, nothing: torch.Tensor) -> torch.Tensor:
        """What a rank returns that only gives input away: with a graph if others have one, to give again in a checkpoint."""
        return connected_zeros(nothing.shape, nothing, self.held("weight"), added=self.held("bias"))

    def held(self, name: str) -> torch.Tensor | None:
        """A parameter or buffer, or what was put in its place, without torch's way to it of 5 us where the caches are cold."""
        for tensors in (self._parameters, self._buffers):
            if name in tensors:
                return tensors[name]
        return getattr(self, name)


def _check_placed_alike(transport: Transport, team: tuple[int, ...], told: str, label: str) -> None:
    """Raise unless all ranks are about to place the same; others may be at a layer's call, and are told as there."""
    mine, error = zlib.crc32(told.encode()), None
    if transport.agree(team, mine) == mine * len(team):
        return
    passed = dict(zip(team, transport.gather_objects(team, {CALL: told}), strict=True))
    check_present(passed, label)
    try:
        check_alike(CALL, {rank: other.get(CALL) for rank, other in passed.items()})
    except ValueError as raised:
        error = raised
    raise_together(transport, team, error, label)


def _drawn(global_shape: Shape, box: Any, draw: Draw, dtype: torch.dtype) -> torch.Tensor:
    """A box of a tensor that is drawn whole, a block of rows at a time; 0 elements where there is no box."""
    if not global_shape:
        value = draw(torch.empty((), dtype=dtype))
        return value if box is not None else value.new_empty(0)
    shape = (0, *global_shape[1:]) if box is None else shape_of(box)
    rows, rest = box[0] if box else (0, 0), tuple(slice(*r) for r in box[1:]) if box else ()
    kept = torch.empty(shape, dtype=dtype)
    step = max(1, _DRAWN_AT_ONCE // max(1, math.prod(global_shape[1:])))
    for start in range(0, global_shape[0], step):
        stop = min(start + step, global_shape[0])
        block = draw(torch.empty((stop - start, *global_shape[1:]), dtype=dtype))
        low, high = max(start, rows[0]), min(stop, rows[1])
        if low < high:
            kept[low - rows[0] : high - rows[0]] = block[(slice(low - start, high - start), *rest)]
    return kept


# ---- serial weights in and out ---------------------------------------------------------------------------------------


Entry = tuple[str, torch.Tensor, Place | None]


def _entries(module: torch.nn.Module) -> Iterator[Entry]:
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


def team_of(module: torch.nn.Module) -> tuple[Transport, tuple[int, ...]]:
    """The world of the distributed layers inside a module and their ranks; the whole ambient world if there are none."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"the model is needed, a torch.nn.Module, not {type(module).__name__}")
    layers = [inner for inner in module.modules() if isinstance(inner, Module) and inner._distdl_partitions]
    if not layers:
        world = current()
        return world, tuple(range(world.size))
    ranks = {rank for layer in layers for P in layer._distdl_partitions for rank in P.ranks}
    return layers[0]._distdl_partitions[0].world_transport, tuple(sorted(ranks))


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
    """
    transport, team, entries = callers(module, root)
    if transport.rank not in team:
        return
    at_root = transport.rank == root
    raise_together(transport, team, _mismatch(entries, state) if at_root else None)
    for name, tensor, _, layouts in entries:
        source = state[name].detach() if at_root and state is not None else None
        with torch.no_grad():
            tensor.copy_(spread(transport, team, root, tensor, layouts, source))


Spread = tuple[str, torch.Tensor, Place | None, tuple[Layout, ...]]  # an entry and its layouts, the root's line's first


def callers(
    module: torch.nn.Module, root: int, of_all_lines: bool = True
) -> tuple[Transport, tuple[int, ...], list[Spread]]:
    """Who calls what works between a root and a module: its ranks and the root, of all lines that name this root.

    Where each line of a grid has layers of its own, all lines must call, unless only the root's count. Beside layers over
    all ranks, lines made from lists of ranks may have layers of their own, too.
    """
    transport, team = team_of(module)
    entries = list(_entries(module))
    if not of_all_lines and _is_of_other_lines(root, team, entries):
        return transport, (), []
    others = {rank for _, _, place in entries if place and place.line for rank in place.line.everywhere}
    team = tuple(sorted({*team, root, *(others if of_all_lines else ())}))
    if transport.rank not in team:
        return transport, team, []
    raise_together(transport, team, replaced_cut_weight(module))
    mine = root, [(name, place.layout if place else tuple(tensor.shape)) for name, tensor, place in entries]
    passed = dict(zip(team, transport.gather_objects(team, mine), strict=True))
    team = tuple(rank for rank in team if passed[rank][0] == root)
    if root not in team:
        raise ValueError(f"ranks {list(team)} name root {root}, which names root {passed[root][0]}")
    check_alike("weights and buffers", {rank: [name for name, _ in passed[rank][1]] for rank in team})
    order = sorted(team, key=lambda rank: rank != root)
    seen = [{rank: passed[rank][1][number][1] for rank in order} for number in range(len(entries))]
    return (
        transport,
        team,
        [(*entry, _over_lines(entry, held, root)) for entry, held in zip(entries, seen, strict=True)],
    )


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
    transport: Transport,
    team: tuple[int, ...],
    root: int,
    like: torch.Tensor,
    layouts: Sequence[Layout],
    source: torch.Tensor | None,
) -> torch.Tensor:
    """This rank's part of the root's `source`, of the shape and kind of `like`; without layouts it is whole everywhere."""
    if not layouts:
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        if source is not None:
            received.copy_(source)
        transport.broadcast(team, received, root)
        return received
    mine = like  # where there is nothing to get
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
    """
    transport, team, entries = callers(module, root, of_all_lines=False)
    if transport.rank not in team:
        return {}
    state = {}
    for name, tensor, _, layouts in entries:
        held = tensor.detach()
        state[name] = gathered_from(transport, root, held, layouts[0]) if layouts else held.clone()
    return state if transport.rank == root else {}


def _is_of_other_lines(root: int, team: tuple[int, ...], entries: Sequence[Entry]) -> bool:
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
