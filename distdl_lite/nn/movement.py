"""The base of all movements of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from distdl_lite.layout import Layout, Shape, shape_of
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition
from distdl_lite.plan import Plan, plan


def into(operator: Operator, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Apply an operator; a rank that has nothing to give takes part with the others' dtype."""
    if operator.plan.shape_in is None and x.dtype is not dtype:
        x = x.to(dtype)
    return operator(x)


def keeping_batch(plan: Plan, shape: Shape) -> Plan:
    """The plan, by which a rank that gets nothing returns ``(batch, 0)``, where it passed a tensor of this shape."""
    return replace(plan, nothing=(shape[0], 0)) if shape else plan


class Movement(Module):
    """Base of all primitives, and of users' own: override `layouts`.

    Parameters
    ----------
    P_x, P_y : Partition
        Of the input and of the output. Ranks outside both pass and get zero-volume tensors.
    preserve_batch : bool
        Whether ranks that receive nothing get ``(batch, 0)`` rather than ``(0,)``.

    Raises
    ------
    ValueError
        At a call, on all ranks, if `layouts` does not describe the blocks that were passed.
    TypeError
        If bool tensors would be added.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> from distdl_lite import layout as lay
    >>> class Gathered(dl.nn.Movement):
    ...     def layouts(self, shapes):
    ...         grid = self.P_x.grid_of_ranks
    ...         X = lay.blocks(grid, lay.cuts_from_shapes(grid, shapes))
    ...         return X, lay.whole(grid, lay.global_shape_of(X))
    >>> def body(world):
    ...     P = world.grid((2,))
    ...     return Gathered(P, P)(torch.full((2 - world.rank,), float(world.rank))).tolist()
    >>> dl.testing.spmd(2, body)
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """

    def __init__(self, P_x: Partition, P_y: Partition, preserve_batch: bool = True) -> None:
        super().__init__(P_x, P_y)
        self.P_x, self.P_y, self.preserve_batch = P_x, P_y, preserve_batch

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout]:
        """The layouts of input and output for the local shapes by world rank; pure, the same on all ranks.

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        raise NotImplementedError(
            "a Movement has a method layouts(shapes) that returns the layouts of input and output"
        )

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        operator, dtype = self._operator(input[0])
        return lambda layer, x: into(operator, x, dtype)

    def _operator(self, x: torch.Tensor) -> tuple[Operator, torch.dtype]:
        """The operator between the two layouts for this structure, and the dtype that it moves."""
        name, transport = self._distdl_label, self._distdl_transport
        inputs = agreed_inputs(self, self.P_x)
        X, Y = self.layouts(inputs.shapes)
        rank = transport.rank
        if rank in inputs.shapes and ((box := X.box(rank)) is None or shape_of(box) != inputs.shapes[rank]):
            raise ValueError(
                f"{name}: rank {rank} holds shape {inputs.shapes[rank]}, layouts() says {box and shape_of(box)}"
            )
        built = plan(X, Y, rank)
        if inputs.dtype is torch.bool and (X.overlaps or built.pattern.sums):
            raise TypeError(f"{name}: bool tensors can be moved but not added")
        if self.preserve_batch:
            built = keeping_batch(built, x.shape)
        return Operator(built, transport, name, inputs.requires_grad), inputs.dtype

    def extra_repr(self) -> str:
        return f"P_x={self.P_x.shape}, P_y={self.P_y.shape}"
