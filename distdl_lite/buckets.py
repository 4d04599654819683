"""Tensors in buckets, each of them one flat tensor, and what all ranks get from them: one rank's values, or the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from distdl_lite.private import flattened, unflattened
from distdl_lite.transport import Team
from distdl_lite.transport.wire import wire_dtype

HALVES = torch.float16, torch.bfloat16
Item = TypeVar("Item")


def grouped(items: Iterable[Item], kind: Callable[[Item], Any]) -> list[list[Item]]:
    """The items by kind, in the order of their first."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return list(groups.values())


def cut(
    items: Iterable[Item],
    kind: Callable[[Item], Any],
    nbytes: Callable[[Item], int],
    most: int,
    first: int | None = None,
) -> list[list[Item]]:
    """The items, in their order, in buckets of one kind, of `most` bytes, the first of `first`.

    A bucket has more where one item has. One that is filled to at most an eighth takes the next item whatever its size; one
    that is filled to more than seven eighths takes no more. So a layer's bias joins its own weight, not that of the next.
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


def broadcast(team: Team, tensors: Sequence[torch.Tensor], root: int | None = None) -> None:
    """Give all ranks of the team the values of its first rank, or another: one message for each dtype."""
    with torch.no_grad():
        for group in grouped([t.detach() for t in tensors], lambda t: (t.dtype, t.device)):
            flat = flattened([t.resolve_conj().resolve_neg() for t in group])
            team.world.broadcast(team, flat, team[0] if root is None else root)
            for tensor, values in zip(group, unflattened(flat, group), strict=True):
                tensor.copy_(values)


def broadcast_structure(team: Team, value: Any, root: int) -> Any:
    """A rank's structure of tensors and other objects: the root's own there, a like one elsewhere."""
    is_root = team.world.rank == root
    told = team.world.gather_objects(team, _empty(value, "meta") if is_root else None)
    if not is_root:
        value = _empty(told[team.index(root)], "cpu")
    broadcast(team, [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)], root)
    return value


def _empty(value: Any, device: str) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device=device), value)


class Flat:
    """Tensors of one dtype and device as one vector, in float32 where they are halves."""

    def __init__(self, tensors: Sequence[torch.Tensor], learns: bool = False) -> None:
        self.tensors = list(tensors)
        self.learns = learns  # whether they are parameters, which a rank goes on to change while their sum is under way
        # The numbers that all ranks last had in common, if differences to them are sent.
        self.anchor: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None  # that rounding has kept from the sums so far

    def read(self) -> torch.Tensor:
        """A copy of the numbers."""
        return torch.cat([_real(tensor).reshape(-1).to(wire_dtype(tensor.dtype).to_real()) for tensor in self.tensors])

    def parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The vector cut into views of the tensors' shapes."""
        shapes = [_real(tensor).shape for tensor in self.tensors]
        pieces = values.split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def write(self, values: torch.Tensor) -> None:
        """Put the numbers back; what was frozen meanwhile stays as it is."""
        for tensor, part in zip(self.tensors, self.parts(values), strict=True):
            if tensor.requires_grad or not self.learns:
                tensor.detach().copy_(torch.complex(*part.unbind(-1)) if tensor.is_complex() else part)

    def contribution(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum: its numbers, or how far they are from the anchor."""
        if self.anchor is None:
            return values
        away = values - self.anchor
        return away if self.residual is None else away.add_(self.residual)


def flats_of(tensors: Iterable[torch.Tensor], learns: bool = False) -> list[Flat]:
    """The tensors by dtype and device, in the order of their first."""
    return [Flat(group, learns) for group in grouped(tensors, lambda t: (wire_dtype(t.dtype).to_real(), t.device))]


def by_tensor(flats: Iterable[Flat], name: str) -> dict[torch.Tensor, torch.Tensor]:
    """The parts of the flats' vectors of a name, where they have one."""
    found = [flat for flat in flats if getattr(flat, name) is not None]
    parts = [zip(flat.tensors, flat.parts(getattr(flat, name)), strict=True) for flat in found]
    return {tensor: part for pairs in parts for tensor, part in pairs}


def joined(flat: Flat, known: dict[torch.Tensor, torch.Tensor], new: torch.Tensor) -> torch.Tensor:
    """A vector with the known parts, and new ones elsewhere."""
    for tensor, part in zip(flat.tensors, flat.parts(new), strict=True):
        if tensor in known:
            part.copy_(known[tensor])
    return new


def average(team: Team, tensors: Iterable[torch.Tensor]) -> None:
    """Put the mean over the team into the tensors, waiting for it; all of the team call it with the same shapes."""
    average_flats(team, flats_of(tensors))


def average_flats(team: Team, flats: Iterable[Flat]) -> None:
    """The same for vectors."""
    if team.size > 1:
        for flat in flats:
            flat.write(team.world.all_reduce(team, flat.read()) / team.size)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
