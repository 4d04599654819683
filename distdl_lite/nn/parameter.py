"""Where weights live: each rank holds the block it computes with, replicas stay equal, names and values are torch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.agreement import call_of, check_met, is_unanimous, vote_of
from distdl_lite.layout import Layout, Shape, global_shape_of, shape_of
from distdl_lite.nn.blocks import connected_zeros
from distdl_lite.nn.draws import Draw, drawn
from distdl_lite.nn.module import Module
from distdl_lite.partition import Line, Partition, line_of
from distdl_lite.reducer import Replicas, replicated, summed_at_once


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


class Layer(Module):
    """Base of layers with parameters.

    A layer calls `place` for each parameter and buffer in the order of the serial layer's constructor, and `use` where
    forward needs a parameter.

    Parameters
    ----------
    *partitions : Partition or None
        As of `Module`, at least one.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> from distdl_lite import layout as lay
    >>> from distdl_lite.nn.draws import constant
    >>> class Times(dl.nn.Layer):
    ...     def __init__(self, P_x):
    ...         super().__init__(P_x)
    ...         self.place("weight", lay.whole(P_x.grid_of_ranks, (1,)), constant(2.0))
    ...
    ...     def forward(self, x):
    ...         return x * self.use("weight")
    >>> def body(world):
    ...     layer = Times(world.grid((2,)))
    ...     layer(torch.ones(3)).sum().backward()
    ...     return layer.weight.grad.tolist()
    >>> dl.testing.spmd(2, body)
    [[6.0], [6.0]]
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
        block = drawn(global_shape_of(layout), box, draw, dtype).to(device=device)
        team = transport.team(layout.replicas(transport.rank))
        label = type(self).__name__
        if team.size > 1:  # before it is numbered, lest ranks that go on after an error number otherwise
            place = call_of(f"{label}.{name} of shape {global_shape_of(layout)}, {dtype}", team.made["replicas"] + 1)
            if not is_unanimous(team, vote_of(place)):  # as every call votes first, and then asks where the others are
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

    def __repr__(self) -> str:
        """That of torch's modules; of weights that are cut this rank's shape stands beside the whole one."""
        held = {name: self.held(name) for name in self._distdl_places}
        shapes = {name: tuple(t.shape) for name, t in held.items() if isinstance(t, torch.Tensor)}
        cut = [
            f"{name} {shape} of {whole}"
            for name, shape in shapes.items()
            if shape != (whole := self._distdl_places[name].global_shape)
        ]
        text = super().__repr__()
        return f"{text[:-1]}; here {', '.join(cut)})" if cut else text

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
                tensor = tensors[name]
                return summed_at_once(tensor) if self._distdl_sums_at_once and tensor is not None else tensor
        return getattr(self, name)
