"""Updates that happen in the next forward, bucket by bucket, just before a layer needs its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import optimizer as of_torch

from distdl_lite.heat.deferred import DataParallelOptimizer
from distdl_lite.parallel.replicas.hooks import WeakHook
from distdl_lite.parallel.replicas.synchroniser import Found, Synchroniser
from distdl_lite.private import running_backward

_FAILED = "DataParallel: backward failed on some rank, so its update is left out on all of them"


class Deferral:
    """All that a backward has left to do: sums to wait for, and steps to take when the module's layers need them."""

    def __init__(
        self, module: torch.nn.Module, sync: Synchroniser, optimizers: Sequence[DataParallelOptimizer]
    ) -> None:
        self.sync, self.optimizers = sync, optimizers
        self.places: list[int] = []  # of the buckets that are still to be put in
        self._steps: list[tuple[torch.optim.Optimizer, list[dict[str, Any]], set[int]]] = []
        self._local: dict[int, tuple[torch.Tensor | None, int]] = {}
        self._stand_ins: set[int] = set()  # parameters of which other ranks alone may have gradients
        self._eager: set[int] = set()  # parameters that are used without their module being called
        self._called: set[int] = set()
        self._after: set[int] = set()  # parameters whose step came after the last forward
        self._is_confirmed = self._owes_error = self._is_stepping = False
        self._versions: dict[int, int] = {}  # of the parameters, at the end of backward
        self._handles: list[Any] = []
        self.others: weakref.WeakSet[Deferral] = sync.team.world.local.setdefault("deferrals", weakref.WeakSet())
        self.others.add(self)
        numbers = {id(p): n for n, p in enumerate(sync.parameters)}
        owners: list[Any] = [layer for layer in module.modules() if layer._parameters or layer is module]
        for layer in owners:
            if layer._parameters:  # it may use those of the layers inside it, too, without calling them
                found = [numbers[id(p)] for p in layer.parameters() if id(p) in numbers]
                called = WeakHook(self, lambda deferral, *_, found=found: deferral.call(found))
                self._handles.append(layer.register_forward_pre_hook(called))
        for optimizer in optimizers:
            optimizer._deferrals.add(self)
            owners.append(optimizer.torch_optimizer)
            self._handles.append(owners[-1].register_step_pre_hook(WeakHook(self, Deferral.before_step)))
        for owner in owners:
            flush = WeakHook(self, lambda deferral, *_: deferral.flush())
            self._handles.append(owner.register_state_dict_pre_hook(flush))
            self._handles.append(owner.register_load_state_dict_pre_hook(flush))

    def remove(self) -> None:
        self.others.discard(self)
        for handle in self._handles:
            handle.remove()
        for optimizer in self.optimizers:
            optimizer._deferrals.discard(self)

    def after_backward(self) -> None:
        """All sums are under way."""
        self.places = list(range(len(self.sync.buckets)))
        self._stand_ins = {n for n in self.sync.places if self.sync.parameters[n].grad is None}
        for number in self._stand_ins:  # zeros, on which zero_grad leaves a trace
            self.sync.parameters[number].grad = torch.zeros_like(self.sync.parameters[number])
        self._local = {n: (p.grad, _version(p.grad)) for n, p in enumerate(self.sync.parameters)}
        self._versions = {n: self.sync.parameters[n]._version for n in self.sync.places}
        self._steps.clear()
        self._is_confirmed = False

    def waits_for(self, parameters: set[int]) -> bool:
        """Whether sums of any of these are still to be put in, or are left by a backward that failed; by their ids."""
        is_busy = bool(self.places) or self.is_interrupted
        return is_busy and any(id(p) in parameters for p in self.sync.parameters)

    @property
    def is_interrupted(self) -> bool:
        """Whether this rank's last backward has not come to its end."""
        is_left = self.sync.is_open and not self.sync.is_broken
        return is_left and not self.places and running_backward() == -1

    def _is_untouched(self, number: int) -> bool:
        grad, version = self._local[number]
        return grad is self.sync.parameters[number].grad and _version(grad) == version

    def step_later(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step when its gradients are there, with the hyperparameters of now."""
        if self.is_interrupted:  # of which all ranks will be told
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        is_second = any(optimizer is other for other, *_ in self._steps)
        if not is_second:
            self._check_gradients(held)
        if is_second or self._is_whole(optimizer):
            self.flush()
            optimizer.step()
            return
        self._steps.append((optimizer, [_hyperparameters(group) for group in optimizer.param_groups], held))
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers ask for

    def _check_gradients(self, held: set[int]) -> None:
        for number, parameter in enumerate(self.sync.parameters):
            if id(parameter) in held and not self._is_untouched(number):
                raise RuntimeError(
                    f"DataParallel: the gradient of {self.sync.names[number]} was changed between backward and step, when "
                    f"it was this rank's part; call synchronize() after backward"
                )

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Somebody calls the step of the optimizer that is wrapped: it needs the sums now."""
        if self.places and not any(other._is_stepping for other in self.others):
            self._check_gradients({id(p) for group in optimizer.param_groups for p in group["params"]})
            self.flush()

    def _is_whole(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether hooks belong to the step, or gradients that are in no bucket, such as of what is trained again."""
        hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        theirs = [hook for known in hooks for hook in known.values() if not isinstance(hook, WeakHook)]
        if any((theirs, of_torch._global_optimizer_pre_hooks, of_torch._global_optimizer_post_hooks)):
            return True
        waited_for = {id(self.sync.parameters[n]) for n in self.sync.places}
        held = (p for group in optimizer.param_groups for p in group["params"])
        return any(p.grad is not None and id(p) not in waited_for for p in held)

    def call(self, numbers: Sequence[int]) -> None:
        """A layer is about to use these parameters."""
        self._called.update(numbers)
        self._put_in({self.sync.places[n] for n in numbers if n in self.sync.places})

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Do before and in a forward what its layers need, and after it what none has called for."""
        self._confirm(self.is_interrupted, in_forward=True)
        self._after.clear()
        self._called.clear()
        self.call(list(self._eager))
        try:
            yield
        finally:
            if self._steps:
                self._after.update(n for place in self.places for n in self.sync.buckets[place].numbers)
            self.flush()

    def came(self, number: int) -> None:
        """A gradient has come."""
        if number not in self._called:
            if number in self._after:
                raise RuntimeError(
                    f"DataParallel: {self.sync.names[number]} was used before its deferred update, as its module was not "
                    f'called; use update="now"'
                )
            self._eager.add(number)

    def flush(self) -> None:
        """Wait for all sums and take the steps."""
        self._put_in(set(self.places))

    def begin_backward(self) -> None:
        """Complete all that an earlier backward has left open."""
        self._confirm(failed=self.sync.is_open and not self.places)
        self.flush()

    def _confirm(self, failed: bool, in_forward: bool = False) -> None:
        """Before any step is taken, raise on all ranks where backward has ended well on some of them only."""
        if failed or (self.places and not self._is_confirmed):
            places, self.places, self._is_confirmed = self.places, [], False
            try:
                ended_well = self.sync.abandon() if failed else self.sync.confirm()
                self._is_confirmed = ended_well == self.sync.team.size
            finally:
                for number in () if self._is_confirmed else list(self._stand_ins):
                    self._withdraw(number)
            if self._is_confirmed:
                self.places = places
            elif ended_well:
                # Not in another kind of call than the ranks where backward has ended well: it may be another step's.
                told = any(self.sync.team.world.gather_objects(self.sync.team, in_forward and not failed))
                if not failed or told is in_forward:
                    raise RuntimeError(_FAILED)
                self._owes_error = told
        if in_forward and self._owes_error:
            self._owes_error = False
            raise RuntimeError(_FAILED)

    def _withdraw(self, number: int) -> bool:
        """Take back what stands for a gradient, unless it, or the gradient, is no longer as backward left it."""
        is_untouched = self._is_untouched(number)
        if is_untouched and number in self._stand_ins:
            self.sync.parameters[number].grad = None
        self._stand_ins.discard(number)
        return is_untouched

    def _put_in(self, places: set[int]) -> None:
        self._confirm(self.is_interrupted)
        if (changed := self._changed(places)) is not None:
            self._steps.clear()  # of no use, unlike the sums, which other ranks make too
            places = set(self.places)
        for place in sorted(places & set(self.places)):
            self.places.remove(place)
            self._apply(self.sync.complete(place))
            if not self.places:
                self.sync.close()
                self._steps.clear()
        if changed is not None:
            raise RuntimeError(
                f"DataParallel: {self.sync.names[changed]} was changed between backward and its deferred update, when the "
                f"gradient was this rank's part: call synchronize() before, or take steps with the container's optimizer"
            )

    def _changed(self, places: set[int]) -> int | None:
        """A parameter that somebody else has changed since backward, such as an optimizer that is not known here."""
        for number in (n for place in places & set(self.places) for n in self.sync.buckets[place].numbers):
            if self.sync.parameters[number]._version != self._versions.get(number):
                return number
        return None

    def _apply(self, found: Found) -> None:
        """Put sums into ``.grad`` where it is as backward left it, and take the steps of these parameters."""
        later: dict[int, torch.Tensor | None] = {}
        for number, value in found:
            parameter = self.sync.parameters[number]
            if self._withdraw(number):
                self.sync.put([(number, value)])
            else:  # such as by zero_grad, which was meant for the next backward
                later[number] = parameter.grad
                parameter.grad = self.sync.added_up(number, value)
        taken = {id(self.sync.parameters[number]) for number, _ in found}
        self._is_stepping = True
        try:
            for optimizer, groups, held in self._steps:
                _step_alone(optimizer, groups, taken & held)
        finally:
            self._is_stepping = False
        for number, grad in later.items():
            self.sync.parameters[number].grad = grad


def _step_alone(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], taken: set[int]) -> None:
    """A step of some parameters, with these hyperparameters."""
    all_of_them = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in taken and p.grad is not None for p in all_of_them):
        return
    others = [(p, p.grad) for p in all_of_them if id(p) not in taken and p.grad is not None]
    now = [_hyperparameters(group) for group in optimizer.param_groups]
    for parameter, _ in others:
        parameter.grad = None
    try:
        for group, then in zip(optimizer.param_groups, groups, strict=False):
            group.update(then)
        optimizer.step()
    finally:
        for group, before in zip(optimizer.param_groups, now, strict=True):
            group.update(before)
        for parameter, grad in others:
            parameter.grad = grad


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in group.items() if key != "params"}
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def _version(grad: torch.Tensor | None) -> int:
    return -1 if grad is None else grad._version
