"""Sums of replica gradients.

A parameter that several ranks hold copies of is used through `replicated`, the adjoint of whose copying is a sum over the
copies. In backward the local gradients go to the rank's one reducer, which adds them up in buckets, while backward runs
where there is much to add, and puts the sums into ``.grad``: they are final when ``backward()`` returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import ref

import torch

from distdl_lite.agreement import check_met, is_unanimous
from distdl_lite.autograd import reduce_from_team
from distdl_lite.buckets import cut
from distdl_lite.early_sums import Arriving, Planned, replanned
from distdl_lite.private import at_end_of_backward, engine_will_run, running_backward, unflattened
from distdl_lite.transport import Team, Transport
from distdl_lite.transport.sums import Pending

BUCKET_BYTES = 25 * 2**20  # of sums at the end of backward
EARLY_BYTES = 4 * 2**20  # of sums that start before; a model with less to sum has none


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold copies of a parameter.

    Attributes
    ----------
    team : Team
    order : int
        A number that grows with the construction of layers, the same on all ranks of the team for the same parameter.
    name : str
        For errors.
    """

    team: Team
    order: int
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self


def replicated(parameter: torch.Tensor, replicas: Replicas) -> torch.Tensor:
    """The parameter for use in a forward; its gradient becomes the sum over its replicas."""
    if replicas.team.size < 2 or not (torch.is_grad_enabled() and parameter.requires_grad):
        return parameter
    reducer = reducer_of(replicas.team.world)
    return _Replicated.apply(parameter, reducer.token, replicas, reducer)


def summed_at_once(parameter: torch.Tensor) -> torch.Tensor:
    """What to use in a parameter's place for its sum to be made in the middle of backward, not at the end: a view of it."""
    return parameter.view_as(parameter) if parameter.requires_grad and torch.is_grad_enabled() else parameter


def reducer_of(transport: Transport) -> Reducer:
    """The rank's one reducer."""
    found = transport.local.get("reducer")
    if found is None:
        found = transport.local["reducer"] = Reducer(transport)
    return found


class _Replicated(torch.autograd.Function):
    """The identity whose adjoint sums over the replicas.

    The node hangs between the parameter and its use, not on the parameter: hooks vanish under deepcopy and
    ``load_state_dict(assign=True)``, and would sum a penalty on the weights once per replica.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, token: torch.Tensor, replicas: Replicas, reducer: Reducer
    ) -> torch.Tensor:
        ctx.replicas, ctx.reducer, ctx.parameter = replicas, reducer, parameter
        ctx.save_for_backward(token.new_empty(0))
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        _ = ctx.saved_tensors
        gradient = gradient.to_dense() if gradient.is_sparse else gradient  # of an embedding
        return ctx.reducer.reduce(ctx.parameter, gradient, ctx.replicas), None, None, None


@dataclass
class Entry:
    """A parameter and its local gradient in one backward, None once its sum has started."""

    parameter: torch.Tensor
    gradient: torch.Tensor | None
    replicas: Replicas
    dtype: torch.dtype

    @property
    def order(self) -> int:
        return self.replicas.order

    @property
    def nbytes(self) -> int:
        return self.parameter.numel() * self.dtype.itemsize

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The properties that must be the same on all ranks, as integers, whose hash is the same in every process."""
        return self.order, self.parameter.shape, self.dtype.itemsize, self.dtype.is_complex

    def __str__(self) -> str:
        return f"{self.order} {self.replicas.name} {tuple(self.parameter.shape)} {self.dtype}"


@dataclass(eq=False)
class _Started:
    """A sum that was started, and the memory that it goes into."""

    team: Team
    bucket: list[Entry]
    flat: torch.Tensor
    pending: Pending


