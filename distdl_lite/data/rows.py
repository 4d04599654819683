"""Rows of tensors that move between ranks: one exchange per tensor, from index arithmetic on whole tensors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from distdl_lite.agreement import check_alike, raise_together
from distdl_lite.data.sampler import permutation
from distdl_lite.grid import balanced
from distdl_lite.partition import Partition, partition_of
from distdl_lite.transport import RowsByRank

Rows = TypeVar("Rows")
Cuts = Sequence[int]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # torch cannot index all others of these sizes


@dataclass(frozen=True)
class Route:
    """A rank's part in moving rows."""

    leaving: torch.Tensor  # the rank's rows that go, in the order of the ranks they go to
    sends: list[int]  # numbers of rows to each rank
    receives: list[int]  # and from each
    places: torch.Tensor  # of each row of the result among those that arrive


def route(wanted: torch.Tensor, held: Cuts, result: Cuts, position: int) -> Route:
    """The route of the rows of rank number `position` of a line of ranks.

    `wanted` has, for each row of the whole result, its place in the whole array as it is held; `held` and `result` say
    where the two are cut over the ranks.
    """
    first, last = held[position], held[position + 1]
    going = ((wanted >= first) & (wanted < last)).nonzero().view(-1)  # ascending, so by the rank they go to
    holders = _holders(wanted[result[position] : result[position + 1]], held)
    size = len(held) - 1
    sends, receives = (counts.bincount(minlength=size).tolist() for counts in (_holders(going, result), holders))
    return Route(wanted[going] - first, sends, receives, inverse(holders.argsort(stable=True)))


