"""The linear layer, cut along its leading dims and along features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.grid import balanced
from distdl_lite.layout import Box, Dim, Layout, Shape, balanced_blocks, ranges_of
from distdl_lite.nn.draws import bias_bound, kaiming_bound, uniform
from distdl_lite.nn.inputs import whose_blocks
from distdl_lite.nn.options import integers
from distdl_lite.nn.work_grid import Product, WorkGridLayer
from distdl_lite.partition import Partition


class DistributedLinear(WorkGridLayer):
    """``y = x W^T + b`` over the tensor that the blocks over `P_x` form, equal to torch's.

    Input ``(*lead, in_features)`` in blocks of any sizes over `P_x`; output ``(*lead, out_features)`` in balanced blocks
    over `P_y`. Ranks outside all partitions pass and get zero-volume tensors; those inside with an empty block take part.

    Parameters
    ----------
    P_x : Partition
        Of the input: ``[*P_lead, P_in]``.
    P_y : Partition or None
        Of the output: ``[*P_lead, P_out]``; None is `P_x`.
    P_w : Partition or None
        Of the weight: ``[P_out, P_in]``, or ``[*P_lead, P_out, P_in]`` where `P_y` cuts leading dims; lead axes left out
        at the end are of length one. Without it each rank of `P_y` fetches all input features.
    in_features, out_features, bias, device, dtype
        As in torch.nn.Linear.

    Raises
    ------
    ValueError
        In the constructor if the partitions do not fit each other; at build if the input does not fit. On all ranks alike.

    Notes
    -----
    Parameters start from the serial layer's values for the same seed. A weight block is replicated over the lead axes, and
    a bias over those of `P_y`, which adds it once, after the sum over ``P_in``. The three partitions may be disjoint.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     layer = dl.nn.DistributedLinear(P, None, None, 4, 6)
    ...     return tuple(layer.weight.shape), tuple(layer(P.cut(torch.zeros(5, 4))).shape)
    >>> dl.testing.spmd(2, body)
    [((3, 4), (5, 3)), ((3, 4), (5, 3))]
    """

    def __init__(
        self,
        P_x: Partition,
        P_y: Partition | None,
        P_w: Partition | None,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(P_x, P_y, P_w)
        integers(self, 0, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        x, y = self.P_x.shape, self.P_y.shape
        if len(x) != len(y) or not x:
            raise self._refuse(f"P_x of shape {x} and P_y of shape {y} must have one axis per dim of the tensors each")
        self._work = self._work_grid(len(y) - 1, "[*P_lead, P_out, P_in]")
        lead = self._work.dim - 2
        self._outs = Dim(ranges_of(balanced(out_features, self._work.shape[lead])), (lead,))
        self._ins = Dim(ranges_of(balanced(in_features, self._work.shape[lead + 1])), (lead + 1,))
        weight = Layout(self._work, (self._outs, self._ins))
        self.place("weight", weight, uniform(kaiming_bound(in_features)), dtype, device)
        cuts = balanced(out_features, self.P_y.shape[-1])
        own = Layout(self.P_y.grid_of_ranks, (Dim(ranges_of(cuts), (self.P_y.dim - 1,)),))
        self.place("bias", own if bias else None, uniform(bias_bound(in_features)), dtype, device)

    def layouts(self, shapes: Mapping[int, Shape]) -> tuple[Layout, Layout, Layout, Layout]:
        X = lay.blocks_from_shapes(self.P_x.grid_of_ranks, shapes)
        *lead, features = lay.global_shape_of(X)
        if features != self.in_features:
            found = f"the input has {features} features, in_features={self.in_features}"
            raise self._refuse(found + whose_blocks(self.P_x.shape[-1]))
        leads = [Dim(ranges_of(balanced(n, self._work.shape[d])), (d,)) for d, n in enumerate(lead)]
        Z, partial = Layout(self._work, (*leads, self._ins)), Layout(self._work, (*leads, self._outs))
        return X, Z, partial, balanced_blocks(self.P_y.grid_of_ranks, (*lead, self.out_features))

    def _product(self, box: Box, held: Box, global_shape: Shape, dtype: torch.dtype) -> Product:
        return F.linear

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        return ", ".join([*parts, *(["bias=False"] if self.bias is None else []), *self._partitions_repr()])
