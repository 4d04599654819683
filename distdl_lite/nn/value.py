"""What rules take and say: values whose layout all ranks know; and the registry of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.factors import Dims, axes_of, shape_of_dims
from distdl_lite.layout import Dim, Layout, Shape
from distdl_lite.operator import Operator
from distdl_lite.reducer import Replicas

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}  # by the name of torch's operation


class NoRule(Exception):
    """Raised by a rule that does not know the case, before it has moved or called anything."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of torch's operations of these names: a function of the compiler, the operation and its arguments."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(eq=False)
class Value:
    """A tensor of the program, as far as all ranks know it.

    Attributes
    ----------
    name : str
        Of the variable that holds this rank's block.
    dims : tuple of factors
        How it lies over the grid; along axes that cut no dim the ranks hold copies, each of which has a part of the gradient.
    dtype : torch.dtype
    grad : bool
        Whether autograd records it, on all ranks or on none.
    make : callable or None
        From the shape of a block to it, for a constant that is made where it is needed.
    parameter : Parameter or None
        What it is, if it is one.
    product : str
        The operation, if it is the product of a weight that is cut along its outputs.
    """

    name: str
    dims: Dims
    dtype: torch.dtype
    grad: bool = False
    make: Callable[[Shape], torch.Tensor] | None = None
    parameter: Parameter | None = None
    product: str = ""

    @property
    def shape(self) -> Shape:
        return shape_of_dims(self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def given(self) -> str:
        """The variable that holds it where it is an input."""
        return self.parameter.raw if self.parameter else self.name

    def axes(self, *dims: int) -> tuple[int, ...]:
        """The axes that cut some dims."""
        return tuple(a for d in dims for a in axes_of(self.dims[d]))

    def with_dims(self, changed: Mapping[int, Dim | tuple[Dim, ...]]) -> Dims:
        """Its dims, some of them others."""
        new = {d % self.ndim: (f,) if isinstance(f, Dim) else f for d, f in changed.items()}
        return tuple(new.get(d, f) for d, f in enumerate(self.dims))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Parameter:
    """A parameter as the program gets it, before its gradient is summed over its replicas.

    Attributes
    ----------
    raw : str
        Of the variable that holds it.
    replicas : callable
        From its dims to the ranks that hold the same block, None in a program that is only looked at.
    is_open : bool
        Whether it may still be cut; after its first use it lies as it does.
    is_used : bool
        Whether the program has the value of which the gradient is the sum over replicas.
    """

    raw: str
    replicas: Callable[[Dims], Replicas | None]
    is_open: bool
    is_used: bool = False


@dataclass(frozen=True)
class Movement:
    """One movement of a program: where in the model, of what kind, between which layouts."""

    path: str
    kind: str
    X: Layout
    Y: Layout
    dtype: torch.dtype
    grad: bool
    operator: Operator | None = None


@dataclass(frozen=True)
class Operation:
    """One operation of torch, as rules see it."""

    name: str
    function: Any
    outputs: tuple[tuple[Shape, torch.dtype, tuple[int, ...]], ...]  # shape, dtype and strides
    is_one: bool  # whether it returns one tensor

    @property
    def shape(self) -> Shape:
        return self.outputs[0][0]

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs[0][1]

    @staticmethod
    def of(name: str, function: Any, made: Any) -> Operation:
        """What a function does that has made this, a tensor or several."""
        tensors = [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, torch.Tensor)]
        outputs = tuple((tuple(t.shape), t.dtype, t.stride()) for t in tensors)
        return Operation(name, function, outputs, isinstance(made, torch.Tensor))


def values_in(args: Iterable[Any]) -> Iterator[Value]:
    """The values among arguments and in lists of them."""
    for value in args:
        if isinstance(value, Value):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from values_in(value)
