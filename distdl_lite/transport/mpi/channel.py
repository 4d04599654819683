"""Plans with their communicators, requests and buffers: packed persistent messages, and MPI's own collectives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from distdl_lite.layout import shape_of
from distdl_lite.plan import Leg, Pattern, Plan
from distdl_lite.transport import Team, wire
from distdl_lite.transport.mpi.buffers import MPI, TAG, as_bytes, as_numbers, at_host, on_wire
from distdl_lite.transport.waiting import BEGUN


class MPIChannel:
    """A plan with its communicators, persistent requests and buffers.

    Collectives run in `start`, leg after leg in the order of their teams, which is the same on all ranks; an exchange is
    started there and completed in `finish`.
    """

    def __init__(
        self,
        world: MPI.Comm,
        communicator: Callable[[Team], MPI.Comm],
        plan: Plan,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.plan, self.dtype, self.device = plan, dtype, device
        exchanges = [leg for leg in plan.legs if leg.pattern is Pattern.EXCHANGE]
        self._exchange = _Exchange(world, plan, exchanges[0], dtype, device) if exchanges else None
        self._collectives = [
            _COLLECTIVES[leg.pattern](communicator(leg.team), plan, leg, dtype, device)
            for leg in plan.legs
            if leg.pattern is not Pattern.EXCHANGE
        ]

    def start(self, x: torch.Tensor) -> torch.Tensor | None:
        BEGUN[0] += 1
        if x.is_conj() or x.is_neg():  # lazily conjugated or negated: the memory does not hold the values
            x = x.resolve_conj().resolve_neg()
        y = None
        if self._exchange is not None:
            self._exchange.start(x)
        for collective in self._collectives:
            result = collective.run(x)
            y = result if result is not None else y
        return y

    def finish(self, pending: torch.Tensor | None, into: torch.Tensor | None = None) -> torch.Tensor:
        if self._exchange is not None:
            return self._exchange.finish() if into is None else self._exchange.finish_into(into)
        if pending is not None:
            return pending
        return torch.zeros(self.plan.returned_shape, dtype=self.dtype, device=self.device)


class _Exchange:
    """Packed persistent messages: 195 us against 577 us of Alltoallw for a 4 MiB repartition on 2 ranks."""

    def __init__(self, comm: MPI.Comm, plan: Plan, leg: Leg, dtype: torch.dtype, device: torch.device) -> None:
        _free_what_left()
        self._shape, self._adds, self._dtype = plan.returned_shape, plan.adds_out, dtype
        self._sum_dtype = wire.wire_dtype(dtype) if plan.adds_out else dtype
        self._widens = self._sum_dtype is not dtype
        self._sends = wire.messages(leg.sends, plan.rank, dtype, device)
        self._receives = wire.messages(leg.receives, plan.rank, dtype, device, plan.adds_out)
        self._kept = wire.kept(leg.sends, leg.receives, plan.rank)
        self._gaps = plan.kept_gaps if plan.adds_out else plan.gaps
        self._receiving = [comm.Recv_init(as_bytes(m.host), m.peer, TAG) for m in self._receives]
        self._sending = [comm.Send_init(as_bytes(m.host), m.peer, TAG) for m in self._sends]
        self._is_sending = False
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
            sent = at_host(x)
            self.comm.Bcast(as_bytes(sent), self.root)
            return x.clone(memory_format=torch.contiguous_format) if self.receives else None
        y = torch.empty(self.shape_out, dtype=self.dtype)
        self.comm.Bcast(as_bytes(y), self.root)
        return self._home(y)


class _Reduce(_Collective):
    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        sent = on_wire(x)
        if not self.at_root:
            self.comm.Reduce(as_numbers(sent), None, MPI.SUM, self.root)
            return None
        y = sent.new_empty(self.shape_out)
        if self.sends:
            self.comm.Reduce(as_numbers(sent), as_numbers(y), MPI.SUM, self.root)
        else:  # the target is no source: it adds zero
            y.zero_()
            self.comm.Reduce(MPI.IN_PLACE, as_numbers(y), MPI.SUM, self.root)
        return self._home(y)


class _AllReduce(_Collective):
    def run(self, x: torch.Tensor) -> torch.Tensor:
        sent = on_wire(x)
        y = sent.new_empty(self.shape_out)
        self.comm.Allreduce(as_numbers(sent), as_numbers(y), MPI.SUM)
        return self._home(y)


class _Blocks(_Collective):
    """A collective of whose tensor each rank has a block; a flat buffer has them one after the other."""

    def __init__(self, comm: MPI.Comm, plan: Plan, leg: Leg, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(comm, plan, leg, dtype, device)
        gathers = leg.pattern is Pattern.ALL_GATHER
        edges, shape = (leg.receives, self.shape_out) if gathers else (leg.sends, plan.shape_in or ())
        sizes = {edge.peer: edge.size for edge in edges}
        self._counts = [sizes.get(rank, 0) for rank in leg.team]  # a rank with an empty block has no edge
        self._even = len(set(self._counts)) == 1
        self._in_order = wire.lie_in_order(edges, shape)
        starts = accumulate((edge.size for edge in edges), initial=0)
        self._places = [
            (edge.slices, slice(start, start + edge.size), shape_of(edge.box))
            for edge, start in zip(edges, starts, strict=False)
        ]


class _AllGather(_Blocks):
    def run(self, x: torch.Tensor) -> torch.Tensor:
        sent = at_host(x)
        y = sent.new_empty(self.shape_out)
        flat = y if self._in_order else sent.new_empty(y.numel())
        counts = [count * flat.itemsize for count in self._counts]
        if self._even:
            self.comm.Allgather(as_bytes(sent), [as_bytes(flat)[0], counts[0], MPI.BYTE])
        else:
            self.comm.Allgatherv(as_bytes(sent), [as_bytes(flat)[0], counts, MPI.BYTE])
        if not self._in_order:
            target, parts = wire.indexable(y), wire.indexable(flat)
            for slices, place, shape in self._places:
                target[slices] = parts[place].reshape(shape)
        return self._home(y)


class _ReduceScatter(_Blocks):
    def run(self, x: torch.Tensor) -> torch.Tensor:
        sent = on_wire(x)
        if not self._in_order:
            flat = sent.new_empty(sent.numel())
            source, parts = wire.indexable(sent), wire.indexable(flat)
            for slices, place, shape in self._places:
                parts[place].reshape(shape)[...] = source[slices]
            sent = flat
        y = sent.new_empty(self.shape_out)
        if self._even:
            memory, _, kind = as_numbers(sent)
            self.comm.Reduce_scatter_block([memory, self._counts[0], kind], as_numbers(y), MPI.SUM)
        else:
            self.comm.Reduce_scatter(as_numbers(sent), as_numbers(y), self._counts, MPI.SUM)
        return self._home(y)


_COLLECTIVES = {
    Pattern.BROADCAST: _Broadcast,
    Pattern.REDUCE: _Reduce,
    Pattern.ALL_REDUCE: _AllReduce,
    Pattern.ALL_GATHER: _AllGather,
    Pattern.REDUCE_SCATTER: _ReduceScatter,
}
