"""One copy of a module on each rank, each for its rows of the batch; gradients are averaged while backward runs."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distdl_lite.agreement import refused_together
from distdl_lite.data.rows import line_of
from distdl_lite.nn.inputs import zero_volume_tensor
from distdl_lite.nn.norm.sync_batch_norm import SyncBatchNorm
from distdl_lite.parallel.replicas.alike import agreed, check_equal, summed_by_container, summed_by_layers, told_of
from distdl_lite.parallel.replicas.bucket import Bucket
from distdl_lite.parallel.replicas.deferral import Deferral
from distdl_lite.parallel.replicas.hooks import (
    OutputHook,
    WeakHook,
    rows_of,
    running_backward_accumulates,
    tensors_in,
    with_graph,
)
from distdl_lite.parallel.replicas.join import joined
from distdl_lite.parallel.replicas.options import Options, check_module, check_ranks, listed, update_of
from distdl_lite.parallel.replicas.synchroniser import Synchroniser
from distdl_lite.partition import partition_of
from distdl_lite.private import at_end_of_backward, running_backward

_KIND = operator.attrgetter("dtype", "device", "shape")


class DataParallel(torch.nn.Module):
    """A module of which each rank has a copy, and each gives its rows of the batch; gradients are those of the whole batch.

    After ``backward()`` every rank's ``.grad`` holds the mean over all rows of all ranks, whatever their numbers, also where
    some rank has none: what one process computes on the whole batch. Optimizers, schedulers, clipping and gradient scalers
    are used as in one process. Parameters may be frozen, trained again or left out by some ranks' forward at any time.

    Parameters
    ----------
    module : torch.nn.Module
        All ranks build the same.
    P : Partition or communicator, optional
        The ranks that hold copies. Of a Cartesian partition, those along the first axis, the batch; along the others
        the module's own layers may cut its tensors. None is the ambient world. A rank outside gets a zero-volume
        tensor that requires grad, so that backward is the same line everywhere.
    optimizer : DataParallelOptimizer or sequence of them, optional
        Those whose steps `update` speaks of.
    blocking_parameter_updates : bool, optional
        Heat's word for `update`: False is "deferred", True "now".
    average : {"samples", "sum", "ranks", "none"}
        "samples": each rank's loss is a mean over its rows, and weighs as many: the size along `dim` of the first tensor that
        has it, of the positional arguments and then those by name, whatever the others' sizes; or what ``loss_weight`` is set
        to before backward, such as a number of tokens. "sum": each rank's loss is a sum
        over its rows; the sum of all is divided by the number of rows, which adds up over backwards inside `no_sync`.
        "ranks": the mean of the ranks' gradients, as torch's DistributedDataParallel. "none": their sum.
    sync_buffers : {"root", "mean", "none"}
        What happens to buffers, such as running statistics, when gradients have been summed: the values of the first rank,
        the mean over the ranks (integers of the first), or nothing.
    engine : {"auto", "inline", "thread", "poll"}
        Who makes the sums: backward itself when it ends, a thread of the library's, or MPI when it can, which is also
        used in place of a thread where MPI does not support several. "auto" is the thread for a model with more than
        2 MiB of gradients.
    update : {"now", "deferred"}
        "deferred": backward does not wait for the sums, and an optimizer's step happens in the next forward, bucket by
        bucket, before a layer uses its parameters; the result is the same bit by bit. See `DataParallelOptimizer`.
    overlap : bool
        Whether the sums of a thread or MPI start while backward runs; without, when it ends.
    init : {"broadcast", "check", "none"}
        Parameters and buffers at the start: those of the first rank; must be the same everywhere; are left as they are.
    dim : int
        The batch's dim.
    bucket_mb : float, optional
        MiB of gradients that are summed in one message, 4 by default.
    comm_hook : callable, optional
        Called with each `Bucket` before it is summed, by all ranks; may change ``bucket.gradients`` in place.
    timeout : float, optional
        Seconds to wait for other ranks before a TimeoutError, after which the container is of no more use, and the job ends
        with exit code 1 when this rank does. By default 1800 where a thread or MPI makes the sums, and no limit where
        backward itself does.

    Raises
    ------
    ValueError
        On all ranks if they hold different modules, parameters that are in another container, or layers that sum over the
        batch axis beside others whose gradients get a mean; for a sparse or expanded buffer that is to get other ranks' values;
        or if an argument of one of them is not among these.
    TypeError
        For a layer with sparse gradients, or an argument of another type, on all ranks.

    Notes
    -----
    A parameter of a distributed layer is left to the layer where its replicas are on all ranks along the batch axis. There
    the loss is a global one, as the distributed losses are, and parameters of other layers need ``average="none"``.
    `SyncBatchNorm` is for losses of each rank's own: with it inside, gradients get their weights when backward begins, for
    which 8 bytes are summed.
    In training an output that depends on no parameter requires grad all the same, so that each rank can call backward.
    ``state_dict`` has the module's own names; with or without ``module.`` before them they can be loaded.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     model = dl.DataParallel(torch.nn.Linear(3, 1, bias=False))
    ...     x = torch.ones(2 + world.rank, 3) * (1 + world.rank)  # 2 rows of ones, 3 of twos
    ...     model(x).mean().backward()
    ...     return [round(g, 4) for g in model.module.weight.grad[0].tolist()]
    >>> dl.testing.spmd(2, body)
    [[1.6, 1.6, 1.6], [1.6, 1.6, 1.6]]
    """

    def __init__(
        self,
        module: torch.nn.Module,
        P: Any = None,
        optimizer: Any = None,
        blocking_parameter_updates: bool | None = None,
        *,
        average: str = "samples",
        sync_buffers: str = "root",
        engine: str = "auto",
        update: str = "now",
        overlap: bool = True,
        init: str = "broadcast",
        dim: int = 0,
        bucket_mb: float | None = None,
        comm_hook: Callable[[Bucket], None] | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        check_ranks(P)
        self.P = partition_of(P)
        with refused_together(self.P, "DataParallel"):
            check_module(module)
            options = Options(average, sync_buffers, engine, update, overlap, init, dim, bucket_mb, comm_hook, timeout)
            update = update_of(optimizer, blocking_parameter_updates, update)
            self._options = replace(options, update=update)
        self.module = module
        self.dim = dim
        self.optimizer = optimizer
        self.__dict__.update(_unprepared())
        self.register_load_state_dict_pre_hook(DataParallel._rename_loaded)
        if self.P.active:
            self._prepare(at_start=True)

    @property
    def comm(self) -> Any:
        """The communicator of P, for the user's own traffic."""
        return self.P.comm

    def _prepare(self, at_start: bool = False) -> None:
        """Take the module's parameters as they are; the ranks along the batch axis call together."""
        self.synchronize()
        if self._sync is not None and self._sync.leave():
            if self._deferral is not None:
                self._sync.team.world.gather_objects(self._sync.team, False)  # as the others do before they raise
            raise RuntimeError(
                "DataParallel: parameters were replaced, or have another dtype or shape, on some ranks alone"
            )
        team, self._sync = line_of(self.P).team, None
        if self._deferral is not None:
            self._deferral.remove()
            self._deferral = None
        # It mixes the gradients of the ranks' own losses, which must have their weights by then.
        has_sync_norm = any(isinstance(layer, SyncBatchNorm) for layer in self.module.modules())
        self._couples = team.size > 1 and has_sync_norm and self._options.average != "none"
        writes_buffers = self._options.sync_buffers != "none" or (at_start and self._options.init != "none")
        weighs_late = self._options.average != "none" and not self._couples
        told = told_of(self._options, listed(self.optimizer), self.module)
        named, late, lane = agreed(self.module, team, told, writes_buffers, weighs_late)
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        names, parameters = [n for n, _ in named], [p for _, p in named]
        modules = list(self.module.modules())
        buffers_now = partial(_values, [module._buffers for module in modules])
        self._sync = Synchroniser(names, parameters, late, buffers_now, team, self._options, lane, self._couples)
        self._owners = [owned for module in modules for owned in (module._modules, module._parameters)]
        self._held, self._kinds = _values(self._owners), list(map(_KIND, parameters))
        wants = not self._options.waits and team.size > 1
        self._deferral = Deferral(self.module, self._sync, listed(self.optimizer)) if wants else None

    @property
    def blocking_parameter_updates(self) -> bool:
        """Whether parameters are updated at once."""
        return self._options.waits

    def synchronize(self) -> None:
        """Wait for the sums of the last backward, and take the steps that were deferred."""
        if self._deferral is not None:
            self._deferral.flush()

    def check_replicas(self) -> None:
        """Raise RuntimeError, on all ranks, unless they hold the same parameters and buffers, bit by bit."""
        self.synchronize()
        if self.P.active:
            team = line_of(self.P).team
            named = summed_by_container(self.module, summed_by_layers(self.module, team))
            buffers = () if self._options.sync_buffers == "none" else self.module.named_buffers()
            check_equal(team, {**dict(named), **dict(buffers)})

    def _refresh(self) -> None:
        """See what has changed in the module since the last forward."""
        held = _values(self._owners)
        if (
            self._sync is None
            or len(held) != len(self._held)
            or not all(map(operator.is_, held, self._held))
            or list(map(_KIND, self._sync.parameters)) != self._kinds
        ):
            self._prepare()
        sync = self._sync
        if sync.is_broken:
            raise RuntimeError("DataParallel: an earlier sum was not completed by all ranks; end the job")
        if sync.team.size == 1 and self._options.average != "sum":
            return
        trained = {n for n, p in enumerate(sync.parameters) if p.requires_grad}
        for number in trained - sync.late - self._handles.keys():
            hook = WeakHook(self, lambda container, _, number=number: container._came(number))
            self._handles[number] = sync.parameters[number].register_post_accumulate_grad_hook(hook)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's, of this rank's rows."""
        if not self.P.active:
            return zero_volume_tensor().requires_grad_(torch.is_grad_enabled())
        if not torch.is_grad_enabled():
            self.synchronize()
            return self.module(*inputs, **kwargs)
        self._refresh()
        with contextlib.nullcontext() if self._deferral is None else self._deferral.in_forward():
            output = self.module(*inputs, **kwargs)
        if self.training and len(self._sync.team) > 1 and any(p.requires_grad for p in self._sync.parameters):
            output = with_graph(output)
        self._watch(output, rows_of((inputs, kwargs), self.dim))
        return output

    def _watch(self, output: Any, rows: int) -> None:
        """Be told when backward reaches an output."""
        self._latest = rows
        hook = OutputHook(weakref.ref(self), rows)
        leaves = [t for t in tensors_in(output) if t.grad_fn is not None]  # a parameter would keep the hook
        for leaf in leaves:
            leaf.register_hook(hook)
        if leaves:
            self._awaited.add(hook)
        else:
            self._unseen += rows

    def _began(self, rows: int) -> None:
        """Backward has reached the outputs of a forward with so many rows."""
        sync, backward = self._sync, running_backward()
        if sync is None or (sync.team.size == 1 and self._options.average != "sum"):
            return
        if not running_backward_accumulates(sync.parameters):
            return
        if not self._syncs:
            if sync.is_open and self._deferral is None:
                sync.abandon()
            sync.keep_local(backward)
            sync.count += rows
            return
        if not (sync.is_open and sync.backward == backward):
            self._begin(backward, rows)
        sync.count_rows(rows)
        sync.may_start = not self._awaited

    def _begin(self, backward: int, rows: int) -> None:
        sync = self._sync
        if self._deferral is not None:
            self._deferral.begin_backward()
        sync.begin(backward)
        if torch.is_grad_enabled():
            sync.fail(
                "DataParallel: backward(create_graph=True) would lose the graph of the gradients in their sum over the ranks; "
                "torch.autograd.grad(..., create_graph=True) keeps that of the rank's own"
            )
        sync.weight = self.loss_weight
        sync.count, self._unseen = sync.count + self._unseen, 0
        if not (sync.count + rows if self.loss_weight is None else self.loss_weight):
            sync.put_aside_unweighted()
        sync.may_start = not self._awaited
        self._waits_for_layers = bool(sync.late)
        at_end_of_backward(self._finish)

    def _came(self, number: int) -> None:
        """A gradient has been added to ``.grad``."""
        sync = self._sync
        if sync is None:
            return
        if not self._syncs:
            sync.keep_local(running_backward())
            return
        if self._deferral is not None:
            self._deferral.came(number)
        if not sync.is_open:  # the outputs are out of sight, or backward does not go through them
            self._begin(running_backward(), self._latest)
            sync.count = sync.count or self._latest
        sync.ready(number)

    def _finish(self) -> None:
        if self._waits_for_layers:  # whose own sums are put into .grad by a callback that comes after this one
            self._waits_for_layers = False
            at_end_of_backward(self._finish)
            return
        sync = self._sync
        self.loss_weight = None  # the sums have it
        if self._deferral is None:
            sync.finish()
        else:
            sync.start_rest()
            self._deferral.after_backward()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backwards inside only add up this rank's gradients; the next one outside sums all of them."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def join(self, *optimizers: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
        """Let ranks whose loop inside ends early take part, without weight, until all have ended; no messages are added.

        Then all take the parameters and buffers of a rank that made the last step, and what these optimizers, or else those
        of the container, know there: hyperparameters, and states such as momentum. Schedulers are left alone.

        Raises
        ------
        ValueError
            On all ranks, unless they name optimizers of the same types with the same parameters in the same order.
        RuntimeError
            Inside the join of another container of these ranks; and on all other ranks, if one of them raises inside.
        """
        return joined(self, optimizers)

    def __getattr__(self, name: str) -> Any:
        """The module's attributes are the container's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            found = getattr(super().__getattr__("module"), name)
            if isinstance(found, torch.Tensor):
                self.synchronize()
            return found

    @property
    def weight(self) -> Any:
        """The module's, which a bare layer has; a number put here is the `loss_weight`."""
        self.synchronize()
        return self.module.weight

    @weight.setter
    def weight(self, value: float | None) -> None:
        if isinstance(value, torch.Tensor) and value.dim():
            what = f"a tensor of shape {tuple(value.shape)}"
            raise TypeError(f"DataParallel: weight is the loss's, a number, not {what}; a layer's is module.weight")
        self.loss_weight = value

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return {name: value for name, value in self.__dict__.items() if name not in _unprepared()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.update(_unprepared())

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", {}).values():
            handle.remove()

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """As torch's, which `train`, `to` and `apply` go through; a deferred update is done first."""
        self.synchronize()
        return super().named_children()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As torch's; a deferred update is done first."""
        self.synchronize()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module.state_dict(*args, **kwargs)

    @staticmethod
    def _rename_loaded(self: torch.nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        own = self.module.state_dict().keys()  # type: ignore[union-attr,operator]
        for key in [key for key in state if key.startswith(prefix)]:
            name = key[len(prefix) :]
            if name in own or not name.startswith("module."):
                state[f"{prefix}module.{name}"] = state.pop(key)

    def extra_repr(self) -> str:
        return f"{self.P!r}, average={self._options.average!r}"


def _values(owners: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [value for owned in owners for value in owned.values()]


def _unprepared() -> dict[str, Any]:
    """The state of a container that is new, copied or loaded."""
    return {
        "loss_weight": None,
        "_sync": None,
        "_deferral": None,
        "_couples": False,
        "_handles": {},
        "_owners": [],  # of the layers and parameters within the module, which may be replaced
        "_held": [],  # those
        "_kinds": [],
        "_syncs": True,
        "_unseen": 0,
        "_awaited": weakref.WeakSet(),  # outputs that backward may yet come to
        "_latest": 0,
        "_waits_for_layers": False,
    }
