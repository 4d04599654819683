"""A whole tensor on one rank to blocks and back."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.nn.inputs import zero_volume_tensor
from distdl_lite.nn.module import Call
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

    Raises
    ------
    ValueError
        On all ranks, if another rank than the root passed data or the tensor has not one dim per axis.
    TypeError
        On all ranks, if the root passed no tensor.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     x = torch.arange(5.0) if world.rank == 0 else None
    ...     return dl.scatter(x, world.grid((2,))).tolist()
    >>> dl.testing.spmd(2, body)
    [[0.0, 1.0, 2.0], [3.0, 4.0]]
    """
    return _moved("scatter", x, P, root)


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

    Raises
    ------
    TypeError
        On all ranks, if a rank of `P` passed no tensor.
    ValueError
        On all ranks, if the blocks do not fit each other; on a rank outside `P` that passed data.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     block = torch.full((2 - world.rank,), float(world.rank))
    ...     return dl.gather(block, world.grid((2,))).tolist()
    >>> dl.testing.spmd(2, body)
    [[0.0, 0.0, 1.0], []]
    """
    return _moved("gather", x, P, root)


class _Rooted(Repartition):
    """The Repartition between one rank and `P`, whose errors speak of what the user called."""

    _distdl_is_numbered = False  # there is one for each root, and ranks that name others may go on after the error

    def __init__(self, kind: str, P: Partition, root: int) -> None:
        alone = P._derive([root], (1,) * P.dim)
        super().__init__(*((alone, P) if kind == "scatter" else (P, alone)), preserve_batch=False)
        self._distdl_label, self.root = kind, root

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        if self._distdl_label == "scatter":
            (tensor,), rank = self._distdl_structure.mine, self._distdl_transport.rank
            if rank == self.root and tensor.kind != "Tensor":
                raise TypeError(self._misplaced(rank, tensor.kind))
            if rank != self.root and tensor.size and tensor.shape:
                raise ValueError(self._misplaced(rank, f"a tensor of shape {tensor.shape}"))
            if rank == self.root and len(tensor.shape) != self.P_y.dim:
                raise ValueError(
                    f"scatter: a tensor of shape {tensor.shape} cannot be cut over a grid of shape {self.P_y.shape}"
                )
        return super()._distdl_module_setup(input)

    def _misplaced(self, rank: int, passed: str) -> str:
        rule = f"pass the whole tensor on rank {self.root}, None elsewhere"
        if self._distdl_label == "gather":
            rule = f"pass blocks on ranks {list(self.P_x.ranks)}, None elsewhere"
        return f"{self._distdl_label}: {rule}; rank {rank} passed {passed}"

    def _distdl_refuse_data(self, input: tuple[Any, ...]) -> None:
        (x,) = input
        if isinstance(x, torch.Tensor) and x.numel() and x.dim():
            raise ValueError(self._misplaced(self._distdl_transport.rank, f"a tensor of shape {tuple(x.shape)}"))


def _moved(kind: str, x: torch.Tensor | None, P: Partition, root: int) -> torch.Tensor:
    """`x` through the Repartition between one rank and `P`, kept so that later calls find its plans and buffers."""
    if not isinstance(P, Partition):
        raise TypeError(f"{kind}: a Partition is needed, not {P!r}")
    world = P.world_transport
    if not 0 <= root < world.size:
        raise ValueError(f"{kind}: root {root} is not a rank of a world of {world.size}")
    kept = world.local.setdefault("rooted", {})
    layer = kept.get((kind, P, root))
    if layer is None:
        layer = kept[kind, P, root] = _Rooted(kind, P, root)
    # None stands for no data where there is to be none.
    return layer(zero_volume_tensor() if x is None and not layer.P_x.active else x)
