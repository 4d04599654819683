"""Tensors in buckets, each of them one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def cut(
    items: Iterable[Item],
    kind: Callable[[Item], Any],
    nbytes: Callable[[Item], int],
    most: int,
    first: int | None = None,
) -> list[list[Item]]:
    """The items, in their order, in buckets of one kind, of `most` bytes, the first of `first`.

    A bucket has more where one item has. An eighth of it is little: what has so little takes the next item in any case, and
    one that lacks so little is closed. A layer's bias is then summed with its weight, not with those of the next layer.
    """
    made: list[list[Item]] = []
    latest: dict[Any, tuple[list[Item], int]] = {}
    for item in items:
        bucket, filled = latest.get(kind(item), ([], 0))
        limit = first if first is not None and bucket and bucket is made[0] else most
        if not bucket or filled > 7 * limit // 8 or (filled + nbytes(item) > limit and filled > limit // 8):
            bucket, filled = [], 0
            made.append(bucket)
        bucket.append(item)
        latest[kind(item)] = bucket, filled + nbytes(item)
    return made


def unwritable(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The reason why tensors cannot take the values of other ranks, with their names; none if all of them can."""
    if names := ", ".join(name for name, tensor in named if not is_writable(tensor)):
        return f"{names} cannot take the values of other ranks: it is sparse or expanded; use what to_dense() or clone() gives"
    return ""


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether each element of a tensor has a place of its own in memory."""
    if tensor.layout is not torch.strided:
        return False
    return all(step or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
