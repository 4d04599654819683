"""Sums of replica gradients.

A parameter that several ranks hold copies of is used through `replicated`, the adjoint of whose copying is a sum over the
copies. In backward the local gradients go to the rank's one reducer, which adds them up in buckets when backward ends and
puts the sums into ``.grad``: they are final when ``backward()`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

import torch

from distdl_lite.shown import shown
from distdl_lite.transport import Transport

BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold copies of a parameter.

    Attributes
    ----------
    team : tuple of int
        Their world ranks, sorted.
    order : int
        A number that grows with the construction of layers, the same on all ranks of the team for the same parameter.
    name : str
        For errors.
    """

    team: tuple[int, ...]
    order: int
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self


def replicated(parameter: torch.Tensor, replicas: Replicas, transport: Transport) -> torch.Tensor:
    """The parameter for use in a forward; its gradient becomes the sum over its replicas."""
    if len(replicas.team) < 2 or not (torch.is_grad_enabled() and parameter.requires_grad):
        return parameter
    reducer = reducer_of(transport)
    return _Replicated.apply(parameter, reducer.token, replicas, reducer)


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
        return ctx.reducer.reduce(ctx.parameter, gradient, ctx.replicas), None, None, None


Entry = tuple[torch.Tensor, torch.Tensor, int, Replicas]  # parameter, local gradient, its order, where its copies are


class Reducer:
    """Collects the replica gradients of each backward and adds them up when it ends."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        with torch.inference_mode(False), torch.enable_grad():
            self.token = torch.empty(0, requires_grad=True)
            self._token_node = self.token.view_as(self.token).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        # Weak: a backward that fails drops its callback, and with it what it had collected.
        self._collected: WeakValueDictionary[int, _Collected] = WeakValueDictionary()

    def reduce(self, parameter: torch.Tensor, gradient: torch.Tensor, replicas: Replicas) -> torch.Tensor | None:
        """Within a backward, the sum of the replicas' gradients; None if it will be put into ``.grad`` when that ends.

        It will in a plain ``backward()``. Under ``autograd.grad`` and ``backward(inputs=...)`` the engine runs only towards
        the tensors it was given, which never include our token, and ``create_graph`` leaves grad mode on. The node that
        calls must have the token among its inputs.
        """
        if len(replicas.team) < 2:
            return gradient
        if parameter.is_leaf and not torch.is_grad_enabled() and _engine_will_run(self._token_node):
            self._add(parameter, gradient, replicas)
            return None
        return shown(gradient, replicas.team, self.transport)

    def _add(self, parameter: torch.Tensor, gradient: torch.Tensor, replicas: Replicas) -> None:
        """Take a local gradient; several of one parameter add up."""
        backward = _running_backward()
        collected = self._collected.get(backward)
        if collected is None:
            collected = self._collected[backward] = _Collected(self.transport)
            _at_end_of_backward(collected.flush)
        entries = collected.teams.setdefault(replicas.team, {})
        known = entries.get(id(parameter))
        entries[id(parameter)] = (
            parameter,
            gradient if known is None else known[1] + gradient,
            replicas.order,
            replicas,
        )


class _Collected:
    """The replica gradients of one backward, by team."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.teams: dict[tuple[int, ...], dict[int, Entry]] = {}

    def flush(self) -> None:
        """Sum team by team, in the order of the teams, which is the same on all ranks."""
        for team in sorted(self.teams):
            group = sorted(self.teams[team].values(), key=itemgetter(2))
            self._check_alike(team, group)
            for bucket in _buckets(group):
                gradients = [gradient for _, gradient, _, _ in bucket]
                flat = _flattened(gradients)
                self.transport.all_reduce(team, flat)
                _accumulate(bucket, _unflattened(flat, gradients))

    def _check_alike(self, team: tuple[int, ...], group: Sequence[Entry]) -> None:
        """Raise on all of the team unless all its ranks are about to sum the same parameters."""
        # Integers alone: their hash is the same in every process.
        mine = hash(tuple([(order, g.shape, g.element_size(), g.is_complex()) for _, g, order, _ in group])) % 2**64
        if self.transport.agree(team, mine) == mine * len(team) % 2**64:
            return
        names = [f"{order} {replicas.name} {tuple(g.shape)} {g.dtype}" for _, g, order, replicas in group]
        everywhere = self.transport.gather_objects(team, names)
        lines = [f"rank {rank}: {', '.join(names)}" for rank, names in zip(team, everywhere, strict=True)]
        raise RuntimeError("backward reached different parameters on the ranks that share them; " + "; ".join(lines))


def _buckets(group: Sequence[Entry]) -> list[list[Entry]]:
    """The entries in buckets of one dtype and device, of `BUCKET_BYTES` at most unless one is larger."""
    made: list[list[Entry]] = []
    latest: dict[Any, tuple[list[Entry], int]] = {}
    for entry in group:
        gradient = entry[1]
        kind, size = (gradient.dtype, gradient.device), gradient.nbytes
        bucket, filled = latest.get(kind, (None, 0))
        if bucket is None or filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            made.append(bucket)
        bucket.append(entry)
        latest[kind] = (bucket, filled + size)
    return made


def _accumulate(bucket: Sequence[Entry], totals: Sequence[torch.Tensor]) -> None:
    for (parameter, *_), total in zip(bucket, totals, strict=True):
        if parameter.grad is None:
            parameter.grad = total if total.dtype is parameter.dtype else total.to(parameter.dtype)
        else:
            with torch.no_grad():
                parameter.grad += total


# ---- the private calls of torch, in one place; tests/test_reducer.py checks them -------------------------


def _engine_will_run(node: Any) -> bool:
    return torch._C._will_engine_execute_node(node)


def _running_backward() -> int:
    return torch._C._current_graph_task_id()


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def _flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One flat tensor of their elements."""
    return torch._C._nn.flatten_dense_tensors(tensors)  # type: ignore[attr-defined]


def _unflattened(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Views of a flat tensor of the shapes of these."""
    return torch._C._nn.unflatten_dense_tensors(flat, tensors)  # type: ignore[attr-defined]
