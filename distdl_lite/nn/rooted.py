"""A whole tensor on one rank to blocks and back."""

from __future__ import annotations

import torch

from distdl_lite.nn.movement import zero_volume_tensor
from distdl_lite.nn.primitives import Repartition
from distdl_lite.partition import Partition


def scatter(x: torch.Tensor | None, P: Partition, root: int = 0) -> torch.Tensor:
    """Cut a whole tensor on one rank into balanced blocks over `P`; differentiable.

    Parameters
    ----------
    x : torch.Tensor or None
        The tensor on the world rank `root`; the others pass None.
    P : Partition
        One axis per tensor dim. Its ranks and the root call this together.
    root : int
        A rank of the ambient world.

    Returns
    -------
    torch.Tensor
        This rank's block, zero-volume on a rank outside `P`.
    """
    return _rooted("scatter", P, root)(zero_volume_tensor() if x is None else x)


def gather(x: torch.Tensor | None, P: Partition, root: int = 0) -> torch.Tensor:
    """Put the blocks over `P` together on one rank; differentiable, the adjoint of `scatter` for balanced blocks.

    Parameters
    ----------
    x : torch.Tensor or None
        This rank's block; a rank outside `P` passes None.
    P, root
        As for `scatter`.

    Returns
    -------
    torch.Tensor
        The whole tensor on the root, zero-volume elsewhere.
    """
    return _rooted("gather", P, root)(zero_volume_tensor() if x is None else x)


def _rooted(kind: str, P: Partition, root: int) -> Repartition:
    """The Repartition between one rank and `P`, kept so that later calls find its plans and buffers."""
    world = P.world_transport
    if not 0 <= root < world.size:
        raise ValueError(f"{kind}: root {root} is not a rank of a world of {world.size}")
    kept = world.local.setdefault("rooted", {})
    if (kind, P, root) not in kept:
        alone = P._derive([root], (1,) * P.dim)
        made = Repartition(alone, P, False) if kind == "scatter" else Repartition(P, alone, False)
        made._distdl_label = kind
        kept[kind, P, root] = made
    return kept[kind, P, root]
