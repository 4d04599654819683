"""The ranks that average together: those of a node, and one of each node."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distdl_lite.buckets import grouped
from distdl_lite.optim.schedule import check_int
from distdl_lite.partition import Partition
from distdl_lite.transport import Team

Nodes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Levels:
    """Two levels of ranks, seen from one."""

    P: Partition  # all ranks
    nodes: Nodes  # the world ranks of each node, sorted; a node may have one

    @property
    def rank(self) -> int:
        """This rank in the world."""
        return int(self.P.world_transport.rank)

    @cached_property
    def team(self) -> Team:
        """All ranks; this one alone if it is outside."""
        return self.P.world_transport.team(rank for node in self.nodes for rank in node)

    @cached_property
    def node(self) -> Team:
        """The ranks of this one's node."""
        return self.P.world_transport.team(next(node for node in self.nodes if self.rank in node))

    @cached_property
    def weight(self) -> float:
        """The weight of this rank's node in a sum over nodes: its ranks over the mean number of ranks of a node."""
        return self.node.size * len(self.nodes) / self.team.size

    @cached_property
    def crossings(self) -> tuple[Team, ...]:
        """The teams of ranks with the same place in their node, where every node has one: they talk for the nodes in turn."""
        return tuple(map(self.P.world_transport.team, zip(*self.nodes, strict=False)))


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
    transport, team = P.world_transport, P.team
    if ranks_per_node is not None:
        check_int("ranks_per_node", ranks_per_node, 1)
    if not P.active:
        return Levels(P, ((transport.rank,),))
    # Always asked for, so that ranks with different arguments still meet.
    chosen = tuple(sorted(groups.ranks)) if isinstance(groups, Partition) else ()
    told = transport.gather_objects(team, (socket.gethostname(), chosen))
    nodes: Iterable[Sequence[int]]
    if isinstance(groups, Partition):
        nodes = dict.fromkeys(chosen for _, chosen in told)
    elif groups != "node":
        nodes = _listed(P, groups)
    elif ranks_per_node is not None:
        nodes = [team[start : start + ranks_per_node] for start in range(0, team.size, ranks_per_node)]
    else:
        nodes = grouped(team, lambda rank: told[team.index(rank)][0])
    levels = Levels(P, tuple(tuple(sorted(node)) for node in nodes))
    if sorted(rank for node in levels.nodes for rank in node) != list(team):
        raise ValueError(f"groups {list(levels.nodes)} do not hold each of the ranks {list(team)} once")
    return levels


def _listed(P: Partition, groups: Any) -> list[list[int]]:
    try:
        return [[P.ranks[rank] for rank in node] for node in groups if len(node)]
    except (TypeError, IndexError):
        raise TypeError(f'groups must be "node", a Partition or lists of ranks, not {groups!r}') from None
