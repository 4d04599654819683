"""One rank's values for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from distdl_lite.autograd import flattened, unflattened
from distdl_lite.transport import Team, Transport


def broadcast(transport: Transport, team: Team, tensors: Sequence[torch.Tensor], root: int | None = None) -> None:
    """Give all ranks of the team the values of its first rank, or another: one message for each dtype."""
    with torch.no_grad():
        for group in _alike([t.detach() for t in tensors]):
            flat = flattened([t.resolve_conj().resolve_neg() for t in group])
            transport.broadcast(team, flat, team[0] if root is None else root)
            for tensor, values in zip(group, unflattened(flat, group), strict=True):
                tensor.copy_(values)


def broadcast_structure(transport: Transport, team: Team, value: Any, root: int) -> Any:
    """A rank's structure of tensors and other objects: the root's own there, a like one elsewhere."""
    is_root = transport.rank == root
    told = transport.gather_objects(team, _empty(value, "meta") if is_root else None)
    if not is_root:
        value = _empty(told[team.index(root)], "cpu")
    broadcast(transport, team, [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)], root)
    return value


def _empty(value: Any, device: str) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device=device), value)


def _alike(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors by dtype and device."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())
