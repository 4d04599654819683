"""Where weights live: each rank holds the block it computes with, replicas stay equal, names and values are torch's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.agreement import call_of, check_met
from distdl_lite.layout import Layout, Shape, global_shape_of, shape_of
from distdl_lite.nn.blocks import connected_zeros
from distdl_lite.nn.module import Module
from distdl_lite.partition import Line, Partition, line_of
from distdl_lite.reducer import Replicas, replicated

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
        team = transport.team(layout.replicas(transport.rank))
        label = type(self).__name__
        if team.size > 1:  # before it is numbered, lest ranks that go on after an error number otherwise
            place = call_of(f"{label}.{name} of shape {global_shape_of(layout)}, {dtype}", team.made["replicas"] + 1)
            vote = zlib.crc32(place.encode())
            if transport.agree(team, vote) != vote * team.size:
                check_met(team, label, place)
        team.made["replicas"] += 1
        replicas = Replicas(team, team.made["replicas"], f"{label}.{name}")
        self._distdl_places[name] = Place(layout, replicas, line_of(*self._distdl_partitions))
        if team.size > 1:
            transport.broadcast(team, block, team[0])
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
        return replicated(parameter, self._distdl_places[name].replicas)

    def given(self, nothing: torch.Tensor) -> torch.Tensor:
        """Output of a rank that sends input but computes nothing: an empty tensor with a graph node if others have one.

        So its backward and its recomputation communicate as the others' do."""
        return connected_zeros(nothing.shape, nothing, self.held("weight"), added=self.held("bias"))

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
