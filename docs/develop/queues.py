"""A transport in one file: ranks are threads that run at the same time, and what moves goes through queues."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch

from distdl_lite import Partition, Plan
from distdl_lite.transport import RowsByRank, Team, Transport, enter, wire
from distdl_lite.transport.counts import counted, record

SECONDS = 60.0  # that a rank waits for another


class QueueTransport(Transport):
    """One rank; every message has a queue of its own, by sender, receiver, purpose and number."""

    name = "queues"
    launcher = "queues.run({}, ...)"
    proc_null = -2

    def __init__(self, queues: dict[Any, SimpleQueue[Any]], rank: int, size: int) -> None:
        self.queues, self.rank, self.size = queues, rank, size
        self.local: dict[str, Any] = {"tallies": []}
        self._posted: Counter[Any] = Counter()
        self._asked: Counter[Any] = Counter()

    def send(self, peer: int, purpose: Any, value: Any) -> None:
        self._posted[peer, purpose] += 1
        self._queue(self.rank, peer, purpose, self._posted[peer, purpose]).put(value)

    def asked(self, peer: int, purpose: Any) -> Callable[[], Any]:
        """What waits for the next message: its number is taken now, though others may be waited for before."""
        self._asked[peer, purpose] += 1
        key = peer, self.rank, purpose, self._asked[peer, purpose]

        def wait() -> Any:
            value = self._queue(*key).get(timeout=SECONDS)
            del self.queues[key]
            return value

        return wait

    def _queue(self, *key: Any) -> SimpleQueue[Any]:
        return self.queues.setdefault(key, SimpleQueue())  # which is atomic

    def told(self, team: Sequence[int], purpose: str, value: Any) -> Callable[[], list[Any]]:
        """Give all of a team a value; the call returned waits for theirs, in the team's order."""
        key = purpose, tuple(team)
        for peer in team:
            self.send(peer, key, value)
        waits = [self.asked(peer, key) for peer in team]
        return lambda: [wait() for wait in waits]

    # Plans

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> QueueChannel:
        return QueueChannel(self, plan, dtype, device)

    # Agreements

    def start_agreeing(self, team: Team, value: int) -> None:
        if team.vote is not None:  # an error kept this rank from asking for the result
            self.agreed(team)
        team.vote = self.told(team, "vote", value)

    def agreed(self, team: Team) -> int:
        began = perf_counter()
        wait, team.vote = team.vote, None
        values = wait()
        record(self, "agreement", team, began)
        return sum(values) % 2**64

    @counted()
    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        return [pickle.loads(told) for told in self.told(team, "objects", pickle.dumps(value))()]

    @counted()
    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        return list(map(max, zip(*self.told(team, "maxima", list(numbers))(), strict=True)))

    # Tensors that no operator moves

    @counted("sums")
    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        fold = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op]
        parts = self.told(team, op, tensor.to(wire.wire_dtype(tensor.dtype), copy=True))()
        return tensor.copy_(reduce(fold, parts))

    @counted("copies")
    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        if self.rank == root:
            for peer in team:
                self.send(peer, ("copies", tuple(team)), tensor.clone())
        tensor.copy_(self.asked(root, ("copies", tuple(team)))())

    def _sum(self, team: Team, tensor: torch.Tensor, engine: str, lane: str, fill: Any, then: Any) -> Later:
        if fill is not None:
            fill()
        wait = self.told(team, f"lane {lane}", tensor.to(wire.wire_dtype(tensor.dtype), copy=True))

        def home() -> None:
            tensor.copy_(reduce(torch.add, wait()))
            if then is not None:
                then()

        return Later(home)

    def _rounded_sum(
        self, team: Team, tensor: torch.Tensor, left: torch.Tensor, dtype: torch.dtype, engine: str, lane: str
    ) -> Later:
        sent = wire.rounded(tensor, dtype, 1).view(tensor.shape)
        left.copy_(tensor - sent)
        wait = self.told(team, f"lane {lane}", sent.to(wire.wire_dtype(dtype)))
        return Later(lambda: tensor.copy_(reduce(torch.add, wait())))

    @counted("rows")
    def exchange_rows(self, ranks: Sequence[int], sends: RowsByRank, receives: RowsByRank) -> Later:
        purpose = "rows", tuple(sorted(ranks))
        for peer, rows in zip(ranks, sends.tensor.clone().split(list(sends.counts)), strict=True):
            self.send(peer, purpose, rows)
        waits = [self.asked(peer, purpose) for peer in ranks]
        return Later(lambda: receives.tensor.copy_(torch.cat([wait() for wait in waits])))

    def user_communicator(self, ranks: Sequence[int]) -> None:
        return None


class Later:
    """A sum, or rows, under way: what waits for it, once."""

    def __init__(self, home: Callable[[], Any]) -> None:
        self._home, self._is_home, self._result = home, False, None

    def test(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_home:
            self._is_home, self._result = True, self._home()
        return True

    def finish(self) -> Any:
        self.wait()
        return self._result


class QueueChannel:
    """A plan, all of whose legs are the messages of their edges; those of a rank to itself among them."""

    def __init__(self, transport: QueueTransport, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.transport, self.plan, self.dtype, self.device = transport, plan, dtype, device

    def start(self, x: torch.Tensor) -> list[Any]:
        edges = [edge for leg in self.plan.legs for edge in leg.receives]
        for leg in self.plan.legs:
            for edge in leg.sends:
                self.transport.send(edge.peer, "plan", x[edge.slices].clone())
        return [(edge.slices, self.transport.asked(edge.peer, "plan")) for edge in edges]

    def finish(self, pending: list[Any], into: torch.Tensor | None = None) -> torch.Tensor:
        adds = self.plan.adds_out or into is not None
        wide = wire.wire_dtype(self.dtype) if self.plan.adds_out else self.dtype
        y = torch.zeros(self.plan.returned_shape, dtype=wide, device=self.device) if into is None else into
        for slices, wait in pending:
            y[slices] = y[slices] + wait() if adds else wait()
        return y.to(self.dtype)


def run(size: int, body: Callable[[Partition], Any]) -> list[Any]:
    """What `spmd` does, over queues."""
    queues: dict[Any, SimpleQueue[Any]] = {}

    def life(rank: int) -> Any:
        enter(QueueTransport(queues, rank, size))
        return body(Partition())

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(life, range(size)))
