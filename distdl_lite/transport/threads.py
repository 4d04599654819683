"""Ranks as threads of one process that take turns: no mpirun, and a deadlock is an error at once.

One rank runs at a time. It hands over where it would wait, and the global random states of torch, numpy and random go
with it, so that seeded code gives each rank what it would get in a process of its own. When every rank waits, each of them
gets an error that names what all of them wait for.
"""

from __future__ import annotations

import ctypes
import pickle
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from time import perf_counter
from types import FrameType
from typing import Any

import numpy
import torch

from distdl_lite.plan import Plan
from distdl_lite.transport import RowsByRank, Team, Transport, enter, wire
from distdl_lite.transport.counts import counted, record
from distdl_lite.transport.frames import frames_of_library
from distdl_lite.transport.sums import Pending

_Meeting = tuple[
    Sequence[int], int, dict[int, Any]
]  # the team, the number of the meeting, and what each rank has brought


class _Abandoned(BaseException):
    """Ends a rank that waits for one that has failed."""


_numpy_states: dict[bytes, Any] = {}  # the latest, by the memory that it draws from


def _numpy_state() -> tuple[bytes, Any]:
    """NumPy's global random state, which takes 100 us to get and set, and is mostly the same on all ranks."""
    generator = numpy.random.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):
        return b"", numpy.random.get_state()
    memory = ctypes.string_at(generator.ctypes.state_address, 625 * 4)  # 624 words and a place among them
    if memory not in _numpy_states:
        _numpy_states.clear()
        state = numpy.random.get_state()
        if state[3]:  # a normal number is left over from a pair, which the memory does not show
            return b"", state
        _numpy_states[memory] = state
    return memory, _numpy_states[memory]


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), _numpy_state(), random.getstate()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    memory, state = states[1]
    if not memory or memory != _numpy_state()[0]:
        numpy.random.set_state(state)
    _numpy_states.clear()
    if memory:
        _numpy_states[memory] = state
    random.setstate(states[2])


