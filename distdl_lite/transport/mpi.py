"""The MPI transport: native collectives, persistent packed messages. The only file that imports mpi4py.

The library works on its own duplicate of each communicator it is given, so a user's traffic cannot match its messages.
There is one communicator per team of ranks, cached under that duplicate and never owned by a layer: MPICH has about 2,000
context ids, and models have thousands of layers.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from time import perf_counter, sleep
from typing import Any

import torch

if "mpi4py.MPI" not in sys.modules:  # else MPI has begun
    # MPICH's collectives through shared memory spin: with more ranks than cores each takes 8 ms, a sum of 4 MiB 4 s, not
    # 75 us and 3 ms; on 2 ranks and 2 cores a sum of 64 B takes 2.4 us, not 4.7, but one of 4 MiB 3.9 ms, not 0.6.
    os.environ.setdefault("MPIR_CVAR_DEVICE_COLLECTIVES", "none")
    # Open MPI spins while it waits, and so takes the core from the computation beside which a thread sums: a step of 8
    # linear layers took 1.24 of the time without overlap, not 1.07. A sum of 64 B on 2 ranks takes 2.5 us, not 1.8.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
from mpi4py import MPI

from distdl_lite.layout import Shape, shape_of
from distdl_lite.plan import Edge, Leg, Pattern, Plan
from distdl_lite.transport import Team, Transport, wire
from distdl_lite.transport.counts import counted, record
from distdl_lite.transport.sums import Done, Pending, Worker

_TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
}
_OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
_TAG = 1
_SECONDS_AT_END = 5.0  # for sums that were started and never waited for

_transports: list[tuple[MPI.Comm, MPITransport]] = []


def transport_over(comm: MPI.Comm | None) -> Transport:
    """The one transport over a communicator; the first call duplicates it, together on all of its ranks."""
    comm = MPI.COMM_WORLD if comm is None else comm
    if comm == MPI.COMM_NULL or comm.Is_inter():
        raise ValueError("a partition needs an intracommunicator that this rank belongs to")
    for known, transport in _transports:
        if comm == known or comm == transport.comm:
            return transport
    _transports.append((comm, MPITransport(comm)))
    return _transports[-1][1]


def _bytes(tensor: torch.Tensor) -> list[Any]:
    """The memory of a contiguous host tensor, which the caller keeps alive."""
    size = tensor.numel() * tensor.element_size()
    return [MPI.memory.fromaddress(tensor.data_ptr(), size), size, MPI.BYTE]


def _numbers(tensor: torch.Tensor) -> list[Any]:
    size = tensor.numel()
    memory = MPI.memory.fromaddress(tensor.data_ptr(), size * tensor.element_size())
    return [memory, size, _TYPES[tensor.dtype]]


def _at_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor contiguous in host memory, itself where it is so already."""
    return (tensor if tensor.device.type == "cpu" else tensor.cpu()).contiguous()


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous host tensor of a dtype MPI can add; the tensor itself where it is one already."""
    if tensor.dtype in _TYPES:
        return _at_host(tensor)
    return tensor.to("cpu", wire.wire_dtype(tensor.dtype)).contiguous()


class MPITransport(Transport):
    """The ranks of one communicator."""

    def __init__(self, comm: MPI.Comm) -> None:
        wire.keep_freed_memory()
        self.comm = comm.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.proc_null: int = MPI.PROC_NULL
        self.local: dict[str, Any] = {}
        self._teams: dict[tuple[int, ...], MPI.Comm] = {tuple(range(self.size)): self.comm}
        self._votes: dict[tuple[int, ...], _Vote] = {}
        self._sums: dict[tuple[tuple[int, ...], str], tuple[MPI.Comm, Worker]] = {}
        atexit.register(self._end)  # before MPI's own end, which was registered earlier
        self._row_teams: dict[tuple[int, ...], MPI.Comm] = {}

    def communicator(self, team: Team) -> MPI.Comm:
        """The team's communicator; the team makes it together at first use, its ranks in sorted order."""
        known = self._teams.get(team) if isinstance(team, tuple) else None
        if known is not None:
            return known
        team = tuple(sorted(team))
        if team not in self._teams:
            group = self.comm.Get_group()
            subgroup = group.Incl(team)
            self._teams[team] = self.comm.Create_group(subgroup, tag=hash(team) % 32749)
            subgroup.Free()
            group.Free()
        return self._teams[team]

    def user_communicator(self, team: Team) -> MPI.Comm:
        group = self.comm.Get_group()
        subgroup = group.Incl(list(team))
        made = self.comm.Create_group(subgroup, tag=hash(tuple(team)) % 32749)
        subgroup.Free()
        group.Free()
        return made

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> MPIChannel:
        return MPIChannel(self, plan, dtype, device)

    def start_agreeing(self, team: tuple[int, ...], value: int) -> None:
        vote = self._votes.get(team)
        if vote is None:
            vote = self._votes[team] = _Vote(self.communicator(team))
        vote.start(value)

    def agreed(self, team: tuple[int, ...]) -> int:
        began = perf_counter() if "tallies" in self.local else 0.0
        value = self._votes[team].finish()
        if began:
            record(self.local, 0, 0, perf_counter() - began, 0, None)
        return value

    @counted()
    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        ordered = sorted(team)
        values = self.communicator(ordered).allgather(value)
        return [values[ordered.index(rank)] for rank in team] if ordered != list(team) else values

    @counted("sums")
    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if len(team) > 1 and tensor.numel():
            sent = _on_wire(tensor)
            self.communicator(team).Allreduce(MPI.IN_PLACE, _numbers(sent), op=_OPS[op])
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor

    def open_sums(self, team: tuple[int, ...], lane: str = "") -> None:
        if (team, lane) not in self._sums:
            self._sums[team, lane] = self.communicator(team).Dup(), Worker()

    def start_sum(
        self,
        team: tuple[int, ...],
        tensor: torch.Tensor,
        engine: str = "auto",
        lane: str = "",
        fill: Callable[[], Any] | None = None,
    ) -> Pending:
        if engine in ("auto", "thread"):
            engine = "thread" if MPI.Query_thread() == MPI.THREAD_MULTIPLE else "poll"
        if fill is not None and (engine != "thread" or len(team) == 1 or not tensor.is_cpu):
            fill()
            fill = None
        if len(team) == 1 or not tensor.numel():
            return Done()
        comm, worker = self._sums[team, lane]
        if "tallies" in self.local:
            record(self.local, 1, tensor.nbytes, 0.0, 1, "sums")
        if engine == "poll":
            sent = _on_wire(tensor)
            return _Posted(comm.Iallreduce(MPI.IN_PLACE, _numbers(sent), MPI.SUM), tensor, sent)
        if engine == "inline":
            _take_home(tensor, _summed(comm, tensor))
            return Done()
        before = _event_of(tensor) if fill is None else fill
        return worker.submit(lambda: _summed(comm, tensor, before), lambda total: _take_home(tensor, total))

    def start_rounded_sum(
        self,
        team: tuple[int, ...],
        tensor: torch.Tensor,
        left: torch.Tensor,
        dtype: torch.dtype,
        engine: str = "auto",
        lane: str = "",
    ) -> Pending:
        if len(team) == 1 or not tensor.numel():
            left.zero_()
            return Done()
        comm, worker = self._sums[team, lane]
        if "tallies" in self.local:
            record(self.local, 1, tensor.numel() * dtype.itemsize, 0.0, 1, "sums")
        # Never "poll": of two collectives MPI would not begin the second by itself.
        if engine in ("auto", "thread") and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            is_ready = _event_of(tensor)
            return worker.submit(
                lambda: _rounded_sum(comm, tensor, left, dtype, is_ready),
                lambda both: _take_both_home(tensor, left, both),
            )
        _take_both_home(tensor, left, _rounded_sum(comm, tensor, left, dtype))
        return Done()

    def _end(self) -> None:
        """Let MPI end although some rank took no part in a sum: the job would wait for it for ever."""
        end = perf_counter() + _SECONDS_AT_END
        stopped = [worker.stop(end - perf_counter()) for _, worker in self._sums.values()]
        if not all(stopped):
            print(
                f"rank {self.rank} ends while a sum that it started waits for other ranks", file=sys.stderr, flush=True
            )
            self.comm.Abort(1)

    @counted("copies")
    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        if len(team) > 1:
            ordered = sorted(team)
            sent = tensor.to("cpu").contiguous()
            self.communicator(ordered).Bcast(_bytes(sent), ordered.index(root))
            if sent is not tensor:
                tensor.copy_(sent)

    @counted("rows")
    def exchange_rows(
        self, team: Team, rows: torch.Tensor, sends: Sequence[int], into: torch.Tensor, receives: Sequence[int]
    ) -> _RowsMoving:
        team = tuple(team)
        if team not in self._row_teams:  # of its own: an exchange is under way while the team's other calls come and go
            self._row_teams[team] = self.user_communicator(team)
        return _RowsMoving(self._row_teams[team], rows, sends, into, receives)


