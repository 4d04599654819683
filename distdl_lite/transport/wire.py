"""Tensors to buffers and back: packing, summing, and staging through host memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy
import torch

from distdl_lite.layout import shape_of
from distdl_lite.plan import Edge

# Sums of these travel wider: MPI adds no bfloat16, and half sums lose digits.
_WIRE_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
_NUMPY_LACKS = {torch.bfloat16: torch.int16, torch.complex32: torch.int32}

Slices = tuple[slice, ...]


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a sum of `dtype` travels."""
    return _WIRE_DTYPES.get(dtype, dtype)


def rounded(tensor: torch.Tensor, dtype: torch.dtype, pieces: int) -> torch.Tensor:
    """A flat tensor as rows of equal length in a half dtype, with zeros at the end."""
    rows = tensor.new_zeros(pieces, -(-tensor.numel() // pieces), dtype=dtype)
    if dtype is torch.float16:  # whose range is passed sooner than bfloat16's
        tensor = tensor.clamp(-65504.0, 65504.0)
    rows.view(-1)[: tensor.numel()] = tensor
    return rows


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, up to 64 MiB, which spares each tensor of a few MiB its page faults.

    Its limits follow the largest block that was ever mapped and freed, up to 32 MiB; the pages of this one are never
    touched. Eight convolutions with halos on 4 MiB took 78 ms in place of 97. See ``mallopt(3)``.
    """
    torch.empty((32 << 20) - (1 << 13), dtype=torch.uint8)


def indexable(tensor: torch.Tensor, adds: bool = False) -> Any:
    """The object by which pieces of a tensor are copied: an array over the same memory where it is on the host.

    NumPy moves a small piece in 0.6 us, torch in 3.5. An array of a dtype NumPy lacks holds its bits, which can be
    copied; where they are added (`adds`), and on a device, it is the tensor itself.
    """
    tensor = tensor.detach()
    if not tensor.is_cpu or (adds and tensor.dtype in _WIRE_DTYPES):
        return tensor
    bits = _NUMPY_LACKS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy()


class Message:
    """All pieces that go to, or come from, one peer, in one flat buffer at `home`; another device's tensors pass through it."""

    def __init__(
        self,
        peer: int,
        edges: Iterable[Edge],
        dtype: torch.dtype,
        device: torch.device,
        home: torch.device,
        adds: bool = False,
    ) -> None:
        self.peer = peer
        edges = list(edges)
        sizes = [edge.size for edge in edges]
        staged = device != home
        self.buffer = torch.empty(sum(sizes), dtype=dtype, device=home, pin_memory=staged)
        self._flat = torch.empty(sum(sizes), dtype=dtype, device=device) if staged else self.buffer
        parts = [part.view(shape_of(edge.box)) for edge, part in zip(edges, self._flat.split(sizes), strict=True)]
        self._parts = [(edge.slices, part) for edge, part in zip(edges, parts, strict=True)]
        self._pieces = [(slices, indexable(part, adds)) for slices, part in self._parts]
        self._staged = staged

    def pack(self, x: Any) -> None:
        """Copy the pieces of an `indexable` into the buffer."""
        for slices, piece in self._pieces:
            piece[...] = x[slices]
        if self._staged:
            self.buffer.copy_(self._flat)  # waits for the stream: the host may read the buffer afterwards

    def unpack(self, y: Any) -> None:
        """Copy the buffer into the pieces of an `indexable`."""
        self._load()
        for slices, piece in self._pieces:
            y[slices] = piece

    def add_to(self, y: Any) -> None:
        """Add the buffer to the pieces of an `indexable`."""
        self._load()
        for slices, piece in self._pieces:
            y[slices] += piece

    def add_into(self, y: torch.Tensor) -> None:
        """Add the buffer to the pieces of a tensor, without NumPy: in a backward, torch's sums are in the caches."""
        self._load()
        for slices, part in self._parts:
            y[slices].add_(part)

    def _load(self) -> None:
        if self._staged:
            self._flat.copy_(self.buffer)


def messages(
    edges: Sequence[Edge], rank: int, dtype: torch.dtype, device: torch.device, home: torch.device, adds: bool = False
) -> list[Message]:
    """One message per peer other than this rank, in the order of the peers."""
    crossing = sorted((edge for edge in edges if edge.peer != rank), key=attrgetter("peer"))
    return [Message(peer, group, dtype, device, home, adds) for peer, group in groupby(crossing, attrgetter("peer"))]


def kept(sends: Sequence[Edge], receives: Sequence[Edge], rank: int) -> list[tuple[Slices, Slices]]:
    """The pieces that a rank sends to itself: slices of the input and their places in the output."""
    mine_in = [edge.slices for edge in sends if edge.peer == rank]
    mine_out = [edge.slices for edge in receives if edge.peer == rank]
    return list(zip(mine_in, mine_out, strict=True))


def quiet() -> Any:
    """NumPy adds infinities without a word, as torch does."""
    return numpy.errstate(over="ignore", invalid="ignore")


def lie_in_order(edges: Sequence[Edge], shape: Sequence[int]) -> bool:
    """Whether the boxes are runs of memory, one after the other, of a contiguous tensor of this shape."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    filled = 0
    for edge in edges:
        box = shape_of(edge.box)
        own = [math.prod(box[d + 1 :]) for d in range(len(box))]
        offset = sum(start * stride for (start, _), stride in zip(edge.box, strides, strict=True))
        if offset != filled or any(n != 1 and a != b for n, a, b in zip(box, strides, own, strict=True)):
            return False
        filled += edge.size
    return True
