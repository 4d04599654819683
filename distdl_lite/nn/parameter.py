"""Where weights live: each rank holds the block it computes with, replicas stay equal, names and values are torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.grid import Grid
from distdl_lite.layout import Layout, Shape, global_shape_of, shape_of, whole
from distdl_lite.nn.module import Module, raise_together
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
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
    """

    layout: Layout
    replicas: Replicas

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
        orders = transport.local.setdefault("orders", {})
        orders[team] = orders.get(team, 0) + 1
        self._distdl_places[name] = Place(layout, Replicas(team, orders[team], f"{type(self).__name__}.{name}"))
        if len(team) > 1:
            transport.broadcast(team, block, min(team))
        if buffer:
            self.register_buffer(name, block)
        else:
            self.register_parameter(name, torch.nn.Parameter(block))

    def use(self, name: str) -> torch.Tensor | None:
        """A parameter for this forward, whose gradient will be the sum over its replicas."""
        parameter = self.held(name)
        if parameter is None:
            return None
        return replicated(parameter, self._distdl_places[name].replicas, self._distdl_transport)

    def held(self, name: str) -> torch.Tensor | None:
        """A parameter or buffer, or what was put in its place, without torch's way to it of 5 us where the caches are cold."""
        for tensors in (self._parameters, self._buffers):
            if name in tensors:
                return tensors[name]
        return getattr(self, name)


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


def _entries(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, Place | None]]:
    """The names and tensors of ``state_dict()`` with their places; the same names in the same order on all ranks."""
    for prefix, inner in module.named_modules(remove_duplicate=False):
        places = getattr(inner, "_distdl_places", {})
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None and name not in inner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, tensor, places.get(name)


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
        The distributed model; the ranks of its layers and the root call this together.
    state : mapping or None
        The serial ``state_dict()`` on the root; what other ranks pass is not read.
    root : int
        A rank of the world.

    Raises
    ------
    ValueError
        On all ranks, if names or shapes differ from the module's.
    """
    transport, team = team_of(module)
    team = tuple(sorted({*team, root}))
    if transport.rank not in team:
        return
    entries = list(_entries(module))
    at_root = transport.rank == root
    raise_together(transport, team, _mismatch(entries, state or {}) if at_root else None)
    for name, tensor, place in entries:
        source = state[name].detach() if at_root and state is not None else None
        with torch.no_grad():
            _load(transport, team, root, tensor, place, source)


def _mismatch(entries: list[tuple[str, torch.Tensor, Place | None]], state: Mapping[str, torch.Tensor]) -> Any:
    wanted = {name: tuple(place.global_shape if place else tensor.shape) for name, tensor, place in entries}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted == given:
        return None
    names = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
    texts = [f"{name}: module {wanted.get(name, 'has none')}, state {given.get(name, 'has none')}" for name in names]
    return ValueError(f"the serial state does not fit the module: {'; '.join(texts)}")


def _load(
    transport: Transport,
    team: tuple[int, ...],
    root: int,
    tensor: torch.Tensor,
    place: Place | None,
    source: torch.Tensor | None,
) -> None:
    if place is None:
        received = torch.empty_like(tensor) if source is None else source.to(tensor).contiguous()
        transport.broadcast(team, received, root)
        tensor.copy_(received)
        return
    alone = whole(Grid((1,), (root,)), place.global_shape)
    move = Operator(plan(alone, place.layout, transport.rank), transport, "load_serial_state_dict")
    block = move.apply(tensor.new_empty(0) if source is None else source.to(tensor))
    if move.plan.shape_out is not None:
        tensor.copy_(block.view(tensor.shape))


def serial_state_dict(module: torch.nn.Module, root: int = 0) -> dict[str, torch.Tensor]:
    """The serial model's ``state_dict()``, put together on one rank.

    Parameters
    ----------
    module : torch.nn.Module
        The distributed model; the ranks of its layers and the root call this together.
    root : int
        A rank of the world.

    Returns
    -------
    dict
        On the root the whole tensors by name; of a parameter of a plain torch layer the root's own. Empty elsewhere.
    """
    transport, team = team_of(module)
    if transport.rank not in {*team, root}:
        return {}
    state = {}
    for name, tensor, place in _entries(module):
        value = tensor.detach().clone() if place is None else gathered_from(transport, root, tensor.detach(), place)
        if transport.rank == root:
            state[name] = value
    return state


def gathered_from(transport: Transport, root: int, block: torch.Tensor, place: Place) -> torch.Tensor:
    """The whole tensor whose boxes the ranks hold, on the root; 0 elements elsewhere."""
    layout = place.layout.first_holders()
    alone = whole(Grid((1,), (root,)), place.global_shape)
    return Operator(plan(layout, alone, transport.rank), transport, "serial_state_dict").apply(block)
