"""Lists of tensors as vectors that are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from distdl_lite.transport import Team, Transport

HALVES = torch.float16, torch.bfloat16


class Flat:
    """Tensors of one dtype and device as one vector, in float32 where they are halves.

    Attributes
    ----------
    tensors : list of torch.Tensor
    point : torch.Tensor or None
        The numbers that all ranks last had in common, where differences to them are sent.
    left : torch.Tensor or None
        What rounding has kept from the sums so far.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], learns: bool = False) -> None:
        self.tensors = list(tensors)
        self.learns = learns  # whether they are parameters, which a rank goes on to change while their sum is under way
        self.point: torch.Tensor | None = None
        self.left: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """A copy of the numbers."""
        return torch.cat([_real(tensor).reshape(-1).to(_wide(tensor.dtype)) for tensor in self.tensors])

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

    def target(self, mean: torch.Tensor) -> torch.Tensor:
        """The point to merge, from the mean of what `contribution` gave."""
        return mean if self.point is None else self.point.add_(mean)

    def contribution(self, values: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum: its numbers, or how far they are from the common point."""
        if self.point is None:
            return values
        away = values - self.point
        return away if self.left is None else away.add_(self.left)


def flats_of(tensors: Iterable[torch.Tensor], learns: bool = False) -> list[Flat]:
    """The tensors by dtype and device, in the order of their first."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((_wide(tensor.dtype), tensor.device), []).append(tensor)
    return [Flat(group, learns) for group in groups.values()]


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


def average(transport: Transport, team: Team, tensors: Iterable[torch.Tensor]) -> None:
    """Put the mean over the team into the tensors, waiting for it; all of the team call it with the same shapes."""
    average_flats(transport, team, flats_of(tensors))


def average_flats(transport: Transport, team: Team, flats: Iterable[Flat]) -> None:
    """The same for vectors."""
    if team.size > 1:
        for flat in flats:
            flat.write(transport.all_reduce(team, flat.read()) / team.size)


def _wide(dtype: torch.dtype) -> torch.dtype:
    real = dtype.to_real()
    return torch.float32 if real in HALVES else real


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
