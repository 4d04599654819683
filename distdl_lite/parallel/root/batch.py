"""The rows of the root's tensors that each rank computes, and the two operators that move rows and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.agreement import TensorStructure
from distdl_lite.grid import Grid, balanced
from distdl_lite.layout import Shape
from distdl_lite.operator import Operator
from distdl_lite.plan import plan
from distdl_lite.transport import Team, Transport

Cuts = tuple[int, ...]


@dataclass(frozen=True)
class Places:
    """The ranks of a container."""

    transport: Transport
    ranks: tuple[int, ...]  # world ranks in the order of the rows they compute
    root: int  # a position among them

    @cached_property
    def team(self) -> Team:
        return self.transport.team(self.ranks)

    @property
    def root_rank(self) -> int:
        return self.ranks[self.root]

    @property
    def place(self) -> int | None:
        """This rank's position, None if it is outside."""
        rank = self.transport.rank
        return self.ranks.index(rank) if rank in self.ranks else None

    def weights_operator(self, size: int) -> Operator:
        """From a flat tensor on the root to copies of it on all ranks; its adjoint adds up gradients."""
        X = lay.whole(Grid((1,), (self.root_rank,)), (size,))
        Y = lay.whole(Grid((len(self.ranks),), self.ranks), (size,))
        return Operator(plan(X, Y, self.transport.rank), self.transport, "RootDataParallel weights")

    def rows_operator(self, shape: Shape, dim: int, cuts: Cuts) -> Operator:
        """From a whole tensor on the root to its rows over the ranks; its adjoint puts rows together."""
        one = (1,) * len(shape)
        grid = Grid((*one[:dim], len(self.ranks), *one[dim + 1 :]), self.ranks)
        X = lay.whole(Grid(one, (self.root_rank,)), shape)
        Y = lay.blocks(grid, [cuts if d == dim else (0, n) for d, n in enumerate(shape)])
        return Operator(plan(X, Y, self.transport.rank), self.transport, "RootDataParallel rows")


def dim_in(shape: Shape, dim: int) -> int | None:
    """The dim that a tensor is cut along, None if it is copied, having none."""
    found = dim if dim >= 0 else dim + len(shape)
    if shape and not 0 <= found < len(shape):
        raise ValueError(f"a tensor of shape {shape} has no dim {dim} to be cut along")
    return found if shape else None


def rows_in(tensors: Sequence[TensorStructure], dim: int) -> int:
    """The length of all tensor arguments along the dim they are cut along; 0 where there is nothing to cut.

    Raises ValueError if they differ, or a tensor lacks the dim.
    """
    cut = [(d, tensor.shape) for tensor in tensors if (d := dim_in(tensor.shape, dim)) is not None]
    if len({shape[d] for d, shape in cut}) > 1:
        shapes = ", ".join(str(shape) for _, shape in cut)
        raise ValueError(f"the tensors among the arguments, of shapes {shapes}, differ in length along dim {dim}")
    return cut[0][1][cut[0][0]] if cut else 0


def cut_rows(rows: int, parts: int, root: int) -> Cuts:
    """Cut points of `rows` over `parts` ranks, whose shares differ by one row at most; the root's is not empty.

    >>> cut_rows(7, 3, 0), cut_rows(2, 4, 3)
    ((0, 3, 5, 7), (0, 1, 1, 1, 2))
    """
    if not root >= rows > 0:
        return balanced(rows, parts)
    return tuple(min(place, rows - 1) + (place > root) for place in range(parts + 1))


def runs(cuts: Cuts, place: int, root: int) -> bool:
    """Whether a rank applies the module: it has rows, or it is the root and nobody has."""
    return cuts[place] < cuts[place + 1] or (place == root and not cuts[-1])


def check_movable(tensor: TensorStructure, what: str) -> None:
    """Raise TypeError for a tensor that cannot be moved."""
    if tensor.kind != "Tensor":
        raise TypeError(f"{what} is {tensor.kind}, which cannot be moved")
    dtype = tensor.dtype
    assert dtype is not None
    if tensor.device == "meta" or (dtype.is_floating_point and dtype.itemsize == 1) or "q" in str(dtype):
        raise TypeError(f"{what}, of {dtype} on device {tensor.device}, cannot be moved")


@dataclass(frozen=True)
class Report:
    """A replica's return value: its nesting, and per item a tensor's structure or a type's name."""

    nesting: str
    items: tuple[TensorStructure, ...]

    @staticmethod
    def of(nesting: Any, items: Sequence[Any]) -> Report:
        return Report(" ".join(str(nesting).split()), tuple(map(TensorStructure.of, items)))


@dataclass(frozen=True)
class Output:
    """A tensor of the output: how its rows lie over the ranks."""

    shape: Shape
    dim: int
    cuts: Cuts
    dtype: torch.dtype
    device: str
    requires_grad: bool


def outputs_of(reports: Mapping[int, Report], parts: int, dim: int) -> list[Output]:
    """How to put the replicas' outputs together, from the reports by position of the ranks that ran.

    Raises ValueError or TypeError, with a text that names the replicas, if they do not fit.
    """
    first, report = next(iter(reports.items()))
    for place, other in reports.items():
        kinds = [tuple(_kind(item) for item in items) for items in (report.items, other.items)]
        if other.nesting != report.nesting or kinds[0] != kinds[1]:
            raise ValueError(
                f"the outputs differ: replica {first} returned {_named(report)}, replica {place} {_named(other)}"
            )
    return [
        _joined(number, {place: other.items[number] for place, other in reports.items()}, parts, dim)
        for number, item in enumerate(report.items)
        if _kind(item) == "tensor"
    ]


def _kind(item: TensorStructure) -> str:
    if item.dtype is not None or item.kind.startswith("a "):
        return "tensor"
    return "None" if item.kind == "NoneType" else "value"


def _named(report: Report) -> str:
    return f"{report.nesting} of {', '.join(_kind(item) for item in report.items) or 'nothing'}"


def _joined(number: int, pieces: dict[int, TensorStructure], parts: int, dim: int) -> Output:
    what = f"output {number}"
    first, piece = next(iter(pieces.items()))
    d = 0 if not piece.shape else dim_in(piece.shape, dim)
    assert d is not None
    for place, other in pieces.items():
        check_movable(other, f"{what} of replica {place}")
        if (_rest(other, d), other.dtype, other.device) != (_rest(piece, d), piece.dtype, piece.device):
            raise ValueError(
                f"{what} cannot be put together along dim {dim}: replica {first} returned {piece.dtype} of shape "
                f"{piece.shape} on {piece.device}, replica {place} {other.dtype} of shape {other.shape} on {other.device}"
            )
    sizes = [(pieces[place].shape or (1,))[d] if place in pieces else 0 for place in range(parts)]
    cuts = tuple(sum(sizes[:place]) for place in range(parts + 1))
    shape = piece.shape or (1,)
    assert piece.dtype is not None
    requires_grad = any(other.requires_grad for other in pieces.values())
    return Output((*shape[:d], cuts[-1], *shape[d + 1 :]), d, cuts, piece.dtype, piece.device, requires_grad)


def _rest(piece: TensorStructure, dim: int) -> Shape:
    """All of a shape that must be alike."""
    return (len(piece.shape), *piece.shape[:dim], *piece.shape[dim + 1 :])
