"""Gradients in flat buckets, with what travels beside them: which of them there are, and how much they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite.reducer import flattened, unflattened
from distdl_lite.transport.wire import wire_dtype

FIRST_BYTES = 1 << 20  # the first bucket is soon full, and its sum soon on its way


def filled(order: Sequence[int], nbytes: Sequence[int], kinds: Sequence[Any], most: int) -> list[tuple[int, ...]]:
    """Cut parameters, in this order, into buckets of one kind, of `most` bytes unless one parameter has more.

    Parameters
    ----------
    order : sequence of int
        The parameters' numbers.
    nbytes, kinds
        By number: what each needs, and what must be the same in a bucket.
    most : int
        The first bucket gets no more than `FIRST_BYTES`.

    Returns
    -------
    list of tuple of int
        The numbers, in the order in which the buckets are complete when the parameters come in theirs.

    >>> filled([3, 2, 1, 0], [8, 8, 8, 8], ["a", "a", "b", "a"], 16)
    [(2,), (3, 1), (0,)]
    """
    made: list[list[int]] = []
    open_: dict[Any, tuple[list[int], int]] = {}
    for number in order:
        bucket, size = open_.get(kinds[number], ([], 0))
        limit = min(most, FIRST_BYTES) if bucket and bucket is made[0] else most
        if not bucket or size + nbytes[number] > limit:
            bucket, size = [], 0
            made.append(bucket)
        bucket.append(number)
        open_[kinds[number]] = bucket, size + nbytes[number]
    last = {number: place for place, number in enumerate(order)}
    return sorted((tuple(bucket) for bucket in made), key=lambda bucket: last[bucket[-1]])


class Bucket:
    """A flat tensor ``[gradients | a flag for each | weight | mark | header]``, which is summed over ranks as a whole.

    Parameters
    ----------
    numbers : sequence of int
        Of the parameters.
    parameters : sequence of torch.Tensor
        The same; none in a bucket that only has a header.
    header : int
        How many numbers travel at the end.

    Attributes
    ----------
    gradients : torch.Tensor
        The flat part of the gradients, while the bucket is packed; those of 16 bits are summed in 32.
    """

    def __init__(self, numbers: Sequence[int], parameters: Sequence[torch.Tensor], header: int = 0) -> None:
        self.numbers, self.header = tuple(numbers), [0.0] * header
        self._like = list(parameters)
        self.dtype = wire_dtype(parameters[0].dtype) if parameters else torch.float32
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.size = sum(p.numel() for p in parameters)
        self.missing = len(parameters)  # before it is complete
        self.flat = self.gradients = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return (self.size + len(self.numbers) + 2 + len(self.header)) * self.dtype.itemsize

    @torch.no_grad()
    def pack(self, gradients: Sequence[torch.Tensor | None], factor: float, weight: float, mark: float) -> None:
        """Fill in the local gradients times a factor. Without weight they are zeros, also where they are not numbers."""
        flags = [float(g is not None) for g in gradients]
        tail = torch.tensor([*flags, weight, mark, *self.header], dtype=self.dtype, device=self.device)
        given = [self._of(g if weight else None, p) for g, p in zip(gradients, self._like, strict=True)]
        self.flat = flattened([*given, tail])  # afresh, as the results will be views of it
        self.gradients = self.flat[: self.size]
        if factor != 1 and weight:
            self.gradients.mul_(factor)

    def _of(self, gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
        if gradient is None:
            return torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
        gradient = gradient.detach()
        return gradient if gradient.dtype is self.dtype else gradient.to(self.dtype)

    @torch.no_grad()
    def unpack(self, divides: bool) -> tuple[list[torch.Tensor | None], float]:
        """The sums, divided by that of the weights if so, None where no rank had a gradient; and the sum of the marks."""
        n, tail = len(self.numbers), self.flat[self.size :]
        numbers = (tail.real if tail.is_complex() else tail).tolist()
        total, marks, self.header = numbers[n], numbers[n + 1], numbers[n + 2 :]
        if divides and total not in (0, 1):
            self.gradients.div_(total)
        views = unflattened(self.gradients, self._like) if self._like else ()
        self.flat = self.gradients = torch.empty(0)
        return [view if flag else None for view, flag in zip(views, numbers[:n], strict=True)], marks