def _holders(rows: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    return torch.bucketize(rows, torch.tensor(cuts[1:]), right=True)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The place of each number in a permutation."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places


def picked(x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A contiguous copy of some rows of a tensor on any device."""
    bits = _BITS.get(x.element_size(), x.dtype)
    kept = torch.index_select(x.view(bits), 0, rows.to(x.device), out=None if out is None else out.view(bits))
    return kept.view(x.dtype)


class LocalRows:
    """A pytree of tensors with rows, and a line of ranks that rows move between, all of which have the like.

    TypeError or ValueError, on all ranks of the line, which make it together, naming the rank: if something is no dense
    tensor with rows, or requires grad, or numbers of rows differ between tensors; or names, dtypes or shapes but for the rows
    between ranks; or if `arguments` raises, or returns another text than on other ranks.
    """

    def __init__(self, name: str, rows: Any, line: Partition, arguments: Callable[[], str]) -> None:
        self.line = line
        error, mine = None, ("", 0, "")
        try:
            mine = (*_described(rows), arguments())
        except (TypeError, ValueError) as raised:
            error = raised
        raise_together(line.team, error, name)
        found = dict(zip(line.ranks, line.allgather_data(mine) or (), strict=True))
        check_alike("tensors", {rank: tensors for rank, (tensors, _, _) in found.items()})
        check_alike("arguments", {rank: text for rank, (_, _, text) in found.items()})
        leaves, self._spec = tree_flatten(rows)
        self.leaves = [x.detach().resolve_conj().resolve_neg() for x in leaves]
        # Where the whole array is cut over the line.
        self.cuts = (0, *accumulate(count for _, count, _ in found.values()))

    @property
    def length(self) -> int:
        return self.cuts[-1]

    def tree(self, leaves: list[torch.Tensor]) -> Any:
        return tree_unflatten(leaves, self._spec)

    def start(self, way: Route, leaving: Sequence[torch.Tensor]) -> list[Any]:
        """Begin to exchange; the tensors are left alone until all that this returns has arrived."""
        exchange, ranks = self.line.world_transport.exchange_rows, self.line.ranks
        pairs = [(x, x.new_empty(len(way.places), *x.shape[1:])) for x in leaving]
        return [exchange(ranks, RowsByRank(x, way.sends), RowsByRank(y, way.receives)) for x, y in pairs]


def _described(rows: Any) -> tuple[str, int]:
    """A rank's rows but for their number, and their number."""
    leaves, _ = tree_flatten_with_path(rows)
    if not leaves:
        raise ValueError("there are no tensors to move rows of")
    texts = []
    for path, x in leaves:
        name = f"rows{keystr(path)}"
        if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.is_nested or x.is_meta:
            raise TypeError(f"{name} is no dense tensor with data, but {type(x).__name__}")
        if not x.dim() or x.requires_grad:
            raise ValueError(f"{name} of shape {tuple(x.shape)} {'requires grad' if x.dim() else 'has no rows'}")
        texts.append(f"{name} {('n', *x.shape[1:])} {x.dtype} on {x.device.type}")
    sizes = {f"rows{keystr(path)}": len(x) for path, x in leaves}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the tensors have different numbers of rows: {sizes}")
    return ", ".join(texts), len(leaves[0][1])


def _order_described(order: Any) -> str:
    if isinstance(order, int) and not isinstance(order, bool):
        return f"seed {order}"
    if not isinstance(order, torch.Tensor) or order.dim() != 1 or order.dtype is not torch.int64:
        given = f"{order.dtype} of shape {tuple(order.shape)}" if isinstance(order, torch.Tensor) else repr(order)
        raise TypeError(f"order is a 1-d tensor of int64 or a seed, not {given}")
    return f"an order of {len(order)} numbers with checksum {zlib.crc32(order.cpu().contiguous().numpy())}"


def redistribute(rows: Rows, order: torch.Tensor | int, P: Any = None, *, keep_counts: bool = False) -> Rows:
    """Move rows between ranks so that the whole array becomes ``whole[order]``, cut over the ranks again.

    Parameters
    ----------
    rows : tensor or pytree of tensors
        This rank's rows, ``(n, ...)`` in all tensors alike; any n on any rank. The whole array is that of the ranks one
        after the other. Tensors may lie on any device and be of any dtype; none may require grad.
    order : tensor of int64, or int
        A permutation of the N rows of all ranks, the same on all; or a seed of `permutation`.
    P : Partition or communicator, optional
        Rows move along its first axis; ranks that differ in other axes keep to themselves. None is the ambient world.
    keep_counts : bool
        Whether each rank gets as many rows as it had; else numbers of rows are balanced, with one more on the first ranks.

    Returns
    -------
    tensor or pytree of tensors
        Of the same structure, fresh. A rank outside `P` gets what it passed.

    Raises
    ------
    TypeError, ValueError
        On all ranks that exchange rows, with the same text, which names the rank: if tensors do not fit, or `order` is no
        permutation of N numbers or differs between ranks.

    Notes
    -----
    All ranks of `P` call it together. Two agreements by small host data, then one exchange per tensor (``MPI_Isend``,
    ``MPI_Irecv``) of rows packed by index arithmetic on whole tensors, of O(N) on each rank. Peak extra memory is twice the
    rank's rows.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite.testing import spmd
    >>> def body(world):
    ...     rows = torch.tensor([[0, 1, 2], [3]][world.rank])
    ...     return redistribute(rows, torch.tensor([3, 1, 0, 2]), world).tolist()
    >>> spmd(2, body)
    [[3, 1], [0, 2]]
    """
    line = line_of(P)
    if not line.active:
        return rows
    local = LocalRows("redistribute", rows, line, lambda: f"{_order_described(order)}, keep_counts={keep_counts}")
    order = permutation(local.length, order) if isinstance(order, int) else order.cpu()
    if not torch.equal(order.sort().values, torch.arange(local.length)):
        raise ValueError(f"redistribute: the order is no permutation of the {local.length} rows of all ranks")
    cuts = local.cuts if keep_counts else balanced(local.length, line.size)
    way = route(order, local.cuts, cuts, line.rank)
    leaving = [picked(x, way.leaving) for x in local.leaves]
    moving = local.start(way, leaving)
    again = leaving if len(leaving[0]) == len(way.places) else [None] * len(leaving)  # spares the page faults of more
    return local.tree([picked(x.finish(), way.places, out) for x, out in zip(moving, again, strict=True)])


def line_of(P: Any) -> Partition:
    """The ranks along the first axis of a partition through this rank."""
    P = partition_of(P)
    return P if P.dim == 1 else P.create_allreduction_partition([0])  # type: ignore[no-any-return]
