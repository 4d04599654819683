"""Plans: what one rank sends and receives to go from one layout to another.

    y_s[g] = sum of x_r[g] over all ranks r with the key of s whose X-box holds g,  for every g in the Y-box of s

A plan is built without communication, from the two layouts alone; its adjoint is the plan with the layouts swapped.
Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Any

from distdl_lite.layout import Box, Layout, Shape, shape_of, uncovered


class Pattern(Enum):
    """The native collective a leg can run as; EXCHANGE is packed messages."""

    BROADCAST = "broadcast"
    REDUCE = "reduce"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    EXCHANGE = "exchange"

    @property
    def adjoint(self) -> Pattern:
        return _ADJOINT.get(self, self)

    @property
    def sums(self) -> bool:
        """Whether the collective adds."""
        return self in (Pattern.REDUCE, Pattern.ALL_REDUCE, Pattern.REDUCE_SCATTER)


_ADJOINT = {
    Pattern.BROADCAST: Pattern.REDUCE,
    Pattern.REDUCE: Pattern.BROADCAST,
    Pattern.ALL_GATHER: Pattern.REDUCE_SCATTER,
    Pattern.REDUCE_SCATTER: Pattern.ALL_GATHER,
}


@dataclass(frozen=True)
class Edge:
    """A box of the local tensor that goes to, or comes from, a peer (which may be this rank itself)."""

    peer: int
    box: Box

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.box)

    @property
    def size(self) -> int:
        return math.prod(shape_of(self.box))


@dataclass(frozen=True)
class Leg:
    """One movement of a plan.

    Attributes
    ----------
    pattern : Pattern
    team : tuple of int
        The ranks of a collective, sorted; empty for an exchange, which only its peers take part in.
    root : int or None
        The rank a broadcast starts from or a reduction ends at.
    sends, receives : tuple of Edge
        In order of the peers; several edges of one pair stand in the same order on both sides.
    """

    pattern: Pattern
    team: tuple[int, ...]
    root: int | None
    sends: tuple[Edge, ...]
    receives: tuple[Edge, ...]

    def adjoint(self) -> Leg:
        return replace(self, pattern=self.pattern.adjoint, sends=self.receives, receives=self.sends)


@dataclass(frozen=True)
class Plan:
    """The sends and receives of one rank in an operator.

    Attributes
    ----------
    rank : int
    shape_in, shape_out : tuple of int or None
        Local shapes; None where the rank holds nothing on that side.
    legs : tuple of Leg
        At most two collectives, in the order of their teams, or one exchange.
    adds_out, adds_in : bool
        Whether points of the output (of the adjoint's output) may receive more than one contribution.
    pattern : Pattern
        Of the operator as a whole, the same on all ranks.
    nothing : tuple of int
        Shape of the tensor that a rank gets where it holds nothing.

    Examples
    --------
    >>> from distdl_lite.grid import Grid
    >>> from distdl_lite.layout import balanced_blocks, gathered
    >>> rows = balanced_blocks(Grid((2, 1), (0, 1)), (5, 3))
    >>> p = plan(rows, gathered(rows, [0]), rank=0)
    >>> p.pattern.value, p.shape_in, p.shape_out
    ('all_gather', (3, 3), (5, 3))
    """

    rank: int
    shape_in: Shape | None
    shape_out: Shape | None
    legs: tuple[Leg, ...]
    adds_out: bool
    adds_in: bool
    pattern: Pattern
    nothing: Shape = (0,)

    def adjoint(self) -> Plan:
        """The plan of the adjoint: sends and receives swapped."""
        return Plan(
            self.rank,
            self.shape_out,
            self.shape_in,
            tuple(leg.adjoint() for leg in self.legs),
            self.adds_in,
            self.adds_out,
            self.pattern.adjoint,
        )

    @property
    def returned_shape(self) -> Shape:
        """Shape of the tensor a rank gets; a scalar's ``()`` is not nothing."""
        return self.nothing if self.shape_out is None else self.shape_out

    @cached_property
    def traffic(self) -> tuple[int, int, int]:
        """How many collectives this rank takes part in, how many messages it sends (a collective is one), and their elements."""
        collectives = sum(bool(leg.team) for leg in self.legs)
        sent = [edge for leg in self.legs for edge in leg.sends if edge.peer != self.rank]
        return collectives, collectives or len({edge.peer for edge in sent}), sum(edge.size for edge in sent)

    @cached_property
    def gaps(self) -> list[tuple[slice, ...]]:
        """The parts of the output that receive nothing and are zero."""
        return self._uncovered([edge.box for leg in self.legs for edge in leg.receives])

    @cached_property
    def kept_gaps(self) -> list[tuple[slice, ...]]:
        """The parts of the output that receive nothing from this rank itself; all of it if it receives several pieces."""
        kept = [edge.box for leg in self.legs for edge in leg.receives if edge.peer == self.rank]
        return self._uncovered(kept if len(kept) == 1 else [])

    def _uncovered(self, boxes: list[Box]) -> list[tuple[slice, ...]]:
        entire = tuple((0, n) for n in self.returned_shape)
        return [tuple(slice(*side) for side in box) for box in uncovered(entire, boxes)]


def plan(X: Layout, Y: Layout, rank: int) -> Plan:
    """One rank's plan of the operator from layout `X` to layout `Y`.

    Parameters
    ----------
    X, Y : Layout
        Of the input and the output: the same global shape, on any two grids of the world.
    rank : int
        In the world; one that is in neither grid has a plan without legs.

    Raises
    ------
    ValueError
        If the layouts differ in their numbers of dims.

    Examples
    --------
    >>> from distdl_lite.grid import Grid
    >>> from distdl_lite.layout import balanced_blocks
    >>> rows, columns = Grid((2, 1), (0, 1)), Grid((1, 2), (0, 1))
    >>> p = plan(balanced_blocks(rows, (2, 2)), balanced_blocks(columns, (2, 2)), rank=0)
    >>> [edge.box for edge in p.legs[0].sends]
    [((0, 1), (0, 1)), ((0, 1), (1, 2))]
    """
    if len(X.dims) != len(Y.dims):
        raise ValueError(f"an operator cannot go from {len(X.dims)} dims to {len(Y.dims)}")
    pattern = classify(X, Y)
    box_in, box_out = X.box(rank), Y.box(rank)
    keys = {key for key in (X.key(rank), Y.key(rank)) if key is not None}
    if pattern is Pattern.EXCHANGE:
        sends = _edges(box_in, X.key(rank), Y, _periods(X, Y), mine_is_source=True)
        receives = _edges(box_out, Y.key(rank), X, _periods(X, Y), mine_is_source=False)
        legs = [Leg(pattern, (), None, sends, receives)] if keys else []
    else:
        legs = [_collective(pattern, X, Y, rank, key) for key in keys]
    return Plan(
        rank,
        None if box_in is None else shape_of(box_in),
        None if box_out is None else shape_of(box_out),
        tuple(sorted(legs, key=lambda leg: leg.team)),
        X.overlaps,
        Y.overlaps,
        pattern,
    )


def _periods(X: Layout, Y: Layout) -> list[int | None]:
    return [x.period or y.period for x, y in zip(X.dims, Y.dims, strict=True)]


def _edges(
    box: Box | None, key: tuple[int, ...] | None, other: Layout, periods: list[int | None], mine_is_source: bool
) -> tuple[Edge, ...]:
    """The edges between this rank's box and the boxes of the other layout.

    Several edges of one pair are ordered by their shift from source to target, which both sides see alike.
    """
    if box is None or key is None:
        return ()
    found = []
    for peer, piece, shift in other.meeting(box, key, periods):
        order = tuple(-s for s in shift) if mine_is_source else shift
        local = tuple((a - start, b - start) for (a, b), (start, _) in zip(piece, box, strict=True))
        found.append((peer, order, Edge(peer, local)))
    return tuple(edge for _, _, edge in sorted(found, key=lambda entry: entry[:2]))


def _collective(pattern: Pattern, X: Layout, Y: Layout, rank: int, key: tuple[int, ...]) -> Leg:
    sources, targets = tuple(X.members(key)), tuple(Y.members(key))
    root = {Pattern.BROADCAST: sources[0], Pattern.REDUCE: targets[0]}.get(pattern)
    none: list[int | None] = [None] * len(X.dims)
    sends = _edges(X.box(rank), key, Y, none, True) if X.key(rank) == key else ()
    receives = sends if X == Y else _edges(Y.box(rank), key, X, none, False) if Y.key(rank) == key else ()
    return Leg(pattern, tuple(sorted({*sources, *targets})), root, sends, receives)


def classify(X: Layout, Y: Layout) -> Pattern:
    """The native collective that the operator from `X` to `Y` is, the same for all its teams and on all ranks."""
    if X.is_empty or Y.is_empty or not (X.free_axes or Y.free_axes) or _periods(X, Y) != [None] * len(X.dims):
        return Pattern.EXCHANGE
    alike = _by_team(X) == _by_team(Y)
    if alike and not X.cut_axes and not Y.cut_axes:
        if not X.free_axes:
            return Pattern.BROADCAST
        if not Y.free_axes:
            return Pattern.REDUCE
        return Pattern.ALL_REDUCE if X.grid == Y.grid else Pattern.EXCHANGE
    if X.grid == Y.grid and X.team_axes == Y.team_axes and X.free_axes:
        if not Y.cut_axes and _tiles(X, Y):
            return Pattern.ALL_GATHER
        if not X.cut_axes and _tiles(Y, X):
            return Pattern.REDUCE_SCATTER
    return Pattern.EXCHANGE


def _by_team(layout: Layout) -> tuple[Any, ...] | None:
    """The dims as functions of the team alone, None where they depend on more."""
    team = layout.team_axes
    if any(not set(dim.axes) <= set(team) and len(set(dim.ranges)) > 1 for dim in layout.dims):
        return None
    cut = [len(set(dim.ranges)) > 1 for dim in layout.dims]
    shape = tuple(layout.grid.shape[a] for a in team)
    dims = tuple(
        (tuple(team.index(a) for a in dim.axes) if is_cut else (), dim.ranges if is_cut else dim.ranges[:1])
        for dim, is_cut in zip(layout.dims, cut, strict=True)
    )
    return shape, dims


def _tiles(parts: Layout, wholes: Layout) -> bool:
    """Whether within each team the boxes of `parts` tile the one box of `wholes`."""
    if parts.overlaps:
        return False
    for part, entire in zip(parts.dims, wholes.dims, strict=True):
        if set(part.axes) & set(parts.free_axes):
            low, high = part.ranges[0][0], part.ranges[-1][1]
            joined = all(a[1] == b[0] for a, b in pairwise(part.ranges))
            if len(part.axes) != 1 or not joined or set(entire.ranges) != {(low, high)}:
                return False
        elif (part.axes, part.ranges) != (entire.axes, entire.ranges):
            return False
    return True
