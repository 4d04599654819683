"""The structure of arguments: all of them but the numbers in their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorStructure:
    """What a rank tells the others about one argument; ``kind`` names one that is no tensor, `integers` are a list's."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: str = ""
    requires_grad: bool = False
    kind: str = "Tensor"
    integers: tuple[int, ...] | None = None

    @staticmethod
    def of(value: Any) -> TensorStructure:
        if not isinstance(value, torch.Tensor):
            listed = isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
            return TensorStructure(kind=type(value).__name__, integers=tuple(value) if listed else None)
        if not is_plain(value):
            return TensorStructure(kind="a nested tensor" if value.is_nested else f"a tensor of {value.layout}")
        return TensorStructure(tuple(value.shape), value.dtype, value.device.type, value.requires_grad)

    @property
    def size(self) -> int:
        return 0 if self.kind != "Tensor" else torch.Size(self.shape).numel()


Structure = Mapping[int, tuple[TensorStructure, ...]]  # world rank -> its tensor arguments


def hashed(parts: list[Any]) -> int:
    """A hash of 64 bits, this rank's own: that of a string is another in each process.

    A tuple's hash is nearly a sum of its items' hashes: of two ranks that swap shapes the sum would often stay the same.
    """
    return hash(hash(tuple(parts)).to_bytes(8, "little", signed=True)) % 2**64


def hashable(value: Any) -> Any:
    """A value's part in the structure: tensors by structure, plain values by value, anything else by type."""
    if isinstance(value, torch.Tensor):
        return (value.shape if is_plain(value) else None), value.dtype, value.device, value.requires_grad
    if isinstance(value, (bool, int, float, complex)):
        return type(value), repr(value)  # 1, 1.0 and True are equal, and -1 and -2 have one hash
    if isinstance(value, (str, bytes, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, Mapping):
        return tuple((key, hashable(item)) for key, item in value.items())
    if isinstance(value, Sequence):
        return tuple(map(hashable, value))
    return type(value)


def autocast() -> tuple[Any, ...]:
    """The dtypes that autocast is on for, by kind of device."""
    return tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a dense block of numbers."""
    return tensor.layout is torch.strided and not tensor.is_nested
