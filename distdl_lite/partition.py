"""Teams and Cartesian grids of ranks.

A `Partition` is a grid together with the world its ranks belong to, seen from one rank.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, reduce
from typing import Any, NamedTuple

from distdl_lite.grid import Grid, balanced, compact, ravel, unravel


def integers_of(name: str, values: Iterable[int]) -> list[int]:
    """Raises a TypeError that names the argument if it is no sequence of integers, such as one number or "2x2"."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name}={values!r} is no sequence of integers") from None


class Line(NamedTuple):
    """One of the lines or planes that a grid was cut into: each rank sees its own, and knows of the others."""

    ranks: tuple[int, ...]  # of this rank's line
    everywhere: tuple[int, ...]  # of all lines


class Partition:
    """A team of ranks, in an order of its own, seen from one rank.

    Every rank of the world builds every partition, also those it is not a member of: building one communicates nothing.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or torch.distributed.DeviceMesh, optional
        The communicator whose ranks form the team, in its order. None is the ambient world: the threads of
        `distdl_lite.testing.spmd` inside one; else the processes of torch.distributed under torchrun and where a process group
        exists, of MPI elsewhere. The variable ``DISTDL_LITE_TRANSPORT``, ``mpi`` or ``torch``, decides where both could be.
        Partitions made from the same communicator inter-operate.

    Attributes
    ----------
    active : bool
        Whether this rank is a member.
    rank : int
        This rank's number in the team, -1 if inactive.
    size, shape, dim : int, tuple of int, int
        Number of members; a team without a grid has the shape ``(size,)``.
    index : tuple of int or None
        Cartesian index of this rank, None if inactive.
    ranks : sequence of int
        The members' ranks in the world, in row-major order.
    names : tuple of str or None
        Of the axes, where `grid` was given some.

    Raises
    ------
    TypeError, ValueError
        If `comm` is none of these, or this rank is not in it.
    RuntimeError
        If there are no ranks: no launcher has started this process and MPI cannot be loaded.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     return P.rank, P.index, tuple(P.cut(torch.zeros(4, 7)).shape)
    >>> dl.testing.spmd(2, body)
    [(0, (0, 0), (4, 4)), (1, (0, 1), (4, 3))]
    """

    def __init__(self, comm: Any = None) -> None:
        from distdl_lite.transport import current, of_communicator

        world = current() if comm is None else of_communicator(comm)
        self._set(world, Grid((world.size,), range(world.size)), None)

    def _set(self, world: Any, grid: Grid, periods: tuple[bool, ...] | None) -> None:
        self.world_transport = world
        self.grid_of_ranks = grid
        self.periods = periods or (False,) * grid.dim
        self.names: tuple[str, ...] | None = None  # of the axes
        self.origin: Line | None = None  # what this partition was made from, if each line of a grid makes its own
        position = grid.position(world.rank)
        self.active = position is not None
        self.rank = -1 if position is None else position
        self.index = None if position is None else unravel(position, grid.shape)

    def _derive(
        self, ranks: Iterable[int], shape: Sequence[int] | None = None, periods: Sequence[bool] | None = None
    ) -> CartesianPartition:
        """A partition of this one's world over other ranks of it, which is no grid unless it is given a shape."""
        ranks = compact(ranks)
        made: Any = object.__new__(Partition if shape is None else CartesianPartition)
        grid = Grid((len(ranks),) if shape is None else tuple(shape), ranks)
        made._set(self.world_transport, grid, None if periods is None else tuple(map(bool, periods)))
        made.origin = self.origin
        return made  # type: ignore[no-any-return]

    @staticmethod
    def world() -> Partition:
        """The ambient world: all processes of the job, or the threads of `distdl_lite.testing.spmd`."""
        return Partition()

    @property
    def ranks(self) -> Sequence[int]:
        return self.grid_of_ranks.ranks

    @cached_property
    def team(self) -> Any:
        """The members as a team of the world's transport, in rising order."""
        return self.world_transport.team(self.ranks)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid_of_ranks.shape

    @property
    def dim(self) -> int:
        return len(self.shape)

    @property
    def comm(self) -> Any:
        """A communicator over the team for the user's own traffic; None if inactive, and where ranks are threads.

        It is mpi4py's over MPI, a process group where torch.distributed moves tensors.
        It is made at first access, which the whole team must make together, and shared by all partitions over the same
        ranks in the same order: freeing it frees it for all of them. The library never sends on it.
        """
        if not self.active:
            return None
        made, team = self.world_transport.local.setdefault("communicators", {}), tuple(self.ranks)
        if not made.get(team):  # one that has been freed is false, too
            made[team] = self.world_transport.user_communicator(team)
        return made[team]

    _comm = comm

    def create_partition_inclusive(self, ranks: Iterable[int]) -> Partition:
        """The team of the given ranks of this partition, in the given order.

        Raises
        ------
        ValueError
            If a rank is not in ``range(size)`` or named twice.
        """
        chosen = integers_of("ranks", ranks)
        outside = sorted({rank for rank in chosen if not 0 <= rank < self.size})
        if outside:
            raise ValueError(f"ranks {outside} are not in a partition of {self.size} ranks")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"ranks {chosen} name a rank twice")
        return self._derive(self.ranks[rank] for rank in chosen)

    def create_partition_union(self, other: Partition) -> Partition:
        """This partition's ranks, then the other's new ones.

        Raises
        ------
        ValueError
            If the two are partitions of different worlds.
        """
        check_same_world(self, other)
        mine = set(self.ranks)
        made = self._derive([*self.ranks, *(rank for rank in other.ranks if rank not in mine)])
        made.origin = line_of(self, other)
        return made

    def create_cartesian_topology_partition(
        self, shape: Iterable[int], periods: Sequence[bool] | None = None
    ) -> CartesianPartition:
        """A row-major grid over this team; one that holds nobody over a team that does, as on ranks outside a grid's lines.

        Raises
        ------
        ValueError
            If the product of `shape` is not the number of ranks, or `periods` has another length.
        """
        shape = tuple(integers_of("shape", shape))
        if any(n < 1 for n in shape) or (self.size and math.prod(shape) != self.size):
            raise ValueError(f"a grid of shape {shape} does not fit a partition of {self.size} ranks")
        if periods is not None and len(periods) != len(shape):
            raise ValueError(f"periods {tuple(periods)} do not fit a grid of shape {shape}")
        return self._derive(self.ranks, shape, periods)

    def grid(
        self,
        shape: Iterable[int] | None = None,
        ranks: Iterable[int] | None = None,
        periods: Sequence[bool] | None = None,
        *,
        of: str | Sequence[str] | None = None,
        **axes: int,
    ) -> CartesianPartition:
        """A grid over the first ``prod(shape)`` ranks of this partition, or over `ranks`.

        Parameters
        ----------
        shape : sequence of int, optional
        ranks, periods : sequence, optional
        of : str or sequence of str, optional
            Names of the axes, such as ``"n c h w"``.
        **axes : int
            In place of `shape`, the ranks along each named axis; an axis of `of` that is not among them has one. Without `of` the
            axes are these.

        Raises
        ------
        TypeError
            If `shape` or `ranks` is one number, or both `shape` and `axes` are given.
        ValueError
            If there are too few ranks, or `ranks` does not fill the shape, or names do not fit.

        Examples
        --------
        >>> from distdl_lite.testing import spmd
        >>> spmd(4, lambda world: str(world.grid(h=2, w=2, of="n c h w")))[3]
        'CartesianPartition(n=1, c=1, h=2, w=2, ranks=0..3, index=(0, 0, 1, 1))'
        """
        names = (
            None
            if of is None and not axes
            else tuple(axes if of is None else of.split() if isinstance(of, str) else of)
        )
        if (shape is None) != bool(axes):
            raise TypeError(f"a grid has either a shape or named axes, not shape={shape} and axes {axes}")
        if shape is None:
            shape = [axes.get(name, 1) for name in names or ()]
        shape = tuple(integers_of("shape", shape))
        if names is not None and (len({*names, *axes}) != len(shape) or len(names) != len(shape)):
            raise ValueError(f"the names {names} do not fit the axes {axes or shape}")
        needed = math.prod(shape)
        if ranks is None and needed > self.size:
            start = self.world_transport.launcher.format(needed)
            hint = f": start it with {start}" if self.size == self.world_transport.size else ""
            raise ValueError(f"a grid of shape {shape} needs {needed} ranks, the partition has {self.size}{hint}")
        team = self.create_partition_inclusive(range(needed) if ranks is None else ranks)
        made = team.create_cartesian_topology_partition(shape, periods)
        made.names = names
        return made

    def print(self, *values: Any, root: int = 0, **options: Any) -> None:
        """Print on one rank of this partition; `options` are those of the built-in ``print``."""
        if self.rank == root:
            print(*values, **{"flush": True, **options})

    def allgather_data(self, data: Any) -> list[Any] | None:
        """The values that the members passed, in team order; None on a rank outside. For small host data."""
        if not self.active:
            return None
        team = self.team
        values = self.world_transport.gather_objects(team, data)
        return values if team.ranks == self.ranks else [values[team.index(rank)] for rank in self.ranks]

    def allreduce_data(self, data: Any, op: Callable[[Any, Any], Any]) -> Any:
        """`op` folded over what the members passed, in team order; None on a rank outside."""
        values = self.allgather_data(data)
        return None if values is None else reduce(op, values)

    def broadcast_data(self, data: Any, root: int = 0, P_data: Partition | None = None) -> Any:
        """The value that rank `root` of `P_data` (None: this partition) passed, on the members of both; None elsewhere.

        Raises
        ------
        ValueError
            If `root` is not a rank of `P_data`; on all ranks, if they name different ones.
        """
        source = self if P_data is None else P_data
        if not 0 <= root < source.size:
            raise ValueError(f"root {root} is not in a partition of {source.size} ranks")
        told = source.create_partition_union(self).allgather_data((root, data if source.rank == root else None))
        if len(roots := {named for named, _ in told or ()}) > 1:
            raise ValueError(f"broadcast_data: the ranks name different roots, {sorted(roots)}")
        return told and told[root][1]

    def deactivate(self) -> None:
        """Make this rank a rank outside the partition, from its own point of view; layers made with it go on as before."""
        self.active, self.rank, self.index = False, -1, None

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *exception: object) -> None:
        self.deactivate()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return id(self.world_transport), self.shape, tuple(self.ranks), self.periods, self.active

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Partition:
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), tuple(self.ranks), self.shape, self.periods, self.origin, self.names)

    @property
    def _members(self) -> str:
        """Shape and ranks, in words that are the same on all ranks."""
        ranks = self.ranks
        listed = f"{ranks[0]}..{ranks[-1]}" if isinstance(ranks, range) and len(ranks) > 2 else str(list(ranks))
        named = zip(self.names, self.shape, strict=True) if self.names else (("shape", self.shape),)
        return ", ".join([*(f"{name}={n}" for name, n in named), f"ranks={listed}"])

    def __repr__(self) -> str:
        where = f"index={self.index}" if self.active else "inactive"
        return f"{type(self).__name__}({self._members}, {where})"


