"""Steps on the blocks of a tensor that layers of several families take."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from distdl_lite.layout import Box, Layout, Shape
from distdl_lite.nn.module import Module
from distdl_lite.nn.movement import keeping_batch
from distdl_lite.operator import Operator
from distdl_lite.plan import plan

Local = Callable[[torch.Tensor], torch.Tensor]


def operator_between(X: Layout, Y: Layout, layer: Module, graph: bool) -> Operator | None:
    """The operator from `X` to `Y`, None where every rank holds the same box in both."""
    if X.same_boxes(Y):
        return None
    transport = layer._distdl_transport
    built = keeping_batch(plan(X, Y, transport.rank), layer._distdl_structure.mine[0].shape)
    return Operator(built, transport, type(layer).__name__, graph)


def anchored(x: torch.Tensor, graph: bool) -> torch.Tensor:
    """The tensor with a graph node if `graph`, which says that some rank's requires grad: all then enter backward."""
    needs_node = graph and not x.requires_grad and torch.is_grad_enabled()
    return x.detach().requires_grad_() if needs_node else x


def connected_zeros(
    shape: Shape, *used: torch.Tensor | None, added: torch.Tensor | None = None, linear: bool = False
) -> torch.Tensor:
    """Zeros that give a zero gradient, not None, to the tensors that an empty block would have been computed from.

    They stand beside torch's function of the others' blocks: in double backward each gradient depends on all tensors, but for
    one that is `added` and unless the function is `linear`, and in the first one a tensor is saved. So the graph leads to the
    same places on all ranks, and a checkpoint recomputes on all of them.
    """
    tensors = [tensor for tensor in used if tensor is not None]
    parts = [tensor.reshape(-1)[:0] for tensor in tensors]
    nothing = sum(part.sum() for part in parts) if linear else math.prod(part * part for part in parts).sum()
    if added is not None:
        nothing = nothing + (added.reshape(-1)[:0] * added.new_empty(0)).sum()
    return torch.zeros(shape, dtype=tensors[0].dtype, device=tensors[0].device) + nothing


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch adds up and weighs values of `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def edge_pad(
    wanted: Box, held: Box, global_shape: Shape, boundary: str
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The local step that reflects or replicates at the global edge: from the box held to the box wanted, None if equal."""
    if wanted == held:
        return None
    rows = [
        None if w == h else torch.tensor([_folded(i, n, boundary) - h[0] for i in range(*w)], dtype=torch.long)
        for w, h, n in zip(wanted, held, global_shape, strict=True)
    ]

    def pad(y: torch.Tensor) -> torch.Tensor:
        for dim, row in enumerate(rows):
            if row is not None:
                y = y.index_select(dim, row.to(y.device))
        return y

    return pad


def _folded(i: int, n: int, boundary: str) -> int:
    """The point inside ``[0, n)`` that point `i` repeats."""
    if boundary == "reflect":
        return abs(i) if i < n else 2 * (n - 1) - i
    return min(max(i, 0), n - 1)