class World:
    """The shared side of `size` ranks: whose turn it is, the mail between them, and their meetings.

    Where only some ranks are `present`, these meet without the others, who would bring what the first of them does.
    """

    def __init__(self, size: int, present: Sequence[int] | None = None) -> None:
        self.size, self.present = size, range(size) if present is None else sorted(present)
        self.mail: dict[tuple[int, int, int], Any] = {}  # by sender, receiver and number, until it is fetched
        self.posted: Counter[tuple[str, int, int]] = Counter()  # how many were sent, and how many asked for, so far
        # By team, lane and number, until the last rank has come.
        self.meetings: dict[tuple[Sequence[int], str, int], dict[int, Any]] = defaultdict(dict)
        self.errors: dict[int, BaseException] = {}
        self.results: dict[int, Any] = {}
        lock = threading.Lock()
        self._turns = {rank: threading.Condition(lock) for rank in self.present}  # told when it is theirs
        self._turn = self.present[0]
        self._among: dict[Sequence[int], Sequence[int]] = {}
        self._waits: dict[int, tuple[Callable[[], bool], str] | None] = dict.fromkeys(self.present)
        self._ended: set[int] = set()
        self._deadlock: str | None = None

    def among(self, team: Sequence[int]) -> Sequence[int]:
        """The ranks of a team that are present."""
        if len(self.present) == self.size:
            return team
        if team not in self._among:
            members = team if isinstance(team, range) else set(team)
            self._among[team] = tuple(rank for rank in self.present if rank in members)
        return self._among[team]

    def run(self, rank: int, body: Callable[[], Any], states: tuple[Any, ...]) -> None:
        """The life of one rank's thread."""
        with self._turns[rank]:
            self._turns[rank].wait_for(lambda: self._turn == rank)
        _set_random_states(states)
        try:
            self.results[rank] = body()
        except BaseException as error:
            self.errors[rank] = error
        with self._turns[rank]:
            self._ended.add(rank)
            self._hand_over(rank)

    def wait(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        """Hand over until `ready()`; `what` tells a deadlock's reader what for."""
        if ready():
            return
        states = _random_states()
        with self._turns[rank]:
            self._waits[rank] = (ready, f"{what}{_inside(sys._getframe(1))}")
            self._hand_over(rank)
            self._turns[rank].wait_for(lambda: self._turn == rank)
            self._waits[rank] = None
        _set_random_states(states)
        if not ready():
            genuine = [r for r, error in self.errors.items() if not isinstance(error, _Abandoned)]
            if genuine and self._deadlock is None:
                raise _Abandoned(f"rank {rank} waited for {what} when rank {min(genuine)} failed")
            raise RuntimeError(self._deadlock)

    def _hand_over(self, rank: int) -> None:
        """Give the turn to the next rank that can go on; if none can, to the next that must be told so."""
        order = sorted(self.present, key=lambda other: (other <= rank, other))
        alive = [r for r in order if r not in self._ended]
        ready = [r for r in alive if (wait := self._waits[r]) is None or wait[0]()]
        if alive and not ready and not self.errors:
            lines = [f"rank {r} waits for {self._waits[r][1]}" for r in sorted(alive)]  # type: ignore[index]
            lines += [f"rank {r} has ended" for r in sorted(self._ended)]
            self._deadlock = "deadlock: " + "; ".join(lines)
        if alive:
            self._turn = (ready or alive)[0]
            self._turns[self._turn].notify()


def _inside(frame: FrameType | None) -> str:
    """The layer whose call a frame stands in."""
    owners = (inner.f_locals.get("self") for inner in frames_of_library(frame))
    layer = next((owner for owner in owners if isinstance(owner, torch.nn.Module)), None)
    return "" if layer is None else f" in {getattr(layer, '_distdl_label', type(layer).__name__)}"


class ThreadTransport(Transport):
    """One rank of a `World`."""

    name = "threads of one process"
    launcher = "spmd({}, ...)"
    proc_null = -2

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.local: dict[str, Any] = {"tallies": []}
        self._met: dict[tuple[Sequence[int], str], int] = defaultdict(int)

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> ThreadChannel:
        return ThreadChannel(self, plan, dtype, device)

    def _meet(self, team: Sequence[int], value: Any, what: str) -> list[Any]:
        """Meet the team: bring a value, and get those of all its ranks in their order."""
        return self._met_all(self._arrive(team, value, what), what)

    def _arrive(self, team: Sequence[int], value: Any, what: str, lane: str = "") -> _Meeting:
        """Bring something to the team's next meeting; those of different lanes may come in any order."""
        ranks = team.ranks if isinstance(team, Team) else tuple(team)
        number = self._met[ranks, lane]
        self._met[ranks, lane] += 1
        present = self.world.meetings[ranks, lane, number]
        present[self.rank] = (what, value)
        here = self.world.among(ranks)
        if len(present) == len(here):
            del self.world.meetings[ranks, lane, number]
        return here, number, present

    def _met_all(self, meeting: _Meeting, what: str) -> list[Any]:
        """Wait for the others."""
        team, number, present = meeting
        self.world.wait(self.rank, lambda: len(present) == len(team), f"{what} number {number} of ranks {list(team)}")
        calls = {rank: call for rank, (call, _) in present.items()}
        if len(set(calls.values())) > 1:
            raise RuntimeError(f"ranks {list(team)} meet in different calls: {dict(sorted(calls.items()))}")
        return [present[rank][1] for rank in team]

    def start_agreeing(self, team: Team, value: int) -> None:
        if team.vote is not None:  # an error kept this rank from asking for the result
            self.agreed(team)
        team.vote = self._arrive(team, value, "agreement")

    def agreed(self, team: Team) -> int:
        began = perf_counter()
        vote, team.vote = team.vote, None
        values = self._met_all(vote, "agreement")
        record(self, "agreement", team, began)
        return (sum(values) + (team.size - len(values)) * values[0]) % 2**64

    @counted()
    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        return [pickle.loads(found) for found in self._meet(team, pickle.dumps(value), "gather of objects")]

    @counted()
    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        told = self._meet(team, numbers, f"maxima of {len(numbers)} numbers")
        return [max(both) for both in zip(*told, strict=True)]

    @counted("sums")
    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        sent = tensor.to(wire.wire_dtype(tensor.dtype), copy=True)
        parts = self._meet(team, sent, f"all-reduce ({op}) of {tensor.numel()} {tensor.dtype}")
        fold = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op]
        return tensor.copy_(reduce(fold, parts))

    def _sum(self, team: Team, tensor: torch.Tensor, engine: str, lane: str, fill: Any, then: Any) -> Pending:
        if fill is not None:
            fill()
        sent = tensor.to(wire.wire_dtype(tensor.dtype), copy=True)

        def take_home(parts: list[torch.Tensor]) -> None:
            tensor.copy_(reduce(torch.add, parts))
            if then is not None:
                then()

        return _Later(self, team, sent, f"sum of {tensor.numel()} {tensor.dtype}", f"sums{lane}", take_home)

    def _rounded_sum(
        self, team: Team, tensor: torch.Tensor, left: torch.Tensor, dtype: torch.dtype, engine: str, lane: str
    ) -> Pending:
        sent, size = wire.rounded(tensor, dtype, team.size), tensor.numel()
        left.copy_(tensor - sent.view(-1)[:size])

        def take_home(parts: list[torch.Tensor]) -> None:
            total = reduce(torch.add, parts).to(tensor.dtype)
            if team.size > 2:
                rows = wire.rounded(total.view(-1), dtype, team.size)
                start = team.index(self.rank) * rows.shape[1]
                mine = slice(start, min(start + rows.shape[1], size))
                left[mine] += (total - rows).view(-1)[mine]
                total = rows
            tensor.copy_(total.view(-1)[:size])

        what = f"sum of {sent.numel()} {dtype}"
        return _Later(self, team, sent.to(wire.wire_dtype(dtype)), what, f"sums{lane}", take_home)

    @counted("copies")
    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        what = f"broadcast of {tensor.numel()} {tensor.dtype} from rank {root}"
        sent = self._meet(team, tensor.clone() if self.rank == root else None, what)[team.index(root)]
        if self.rank != root:
            tensor.copy_(sent)

    @counted("rows")
    def exchange_rows(self, ranks: Sequence[int], sends: RowsByRank, receives: RowsByRank) -> _Later:
        (rows, counts), into, team = sends, receives[0], sorted(ranks)
        parts = dict(zip(ranks, rows.clone().split(list(counts)), strict=True))

        def take_home(brought: list[dict[int, torch.Tensor]]) -> torch.Tensor:
            by_rank = dict(zip(team, brought, strict=True))
            return into.copy_(torch.cat([by_rank[rank][self.rank] for rank in ranks]))

        what = f"exchange of rows of shape {list(rows.shape[1:])} and {rows.dtype}"
        return _Later(self, team, parts, what, "rows", take_home)


