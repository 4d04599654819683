"""Gradients in flat buckets, with what travels beside them: which of them there are, and how much they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
        The flat part of the gradients; those of 16 bits are summed in 32.
    """

    def __init__(self, numbers: Sequence[int], parameters: Sequence[torch.Tensor], header: int = 0) -> None:
        self.numbers = tuple(numbers)
        dtype = wire_dtype(parameters[0].dtype) if parameters else torch.float32
        device = parameters[0].device if parameters else torch.device("cpu")
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes) + len(sizes) + 2 + header, dtype=dtype, device=device)
        self.gradients, self.tail = self.flat.split([sum(sizes), len(sizes) + 2 + header])
        pieces = self.gradients.split(sizes) if sizes else ()
        self.views = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        self.header = [0.0] * header
        self.missing = len(sizes)  # before it is complete

    @torch.no_grad()
    def pack(self, gradients: Sequence[torch.Tensor | None], factor: float, weight: float, mark: float) -> None:
        """Fill in the local gradients times a factor. Without weight they are zeros, also where they are not numbers."""
        given = [(view, g) for view, g in zip(self.views, gradients, strict=True) if g is not None] if weight else []
        if len(given) < len(gradients):
            self.gradients.zero_()
        if given:
            views, found = zip(*given, strict=True)
            torch._foreach_copy_(views, found)
            if factor != 1:
                self.gradients.mul_(factor)
        flags = [float(g is not None) for g in gradients]
        self.tail.copy_(torch.tensor([*flags, weight, mark, *self.header], dtype=torch.float64))

    @torch.no_grad()
    def unpack(self, divides: bool) -> tuple[list[torch.Tensor | None], float]:
        """The sums, divided by that of the weights if so, None where no rank had a gradient; and the sum of the marks."""
        tail = self.tail.real.tolist() if self.tail.is_complex() else self.tail.tolist()
        flags, (total, marks), self.header = (
            tail[: len(self.views)],
            tail[len(self.views) :][:2],
            tail[len(self.views) + 2 :],
        )
        if divides and total not in (0, 1):
            self.gradients.div_(total)
        return [view if flag else None for view, flag in zip(self.views, flags, strict=True)], marks
