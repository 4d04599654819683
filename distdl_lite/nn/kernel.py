"""What layers with sliding kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.module import Module
from distdl_lite.operator import Operator
from distdl_lite.plan import plan


def per_dim(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A number per spatial dim."""
    values = (value,) * dims if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != dims:
        raise ValueError(f"{name}={value} does not have {dims} numbers")
    return values


def operator_between(X: Layout, Y: Layout, layer: Module, graph: bool) -> Operator | None:
    """The operator from `X` to `Y`, None where every rank holds the same box in both."""
    if X.same_boxes(Y):
        return None
    name = type(layer).__name__
    return Operator(plan(X, Y, layer._distdl_transport.rank), layer._distdl_transport, name, graph)


def connected_zeros(shape: Shape, *used: torch.Tensor | None) -> torch.Tensor:
    """Zeros that give a zero gradient, not None, to the tensors that an empty block would have been computed from."""
    tensors = [tensor for tensor in used if tensor is not None]
    nothing = sum(tensor.reshape(-1)[:0].sum() for tensor in tensors)
    return torch.zeros(shape, dtype=tensors[0].dtype, device=tensors[0].device) + nothing
