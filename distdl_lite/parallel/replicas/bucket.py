"""Gradients in flat buckets, with what travels beside them: which of them there are, and how much they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite.buckets import cut
from distdl_lite.private import holders, unflattened
from distdl_lite.transport.wire import wire_dtype

_LARGE = 4096  # numbers in a gradient from which one pass over it takes longer than a call
FIRST_BYTES = 1 << 20  # the first bucket is soon full, and its sum soon on its way


def filled(
    order: Sequence[int], nbytes: Sequence[int], kinds: Sequence[Any], most: int, first: int
) -> list[tuple[int, ...]]:
    """Cut parameters, in this order, into buckets of one kind, of about `most` bytes, the first of `first` if that is less.

    Parameters are given and returned by their numbers, which `nbytes` and `kinds` go by. The buckets come in the order in
    which they are complete when the parameters come in theirs.

    >>> filled([3, 2, 1, 0], [8, 8, 8, 8], ["a", "a", "b", "a"], 16, 16)
    [(2,), (3, 1), (0,)]
    """
    made = cut(order, kinds.__getitem__, nbytes.__getitem__, most, min(most, first))
    last = {number: place for place, number in enumerate(order)}
    return sorted((tuple(bucket) for bucket in made), key=lambda bucket: last[bucket[-1]])


class Bucket:
    """A flat tensor ``[gradients | a flag for each | weight | mark | header]``, which is summed over ranks as a whole.

    The header has as many numbers as the container that makes it says; there may be no parameters.

    Attributes
    ----------
    gradients : torch.Tensor
        The flat part of the gradients, while the bucket is packed; those of 16 bits are summed in 32.
    dtype : torch.dtype
    """

    def __init__(self, numbers: Sequence[int], parameters: Sequence[torch.Tensor], header: int = 0) -> None:
        self.numbers, self.header = tuple(numbers), [0.0] * header
        self._like = list(parameters)
        self.dtype = wire_dtype(parameters[0].dtype) if parameters else torch.float32
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.size = sum(p.numel() for p in parameters)
        self.missing = len(parameters)  # before it is complete
        self._allot()

    def _allot(self) -> None:
        tail = len(self.numbers) + 2 + len(self.header)
        self.flat = torch.empty(self.size + tail, dtype=self.dtype, device=self.device)
        self.gradients, self.tail = self.flat.split([self.size, tail])
        self._views = list(unflattened(self.gradients, self._like)) if self._like else []
        self._holders = holders(self.flat)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def free(self) -> torch.Tensor:
        """The flat tensor, to be filled: another one if somebody has kept a gradient."""
        if holders(self.flat) != self._holders:
            self._allot()
        return self.flat

    @torch.no_grad()
    def pack(self, gradients: Sequence[torch.Tensor | None], factor: float, weight: float, mark: float) -> None:
        """Fill in the local gradients times a factor. Without weight they are zeros, also where they are not numbers."""
        given = [(view, g) for view, g in zip(self._views, gradients, strict=True) if g is not None and weight]
        if len(given) < len(gradients):
            self.gradients.zero_()
        if given and self.size > _LARGE * len(given) and all(g.dtype is self.dtype for _, g in given):
            for view, g in given:
                torch.mul(g, factor, out=view)
        elif given:
            views, found = zip(*given, strict=True)
            torch._foreach_copy_(views, found)
            if factor != 1:
                self.gradients.mul_(factor)
        flags = [float(g is not None) for g in gradients]
        self.tail.copy_(torch.tensor([*flags, weight, mark, *self.header], dtype=torch.float64))

    def unpack(self, divides: bool, scale: float = 1) -> tuple[list[torch.Tensor | None], float, float]:
        """The results, and what has been added up of weights and marks.

        The sums are divided by that of the weights, if so, but for the `scale` by which all ranks have multiplied them
        already. They share the bucket's memory, which is not used again while anybody holds one. None stands where no rank
        had a gradient.
        """
        n = len(self.numbers)
        numbers = (self.tail.real if self.tail.is_complex() else self.tail).tolist()
        weight, marks, self.header = numbers[n], numbers[n + 1], numbers[n + 2 :]
        if divides and weight and abs(weight * scale - 1) > 1e-12:
            self.gradients.div_(weight * scale)
        found = [view.detach() if flag else None for view, flag in zip(self._views, numbers[:n], strict=True)]
        return found, weight, marks
