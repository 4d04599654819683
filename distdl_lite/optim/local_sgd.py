"""Ranks that train by themselves and average their parameters from time to time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch

from distdl_lite.agreement import refused_together
from distdl_lite.buckets import HALVES, Flat, average_flats, by_tensor, flats_of, joined
from distdl_lite.optim.checks import check_numbers, check_same, check_settings, check_tensors, form_of, told_of
from distdl_lite.optim.flight import LANE, MERGES, Flight
from distdl_lite.optim.nodes import levels_of
from distdl_lite.optim.schedule import Periodic, Schedule, Skips, check_int
from distdl_lite.partition import partition_of


class LocalSGD(torch.optim.Optimizer):
    """An optimizer that steps on each rank alone, and averages the parameters over ranks when its schedule says so.

    Local and post-local SGD, hierarchical SGD, BMUF, SlowMo, DiLoCo and DASO are settings of it. Nothing is sent for
    gradients. With a period of k steps the ranks send a k-th of what sums of gradients at every step would.

    All ranks make the same calls in the same order: `step`, and also `state_dict`, `load_state_dict`, `synchronise`,
    `drain`, `replan`, `add_param_group` and `next_epoch`, which may communicate. Ranks start from the weights that each has:
    build the model after the same ``torch.manual_seed`` everywhere.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Takes the steps. Its `param_groups` and `state` are this one's too, so that learning-rate schedulers may be made for
        either. What it holds that requires grad is averaged, whether or not it got a gradient on this rank.
    schedule : int or Schedule
        The period in steps, or a function ``(epoch, batch, losses) -> (global_every, local_every, delay)``, such as
        `Periodic`, `PostLocal` and `DASOSchedule`.
    P : Partition or communicator, optional
        The ranks that average, by default all. A rank outside is alone.
    groups, ranks_per_node : optional
        What a node is, where the schedule's ``local_every`` is not 0: see `levels_of`. By default a host.
    delay : int
        Steps that a rank goes on while the average is under way, where the schedule leaves it at 0. It is merged when the
        next one begins at the latest. After ``global_every`` 0 there is none.
    merge : "daso", "delta" or "replace"
        What becomes of parameters w that have changed for b steps since the average m of old ones over P members began:
        ``(2 b w + P m) / (2 b + P)``, ``w + m - old w``, which keeps the rank's own progress, or ``m``. With b = 0 it is m.
        The members are ranks; where nodes play a part, they are nodes.
    outer : callable or torch.optim.Optimizer, optional
        ``outer(tensors)`` makes an optimizer over the parameters that all ranks last had in common. Its gradient is how far
        the mean of the ranks has come since, negative; its result takes the place of the mean. ``SGD`` with ``lr=1`` is the
        plain mean; with Nesterov momentum 0.9 and ``lr=0.7`` it is DiLoCo. An optimizer without state over the same
        parameters is taken over.
    wire : torch.dtype, optional
        float16 or bfloat16: what is sent are differences to the parameters that all ranks last had in common, rounded; what
        rounding keeps is sent with the next. float32 is the same as None: numbers travel as they are, halves as float32.
    buffers : iterable of torch.Tensor
        Floating-point tensors, such as running statistics, to be averaged and replaced together with the parameters.
    chunk : int, optional
        The most elements in a message. By default all parameters of a dtype are one.
    engine : str
        Who carries out the sums that are under way, "thread", "poll" or "inline"; "auto" chooses.
    timeout : float, optional
        Seconds to wait for a sum over all ranks.

    Attributes
    ----------
    steps, epoch, batch : int
        Steps taken, epochs ended, and steps taken in this epoch.
    losses : tuple of float
        Mean losses of the epochs, for the schedule.

    Raises
    ------
    TypeError, ValueError
        If an argument of some rank is none of the above, or the ranks differ in the parameters' number, shapes, dtypes or
        names, where the optimizer was given them, or in the settings; on all ranks.
    RuntimeError
        From `step`, if a parameter requires grad that did not before: call `replan` on all ranks. One that is frozen later
        stays as it is.
    TimeoutError
        If an average takes longer than `timeout`.

    Notes
    -----
    An average is one sum over the ranks per dtype and `chunk`. Where nodes play a part it is a sum within the node, one
    over a rank of each node, in turns, and a broadcast within the node. Halves and complex numbers are added in float32 or
    wider. At construction ranks compare shapes, and with `wire` or `outer` take rank 0's parameters as the common ones.

    A `torch.amp.GradScaler` may be given to `add_scaler`, or be used as usual: ``scaler.step(this)`` skips the optimizer's
    step where gradients have overflowed, but never the average.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     w = torch.nn.Parameter(torch.zeros(1))
    ...     optimizer = dl.LocalSGD(torch.optim.SGD([w], lr=1.0), 2)
    ...     seen = []
    ...     for _ in range(4):
    ...         w.grad = torch.full((1,), -1.0 - world.rank)
    ...         optimizer.step()
    ...         seen.append(w.item())
    ...     return seen
    >>> dl.testing.spmd(2, body)
    [[1.0, 3.0, 4.0, 6.0], [2.0, 3.0, 5.0, 6.0]]
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves it to us to skip the step, and never skips an average
    _keeps_nodes_equal = False  # whether something else makes the ranks of a node equal

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: int | Schedule,
        *,
        P: Any = None,
        groups: Any = "node",
        ranks_per_node: int | None = None,
        delay: int = 0,
        merge: str = "daso",
        outer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | torch.optim.Optimizer | None = None,
        wire: torch.dtype | None = None,
        buffers: Iterable[torch.Tensor] = (),
        chunk: int | None = None,
        engine: str = "auto",
        timeout: float | None = None,
    ) -> None:
        self._P = partition_of(P)
        with refused_together(self._P, type(self).__name__):
            self.buffers = list(buffers)
            check_tensors(optimizer, self.buffers)
            schedule = Periodic(schedule) if isinstance(schedule, int) else schedule
            check_settings(schedule, outer, merge, wire, engine)
            check_numbers(delay, chunk, ranks_per_node, timeout)
        self.optimizer, self.schedule = optimizer, schedule
        self.delay, self.merge, self.chunk, self.timeout, self.engine = delay, merge, chunk, timeout, engine
        self.wire = wire if wire in HALVES else None
        self.outer = outer if isinstance(outer, torch.optim.Optimizer) else None
        self._make_outer = None if outer is self.outer else outer
        self._has_outer = outer is not None
        self._outer_groups = [list(group["params"]) for group in self.outer.param_groups] if self.outer else []
        self.steps = self.epoch = self.batch = self._averages = self._since = self._since_local = 0
        self.losses: tuple[float, ...] = ()
        self._flight: Flight | None = None
        self._scaler: Any = None
        with refused_together(self._P, type(self).__name__):
            self.levels = levels_of(self._P, groups, ranks_per_node)
        self.flats: list[Flat] = []
        self._outer_views: dict[torch.Tensor, torch.Tensor] = {}
        self.replan()
        for team in (self.levels.team, *self.levels.crossings):
            if self.levels.rank in team:
                for engine in dict.fromkeys((self.engine, "inline")):
                    self._transport.open_sums(team, LANE.format(engine))

    @property
    def _transport(self) -> Any:
        return self._P.world_transport

    def _learning(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    @torch.no_grad()
    def replan(self) -> None:
        """Average from now on what now requires grad, after what is under way; all ranks call it.

        Raises
        ------
        ValueError
            On all ranks, if they differ.
        """
        self.drain()
        learning = self._learning()
        self._compare(learning)
        flats = flats_of(learning, learns=True)
        if self.wire is not None or self._has_outer:
            anchors, residuals = by_tensor(self.flats, "anchor"), by_tensor(self.flats, "residual")
            for flat in flats:
                anchor = flat.read()
                self._transport.broadcast(self.levels.team, anchor, self.levels.team[0])
                flat.anchor = joined(flat, anchors, anchor)
                flat.residual = None if self.wire is None else joined(flat, residuals, torch.zeros_like(anchor))
        self.flats = [*flats, *flats_of(self.buffers)]
        self._planned = {id(p) for p in learning}
        if self._has_outer:
            with refused_together(self._P, type(self).__name__):
                self._plan_outer()

    def _compare(self, learning: Sequence[torch.Tensor]) -> None:
        """Raise on all ranks unless they will make the same calls."""
        mine = {
            **self._settings(),
            "schedule": repr(self.schedule) if is_dataclass(self.schedule) else type(self.schedule).__name__,
            "nodes": self.levels.nodes,
            "timeout": self.timeout is not None,
            "outer": self._has_outer,
            **{name: getattr(self, name) for name in ("merge", "delay", "wire", "chunk", "engine")},
            **told_of(self.optimizer, learning, self.buffers),
        }
        self._agree(mine)

    def _settings(self) -> dict[str, Any]:
        """Other settings that must be the same on all ranks."""
        return {}

    def _agree(self, mine: dict[str, Any]) -> None:
        """Raise ValueError on all ranks unless they have the same."""
        text = f"{type(self).__name__}: the ranks disagree: {{name}} is {{value}} on rank {{rank}}, {{usual}} on rank {{first}}"
        check_same(self.levels.team, self._transport.gather_objects(self.levels.team, mine), text)

    def _plan_outer(self) -> None:
        """Give the outer optimizer the anchors, cut into tensors, and the states of those that it had before."""
        before, old_views = self.outer, self._outer_views
        views = {p: part.detach().requires_grad_() for p, part in by_tensor(self.flats, "anchor").items()}
        if self._make_outer is not None:
            self.outer = self._make_outer([views[p] for p in self._learning()])
            if not isinstance(self.outer, torch.optim.Optimizer):
                raise TypeError(f"outer must make a torch.optim.Optimizer, not {self.outer!r}")
        else:
            if {p for group in self._outer_groups for p in group if p.requires_grad} != set(views):
                raise ValueError("outer must hold the parameters that the optimizer holds, all of them")
            for group, tensors in zip(self.outer.param_groups, self._outer_groups, strict=True):
                group["params"] = [views[p] for p in tensors if p.requires_grad]
        if before is not None:
            states = {tensor: before.state.pop(view) for tensor, view in old_views.items() if view in before.state}
            self.outer.state.update({views[tensor]: state for tensor, state in states.items() if tensor in views})
        self._outer_views = views

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the optimizer's step; then merge, begin or make the average that is due; returns what the optimizer does."""
        strange = [number for number, p in enumerate(self._learning()) if id(p) not in self._planned]
        if strange:
            raise RuntimeError(
                f"{type(self).__name__}: the parameters {strange} of those that require grad did not before: "
                "call replan() on all ranks"
            )
        every, local_every, delay = self._skips()
        loss = self._inner_step(closure)
        with torch.no_grad():
            self._average(every, local_every, delay)
        self.steps += 1
        self.batch += 1
        return loss

    def _skips(self) -> Skips:
        skips = self.schedule(self.epoch, self.batch, self.losses)
        for name, value in zip(("global_every", "local_every", "delay"), skips, strict=True):
            check_int(f"the schedule's {name}", value, 0)
        every, local_every, delay = skips
        return (every, local_every, delay or self.delay) if every else (1, local_every, 0)

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        if self._scaler is not None:
            if closure is not None:
                raise RuntimeError(f"{type(self).__name__}: a closure cannot be used with a GradScaler")
            loss = self._scaler.step(self.optimizer)
            self._scaler.update()
            return loss
        if self.__dict__.get("found_inf"):  # a GradScaler was called with this optimizer
            return None
        scale = self.__dict__.get("grad_scale")
        if scale is not None:
            for p in self._learning():
                if p.grad is not None:
                    p.grad.div_(scale.to(p.grad.device))
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def _is_due(self, every: int, since: int) -> bool:
        """Whether an average follows this step, `since` steps after the last one's."""
        return since + 1 >= every

    def _average(self, every: int, local_every: int, delay: int) -> None:
        is_due = self._is_due(every, self._since)
        if self._flight is not None and (is_due or self.steps >= self._flight.due):
            self.drain()
        is_local = bool(local_every) and (is_due or self._is_due(local_every, self._since_local))
        is_shared = bool(local_every) or self._keeps_nodes_equal
        if is_local or (is_due and is_shared):
            flats = [flat for flat in self.flats if not (flat.learns and self._keeps_nodes_equal)]
            average_flats(self.levels.node, flats)
        if is_due:
            self._begin(delay, is_shared)
            if not delay:
                self.drain()
        self._since = 0 if is_due else self._since + 1
        self._since_local = 0 if is_local else self._since_local + 1

    def _begin(self, delay: int, is_shared: bool) -> None:
        """Begin the average over all ranks; where it is shared, those of a node are equal."""
        levels = self.levels
        team = levels.crossings[self._averages % len(levels.crossings)] if is_shared else levels.team
        self._averages += 1
        engine = "inline" if not delay and self.timeout is None else self.engine
        self._flight = Flight(team, is_shared, self.steps, self.steps + delay)
        for flat in self.flats:
            self._flight.add(flat, levels.weight if is_shared else 1, engine, self.wire, self.chunk)

    @torch.no_grad()
    def drain(self) -> None:
        """Wait for the average that is under way, if any, and merge it; all ranks call it.

        Raises
        ------
        TimeoutError
            If it takes longer than `timeout`. It is still under way then.
        """
        flight = self._flight
        if flight is None:
            return
        flight.wait(self.timeout)
        self._flight = None
        count, waited = flight.team.size, self.steps - flight.began
        targets = self._targets(flight.means(self.levels.node))
        for flat, old, target in zip(self.flats, flight.old, targets, strict=True):
            if waited and flat.learns:
                target = MERGES[self.merge](flat.read(), old, target, waited, count)
            flat.write(target)

    def _targets(self, means: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The vectors to merge: the means, or the anchor that has moved."""
        if self.outer is None:
            pairs = zip(self.flats, means, strict=True)
            return [mean if flat.anchor is None else flat.anchor.add_(mean) for flat, mean in pairs]
        for flat, mean in zip(self.flats, means, strict=True):
            if flat.anchor is not None:
                for tensor, part in zip(flat.tensors, flat.parts(mean), strict=True):
                    self._outer_views[tensor].grad = part.neg()
        self.outer.step()
        self.outer.zero_grad()
        return [mean if flat.anchor is None else flat.anchor for flat, mean in zip(self.flats, means, strict=True)]

    def synchronise(self) -> None:
        """Average over all ranks now, after what is under way; all ranks call it."""
        self.drain()
        with torch.no_grad():
            self._begin(0, False)
            self.drain()
        self._since = self._since_local = 0

    def make_equal(self) -> None:
        """Average over all ranks now, unless an average was the last thing they did; all ranks call it."""
        if self._flight is not None or self._since:
            self.synchronise()

    def next_epoch(self, loss: float | torch.Tensor | None = None) -> None:
        """End the epoch, and tell its loss on this rank, the mean of which over the ranks the schedule sees."""
        if loss is not None:
            self.losses = (*self.losses, self._mean_loss(loss))
        self.epoch += 1
        self.batch = 0

    def _mean_loss(self, loss: float | torch.Tensor) -> float:
        """The same number on all ranks, whatever MPI's sums do."""
        with refused_together(self._P, type(self).__name__):
            mine = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        told = self._transport.gather_objects(self.levels.team, mine)
        return sum(told) / len(told)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; all ranks call it."""
        self.optimizer.add_param_group(param_group)
        self.replan()

    def add_scaler(self, scaler: Any) -> None:
        """Let a `torch.amp.GradScaler` take the optimizer's steps, and update it."""
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, not {scaler!r}")
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, and under "local_sgd" the counters, losses, common points and what rounding has kept.

        All ranks call it, since it first merges what is under way; save each rank's own.
        """
        self.drain()
        own = {name: getattr(self, name) for name in _COUNTERS}
        own |= {"points": [flat.anchor for flat in self.flats], "left": [flat.residual for flat in self.flats]}
        own["outer"] = None if self.outer is None else self.outer.state_dict()
        own["scaler"] = None if self._scaler is None else self._scaler.state_dict()
        return {**self.optimizer.state_dict(), "local_sgd": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state; that of the optimizer alone leaves the rest as it is. All ranks call it.

        Raises
        ------
        ValueError
            On all ranks, if what is averaged, `wire` or `outer` were others, or ranks were at different steps.
        """
        self.drain()
        own = state_dict.get("local_sgd")
        told = own or {}
        parts = {name: form_of(told.get(name)) for name in ("points", "left", "outer")}
        counters = {name: repr(told.get(name)) for name in _COUNTERS}
        self._agree({f"the state's {name}": value for name, value in {**parts, **counters}.items()})
        if own is not None:
            mine = self.state_dict()["local_sgd"]
            for name, part in parts.items():
                if part != form_of(mine[name]):
                    raise ValueError(f"LocalSGD: the state's {name} is {part}, here it is {form_of(mine[name])}")
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "local_sgd"})
        if own is None:
            return
        for name in _COUNTERS:
            setattr(self, name, own[name])
        with torch.no_grad():
            for flat, *saved in zip(self.flats, own["points"], own["left"], strict=True):
                for vector, values in zip((flat.anchor, flat.residual), saved, strict=True):
                    if vector is not None:
                        vector.copy_(values)
        if self.outer is not None:
            self.outer.load_state_dict(own["outer"])
        if self._scaler is not None and own["scaler"] is not None:
            self._scaler.load_state_dict(own["scaler"])

    def __getstate__(self) -> dict[str, Any]:
        self.drain()
        # A scheduler puts a step of its own there, which is this optimizer's also in a copy.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._planned = {id(tensor) for flat in self.flats if flat.learns for tensor in flat.tensors}
        anchors = by_tensor(self.flats, "anchor")
        for tensor, view in self._outer_views.items():  # pickle forgets that they share memory
            view.data = anchors[tensor]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r}, {self.schedule!r})"


_COUNTERS = "steps", "epoch", "batch", "losses", "_averages", "_since", "_since_local"