class _Later:
    """A meeting that this rank has come to and need not wait for yet: a sum or rows under way.

    There is no time in which to wait for it: that nobody comes is found out at once.
    """

    def __init__(
        self,
        transport: ThreadTransport,
        team: Sequence[int],
        value: Any,
        what: str,
        lane: str,
        home: Callable[..., Any],
    ) -> None:
        self._transport, self._what, self._home = transport, what, home
        self._meeting = transport._arrive(team, value, what, lane)
        self._is_home, self._result = False, None

    def test(self) -> bool:
        team, _, present = self._meeting
        return len(present) == len(team)

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_home:
            parts = self._transport._met_all(self._meeting, self._what)
            self._is_home = True
            self._result = self._home(parts)
        return True

    def finish(self) -> Any:
        self.wait()
        return self._result


class ThreadChannel:
    """Runs every leg, collectives too, as the messages of its edges."""

    def __init__(self, transport: ThreadTransport, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.transport, self.plan, self.dtype, self.device = transport, plan, dtype, device
        self._sends = [(leg, edge) for leg in plan.legs for edge in leg.sends]
        self._receives = [(leg, edge) for leg in plan.legs for edge in leg.receives]

    def start(self, x: torch.Tensor) -> list[tuple[int, int, int]]:
        rank, mail = self.plan.rank, self.transport.world.mail
        for leg, edge in self._sends:
            mail[self._number("sent", rank, edge.peer)] = leg.pattern, leg.team, x[edge.slices].clone()
        return [self._number("asked for", edge.peer, rank) for _, edge in self._receives]

    def _number(self, what: str, sender: int, receiver: int) -> tuple[int, int, int]:
        """The key of the next message from one to the other, of which several operators may have some under way."""
        posted = self.transport.world.posted
        posted[what, sender, receiver] += 1
        return sender, receiver, posted[what, sender, receiver]

    def finish(self, pending: list[tuple[int, int, int]], into: torch.Tensor | None = None) -> torch.Tensor:
        dtype = wire.wire_dtype(self.dtype) if self.plan.adds_out else self.dtype
        y = torch.zeros(self.plan.returned_shape, dtype=dtype, device=self.device) if into is None else into
        for key, (leg, edge) in zip(pending, self._receives, strict=True):
            part = self._fetched(key, leg.pattern.value, leg.team)
            if self.plan.adds_out or into is not None:
                y[edge.slices] += part
            else:
                y[edge.slices] = part
        return y.to(self.dtype)

    def _fetched(self, key: tuple[int, int, int], pattern: str, team: Team) -> torch.Tensor:
        (peer, rank, _), mail = key, self.transport.world.mail
        shape = list(self.plan.shape_out or ())
        self.transport.world.wait(
            rank, lambda: key in mail, f"a message of a {pattern} to shape {shape} from rank {peer}"
        )
        sent, sent_team, part = mail.pop(key)
        if (sent.value, sent_team) != (pattern, team):
            raise RuntimeError(
                f"rank {rank} expects a message of a {pattern} from rank {peer}, which sent a {sent.value}"
            )
        return part


def spmd(size: int, body: Callable[..., Any]) -> list[Any]:
    """Run ``body(world)`` on `size` ranks as threads of this process that take turns.

    Parameters
    ----------
    size : int
        Number of ranks.
    body : callable
        Called once per rank with the `Partition` of all ranks.

    Returns
    -------
    list
        The results in rank order.

    Raises
    ------
    Exception
        The error of the lowest rank that failed. A deadlock is a RuntimeError that names what each rank waits for.

    Examples
    --------
    >>> from distdl_lite.testing import spmd
    >>> spmd(3, lambda world: world.rank)
    [0, 1, 2]
    """
    from distdl_lite.partition import Partition

    if size < 1:
        raise ValueError(f"spmd needs at least one rank, not {size}")
    return list(in_turn(World(size), ThreadTransport, lambda: body(Partition())).values())


def in_turn(world: World, transport: Callable[[World, int], Transport], body: Callable[[], Any]) -> dict[int, Any]:
    """Run a function on the ranks of a world that are present, each with its transport; their results, by rank."""
    states = _random_states()

    def life(rank: int) -> None:
        enter(transport(world, rank))
        world.run(rank, body, states)

    threads = [threading.Thread(target=life, args=(r,), name=f"rank {r}", daemon=True) for r in world.present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _set_random_states(states)
    genuine = {rank: error for rank, error in world.errors.items() if not isinstance(error, _Abandoned)}
    if genuine:
        raise genuine[min(genuine)]
    return {rank: world.results[rank] for rank in world.present}
