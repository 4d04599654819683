"""Flattening: a plain reshape of blocks where of the flattened dims only the first is cut."""

from __future__ import annotations

import math
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import Grid
from distdl_lite.nn.blocks import operator_between
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.movement import into
from distdl_lite.nn.options import integers
from distdl_lite.partition import Partition


class DistributedFlatten(Module):
    """The tensor that the blocks over `P_x` form, with the dims from `start_dim` to `end_dim` made one, as torch's.

    Input in blocks of any sizes and of any dtype. Without `P_y` the output is cut as the input is: nothing is communicated,
    and the blocks of the flattened dim consist of whole rows of the first one, so they need not be balanced. With `P_y` the
    input is first moved to balanced blocks of the first flattened dim, the others whole. Ranks outside `P_x` pass and those
    outside `P_y` get zero-volume tensors.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input.
    start_dim, end_dim : int
        The first and the last dim to flatten, as in torch.nn.Flatten.
    P_y : Partition, optional
        One axis per dim of the output. Needed where a flattened dim after the first is cut, since then the blocks are no
        boxes of the output.

    Raises
    ------
    ValueError
        In the constructor if the dims do not exist or are in the wrong order, `P_y` is missing, which the text says
        together with a shape for it, or has another number of axes than the output; at build if the blocks form no tensor
        product. On all ranks alike.

    Notes
    -----
    At most one exchange forward, and its adjoint backward; none without `P_y`.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2, 1))
    ...     return tuple(dl.nn.DistributedFlatten(P)(P.cut(torch.zeros(2, 3, 5))).shape)
    >>> dl.testing.spmd(2, body)
    [(2, 10), (2, 5)]
    """

    def __init__(self, P_x: Partition, start_dim: int = 1, end_dim: int = -1, P_y: Partition | None = None) -> None:
        super().__init__(P_x, P_y)
        self.P_x, self.P_y, self.start_dim, self.end_dim = P_x, P_y, start_dim, end_dim
        integers(self, start_dim=start_dim, end_dim=end_dim)
        n, x = P_x.dim, P_x.shape
        if not (-n <= start_dim < n and -n <= end_dim < n and start_dim % n <= end_dim % n):
            raise self._refuse(f"start_dim={start_dim} to end_dim={end_dim} are no dims of a tensor of {n} dims")
        self._first, self._last = first, last = start_dim % n, end_dim % n
        flat = (*x[:first], math.prod(x[first : last + 1]), *x[last + 1 :])
        if P_y is None and flat[first] > x[first]:
            raise self._refuse(
                f"P_x of shape {x} cuts dims {first + 1} to {last}, so that its blocks are no boxes of the flattened tensor: "
                f"give P_y, such as a partition of shape {flat}"
            )
        if P_y is not None and P_y.dim != len(flat):
            raise self._refuse(f"P_y of shape {P_y.shape} has {P_y.dim} axes, the output has {len(flat)} dims")

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        X = lay.blocks_from_shapes(self.P_x.grid_of_ranks, inputs.shapes)
        Z, dtype, first, last = X, inputs.dtype, self._first, self._last
        if self.P_y is not None:
            shape, ones = self.P_y.shape, (1,) * (last - first)
            rows = Grid((*shape[: first + 1], *ones, *shape[first + 1 :]), self.P_y.ranks)
            Z = lay.balanced_blocks(rows, lay.global_shape_of(X))
        move = operator_between(X, Z, self, inputs.requires_grad)
        gets = Z.box(self._distdl_transport.rank) is not None

        def run(layer: DistributedFlatten, x: torch.Tensor) -> torch.Tensor:
            z = x if move is None else into(move, x, dtype)
            return z.flatten(first, last) if gets else z

        return run

    def extra_repr(self) -> str:
        own = f"start_dim={self.start_dim}, end_dim={self.end_dim}, P_x={self.P_x.shape}"
        return own if self.P_y is None else f"{own}, P_y={self.P_y.shape}"
