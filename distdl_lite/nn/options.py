"""Options of layers, checked in the constructor: a refusal names the layer, the option, its value and the rule."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from distdl_lite.nn.module import Module
    from distdl_lite.partition import Partition


def plain(value: Any) -> Any:
    """An option; numbers and arrays of NumPy, also in a sequence, as Python's own numbers and tuples of them."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, torch.Tensor) or not hasattr(value, "tolist"):
        return value
    made = value.tolist()
    return tuple(made) if isinstance(made, list) else made


def listed(value: Any, dims: int = 1) -> tuple[Any, ...]:
    """One option for each dim, from several, in a sequence or an array, or from one for all."""
    value = plain(value)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,) * dims


def options_of(dims: int, *options: Any) -> tuple[tuple[Any, ...], ...]:
    """torch's options of an operation, one for each spatial dim from one for all, in a sequence of one or alone."""
    return tuple(found * (dims if len(found) == 1 else 1) for found in map(listed, options))


def integers(layer: Module, least: int | None = None, **options: Any) -> None:
    """Raise TypeError unless each option is an integer, ValueError unless it is at least `least`, 0 or 1."""
    for name, value in options.items():
        if not _is_integer(value):
            raise layer._refuse(f"{name}={value!r} is not an integer", TypeError)
        _check_least(layer, name, value, value, least)


def per_dim(layer: Module, dims: int, name: str, value: int | Sequence[int], least: int | None = 1) -> tuple[int, ...]:
    """An integer per spatial dim, from one of them or one for all."""
    values = listed(value, dims)
    rule = f"{name}={value!r} is neither an integer nor {dims} of them"
    if not all(map(_is_integer, values)):
        raise layer._refuse(rule, TypeError)
    if len(values) != dims:
        raise layer._refuse(rule)
    _check_least(layer, name, value, min(values), least)
    return tuple(map(operator.index, values))


def different_dims(layer: Module, dims: int, value: int | Sequence[int]) -> tuple[int, ...]:
    """The dims that an option `dim` names, of a tensor of so many, counted from the first one on."""
    named = listed(value)
    for d in named:
        integers(layer, dim=d)
    found = tuple(d % dims for d in named)
    if any(not -dims <= d < dims for d in named) or len(set(found)) != len(found):
        raise layer._refuse(f"dim={value} are not different dims of a tensor of {dims} dims")
    return found


def spatial_axes(layer: Module, name: str, P: Partition, dims: int) -> None:
    """Raise ValueError unless a partition has an axis for batch, channels and each of so many spatial dims."""
    if P.dim != dims + 2:
        raise layer._refuse(f"{name} of shape {P.shape} has {P.dim} axes, a tensor (N, C, *space) has {dims + 2} dims")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _check_least(layer: Module, name: str, value: Any, smallest: int, least: int | None) -> None:
    if least is not None and smallest < least:
        raise layer._refuse(f"{name}={value} must {'be positive' if least else 'not be negative'}")


def booleans(layer: Module, **options: Any) -> None:
    """Raise TypeError unless each option is a bool: for those where torch takes nothing else for one."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise layer._refuse(f"{name}={value!r} is neither True nor False", TypeError)


@cache
def fixed_options(kind: type) -> frozenset[str]:
    """The arguments of the constructors of the library's own layers that this is one of, but for the free ones."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("distdl_lite.nn.") and "__init__" in vars(base)]
    given = [parameter for base in own for parameter in inspect.signature(base).parameters.values()]
    free: frozenset[str] = kind._distdl_free  # type: ignore[attr-defined]
    return frozenset(p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)) - free


def is_same(one: Any, other: Any) -> bool:
    """Whether an option is given the value that it has."""
    return one is other or (type(one) is type(other) and bool(one == other))
