"""Layers that are one rule: a program of one operation over the blocks of their partition."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.factors import Dims, blocks, uncut
from distdl_lite.layout import Layout
from distdl_lite.nn.blocks import anchored
from distdl_lite.nn.compiler import Compiler, Value
from distdl_lite.nn.inputs import Inputs, agreed_inputs
from distdl_lite.nn.module import Call
from distdl_lite.nn.parameter import Layer
from distdl_lite.partition import Partition


def dims_of(X: Layout) -> Dims:
    """The dims of a layout, each of one factor."""
    return tuple((uncut(dim.ranges[0][1]) if len(dim.ranges) == 1 else dim,) for dim in X.dims)


class RuleLayer(Layer):
    """Base of layers that run one rule; override `rule`.

    Input in blocks of any sizes over `P_x`, the first partition; output in balanced blocks, unless `keeps_blocks`.
    """

    P_x: Partition
    keeps_blocks = False  # whether the output lies as the rule leaves it
    overwrites = False  # whether the input is overwritten, which no leaf of autograd's may be

    def rule(self, c: Compiler, x: Value) -> Any:
        """The output, or several, of an input that lies over the grid of `P_x`."""
        raise NotImplementedError

    def result_dtype(self, inputs: Inputs) -> torch.dtype:
        """The dtype of torch's result, as which the input is taken. Raises TypeError if torch's layer does not take it."""
        return inputs.dtype

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs, grid, transport = agreed_inputs(self, self.P_x), self.P_x.grid_of_ranks, self._distdl_transport
        dtype, graph = self.result_dtype(inputs), inputs.requires_grad
        c = Compiler(grid, transport.rank, transport, self._distdl_label, inputs.device)
        X = lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes))
        x = c.new(dims_of(X), dtype, graph, "x")
        made = self.rule(c, x)
        outputs = [made] if isinstance(made, Value) else list(made)
        if not self.keeps_blocks:
            outputs = [c.move(y, blocks(y.shape, range(y.ndim), grid)) for y in outputs]
        run, one, anchors = c.compiled([x], outputs), isinstance(made, Value), graph and not self.overwrites

        def call(layer: RuleLayer, x: torch.Tensor) -> Any:
            # Anchored also where nothing moves: a checkpoint around it runs the layer again on the ranks that have a graph.
            y = run(anchored(x if x.dtype is dtype else x.to(dtype), anchors))
            return y[0] if one else y

        return call
