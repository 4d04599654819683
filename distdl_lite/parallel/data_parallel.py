"""One copy of a module on each rank, each for its rows of the batch; gradients are averaged while backward runs."""

from __future__ import annotations

import contextlib
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from distdl_lite.agreement import refused_together
from distdl_lite.autograd import at_end_of_backward, running_backward, running_backward_accumulates
from distdl_lite.nn.movement import zero_volume_tensor
from distdl_lite.nn.parameter import Layer
from distdl_lite.nn.sync_batch_norm import SyncBatchNorm
from distdl_lite.operator import ANCHOR
from distdl_lite.parallel.arguments import (
    check_arguments,
    check_equal,
    check_ranks,
    check_same,
    check_same_module,
    listed,
    order,
    owners,
    refusal_of,
    update_of,
)
from distdl_lite.parallel.buckets import Bucket
from distdl_lite.parallel.copies import broadcast, broadcast_structure
from distdl_lite.parallel.deferred import Deferral
from distdl_lite.parallel.synchroniser import BAD_WEIGHT, Options, Synchroniser, as_weight
from distdl_lite.partition import partition_of
from distdl_lite.transport import Team

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
    P : Partition or mpi4py.MPI.Comm, optional
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
            check_arguments(
                module, average, sync_buffers, engine, update, overlap, init, dim, bucket_mb, comm_hook, timeout
            )
            self._update = update_of(optimizer, blocking_parameter_updates, update)
        self.module = module
        self.dim = dim
        self.optimizer = optimizer
        given = {"bucket_bytes": bucket_mb and math.ceil(bucket_mb * 2**20), "timeout": timeout}
        given = {name: value for name, value in given.items() if value}
        waits = self._update == "now"
        self._options = Options(average, sync_buffers, engine, overlap, comm_hook=comm_hook, waits=waits, **given)
        self._init = init
        self.__dict__.update(_unprepared())
        self.register_load_state_dict_pre_hook(DataParallel._rename_loaded)
        if self.P.active:
            self._prepare(at_start=True)

    @property
    def comm(self) -> Any:
        """The communicator of P, for the user's own traffic."""
        return self.P.comm

    def _team(self) -> Team:
        """The ranks along the batch axis."""
        P = self.P
        assert P.index is not None
        step = math.prod(P.shape[1:])
        first = P.rank - P.index[0] * step
        return P.world_transport.team(P.ranks[first + n * step] for n in range(P.shape[0]))

    def _prepare(self, at_start: bool = False) -> None:
        """Take the module's parameters as they are; the ranks along the batch axis call together."""
        self.synchronize()
        if self._sync is not None and self._sync.leave():
            if self._deferral is not None:
                self.P.world_transport.gather_objects(self._sync.team, False)  # as the others do before they raise
            raise RuntimeError(
                "DataParallel: parameters were replaced, or have another dtype or shape, on some ranks alone"
            )
        transport, team, self._sync, lane = self.P.world_transport, self._team(), None, 0
        if self._deferral is not None:
            self._deferral.remove()
            self._deferral = None
        elsewhere = self._summed_by_layers(set(team))
        named = self._named_parameters(elsewhere)
        late = [number for number, (_, p) in enumerate(named) if id(p) in elsewhere]
        buffers = dict(self.module.named_buffers())
        tensors = {**dict(named), **buffers}
        # It mixes the gradients of the ranks' own losses, which must have their weights by then.
        has_sync_norm = any(isinstance(layer, SyncBatchNorm) for layer in self.module.modules())
        self._couples = team.size > 1 and has_sync_norm and self._options.average != "none"
        is_many, o = team.size > 1, self._options
        alike = tensors if o.sync_buffers != "none" or (at_start and self._init != "none") else dict(named)
        mixed, written = (self._of_two_scales(elsewhere), alike.items()) if is_many else ([], ())
        refusal = refusal_of(transport, named, written, self._sparse_layers(), mixed, o.average)
        if is_many:
            lane = check_same_module(transport, team, tensors, refusal, self._agreed_options())
            if self._init == "broadcast":
                broadcast(transport, team, list(alike.values()))
            elif self._init == "check":
                check_equal(transport, team, alike)
        elif refusal is not None:
            raise refusal
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        names, parameters = [n for n, _ in named], [p for _, p in named]
        modules = list(self.module.modules())
        buffers_now = partial(_values, [module._buffers for module in modules])
        self._sync = Synchroniser(
            names, parameters, late, buffers_now, transport, team, self._options, lane, self._couples
        )
        self._owners = [owned for module in modules for owned in (module._modules, module._parameters)]
        self._held, self._kinds = _values(self._owners), list(map(_KIND, parameters))
        wants = self._update == "deferred" and team.size > 1
        self._deferral = Deferral(self.module, self._sync, listed(self.optimizer)) if wants else None

    @property
    def blocking_parameter_updates(self) -> bool:
        """Whether parameters are updated at once."""
        return self._update == "now"

    def synchronize(self) -> None:
        """Wait for the sums of the last backward, and take the steps that were deferred."""
        if self._deferral is not None:
            self._deferral.flush()

    def _summed_by_layers(self, team: set[int]) -> dict[int, bool]:
        """The parameters of distributed layers, and whether their sum covers the batch axis."""
        found = {}
        for name, layer in self.module.named_modules():
            for key, place in layer._distdl_places.items() if isinstance(layer, Layer) else ():
                replicas = set(place.replicas.team)
                if team - replicas and len(team & replicas) > 1:
                    raise ValueError(
                        f"DataParallel: {name}.{key} has replicas on ranks {sorted(replicas)}, some of the ranks "
                        f"{sorted(team)} of the batch axis; they must be all of them, or one"
                    )
                if layer._parameters.get(key) is not None:
                    found[id(layer._parameters[key])] = not team - replicas
        return found

    def _named_parameters(self, elsewhere: Mapping[int, bool]) -> list[tuple[str, torch.nn.Parameter]]:
        """Those that the container sums."""
        return [(name, p) for name, p in self.module.named_parameters() if not elsewhere.get(id(p))]

    def _of_two_scales(self, elsewhere: Mapping[int, bool]) -> list[str]:
        """A parameter that its layer sums over the batch axis and one that gets the mean, if both are trained."""
        if self._couples or self._options.average == "none":  # weighed before either is summed, or not at all
            return []
        trained = [(n, elsewhere.get(id(p), False)) for n, p in self.module.named_parameters() if p.requires_grad]
        found = [next((n for n, covers in trained if covers is by_layer), None) for by_layer in (True, False)]
        return [n for n in found if n is not None] if None not in found else []

    def _agreed_options(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        o = self._options
        hook = o.comm_hook
        return {
            "average": o.average,
            "sync_buffers": o.sync_buffers,
            "engine": o.engine,
            "overlap": o.overlap,
            "init": self._init,
            "bucket_mb": o.bucket_bytes / 2**20,
            "dim": self.dim,
            "timeout": o.timeout,
            "update": self._update,
            "comm_hook": hook and getattr(hook, "__qualname__", type(hook).__qualname__),
            **owners(listed(self.optimizer), self.module.named_parameters()),
        }

    def _sparse_layers(self) -> list[str]:
        return [
            name or type(m).__name__ for name, m in self.module.named_modules() if getattr(m, "sparse", False) is True
        ]

    def check_replicas(self) -> None:
        """Raise RuntimeError, on all ranks, unless they hold the same parameters and buffers, bit by bit."""
        self.synchronize()
        if self.P.active:
            team = self._team()
            buffers = {} if self._options.sync_buffers == "none" else dict(self.module.named_buffers())
            held = {**dict(self._named_parameters(self._summed_by_layers(set(team)))), **buffers}
            check_equal(self.P.world_transport, team, held)

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
        assert sync is not None
        if sync.is_broken:
            raise RuntimeError("DataParallel: an earlier sum was not completed by all ranks; end the job")
        if sync.team.size == 1 and self._options.average != "sum":
            return
        trained = {n for n, p in enumerate(sync.parameters) if p.requires_grad}
        for number in trained - sync.late - self._handles.keys():
            hook = _ReadyHook(weakref.ref(self), number)
            self._handles[number] = sync.parameters[number].register_post_accumulate_grad_hook(hook)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's, of this rank's rows."""
        if not self.P.active:
            return zero_volume_tensor().requires_grad_(torch.is_grad_enabled())
        if not torch.is_grad_enabled():
            self.synchronize()
            return self.module(*inputs, **kwargs)
        self._refresh()
        output = self._joined(self._call_module(*inputs, **kwargs))
        self._watch(output, self._rows(inputs, kwargs))
        return output

    def _call_module(self, *inputs: Any, **kwargs: Any) -> Any:
        if self._deferral is None:
            return self.module(*inputs, **kwargs)
        self._deferral.begin_forward()
        try:
            return self.module(*inputs, **kwargs)
        finally:
            self._deferral.end_forward()

    def _joined(self, output: Any) -> Any:
        """The output; in training, one that depends on no parameter gets a graph, so that its backward meets the other ranks."""
        sync = self._sync
        assert sync is not None
        if not self.training or sync.team.size == 1 or not any(p.requires_grad for p in sync.parameters):
            return output
        if any(leaf.requires_grad for leaf in _tensors(output)):
            return output
        return tree_map_only(torch.Tensor, lambda x: _Joined.apply(x, ANCHOR), output)

    def _rows(self, inputs: Any, kwargs: Any) -> int:
        for leaf in _tensors((inputs, kwargs)):
            if -leaf.dim() <= self.dim < leaf.dim():
                return leaf.shape[self.dim]
        return 1

    def _watch(self, output: Any, rows: int) -> None:
        """Be told when backward reaches an output."""
        self._latest = rows
        hook = _OutputHook(weakref.ref(self), rows)
        for leaf in _tensors(output):
            if leaf.grad_fn is not None:  # a parameter that is returned would keep the hook
                leaf.register_hook(hook)
                hook.is_used = True
        if hook.is_used:
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
            sync.keep_local()
            self._told_at_end = backward
            sync.count += rows
            return
        if not (sync.is_open and sync.backward == backward):
            self._begin(backward, rows)
        sync.count_rows(rows)
        sync.may_start = not self._awaited

    def _share(self, rows: int) -> float:
        """The weight in the mean of a forward's gradients; the ranks along the batch axis call together."""
        sync, average = self._sync, self._options.average
        assert sync is not None
        if average == "ranks":
            return 1 / sync.team.size
        if average == "sum" and not self._syncs:
            raise RuntimeError('DataParallel: with SyncBatchNorm inside, average="sum" allows no no_sync')
        weight = float(rows) if self.loss_weight is None else as_weight(self.loss_weight)
        total = self.P.world_transport.all_reduce(sync.team, torch.tensor([weight], dtype=torch.float64)).item()
        if not math.isfinite(total):
            self.loss_weight = None
            raise ValueError(BAD_WEIGHT)
        return 0.0 if not (weight and total) else (weight if average == "samples" else 1.0) / total

    def _begin(self, backward: int, rows: int) -> None:
        assert self._sync is not None
        if self._deferral is not None:
            self._deferral.begin_backward()
        self._sync.begin(backward)
        if torch.is_grad_enabled():
            self._sync.fail(
                "DataParallel: backward(create_graph=True) would lose the graph of the gradients in their sum over the ranks; "
                "torch.autograd.grad(..., create_graph=True) keeps that of the rank's own"
            )
        self._sync.weight = self.loss_weight
        self._sync.count, self._unseen = self._sync.count + self._unseen, 0
        if not (self._sync.count + rows if self.loss_weight is None else self.loss_weight):
            self._sync.keep_what_weighs_nothing()
        if self._deferral is None and not self._sync.starts_early:
            self._told_at_end = backward
        self._sync.may_start = not self._awaited
        self._waits_for_layers = bool(self._sync.late)
        at_end_of_backward(self._finish)

    def _came(self, number: int) -> None:
        """A gradient has been added to ``.grad``."""
        sync = self._sync
        if sync is None:
            return
        if not self._syncs:
            self._told_at_end = running_backward()
            sync.keep_local()
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
        assert sync is not None
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

    @contextlib.contextmanager
    def join(self, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
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
        if self.P.active:
            self._refresh()  # where it is a copy or has been loaded, as ranks that make no step must know
        if self._couples:
            raise RuntimeError("DataParallel: SyncBatchNorm needs all ranks in every step; join is not for it")
        given, transport, sync = optimizers or listed(self.optimizer), self.P.world_transport, self._sync
        if sync is None or sync.team.size == 1:
            yield
            return
        check_same(transport, sync.team, order(given, self.module.named_parameters()))
        joined = transport.local.setdefault("teams in join", [])
        if sync.team in joined:
            raise RuntimeError(
                "DataParallel: ranks that have ended would wait in one join while others are in that of another container; "
                "put both modules into one container"
            )
        joined.append(sync.team)
        try:
            yield
        except Exception as error:
            self._leave_join(error)
            raise
        finally:
            joined.remove(sync.team)
        self.synchronize()
        sync = self._sync  # another where parameters were replaced
        steps_behind = -1
        takes_part = True
        while takes_part:
            sync.begin(None, takes_part=False)
            takes_part = sync.finish()
            steps_behind += 1
        place = sync.team.index(transport.rank)
        nearest = torch.tensor([steps_behind * sync.team.size + place])
        transport.all_reduce(sync.team, nearest, "min")
        root = sync.team[int(nearest) % sync.team.size]
        broadcast(transport, sync.team, [*sync.parameters, *sync.buffers], root)
        for optimizer in given:
            state = broadcast_structure(transport, sync.team, optimizer.state_dict(), root)
            if transport.rank != root:
                optimizer.load_state_dict(state)

    def _leave_join(self, error: Exception) -> None:
        """Let the other ranks, who are in a step or have ended, raise this rank's error, unless all have failed together."""
        sync, deferral = self._sync, self._deferral
        if sync is None or sync.is_broken or sync.has_failed:
            return
        with contextlib.suppress(Exception):
            if deferral is not None and not deferral.is_interrupted:
                deferral.flush()
            sync.abandon(error)

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


class _Joined(torch.autograd.Function):
    """The identity, of which the result requires grad and leads nowhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


class _OutputHook:
    """Tells a container that backward has reached an output of a forward, once in each backward."""

    def __init__(self, container: weakref.ref[DataParallel], rows: int) -> None:
        self._container, self._rows, self._backward, self._share = container, rows, -1, 1.0
        self.is_used = False

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        container, backward = self._container(), running_backward()
        if container is None:
            return None
        if backward != self._backward:
            self._backward = backward
            container._awaited.discard(self)
            container._began(self._rows)
            self._share = container._share(self._rows) if container._couples else 1.0
        if self._share == 1:
            return None
        return gradient * self._share if self._share else torch.zeros_like(gradient)


class _ReadyHook:
    """Tells a container that a gradient is there."""

    def __init__(self, container: weakref.ref[DataParallel], number: int) -> None:
        self._container, self._number = container, number

    def __call__(self, parameter: torch.Tensor) -> None:
        container = self._container()
        if container is None:
            return
        if container._told_at_end != running_backward():
            container._came(self._number)
        elif container._sync is not None:
            container._sync.seen[self._number] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadyHook:
        return self


def _tensors(value: Any, seen: tuple[Any, ...] = ()) -> Iterator[torch.Tensor]:
    """The tensors in a structure of lists, dictionaries and objects."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif not isinstance(leaf, (type, torch.nn.Module)) and not any(leaf is other for other in seen):
            inside = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
            for part in inside.values():
                yield from _tensors(part, (*seen, leaf))


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
        "_told_at_end": -1,  # of the gradients of this backward
    }
