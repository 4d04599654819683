"""DistDL's partitions: this library's, with NumPy's arrays for shapes and a communicator to ask."""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np

from distdl_lite import nn as dnn
from distdl_lite.grid import Grid
from distdl_lite.partition import CartesianPartition, Partition

_NOBODY = object()
_OPS = {"sum": operator.add, "prod": operator.mul, "max": np.maximum, "min": np.minimum}


def plain(value: Any) -> Any:
    """This library's partition in place of one of the objects below; anything else as it is."""
    return value.ours if isinstance(value, MPIPartition) else value


def _dressed(value: Any) -> Any:
    if not isinstance(value, Partition):
        return value
    made = object.__new__(MPICartesianPartition if isinstance(value, CartesianPartition) else MPIPartition)
    made.ours = value
    return made


def _over(comm: Any) -> Partition:
    """The partition over a communicator; MPI's world is the ambient one, which may be of threads or of torchrun."""
    MPI = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if comm is _NOBODY or (MPI is not None and comm == MPI.COMM_NULL):
        return Partition()._derive(())
    if isinstance(comm, Comm):
        return comm._P  # type: ignore[no-any-return]
    return Partition(None if MPI is not None and comm == MPI.COMM_WORLD else comm)


class MPIPartition:
    """DistDL's name of a `distdl_lite.Partition`, which it holds as `ours` and whose other names it has too.

    Parameters
    ----------
    comm : communicator, optional
        ``MPI.COMM_WORLD`` and None stand for all ranks of the job, however they were started; without an argument the partition
        holds nobody. What DistDL takes after it is not read.

    Attributes
    ----------
    ours : distdl_lite.Partition
        What all functions of this library take.
    shape, index : numpy.ndarray
        Copies; the index is None on a rank outside.
    """

    def __init__(self, comm: Any = _NOBODY, *unread: Any, **unread_too: Any) -> None:
        self.ours = _over(comm)

    def __getattr__(self, name: str) -> Any:
        if name == "ours" or name.startswith("__"):  # which a copy in the making does not have yet
            raise AttributeError(name)
        found = getattr(self.ours, name)
        if not callable(found):
            return found
        return lambda *args, **options: _dressed(found(*map(plain, args), **{n: plain(v) for n, v in options.items()}))

    @property
    def shape(self) -> np.ndarray:
        return np.asarray(self.ours.shape)

    @property
    def index(self) -> np.ndarray | None:
        return None if self.ours.index is None else np.asarray(self.ours.index)

    def cartesian_index(self, rank: int) -> np.ndarray:
        return np.asarray(plain(self).cartesian_index(rank))

    @property
    def _comm(self) -> Any:
        """MPI's communicator, or what stands for it where ranks are threads or torchrun's; None on a rank outside."""
        if not self.active:
            return None
        return self.ours.comm if hasattr(self.ours.comm, "Barrier") else Comm(self.ours)

    def allreduce_data(self, data: Any, op: Any = "sum") -> Any:
        """`op` over what the members pass: "sum", "prod", "max", "min", an operation of MPI or a function of two values."""
        return self.ours.allreduce_data(data, _OPS.get(op, op) if isinstance(op, str) else op)

    def create_partition_inclusive(self, ranks: Any) -> Any:
        """The team of these ranks; of a partition that holds nobody, nobody."""
        return _dressed(self.ours.create_partition_inclusive(ranks) if self.size else self.ours)

    def create_allreduction_partition(self, axes_reduce: Any) -> Any:
        """The ranks that a sum over these axes puts together, as a grid whose other axes have length one."""
        line = plain(self).create_allreduction_partition(axes_reduce)
        summed = {axis % self.dim for axis in axes_reduce}
        shape = [n if axis in summed else 1 for axis, n in enumerate(self.shape)]
        return _dressed(line.create_cartesian_topology_partition(shape) if line.size else line)

    def create_broadcast_partition_to(self, P_dest: Any, *transposed: bool, **named: bool) -> tuple[Any, Any]:
        """The team to which this rank gives its copies, and the one from whose first rank it gets one."""
        move = dnn.Broadcast(self.ours, plain(P_dest), *transposed, **named)
        return _teams(move, move._source, move._target)

    def create_reduction_partition_to(self, P_dest: Any, *transposed: bool, **named: bool) -> tuple[Any, Any]:
        """The team in which this rank gives a term to the first one, and the one whose sum it gets."""
        move = dnn.SumReduce(self.ours, plain(P_dest), *transposed, **named)
        return _teams(move, move._target, move._source)[::-1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MPIPartition) and self.ours == other.ours

    def __hash__(self) -> int:
        return hash(self.ours)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.ours}"


class MPICartesianPartition(MPIPartition):
    """The same of a grid."""


def _teams(move: dnn.Broadcast, roots: Grid, members: Grid) -> tuple[Any, Any]:
    """For this rank as a root and as a member: the root, then the members with its index along the matched axes."""

    def team(grid: Grid) -> Any:
        index = grid.index(move.P_x.world_transport.rank)
        fixed = {axis: index[axis] for axis in move._teams} if index else {}
        both = dict.fromkeys([*roots.members(fixed), *members.members(fixed)]) if index else ()
        return _dressed(move.P_x._derive(both))

    return team(roots), team(members)


class Comm:
    """What programs ask a communicator of MPI for, of ranks that have none; without an argument of all ranks of the job."""

    def __init__(self, P: Partition | None = None) -> None:
        self._given = P

    _P = property(lambda self: self._given or Partition())
    rank, size = property(lambda self: self._P.rank), property(lambda self: self._P.size)

    def Get_rank(self) -> Any:
        return self.rank

    def Get_size(self) -> Any:
        return self.size

    def Barrier(self) -> None:
        self._P.allgather_data(None)

    def allgather(self, data: Any) -> Any:
        return self._P.allgather_data(data)

    def allreduce(self, data: Any, op: Any = operator.add) -> Any:
        return self._P.allreduce_data(data, op)

    def bcast(self, data: Any, root: int = 0) -> Any:
        return self._P.broadcast_data(data, root)
