"""Layers whose weight lives on a work grid: the linear layer and the convolutions, cut by one rule.

The axes of the work grid are [batch, out, in, *space], for a linear layer [*lead, out, in]. Three layouts make the layer:

    X   the input blocks over P_x
    Z   over the work grid: the input features of `in` and the points that the outputs of `space` read
    Y   the output blocks over P_y; the work grid's partial outputs are added up over `in`

so broadcasting over `out`, halos, all-gathers of features and the sum over `in` are the two operators X -> Z and
work -> Y, each left out where its two layouts are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import Grid
from distdl_lite.layout import Box, Layout, Shape
from distdl_lite.nn.blocks import operator_between
from distdl_lite.nn.inputs import Inputs, agreed_inputs, computing_dtype, weight_dtype
from distdl_lite.nn.module import Call
from distdl_lite.nn.movement import into
from distdl_lite.nn.parameter import Layer
from distdl_lite.operator import Operator
from distdl_lite.partition import Partition

Product = Callable[..., torch.Tensor]  # of the inputs held, weight and bias


class WorkGridLayer(Layer):
    """Base of these layers; a subclass overrides `layouts` and `_product`."""

    dims = 0  # spatial ones
    _work: Grid

    def __init__(self, P_x: Partition, P_y: Partition | None, P_w: Partition | None) -> None:
        P_y = P_x if P_y is None else P_y
        super().__init__(P_x, P_y, P_w)
        self.P_x, self.P_y, self.P_w = P_x, P_y, P_w

    def _work_grid(self, out: int, axes: str) -> Grid:
        """The grid on which the layer is computed; `out` is the axis of its output features, `axes` names all."""
        x, y = self.P_x.shape, self.P_y.shape
        if self.P_w is None:
            return Grid((*y[: out + 1], 1, *y[out + 1 :]), self.P_y.ranks)
        w, wanted = self.P_w.shape, (*y[: out + 1], x[out], *y[out + 1 :])
        lead = max(len(w) - 2 - self.dims, 0)
        shape = (*w[:lead], *(1,) * (out - lead), *w[lead:])
        if shape != wanted:
            raise self._refuse(
                f"P_w of shape {w} does not fit P_x of shape {x} and P_y of shape {y}: {axes} must be {wanted} (axes of "
                f"length one before P_out may be left out)"
            )
        return Grid(shape, self.P_w.ranks)

    def layouts(self, shapes: Mapping[int, Shape], *wanted: Any) -> tuple[Layout, Layout, Layout, Layout]:
        """X, Z, the work grid's partial outputs, and Y; pure."""
        raise NotImplementedError

    def _product(self, box: Box, held: Box, global_shape: Shape, dtype: torch.dtype) -> Product:
        """The local computation from the inputs held to the outputs of the box, for an input of the global shape."""
        raise NotImplementedError

    def _fused(
        self, inputs: Inputs, X: Layout, Z: Layout, Y: Layout, fetch: Operator | None, product: Product | None
    ) -> Call | None:
        """The layer as one graph node, where there is one that pays and each rank computes its own outputs."""
        return None

    def _distdl_module_setup(self, input: tuple[Any, ...], *wanted: Any) -> Call:
        inputs, rank = agreed_inputs(self, self.P_x), self._distdl_transport.rank
        X, Z, partial, Y = self.layouts(inputs.shapes, *wanted)
        graph = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        fetch = operator_between(X, Z, self, inputs.requires_grad)
        deliver = operator_between(partial, Y, self, graph)
        dtype, weight = inputs.dtype, weight_dtype(self)
        out_dtype = computing_dtype(type(self).__name__, inputs, weight)
        box, held, adds_bias = partial.box(rank), Z.box(rank), Y.box(rank) is not None
        product = None
        if box is not None and held is not None:
            product = self._product(box, held, lay.global_shape_of(X), out_dtype)
        if deliver is None and dtype is out_dtype is weight:
            fused = self._fused(inputs, X, Z, Y, fetch, product)
            if fused is not None:
                return fused

        def run(layer: WorkGridLayer, x: torch.Tensor) -> torch.Tensor:
            z = x if fetch is None else into(fetch, x, dtype)
            bias = layer.use("bias") if adds_bias else None
            if deliver is None:
                return layer.given(z) if product is None else product(z, layer.use("weight"), bias)
            y = z if product is None else product(z, layer.use("weight"), None)
            return with_bias(into(deliver, y, out_dtype), bias, layer.dims)

        return run

    def _partitions_repr(self) -> list[str]:
        """The end of `extra_repr`."""
        parts = [f"P_x={self.P_x.shape}"] + ([f"P_y={self.P_y.shape}"] if self.P_y is not self.P_x else [])
        return parts + ([f"P_w={self.P_w.shape}"] if self.P_w is not None else [])


def with_bias(y: torch.Tensor, bias: torch.Tensor | None, dims: int) -> torch.Tensor:
    """The bias added in place to the features of `y`, a tensor of our own; behind them stand that many spatial dims.

    It is taken to the dtype of `y`, which autocast may have chosen.
    """
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, *(1,) * dims))
