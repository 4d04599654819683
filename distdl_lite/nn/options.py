"""Options of layers, checked in the constructor: a refusal names the layer, the option, its value and the rule."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from distdl_lite.nn.module import Module


def plain(value: Any) -> Any:
    """An option; a number or an array of NumPy as Python's own numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def listed(value: Any, dims: int = 1) -> tuple[Any, ...]:
    """One option for each dim, from several, in a sequence or an array, or from one for all."""
    value = plain(value)
    return tuple(map(plain, value)) if isinstance(value, Iterable) and not isinstance(value, str) else (value,) * dims


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


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _check_least(layer: Module, name: str, value: Any, smallest: int, least: int | None) -> None:
    if least is not None and smallest < least:
        raise layer._refuse(f"{name}={value} must {'be positive' if least else 'not be negative'}")


def numbers(layer: Module, **options: Any) -> None:
    """Raise TypeError unless each option is a real number."""
    for name, value in options.items():
        if not isinstance(value, Real):
            raise layer._refuse(f"{name}={value!r} is not a number", TypeError)


def booleans(layer: Module, **options: Any) -> None:
    """Raise TypeError unless each option is a bool: for those where torch takes nothing else for one."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise layer._refuse(f"{name}={value!r} is neither True nor False", TypeError)
