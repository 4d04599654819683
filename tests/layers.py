"""Distributed layers beside their serial twins by name, and where each refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import distdl_lite as dl
import distdl_lite.nn as dnn

X = {1: (2, 4, 9), 2: (2, 4, 9, 7)}


@dataclass(frozen=True)
class Case:
    """A layer, valid options, the values to try for some, and the input: a shape, or more than that in words.

    `stricter`: the options of which torch takes some value that has no use, or no meaning over several ranks.
    """

    name: str
    base: Mapping[str, Any]
    tried: Mapping[str, Sequence[Any]]
    input: Any
    twin: str = ""
    stricter: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.base)})"


def inputs_of(case: Case) -> list[torch.Tensor]:
    if case.input == "indices":
        return [torch.tensor([[0, 1, 2], [3, 4, 0]])]
    if case.input == "values":
        x = torch.rand(X[1]) * 0.8 + 0.1
        return [x, x.flip(1)]
    if case.input == "classes":
        return [torch.rand(X[1]).log_softmax(1), torch.arange(18).view(2, 9) % 4]
    return [torch.rand(case.input)]


def outcome(make: Callable[[], torch.nn.Module], inputs: Sequence[torch.Tensor]) -> tuple[str, str]:
    """Where a layer refuses, in its constructor, in its call, or nowhere; and what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            layer = make()
        except Exception as error:
            return "constructor", str(error)
        try:
            layer(*inputs)
        except Exception as error:
            return "call", str(error)
    return "", ""


def make_layer(case: Case, world: dl.Partition, options: Mapping[str, Any], axis: int) -> tuple[Any, dl.Partition]:
    """A constructor of the distributed layer over two ranks that cut one axis."""
    dims = 3 if case.input in ("indices", "values", "classes") else len(case.input)
    P = world.grid([2 if a == axis % dims else 1 for a in range(dims)])
    partitions = (P, None, None) if case.name == "Linear" else (P,)
    return lambda: getattr(dnn, f"Distributed{case.name}")(*partitions, **options), P


def blocks_of(case: Case, inputs: Sequence[torch.Tensor], P: dl.Partition) -> list[torch.Tensor]:
    block = P.block((*inputs[0].shape, 1) if case.input == "indices" else inputs[0].shape)
    if case.name == "ColumnParallelLinear":  # whose features are not cut
        block = (*block[:-1], slice(None))
    of_dims = {x.dim(): block[: x.dim()] for x in inputs}
    if case.input == "classes":
        of_dims[2] = (block[0], block[2])
    return [x[of_dims[x.dim()]] for x in inputs]