def _summed(comm: MPI.Comm, tensor: torch.Tensor, before: Callable[[], Any] | None = None) -> torch.Tensor:
    """The sum in host memory, that of the tensor itself where it can be."""
    if before is not None:
        before()
    sent = _on_wire(tensor)
    comm.Allreduce(MPI.IN_PLACE, _numbers(sent), MPI.SUM)
    return sent


def _rounded_sum(
    comm: MPI.Comm,
    tensor: torch.Tensor,
    left: torch.Tensor,
    dtype: torch.dtype,
    is_ready: Callable[[], Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and what rounding left of this rank's numbers and of the piece that it adds up, in host memory.

    They are the tensors themselves where they can be: each further vector costs as much as it takes to send one.
    """
    if is_ready is not None:
        is_ready()
    total, size = _at_host(tensor), tensor.numel()
    kept = left if left.is_cpu else torch.empty_like(total)
    sent = wire.rounded(total, dtype, 1 if comm.size == 2 else comm.size)
    torch.sub(total, sent.view(-1)[:size], out=kept)
    if comm.size == 2:  # each adds up everything, in no more bytes
        return _added_up(_gathered(comm, sent), total), kept
    parts, nbytes = torch.empty_like(sent), sent[0].nbytes
    comm.Alltoall([_bytes(sent)[0], nbytes, MPI.BYTE], [_bytes(parts)[0], nbytes, MPI.BYTE])
    exact = _added_up(parts, torch.empty_like(parts[0], dtype=total.dtype))
    piece = wire.rounded(exact, dtype, 1)
    total.copy_(_gathered(comm, piece).view(-1)[:size])
    mine = kept[comm.rank * exact.numel() :][: exact.numel()]
    mine += (exact - piece[0])[: mine.numel()]
    return total, kept


def _added_up(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """The sum of the rows, one after another: for long ones five times as fast as torch's sum over the first dim."""
    into.copy_(rows[0])
    for row in rows[1:]:
        into += row
    return into


def _gathered(comm: MPI.Comm, piece: torch.Tensor) -> torch.Tensor:
    """The ranks' pieces as rows."""
    rows = piece.new_empty(comm.size, piece.numel())
    comm.Allgather(_bytes(piece), [_bytes(rows)[0], piece.nbytes, MPI.BYTE])
    return rows


def _take_home(tensor: torch.Tensor, total: torch.Tensor) -> None:
    if total is not tensor:
        tensor.copy_(total)


def _take_both_home(tensor: torch.Tensor, left: torch.Tensor, both: tuple[torch.Tensor, torch.Tensor]) -> None:
    _take_home(tensor, both[0])
    _take_home(left, both[1])


def _event_of(tensor: torch.Tensor) -> Callable[[], Any] | None:
    """What waits for all that was asked of the tensor's device so far, in this thread; None for the host."""
    return None if tensor.is_cpu else torch.accelerator.current_stream(tensor.device).record_event().synchronize


class _Posted:
    """A non-blocking sum."""

    def __init__(self, request: MPI.Request, tensor: torch.Tensor, sent: torch.Tensor) -> None:
        self._request, self._tensor, self._sent = request, tensor, sent

    def is_done(self) -> bool:
        return bool(self._request.Test())

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            self._request.Wait()
        end = perf_counter() + (timeout or 0)
        while not self._request.Test():
            if perf_counter() > end:
                return False
            sleep(0)
        _take_home(self._tensor, self._sent)
        return True


class _Vote:
    """A team's agreements: a persistent sum, which the ranks need not wait for when they give their numbers."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._mine, self._sum = array("Q", [0]), array("Q", [0])
        specs = [[MPI.memory.frombuffer(buffer), 1, MPI.UINT64_T] for buffer in (self._mine, self._sum)]
        self._request = comm.Allreduce_init(*specs, MPI.SUM)
        self._is_open = False

    def start(self, value: int) -> None:
        if self._is_open:  # an error kept this rank from asking for the result
            self.finish()
        self._mine[0] = value
        self._is_open = True
        self._request.Start()

    def finish(self) -> int:
        self._is_open = False
        self._request.Wait()
        return self._sum[0]


class MPIChannel:
    """A plan with its communicators, persistent requests and buffers.

    Collectives run in `start`, leg after leg in the order of their teams, which is the same on all ranks; an exchange is
    started there and completed in `finish`.
    """

    def __init__(self, transport: MPITransport, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan, self.dtype, self.device = plan, dtype, device
        self._exchanges = [
            _Exchange(transport, plan, leg, dtype, device) for leg in plan.legs if leg.pattern is Pattern.EXCHANGE
        ]
        self._collectives = [
            _COLLECTIVES[leg.pattern](transport.communicator(leg.team), plan, leg, dtype, device)
            for leg in plan.legs
            if leg.pattern is not Pattern.EXCHANGE
        ]

    def start(self, x: torch.Tensor) -> torch.Tensor | None:
        if x.is_conj() or x.is_neg():  # lazily conjugated or negated: the memory does not hold the values
            x = x.resolve_conj().resolve_neg()
        y = None
        if self._exchanges:
            self._exchanges[0].start(x)
        for collective in self._collectives:
            result = collective.run(x)
            y = result if result is not None else y
        return y

    def finish(self, pending: torch.Tensor | None, into: torch.Tensor | None = None) -> torch.Tensor:
        if self._exchanges:
            return self._exchanges[0].finish() if into is None else self._exchanges[0].finish_into(into)
        if pending is not None:
            return pending
        return torch.zeros(self.plan.returned_shape, dtype=self.dtype, device=self.device)


class _Exchange:
    """Packed persistent messages: 195 us against 577 us of Alltoallw for a 4 MiB repartition on 2 ranks."""

    def __init__(self, transport: MPITransport, plan: Plan, leg: Leg, dtype: torch.dtype, device: torch.device) -> None:
        _free_what_left()
        self._shape, self._adds, self._dtype = plan.returned_shape, plan.adds_out, dtype
        self._sum_dtype = wire.wire_dtype(dtype) if plan.adds_out else dtype
        self._widens = self._sum_dtype is not dtype
        self._sends = wire.messages(leg.sends, plan.rank, dtype, device)
        self._receives = wire.messages(leg.receives, plan.rank, dtype, device, plan.adds_out)
        self._kept = wire.kept(leg.sends, leg.receives, plan.rank)
        self._gaps = plan.kept_gaps if plan.adds_out else plan.gaps
        comm = transport.comm
        self._receiving = [comm.Recv_init(_bytes(m.host), m.peer, _TAG) for m in self._receives]
        self._sending = [comm.Send_init(_bytes(m.host), m.peer, _TAG) for m in self._sends]
        self._is_sending = False
        self._is_one_piece = not (self._gaps or self._kept or self._adds) and wire.is_one_piece(
            self._receives, self._shape
        )
        self._starts = list(zip(self._sends, self._sending, strict=True))
        self._x: torch.Tensor | None = None
        self._source: Any = None

    def start(self, x: torch.Tensor) -> None:
        if self._is_sending:
            MPI.Request.Waitall(self._sending)
        for request in self._receiving:
            request.Start()
        self._x, self._source = x, wire.indexable(x)
        for message, request in self._starts:
            message.pack(self._source)
            request.Start()

    def _receive(self) -> None:
        """Wait for what comes. What goes may go on: it lies in our buffers, and a large message leaves when it is fetched."""
        if self._receiving:
            MPI.Request.Waitall(self._receiving)
        if self._sending:
            self._is_sending = not MPI.Request.Testall(self._sending)

    def finish(self) -> torch.Tensor:
        x, source = self._x, self._source
        assert x is not None
        self._x = self._source = None
        if self._is_one_piece:
            self._receive()
            return self._receives[0].whole(self._shape)
        y = x.new_empty(self._shape, dtype=self._sum_dtype)
        if self._widens:
            source, target = x.detach(), y
        else:
            target = wire.indexable(y)
        for gap in self._gaps:
            target[gap] = 0
        if self._adds:
            self._add_up(source, target, copies=len(self._kept) == 1)
            return y.to(self._dtype) if self._widens else y
        for here, there in self._kept:
            target[there] = source[here]
        self._receive()
        for message in self._receives:
            message.unpack(target)
        return y

    def finish_into(self, y: torch.Tensor) -> torch.Tensor:
        """Add what arrives to `y`."""
        x, self._x, self._source = self._x, None, None
        for here, there in self._kept:
            y[there].add_(x[here])  # type: ignore[index]
        self._receive()
        for message in self._receives:
            message.add_into(y)
        return y

    def _add_up(self, source: Any, target: Any, copies: bool) -> None:
        """This rank's own part, then the others' in rank order: a sum of floats depends on its order.

        `copies`: there is one own piece, the rest of the target is zero, and the piece need not be added to zeros.
        """
        with wire.quiet():
            for here, there in self._kept:
                if copies:
                    target[there] = source[here]
                else:
                    target[there] += source[here]
            self._receive()
            for message in self._receives:
                message.add_to(target)

    def __del__(self) -> None:
        # Another thread may collect garbage while this one is inside MPI, and the last messages may still be under way.
        if _leaving is not None:  # as it is when Python ends
            _leaving.append(([*getattr(self, "_receiving", ()), *getattr(self, "_sending", ())], self.__dict__))


_leaving: list[tuple[list[MPI.Prequest], Any]] = []  # requests and buffers of operators that are no more


def _free_what_left() -> None:
    for entry in _leaving[:]:
        if MPI.Request.Testall(entry[0]):
            _leaving.remove(entry)
            for request in entry[0]:
                request.Free()


class _RowsMoving:
    """Rows under way. What nobody waits for is kept until it has gone, for MPI reads and writes the buffers."""

    def __init__(
        self,
        comm: MPI.Comm,
        rows: torch.Tensor,
        sends: Sequence[int],
        into: torch.Tensor,
        receives: Sequence[int],
    ) -> None:
        _moving[:] = [other for other in _moving if not other.test()]
        self._into, self._sent = into, _at_host(rows)
        self._received = into if into.is_cpu else torch.empty_like(into, device="cpu")
        row = math.prod(rows.shape[1:]) * rows.element_size()
        starts, ends = (_cuts(counts, row) for counts in (sends, receives))
        source, target = _bytes(self._sent)[0], _bytes(self._received)[0]
        self._requests = []
        for peer in range(comm.size):
            piece, place = source[slice(*starts[peer])], target[slice(*ends[peer])]
            if peer == comm.rank:
                place[:] = piece
                continue
            if len(place):
                self._requests.append(comm.Irecv([place, len(place), MPI.BYTE], peer, _TAG))
            if len(piece):
                self._requests.append(comm.Isend([piece, len(piece), MPI.BYTE], peer, _TAG))
        _moving.append(self)

    def test(self) -> bool:
        if self in _moving and MPI.Request.Testall(self._requests):
            _moving.remove(self)
        return self not in _moving

    def finish(self) -> torch.Tensor:
        MPI.Request.Waitall(self._requests)
        self.test()
        return self._into if self._received is self._into else self._into.copy_(self._received)


def _cuts(counts: Sequence[int], row: int) -> list[tuple[int, int]]:
    """Where each rank's rows begin and end, in bytes."""
    ends = [row * end for end in accumulate(counts)]
    return list(zip([0, *ends], ends, strict=False))


_moving: list[_RowsMoving] = []


@atexit.register
def _let_rows_arrive() -> None:
    """Python frees tensors before MPI ends: wait for the last rows that nobody waited for, or never free them."""
    deadline = perf_counter() + 10
    while not (MPI.Is_finalized() or all(moving.test() for moving in _moving[:])) and perf_counter() < deadline:
        sleep(0.001)
    for moving in _moving:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(moving))


class _Collective:
    """One collective leg seen from one rank."""

    def __init__(self, comm: MPI.Comm, plan: Plan, leg: Leg, dtype: torch.dtype, device: torch.device) -> None:
        self.comm, self.dtype, self.device = comm, dtype, device
        self.shape_out = plan.returned_shape
        self.stays = device.type == "cpu" and wire.wire_dtype(dtype) is dtype
        self.sends, self.receives = bool(leg.sends), bool(leg.receives)
        self.root = -1 if leg.root is None else leg.team.index(leg.root)
        self.at_root = leg.root == plan.rank

    def _home(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.stays else y.to(self.device, self.dtype)


class _Broadcast(_Collective):
    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.at_root:
            sent = _at_host(x)
            self.comm.Bcast(_bytes(sent), self.root)
            return x.clone(memory_format=torch.contiguous_format) if self.receives else None
        y = torch.empty(self.shape_out, dtype=self.dtype)
        self.comm.Bcast(_bytes(y), self.root)
        return self._home(y)


class _Reduce(_Collective):
    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        sent = _on_wire(x)
        if not self.at_root:
            self.comm.Reduce(_numbers(sent), None, MPI.SUM, self.root)
            return None
        y = sent.new_empty(self.shape_out)
        if self.sends:
            self.comm.Reduce(_numbers(sent), _numbers(y), MPI.SUM, self.root)
        else:  # the target is no source: it adds zero
            y.zero_()
            self.comm.Reduce(MPI.IN_PLACE, _numbers(y), MPI.SUM, self.root)
        return self._home(y)


class _AllReduce(_Collective):
    def run(self, x: torch.Tensor) -> torch.Tensor:
        sent = _on_wire(x)
        y = sent.new_empty(self.shape_out)
        self.comm.Allreduce(_numbers(sent), _numbers(y), MPI.SUM)
        return self._home(y)


class _AllGather(_Collective):
    def __init__(self, comm: MPI.Comm, plan: Plan, leg: Leg, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(comm, plan, leg, dtype, device)
        self._counts = [count * dtype.itemsize for count in _counts(leg.team, leg.receives)]
        self._even = len(set(self._counts)) == 1
        self._in_order = wire.lie_in_order(leg.receives, self.shape_out)
        self._places = _places(leg.receives)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        sent = _at_host(x)
        y = sent.new_empty(self.shape_out)
        flat = y if self._in_order else sent.new_empty(y.numel())
        if self._even:
            self.comm.Allgather(_bytes(sent), [_bytes(flat)[0], self._counts[0], MPI.BYTE])
        else:
            self.comm.Allgatherv(_bytes(sent), [_bytes(flat)[0], self._counts, MPI.BYTE])
        if not self._in_order:
            self._lay_out(flat, y)
        return self._home(y)

    def _lay_out(self, flat: torch.Tensor, y: torch.Tensor) -> None:
        target = wire.indexable(y)
        parts = wire.indexable(flat)
        start = 0
        for slices, shape, size in self._places:
            target[slices] = parts[start : start + size].reshape(shape)
            start += size


class _ReduceScatter(_Collective):
    def __init__(self, comm: MPI.Comm, plan: Plan, leg: Leg, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(comm, plan, leg, dtype, device)
        self._counts = _counts(leg.team, leg.sends)
        self._even = len(set(self._counts)) == 1
        self._in_order = wire.lie_in_order(leg.sends, plan.shape_in or ())
        self._places = _places(leg.sends)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        sent = _on_wire(x)
        if not self._in_order:
            sent = self._line_up(sent)
        y = sent.new_empty(self.shape_out)
        if self._even:
            memory, _, kind = _numbers(sent)
            self.comm.Reduce_scatter_block([memory, self._counts[0], kind], _numbers(y), MPI.SUM)
        else:
            self.comm.Reduce_scatter(_numbers(sent), _numbers(y), self._counts, MPI.SUM)
        return self._home(y)

    def _line_up(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.new_empty(x.numel())
        source, parts = wire.indexable(x), wire.indexable(flat)
        start = 0
        for slices, shape, size in self._places:
            parts[start : start + size].reshape(shape)[...] = source[slices]
            start += size
        return flat


def _counts(team: Sequence[int], edges: Sequence[Edge]) -> list[int]:
    """Elements per rank of a team; a rank with an empty block has no edge."""
    sizes = {edge.peer: edge.size for edge in edges}
    return [sizes.get(rank, 0) for rank in team]


def _places(edges: Sequence[Edge]) -> list[tuple[wire.Slices, Shape, int]]:
    """Where the runs of a flat buffer stand in a tensor."""
    return [(edge.slices, shape_of(edge.box), edge.size) for edge in edges]


_COLLECTIVES = {
    Pattern.BROADCAST: _Broadcast,
    Pattern.REDUCE: _Reduce,
    Pattern.ALL_REDUCE: _AllReduce,
    Pattern.ALL_GATHER: _AllGather,
    Pattern.REDUCE_SCATTER: _ReduceScatter,
}