class Reducer:
    """Collects the replica gradients of each backward and adds them up: much of them while it runs, the rest when it ends."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.engine = "auto"  # of the sums that start early; "inline" would wait for ranks that may wait for this one
        with torch.inference_mode(False), torch.enable_grad():
            self.token = torch.empty(0, requires_grad=True)
            self._token_node = self.token.view_as(self.token).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        self.collected: dict[int, _Collected] = {}  # by the number of the backward
        self.planned: dict[Team, list[Planned]] = {}  # by team
        self.begun = self.flushed = 0  # backwards
        self.under_way: list[_Started] = []  # also of backwards that failed: MPI writes into their memory

    def reduce(self, parameter: torch.Tensor, gradient: torch.Tensor, replicas: Replicas) -> torch.Tensor | None:
        """Within a backward, the sum of the replicas' gradients; None if it will be put into ``.grad`` when that ends.

        It will in a plain ``backward()``. Under ``autograd.grad`` and ``backward(inputs=...)`` the engine runs only towards
        the tensors it was given, which never include our token, and ``create_graph`` leaves grad mode on. The node that
        calls must have the token among its inputs.
        """
        if replicas.team.size < 2:
            return gradient
        if parameter.is_leaf and not torch.is_grad_enabled() and engine_will_run(self._token_node):
            backward = running_backward()
            collected = self.collected.get(backward)
            if collected is None:
                collected = _Collected(self, backward)
                self.collected = {other.backward: other for other in (*self.running(), collected)}
            collected.add(parameter, gradient, replicas)
            return None
        self._agree_at_once(replicas)
        return reduce_from_team(gradient, replicas.team)

    def _agree_at_once(self, replicas: Replicas) -> None:
        """Raise unless all ranks of the team are about to sum this gradient: others may be at the end of a ``backward()``."""
        team, mine = replicas.team, hash((replicas.order, -1)) % 2**64
        if not is_unanimous(team, mine):
            place = f"the gradient {replicas.order} {replicas.name}"
            check_met(team, replicas.name, place, f"{place}, which autograd.grad or backward(inputs=...) sums at once")

    def running(self) -> list[_Collected]:
        """The collections of the backwards that run: of one, and of those that it runs inside of."""
        return [collected for collected in self.collected.values() if collected.end() is not None]


class _Collected:
    """The replica gradients of one backward, by team."""

    def __init__(self, reducer: Reducer, backward: int) -> None:
        self.reducer, self.transport, self.backward = reducer, reducer.transport, backward
        # A backward that fails drops its callback, which nobody but the engine keeps, and never calls it: no frame has it among
        # its variables, as it would have a method's object, whoever keeps that frame.
        end = partial(_Collected.flush, self)
        self.end = ref(end)
        at_end_of_backward(end)
        self.teams: dict[Team, dict[int, Entry]] = {}
        self.started: list[_Started] = []
        running = reducer.running()
        self._failed = [s for s in reducer.under_way if not any(s in other.started for other in running)]
        # Inside another backward, of which ranks may have come differently far, nothing starts early. Where one has
        # failed, they may have started different sums, and must agree before they start others.
        self._arriving = {} if running else {team: Arriving(p) for team, p in reducer.planned.items()}
        self._may_start = reducer.begun == reducer.flushed
        reducer.begun = reducer.flushed + len(running) + 1

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor, replicas: Replicas) -> None:
        """Take a local gradient; several of one parameter add up."""
        entries = self.teams.setdefault(replicas.team, {})
        known = entries.get(id(parameter))
        if known is not None:
            known.gradient = known.gradient + gradient
            return
        entry = entries[id(parameter)] = Entry(parameter, gradient, replicas, gradient.dtype)
        arriving = self._arriving.get(replicas.team)
        if arriving is not None:
            arriving.add(entry)
            if self._may_start:
                self._start(replicas.team, arriving.complete())

    def _start(self, team: Team, ready: Iterable[list[Entry]]) -> None:
        for bucket in ready:
            flat = _flat(bucket)
            for entry in bucket:
                entry.gradient = None
                del self.teams[team][id(entry.parameter)]
            pending = self.transport.start_sum(team, flat, self.reducer.engine)
            self.started.append(_Started(team, bucket, flat, pending))
            self.reducer.under_way.append(self.started[-1])

    def flush(self) -> None:
        """Complete what was started, sum what is left in the order of the teams, and put all sums into ``.grad``."""
        self.reducer.collected.pop(self.backward, None)
        teams = sorted(self.teams)
        groups = {team: self._group(team) for team in teams}
        votes = {team: self._vote(team, groups[team]) for team in teams}
        for team in teams:
            if self.transport.agreed(team) != votes[team] * team.size % 2**64:
                self._settle(team, groups[team])
                groups[team] = self._group(team)
        for team in teams:
            if team in self._arriving:
                self._start(team, self._arriving[team].complete(skips=True))
        for started in [*self._failed, *self.started]:
            started.pending.wait()
            self.reducer.under_way.remove(started)
        for started in self.started:
            _accumulate(started.bucket, started.flat)
        for team in teams:
            for bucket in buckets(sorted(self.teams[team].values(), key=attrgetter("order")), BUCKET_BYTES):
                _accumulate(bucket, self.transport.all_reduce(team, _flat(bucket)))
            self._plan(team, groups[team])
        self.reducer.flushed += 1

    def _plan(self, team: Team, group: Sequence[Entry]) -> None:
        """Let a team's next backwards sum early what this one has reached, where that is much."""
        if sum(entry.nbytes for entry in group) < EARLY_BYTES:
            return
        plan = replanned(self.reducer.planned.get(team, ()), buckets(group[::-1], EARLY_BYTES))
        if plan is not None:
            self.transport.open_sums(team)
            self.reducer.planned[team] = plan

    def _vote(self, team: Team, group: Sequence[Entry]) -> int:
        """Tell the team what this rank sums over it, which must be the same on all its ranks."""
        failed = sum(s.team is team for s in self._failed)
        mine = hash((tuple([entry.numbers for entry in group]), failed)) % 2**64
        self.transport.start_agreeing(team, mine)
        return mine

    def _group(self, team: Team) -> list[Entry]:
        """The parameters whose gradients this backward sums over a team, in order."""
        gone = [entry for started in self.started if started.team is team for entry in started.bucket]
        return sorted([*gone, *self.teams[team].values()], key=attrgetter("order"))

    def _settle(self, team: Team, group: Sequence[Entry]) -> None:
        """Settle a vote that was not unanimous: complete sums that only some have started, and raise on all if ranks differ."""
        names = [str(entry) for entry in group]
        place = "the end of a backward()"
        check_met(team, "backward", place, f"{place} that has reached {', '.join(names) or 'nothing'}")
        failed, started = ([s for s in known if s.team is team] for known in (self._failed, self.started))
        sizes = [(s.flat.numel(), s.flat.dtype) for s in (*failed, *started)]
        told = self.transport.gather_objects(team, _Told(names, sizes, len(failed), len(started)))
        differ = len({frozenset(other.names) for other in told}) > 1
        any_failed, any_started = any(other.failed for other in told), any(other.started for other in told)
        if differ or any_failed:
            for size, dtype in max((other.sizes for other in told), key=len)[len(sizes) :]:
                zeros = torch.zeros(size, dtype=dtype)
                pending = self.transport.start_sum(team, zeros, self.reducer.engine)
                self._failed.append(_Started(team, [], zeros, pending))
                self.reducer.under_way.append(self._failed[-1])
        if differ:
            lines = [f"rank {rank}: {', '.join(other.names)}" for rank, other in zip(team, told, strict=True)]
            raise RuntimeError(
                "backward reached different parameters on the ranks that share them; " + "; ".join(lines)
            )
        if any_failed and any_started:
            ranks = [rank for rank, other in zip(team, told, strict=True) if other.failed]
            raise RuntimeError(
                f"an earlier backward failed on ranks {ranks} alone of {list(team)}, which share parameters"
            )
        # A parameter used twice, whose sum has started before its second gradient came on some ranks.
        entries = self.teams[team]
        again = {name for other in told for name in other.names if other.names.count(name) > 1}
        for entry in group:
            if str(entry) in again and id(entry.parameter) not in entries:
                zeros = torch.zeros_like(entry.parameter, dtype=entry.dtype, memory_format=torch.contiguous_format)
                entries[id(entry.parameter)] = Entry(entry.parameter, zeros, entry.replicas, entry.dtype)


