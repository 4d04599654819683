"""Which ranks average with which: those of a node, and one of each node."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distdl_lite.optim.schedule import check_int
from distdl_lite.partition import Partition

Teams = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Levels:
    """Two levels of ranks, seen from one.

    Attributes
    ----------
    rank : int
        This rank in the world.
    nodes : tuple of tuples of int
        The world ranks of each node, sorted; a node may have one.
    """

    rank: int
    nodes: Teams

    @cached_property
    def team(self) -> tuple[int, ...]:
        """All ranks."""
        return tuple(sorted(rank for node in self.nodes for rank in node))

    @cached_property
    def node(self) -> tuple[int, ...]:
        """The ranks of this one's node."""
        return next(node for node in self.nodes if self.rank in node)

    @cached_property
    def weight(self) -> float:
        """That of this rank's node in a sum over nodes: its ranks over the mean number of ranks of a node."""
        return len(self.node) * len(self.nodes) / len(self.team)

    @cached_property
    def crossings(self) -> Teams:
        """The teams of ranks with the same place in their node, where every node has one."""
        return tuple(tuple(sorted(ranks)) for ranks in zip(*self.nodes, strict=False))

    def crossing(self, turn: int) -> tuple[int, ...]:
        """The team that talks for the nodes at this turn; the load goes round."""
        return self.crossings[turn % len(self.crossings)]


def levels_of(P: Partition, groups: Any = "node", ranks_per_node: int | None = None) -> Levels:
    """The levels over the ranks of `P`, which call this together.

    Parameters
    ----------
    P : Partition
        A rank outside it is alone.
    groups : "node", Partition or sequence of sequences of int
        Ranks of one host; or of one partition, for example the line of `P` through this rank; or as listed by their
        ranks in `P`.
    ranks_per_node : int, optional
        So many ranks in a row count as one host, the last may have fewer.

    Raises
    ------
    TypeError, ValueError
        If `groups` does not say for each rank of `P` in which node it is.
    """
    transport, team = P.world_transport, tuple(sorted(P.ranks))
    if ranks_per_node is not None:
        check_int("ranks_per_node", ranks_per_node, 1)
    if not P.active:
        return Levels(transport.rank, ((transport.rank,),))
    # Always asked for, so that ranks with different arguments still meet.
    chosen = tuple(sorted(groups.ranks)) if isinstance(groups, Partition) else ()
    told = transport.gather_objects(team, (socket.gethostname(), chosen))
    nodes: Iterable[Sequence[int]]
    if isinstance(groups, Partition):
        nodes = dict.fromkeys(chosen for _, chosen in told)
    elif groups != "node":
        nodes = _listed(P, groups)
    elif ranks_per_node is not None:
        nodes = [team[start : start + ranks_per_node] for start in range(0, len(team), ranks_per_node)]
    else:
        hosts = [host for host, _ in told]
        nodes = [
            [rank for rank, other in zip(team, hosts, strict=True) if other == host] for host in dict.fromkeys(hosts)
        ]
    levels = Levels(transport.rank, tuple(tuple(sorted(node)) for node in nodes))
    if levels.team != team:
        raise ValueError(f"groups {list(levels.nodes)} do not hold each of the ranks {list(team)} once")
    return levels


def _listed(P: Partition, groups: Any) -> list[list[int]]:
    try:
        return [[P.ranks[rank] for rank in node] for node in groups if len(node)]
    except (TypeError, IndexError):
        raise TypeError(f'groups must be "node", a Partition or lists of ranks, not {groups!r}') from None