class CartesianPartition(Partition):
    """A row-major grid of ranks; made by `Partition.grid` or `Partition.create_cartesian_topology_partition`.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid(h=2, of="n c h")
    ...     return P.shape, P.names, P.index
    >>> dl.testing.spmd(2, body)
    [((1, 1, 2), ('n', 'c', 'h'), (0, 0, 0)), ((1, 1, 2), ('n', 'c', 'h'), (0, 0, 1))]
    """

    def __init__(self) -> None:
        raise TypeError("a CartesianPartition is made by Partition.grid(shape)")

    def cartesian_index(self, rank: int) -> tuple[int, ...]:
        """Index of a rank of this partition.

        Raises
        ------
        ValueError
            If `rank` is not in ``range(size)``.
        """
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a partition of {self.size} ranks")
        return unravel(rank, self.shape)

    def neighbor_ranks(self, rank: int | None = None) -> tuple[tuple[int, int], ...] | None:
        """The (left, right) neighbours along each axis of a rank (None: this one), as ranks of this partition.

        At an edge that is not periodic the neighbour is ``MPI.PROC_NULL``. None on a rank outside the partition.
        """
        if rank is None and not self.active:
            return None
        index = self.cartesian_index(self.rank if rank is None else rank)
        return tuple((self._neighbor(index, a, -1), self._neighbor(index, a, 1)) for a in range(self.dim))

    def _neighbor(self, index: tuple[int, ...], axis: int, step: int) -> int:
        moved = index[axis] + step
        if not self.periods[axis] and not 0 <= moved < self.shape[axis]:
            return int(self.world_transport.proc_null)
        return ravel((*index[:axis], moved % self.shape[axis], *index[axis + 1 :]), self.shape)

    def create_cartesian_subtopology_partition(self, keep: Iterable[bool]) -> CartesianPartition:
        """The line or plane of the grid through this rank: the kept axes vary, the others stay.

        On a rank outside the partition the result holds nobody.

        Raises
        ------
        ValueError
            If `keep` does not have one bool per axis.
        """
        keep = [bool(k) for k in keep]
        if len(keep) != self.dim:
            raise ValueError(f"keep={tuple(keep)} does not have one bool per axis of a grid of shape {self.shape}")
        kept = [axis for axis in range(self.dim) if keep[axis]]
        fixed = {a: i for a, i in enumerate(self.index or ()) if not keep[a]}
        ranks = self.grid_of_ranks.members(fixed) if self.active else ()
        made = self._derive(ranks, [self.shape[a] for a in kept], [self.periods[a] for a in kept])
        made.names = self.names and tuple(self.names[a] for a in kept)
        if any(n > 1 and a not in kept for a, n in enumerate(self.shape)):
            everywhere = self.origin.everywhere if self.origin else tuple(sorted(self.ranks))
            made.origin = Line(tuple(sorted(made.ranks)), everywhere)
        return made

    def axis(self, which: int | str) -> int:
        """The number of an axis, given by its name or number.

        Raises
        ------
        ValueError
            If the grid has no such axis.
        """
        known: Sequence[Any] = (self.names or ()) if isinstance(which, str) else range(-self.dim, self.dim)
        if which not in known:
            raise ValueError(f"{self._members} has no axis {which!r}: its axes are {self.names or 'not named'}")
        return known.index(which) % self.dim

    def line(self, *axes: int | str) -> CartesianPartition:
        """The line of the grid through this rank along an axis, or the plane along several, given by names or numbers.

        It has these axes alone; a layer that wants an axis for each dim takes ``P.line("h").grid((1, 1, n, 1))``.

        Raises
        ------
        ValueError
            If the grid has no such axes.
        """
        kept = {self.axis(which) for which in axes}
        return self.create_cartesian_subtopology_partition(axis in kept for axis in range(self.dim))

    def create_allreduction_partition(self, axes: Iterable[int]) -> CartesianPartition:
        """The ranks this one is summed with when a sum runs over `axes`.

        Raises
        ------
        ValueError
            If an axis is not one of the grid's.
        """
        summed = set(check_axes(axes, self.dim))
        return self.create_cartesian_subtopology_partition([axis in summed for axis in range(self.dim)])

    def bounds(self, global_shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Per dim, the cut points of the balanced blocks of a tensor.

        Raises
        ------
        ValueError
            If the tensor has another number of dims than the grid has axes.
        """
        if len(global_shape) != self.dim:
            raise ValueError(f"a tensor of shape {tuple(global_shape)} cannot be cut over a grid of shape {self.shape}")
        return tuple(balanced(int(n), p) for n, p in zip(global_shape, self.shape, strict=True))

    def block(
        self, global_shape: Sequence[int], axes: Sequence[int | str | None] | None = None
    ) -> tuple[slice, ...] | None:
        """This rank's balanced block of a tensor as slices, None if inactive: ``x_local = x_global[P.block(x.shape)]``.

        Parameters
        ----------
        global_shape : sequence of int
        axes : sequence of int, str or None, optional
            The axis that cuts each dim, by number or name, None for a whole one; by default dim d is cut along axis d.

        Raises
        ------
        ValueError
            If the tensor has another number of dims than the grid has axes, or than `axes` has entries, or there is no such axis.
        """
        if axes is None:
            cuts, chosen = self.bounds(global_shape), list[int | None](range(self.dim))
        elif len(axes) != len(global_shape):
            raise ValueError(f"axes {tuple(axes)} do not fit a tensor of shape {tuple(global_shape)}")
        else:
            chosen = [None if a is None else self.axis(a) for a in axes]
            parts = [1 if a is None else self.shape[a] for a in chosen]
            cuts = tuple(balanced(int(n), p) for n, p in zip(global_shape, parts, strict=True))
        if self.index is None:
            return None
        at = [0 if a is None else self.index[a] for a in chosen]
        return tuple(slice(*cut[i : i + 2]) for cut, i in zip(cuts, at, strict=True))

    def cut(self, x: Any, axes: Sequence[int | str | None] | None = None) -> Any:
        """This rank's balanced block of a tensor that every rank has or can make; zero-volume on a rank outside.

        Parameters
        ----------
        x : torch.Tensor
            The whole tensor, the same on all ranks.
        axes
            As for `block`.

        Returns
        -------
        torch.Tensor
            In memory of its own, so that the whole tensor can go; of the same dtype and device, and of shape ``(0,)`` outside.

        Raises
        ------
        ValueError
            As for `block`.

        Examples
        --------
        >>> import torch
        >>> from distdl_lite.testing import spmd
        >>> spmd(3, lambda world: world.grid((2,)).cut(torch.arange(5)).tolist())
        [[0, 1, 2], [3, 4], []]
        """
        slices = self.block(x.shape, axes)
        return x.new_empty(0) if slices is None else x[slices].clone()


def _unpickle(
    kind: type,
    ranks: tuple[int, ...],
    shape: tuple[int, ...],
    periods: tuple[bool, ...],
    origin: Line | None = None,
    names: tuple[str, ...] | None = None,
) -> Partition:
    world = Partition()
    if ranks and max(ranks) >= world.size:
        raise ValueError(f"a pickled partition over ranks {list(ranks)} does not fit a world of {world.size} ranks")
    made = world._derive(ranks, shape if issubclass(kind, CartesianPartition) else None, periods)
    made.origin = origin
    made.names = names
    return made


def check_axes(axes: Iterable[int], dim: int) -> tuple[int, ...]:
    """The axes as sorted non-negative numbers.

    Raises
    ------
    ValueError
        If an axis is not in ``range(-dim, dim)`` or named twice.
    """
    axes = integers_of("axes", axes)
    if any(not -dim <= axis < dim for axis in axes):
        raise ValueError(f"axes {axes} are not all axes of a partition of {dim} axes")
    axes = [axis % dim for axis in axes]
    if len(set(axes)) != len(axes):
        raise ValueError(f"axes {axes} name an axis twice")
    return tuple(sorted(axes))


def partition_of(P: Any) -> Partition:
    """A Partition equal to `P`, which a later `P.deactivate()` leaves alone; that of a communicator, or the ambient world."""
    if isinstance(P, Partition):
        own = object.__new__(type(P))
        own.__dict__.update(P.__dict__)
        return own
    from distdl_lite.transport import is_communicator

    if not is_communicator(P):
        raise TypeError(f"a Partition or a communicator is needed, not {P!r}")
    return Partition(P)


def check_same_world(*partitions: Partition) -> None:
    """Raise ValueError unless all partitions were made from the same communicator."""
    if len({id(P.world_transport) for P in partitions}) > 1:
        shapes = ", ".join(str(P.shape) for P in partitions)
        raise ValueError(f"partitions of different communicators cannot work together: those of shapes {shapes}")


def union_of_teams(*partitions: Partition) -> Any:
    """The team of the ranks of all given partitions, one or more, of one world."""
    teams = {P.team for P in partitions}
    if len(teams) == 1:
        return teams.pop()
    return partitions[0].world_transport.team({rank for team in teams for rank in team})


def line_of(*partitions: Partition) -> Line | None:
    """The lines that partitions were made from, put together; None if none was made from a line."""
    lines = [P.origin for P in partitions if P.origin is not None]
    if not lines:
        return None
    ranks, everywhere = ({rank for part in parts for rank in part} for parts in zip(*lines, strict=True))
    return Line(tuple(sorted(ranks)), tuple(sorted(everywhere)))
