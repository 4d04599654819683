"""Layers that are one rule: a program of one operation over the blocks of their partition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.factors import blocks, dims_of
from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.blocks import anchored
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs, agreed_inputs, weight_dtype
from distdl_lite.nn.module import Call
from distdl_lite.nn.parameter import Layer
from distdl_lite.nn.value import Value
from distdl_lite.partition import Partition


@dataclass(frozen=True)
class Running:
    """The call of a layer for one structure: its program, which takes the input and the named tensors of the layer."""

    compiler: Compiler
    run: Callable[..., tuple[torch.Tensor, ...]]
    held: tuple[str, ...]
    dtype: torch.dtype
    graph: bool
    one: bool
    outputs: tuple[Value, ...]

    def __call__(self, layer: Layer, x: torch.Tensor, *others: torch.Tensor) -> Any:
        # Anchored also where nothing moves: a checkpoint around it runs the layer again on the ranks that have a graph.
        x = anchored(x if x.dtype is self.dtype else x.to(self.dtype), self.graph)
        y = self.run(x, *others, *map(layer.held, self.held))
        return y[0] if self.one else y


class RuleLayer(Layer):
    """Base of layers that run one rule; override `rule`, and `others` if there are more arguments than the input.

    Input in blocks of any sizes over `P_x`, the first partition; output in balanced blocks, unless `keeps_blocks`.
    """

    P_x: Partition
    keeps_blocks = False  # whether the output lies as the rule leaves it
    overwrites = False  # whether the input is overwritten, which no leaf of autograd's may be

    def rule(self, c: Compiler, x: Value, **held: Value) -> Any:
        """The output, or several, of an input that lies over the grid of `P_x`, and of the layer's tensors, by name."""
        raise NotImplementedError

    def result_dtype(self, inputs: Inputs, shape: Shape) -> torch.dtype:
        """The dtype of torch's result, as which an input of this global shape is taken; TypeError if torch's takes no such."""
        return inputs.dtype

    def blocks(self, shapes: Mapping[int, Shape]) -> Layout:
        """How the input lies over the grid, from the ranks' local shapes."""
        return lay.blocks_from_shapes(self.P_x.grid_of_ranks, shapes)

    def others(self, c: Compiler, x: Value) -> list[Value]:
        """The arguments after the input, which the rule takes after it."""
        return []

    def tensors(self, c: Compiler) -> dict[str, Value]:
        """The layer's tensors by name, of which gradients will be sums over their copies."""
        found, trains = dict[str, Value](), any(p.requires_grad for p in self.parameters())
        for name, place in self._distdl_places.items():
            dtype, grad = weight_dtype(self, name), trains and name not in self._buffers
            if dtype is not None:
                replicas = place.replicas
                found[name] = c.parameter(name, dims_of(place.layout.dims), dtype, grad, lambda dims, of=replicas: of)
        return found

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs, grid, transport = agreed_inputs(self, self.P_x), self.P_x.grid_of_ranks, self._distdl_transport
        X = self.blocks(inputs.shapes)
        dtype = self.result_dtype(inputs, lay.global_shape_of(X))
        c = Compiler(grid, transport.rank, transport, self._distdl_label, inputs.device)
        graph = self._distdl_structure.requires_grad
        x = c.new(dims_of(X.dims), dtype, graph, "x")
        others, held = self.others(c, x), self.tensors(c)
        made = self.rule(c, x, *others, **held)
        outputs = [made] if isinstance(made, Value) else list(made)
        if not self.keeps_blocks:
            outputs = [c.move(y, blocks(y.shape, range(y.ndim), grid)) for y in outputs]
        run = c.compiled([x, *others, *held.values()], outputs)
        graph = graph and not self.overwrites
        return Running(c, run, tuple(held), dtype, graph, isinstance(made, Value), tuple(outputs))