@dataclass(frozen=True)
class _Told:
    """The message of a rank to its team when they have not collected the same."""

    names: list[str]
    sizes: list[tuple[int, torch.dtype]]  # of the sums started since they last agreed
    failed: int  # how many of them by backwards that failed
    started: int  # and by this one


def buckets(group: Iterable[Entry], most: int) -> list[list[Entry]]:
    """The entries in buckets of one dtype and device, of about `most` bytes unless one is larger."""
    return cut(group, lambda entry: (entry.dtype, entry.parameter.device), lambda entry: entry.nbytes, most)


def _flat(bucket: Sequence[Entry]) -> torch.Tensor:
    """A bucket's gradients as one tensor of its own: the graph may have given the same memory to other nodes, or the user's."""
    return torch.cat([entry.gradient.reshape(-1) for entry in bucket])  # type: ignore[union-attr]


def _accumulate(bucket: Sequence[Entry], flat: torch.Tensor) -> None:
    """Add a bucket's sums to ``.grad``."""
    totals = unflattened(flat, [entry.parameter for entry in bucket])
    with torch.no_grad():
        for entry, total in zip(bucket, totals, strict=True):
            parameter = entry.parameter
            if parameter.grad is not None:
                parameter.grad.add_(total)
            else:
                parameter.grad = total if total.dtype is parameter.dtype else total.to(parameter.dtype)
