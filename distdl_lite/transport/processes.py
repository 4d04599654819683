"""What transports over processes have in common: their channels, and sums beside the computation."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from distdl_lite.plan import Leg, Plan
from distdl_lite.transport import Team, Transport, wire
from distdl_lite.transport.abort import abort
from distdl_lite.transport.calls import begin
from distdl_lite.transport.channel import Group, PlannedChannel, Requests
from distdl_lite.transport.counts import counted, of_process, record
from distdl_lite.transport.devices import HOST, event_of, take_gpu
from distdl_lite.transport.sums import (
    Done,
    Pending,
    Posted,
    Worker,
    rounded_sum,
    summed,
    take_both_home,
    take_home,
)

_SECONDS_AT_END = 5.0  # for sums that were started and never waited for


class ProcessTransport(Transport):
    """Ranks that are processes; a transport gives the groups that move their tensors."""

    engine: str  # who carries out a sum that may be made beside the computation
    threads_may_call: bool

    def _begin(self, rank: int, size: int, proc_null: int) -> None:
        wire.keep_freed_memory()
        take_gpu()
        self.rank, self.size, self.proc_null = rank, size, proc_null
        self.local: dict[str, Any] = {"tallies": of_process}
        self._workers: list[Worker] = []
        atexit.register(self._end)
        self._row_groups: dict[tuple[int, ...], Any] = {}

    def make_group(self, ranks: Sequence[int]) -> Group:
        """A new group of ranks, in their order, which make it together."""

    def make_vote(self, team: Team) -> Any:
        """What the team votes with, which it makes together: `start` gives a number, `finish` the sum modulo 2^64."""

    def home(self, device: torch.device) -> torch.device:
        """Where tensors of a device must lie to travel: there, or in host memory."""
        return HOST

    def on_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor at home, of a dtype that can be added; the tensor itself where it is one already."""
        return tensor.to(self.home(tensor.device), wire.wire_dtype(tensor.dtype)).contiguous()

    def has(self, leg: Leg, device: torch.device) -> bool:
        """Whether there is a collective for the leg that is better than messages."""
        return True

    def requests(self, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> Requests:
        """What sends and receives the messages of an exchange."""

    def group(self, team: Team) -> Group:
        """The team's group; the team makes it together at first use."""
        if team.comm is None:
            team.comm = self.make_group(team.ranks)
        return team.comm

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> PlannedChannel:
        return PlannedChannel(self, plan, dtype, device)

    def start_agreeing(self, team: Team, value: int) -> None:
        begin("agreement", self, team)
        if team.vote is None:
            team.vote = self.make_vote(team)
        team.vote.start(value)

    def agreed(self, team: Team) -> int:
        began = perf_counter()
        value: int = team.vote.finish()
        record(self, "agreement", team, began)
        return value

    @counted("sums")
    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if team.size > 1 and tensor.numel():
            sent = self.on_wire(tensor)
            self.group(team).all_reduce(sent, sent, op)
            take_home(tensor, sent)
        return tensor

    @counted("copies")
    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        if team.size > 1:
            sent = tensor.to(self.home(tensor.device)).contiguous()
            self.group(team).broadcast(sent, team.index(root))
            take_home(tensor, sent)

    def open_sums(self, team: Team, lane: str = "") -> None:
        if lane not in team.lanes:
            group, worker = self.make_group(team.ranks), Worker()
            # Two threads would come to one group in another order on each rank.
            has_own = self.threads_may_call and self.engine != "thread"
            team.lanes[lane] = group, worker, self.make_group(team.ranks) if has_own else group
            self._workers.append(worker)

    def _sum(self, team: Team, tensor: torch.Tensor, engine: str, lane: str, fill: Any, then: Any) -> Pending:
        if engine in ("auto", "thread"):
            engine = self.engine
        if fill is not None and (engine != "thread" or not tensor.is_cpu):
            fill()
            fill = None
        group, worker, _ = team.lanes[lane]
        if engine == "poll":
            sent = self.on_wire(tensor)
            return Posted(group.post_all_reduce(sent), lambda: take_home(tensor, sent, then))
        if engine == "inline":
            take_home(tensor, summed(self, group, tensor), then)
            return Done()
        before = event_of(tensor) if fill is None else fill
        return worker.submit(
            lambda: summed(self, group, tensor, before, then),
            lambda total: None if total is tensor else take_home(tensor, total, then),
        )

    def _rounded_sum(
        self, team: Team, tensor: torch.Tensor, left: torch.Tensor, dtype: torch.dtype, engine: str, lane: str
    ) -> Pending:
        _, worker, group = team.lanes[lane]
        # Never "poll": of two collectives nothing would begin the second by itself.
        if engine in ("auto", "thread") and self.threads_may_call:
            is_ready = event_of(tensor)
            return worker.submit(
                lambda: rounded_sum(group, tensor, left, dtype, is_ready),
                lambda both: take_both_home(tensor, left, both),
            )
        take_both_home(tensor, left, rounded_sum(group, tensor, left, dtype))
        return Done()

    def _end(self) -> None:
        """Let the process end although some rank took no part in a sum: it would wait for it for ever."""
        end = perf_counter() + _SECONDS_AT_END
        stopped = [worker.stop(end - perf_counter()) for worker in self._workers]
        if not all(stopped):
            print(
                f"rank {self.rank} ends while a sum that it started waits for other ranks", file=sys.stderr, flush=True
            )
            abort()
