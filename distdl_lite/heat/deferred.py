"""Heat's optimizer, whose steps may be taken later."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class DataParallelOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose steps a `DataParallel` with ``update="deferred"`` may carry out later.

    Without such a container, or with ``update="now"``, it is the optimizer that it wraps.

    Parameters
    ----------
    torch_optimizer : torch.optim.Optimizer
        Which does the steps.
    blocking : bool
        Heat's argument; a container overwrites it.

    Attributes
    ----------
    torch_optimizer : torch.optim.Optimizer
    blocking_parameter_updates : bool

    Raises
    ------
    TypeError
        For another kind of optimizer, or `blocking`.

    Notes
    -----
    A deferred step has the hyperparameters of the moment of ``step()``, and the result is bit by bit that of an immediate
    one. Until it is done, ``.grad`` holds this rank's part and the parameters are the old ones:
    ``DataParallel.synchronize()`` does it at once, as do ``eval()``, ``to()``, ``apply()``, ``state_dict()``,
    ``load_state_dict()`` and ``parameters()`` of the container, and ``step()`` of the wrapped optimizer. Code that touches the
    bare module's parameters calls it before; where it, or another optimizer, has changed them, the next forward raises.
    An optimizer with step hooks, or with gradients that are in no bucket, takes its step in ``step()``.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     model = torch.nn.Linear(1, 1, bias=False)
    ...     optimizer = dl.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    ...     net = dl.DataParallel(model, optimizer=optimizer, update="deferred")
    ...     before = model.weight.item()
    ...     net(torch.full((1, 1), 1.0 + 2 * world.rank)).sum().backward()
    ...     optimizer.step()
    ...     net.synchronize()
    ...     return round(before - model.weight.item(), 4)
    >>> dl.testing.spmd(2, body)
    [2.0, 2.0]
    """

    _step_supports_amp_scaling = False  # a GradScaler sets the scale on us, and fused steps look for it on themselves

    def __init__(self, torch_optimizer: torch.optim.Optimizer, blocking: bool = False) -> None:
        if not isinstance(torch_optimizer, torch.optim.Optimizer):
            raise TypeError(f"DataParallelOptimizer: a torch.optim.Optimizer is needed, not {torch_optimizer!r}")
        if not isinstance(blocking, bool):
            raise TypeError(f"DataParallelOptimizer: blocking must be a bool, not {blocking!r}")
        self.torch_optimizer = torch_optimizer
        self.blocking_parameter_updates = blocking
        self._deferrals: weakref.WeakSet[Any] = weakref.WeakSet()  # `Deferral`s of the containers that it was given to

    def __getattr__(self, name: str) -> Any:
        if name == "torch_optimizer":  # while it is copied
            raise AttributeError(name)
        return getattr(self.torch_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a step of its own there, which is this optimizer's also in a copy.
        return {name: value for name, value in self.__dict__.items() if name not in ("_deferrals", "step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _deferrals=weakref.WeakSet())

    def __repr__(self) -> str:
        return f"DataParallelOptimizer({self.torch_optimizer!r})"

    def _pending(self) -> list[Any]:
        """The deferrals that have something left to do with its parameters, in one order on all ranks."""
        alive = {other for deferral in self._deferrals for other in deferral.others}
        held = {id(p) for group in self.param_groups for p in group["params"]} if alive else set()
        return sorted((d for d in alive if d.waits_for(held)), key=lambda d: d.sync.serial)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """As torch's, or in the next forward."""
        pending = self._pending()
        if pending and closure is not None:
            raise ValueError('DataParallelOptimizer: a step with a closure cannot be deferred; use update="now"')
        if len(pending) == 1 and pending[0] in self._deferrals:
            pending[0].step_later(self.torch_optimizer)
            return None
        for deferral in pending:  # its parameters are in several containers
            deferral.flush()
        return self.torch_optimizer.step() if closure is None else self.torch_optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; sums that are under way are not lost."""
        self.torch_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.torch_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the wrapped optimizer."""
        self.torch_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the wrapped optimizer."""
        self.torch_optimizer.add_param_group(param_group)
