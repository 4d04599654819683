"""torch.nn.DataParallel over ranks: one rank holds the script, the weights and the loss, the others compute.

Repartition - Broadcast - apply - Repartition: the root's rows are cut over the ranks, its weights broadcast, the module
applied, the outputs' rows put together on the root. Backward is the adjoints in reverse order around a local backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from torch.utils import _pytree as pytree

from distdl_lite.agreement import as_raised, check_alike
from distdl_lite.autograd import ANCHOR
from distdl_lite.nn.inputs import zero_volume_tensor
from distdl_lite.nn.module import Module
from distdl_lite.parallel.replicas.data_parallel import DataParallel
from distdl_lite.parallel.root.batch import Places
from distdl_lite.parallel.root.passes import Passes
from distdl_lite.parallel.root.protocol import NAME, Agreed, Order, meet, unwrapped
from distdl_lite.parallel.root.run import Result, Run
from distdl_lite.partition import partition_of
from distdl_lite.private import backward_keeps_graph, running_backward, transforms_are_active, untraced


class RootDataParallel(torch.nn.Module):
    """A module whose batch is cut over ranks, with `torch.nn.DataParallel`'s semantics.

    One rank, the root, holds the data, the weights, the optimizer and the loss. At each call its tensors are cut along `dim`
    over the ranks, every rank applies the module with the root's weights to its rows, and the outputs are put together on
    the root. Values and gradients are those of the plain module, for any batch.

    Parameters
    ----------
    module : torch.nn.Module
        On the root the model; on other ranks one of the same structure, whose weights are not read and may be on ``meta``,
        and are replaced by copies of the root's. It holds no distributed layers or containers.
    P : Partition or communicator, optional
        The ranks that build the container together; None is the ambient world.
    dim : int
        The dim along which tensors are cut and outputs put together; it may count from the end.
    device_ids : sequence of int, optional
        The ranks of `P` that compute, in the order of the rows they get; all by default. Others take no part: they pass
        nothing, and get a zero-volume tensor.
    output_device : int, optional
        The root, a rank of `P` among `device_ids`; the first of these by default.

    Raises
    ------
    TypeError, ValueError
        On all ranks of `P`, if an argument does not fit or differs between them.

    Notes
    -----
    *Arguments*, positional or by keyword, and outputs are nested in tuples, lists, dicts and namedtuples. Tensors with dims
    are cut in shares that differ by one row at most, and must all have the same number of rows. Tensors without dims are
    copied, and their gradients added up; anything else is pickled. Where there are no rows, the root alone applies the
    module, once.

    *Outputs* on the root: tensors are put together, of those without dims a vector of one entry per rank that had rows. None
    stays None, and what else is no tensor is the root's. On other ranks a zero-volume tensor stands for all of it.

    *Other ranks* take part in each forward and backward. Either they say so: ``dp()`` for a forward, and
    ``dp().sum().backward()`` for one that has a backward, in the root's order. Or they are in `serve`, and the root's script
    runs as if it were alone.

    *Weights* travel where the root's have changed, and at the first call: one broadcast per dtype for the parameters, one for
    the buffers. The root compares bits, and keeps a copy for it. Gradients are added up on the root by one reduction per
    dtype; an unused parameter gets none, as in the plain module. Training mode, ``requires_grad``, grad mode and autocast are
    the root's. All else about the module, such as attributes, hooks and layers, is changed on all ranks, so before `serve`:
    layers of other kinds, and options of torch's layers that they print, are then an error on all ranks, other changes are not
    seen. Buffers that the module changes in forward stay changed on the root alone, which sees its own rows, as device 0 does
    under torch; attributes that it changes in forward are each rank's own, as are tensors that are no buffers. Dropout draws
    from each rank's own generator.

    *Collectives*: a forward makes two gathers of host objects, a backward too; the rest are the broadcasts, the
    reductions, and one message per tensor and rank.

    An error of any rank's module, forward or backward, is raised on all of them, with the same type and text, which names the
    replica; one of a type of its own is a RuntimeError. With one rank the module is called directly. A gradient of a gradient
    raises.

    ``state_dict()`` is that of `torch.nn.DataParallel`, with the prefix ``module.``; the root's is the one to save.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.RootDataParallel(torch.nn.Linear(3, 1, bias=False))
    ...     y = net(torch.ones(5, 3)) if world.rank == 0 else net()
    ...     y.sum().backward()
    ...     return tuple(y.shape), net.module.weight.grad if world.rank else net.module.weight.grad.tolist()
    >>> dl.testing.spmd(2, body)
    [((5, 1), [[5.0, 5.0, 5.0]]), ((0,), None)]
    """

    def __init__(
        self,
        module: torch.nn.Module,
        P: Any = None,
        dim: int = 0,
        *,
        device_ids: Sequence[int] | None = None,
        output_device: int | None = None,
    ) -> None:
        super().__init__()
        self.P = partition_of(P)
        self.dim = dim
        self.device_ids = list(range(self.P.size)) if device_ids is None else list(device_ids)
        self.output_device = next(iter(self.device_ids), 0) if output_device is None else output_device
        self.__dict__.update(_unused())
        with unwrapped():
            self._construct(module)
        self.module = module
        self._register()

    def _construct(self, module: torch.nn.Module) -> None:
        """Check the arguments, together on all ranks of P, and agree on a number."""
        if not self.P.active:
            self._check(module)
            return
        transport, ranks, error = self.P.world_transport, tuple(self.P.ranks), None
        try:
            self._check(module)
        except Exception as found:
            error = found
        settings = {"dim": self.dim, "device_ids": self.device_ids, "output_device": self.output_device}
        mine = Order("construct", content=(settings, transport.local.get(_NUMBER, 0)), error=as_raised(error, NAME))
        orders = meet(transport.team(ranks), ranks[0], mine, error)
        for name in settings:
            check_alike(name, {rank: order.content[0][name] for rank, order in orders.items()}, NAME)
        transport.local[_NUMBER] = max(order.content[1] for order in orders.values())

    def _check(self, module: torch.nn.Module) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module={module!r} is no torch.nn.Module")
        kinds = Module, DataParallel, RootDataParallel
        cut = [name for name, inner in module.named_modules() if isinstance(inner, kinds)]
        if cut:
            raise TypeError(f"the module holds distributed layers ({', '.join(name or 'itself' for name in cut)})")
        if not isinstance(self.dim, int):
            raise TypeError(f"dim={self.dim!r} is no integer")
        if not self.device_ids:
            raise ValueError("device_ids is empty")
        self.P.create_partition_inclusive(self.device_ids)
        if self.output_device not in self.device_ids:
            raise ValueError(f"output_device={self.output_device} is not among device_ids={self.device_ids}")

    def _register(self) -> None:
        """Take the next number, by which the ranks know the container."""
        transport = self.P.world_transport
        self._number = transport.local[_NUMBER] = transport.local.get(_NUMBER, 0) + 1
        transport.local.setdefault(_CONTAINERS, WeakValueDictionary())[self._number] = self
        ranks = tuple(self.P.ranks[rank] for rank in self.device_ids)
        self._team = Places(transport, ranks, self.device_ids.index(self.output_device))
        self._passes = Passes(self._team)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_unused()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, device_ids={self.device_ids}, output_device={self.output_device}"

    @property
    def _is_root(self) -> bool:
        return self._team.place == self._team.root

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module; see the class. torch.compile does not look inside."""
        if self._is_root and len(self._team.ranks) == 1:
            return self.module(*args, **kwargs)
        leaves, nesting = pytree.tree_flatten((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
        with self._together():
            if self._is_root:
                return self._forward_on_root(leaves, nesting, tensors)
            return self._forward_elsewhere(tensors)

    def _forward_on_root(self, leaves: list[Any], nesting: Any, tensors: list[torch.Tensor]) -> Any:
        call = weights = error = None
        try:
            self._check_surroundings()
            call, weights = self._passes.call(self.module, self.dim, leaves, nesting, tensors)
        except Exception as found:
            error = found
        self._forwards += 1
        order = self._meet("forward", self._forwards, call, error)
        run, result = self._forward(order, tensors, weights)
        assert weights is not None
        assert result is not None
        outputs = iter(self._returned(run, [tensor for tensor in (*weights, *tensors) if tensor.requires_grad]))
        items = [next(outputs) if isinstance(item, torch.Tensor) else item for item in result.items]
        return pytree.tree_unflatten(items, result.nesting)

    def _check_surroundings(self) -> None:
        if transforms_are_active():
            raise RuntimeError("torch.func's transforms (grad, vmap, ...) see the graph of one rank alone")
        if self._team.transport.local.get(_BLOCKS) and running_backward() != -1:
            raise RuntimeError(
                "called again in a backward, as by a checkpoint around it: the ranks in serve() would draw other random "
                "numbers; put the checkpoint inside the module"
            )

    def _forward_elsewhere(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        error = None
        if any(tensor.numel() and tensor.dim() for tensor in tensors):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            text = f"{NAME}: rank {self._team.transport.rank} passed tensors of shapes {shapes}, but is not the root"
            error = ValueError(text)
        if self._team.place is not None:
            run, _ = self._forward(self._meet("forward", error=error))
            return self._returned(run, tensors)[0]
        if error is not None:
            raise error
        return zero_volume_tensor().requires_grad_(torch.is_grad_enabled())

    def _forward(
        self, order: Order, tensors: list[torch.Tensor] | None = None, weights: list[torch.Tensor] | None = None
    ) -> tuple[Run, Result | None]:
        return self._passes.forward(self.module, order.number, order.content, self._gather, tensors, weights)

    def _returned(self, run: Run, passed: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs of forward, with the node whose backward all ranks run together."""
        differentiable = [output.requires_grad for output, _ in run.outputs]
        if not self._is_root:
            run.returned, differentiable = [zero_volume_tensor()], [any(differentiable)]
        if not any(differentiable):
            return tuple(run.returned)
        with torch.enable_grad():
            return _Returned.apply(self, run, differentiable, ANCHOR, *passed)

    def _meet(self, kind: str, number: int = 0, content: Any = None, error: Exception | None = None) -> Order:
        dropped = tuple(self._dropped)
        del self._dropped[: len(dropped)]
        mine = Order(kind, self._number, number, content, as_raised(error, NAME), dropped)
        order = meet(self._team.team, self._team.root_rank, mine, error)[self._team.root_rank]
        self._team.transport.local[_IN_CALL] = order.kind != "leave"
        return order

    def _gather(self, kind: str, number: int, value: Any, error: BaseException | None) -> dict[int, Any]:
        """The ranks' values by position, without those that have None; the error is one of this rank's replica."""
        where = f"{NAME}: replica {self._team.place}, on rank {self._team.transport.rank}"
        mine = Order(kind, self._number, number, value, as_raised(error, where))
        orders = meet(self._team.team, self._team.root_rank, mine, error)
        found = [orders[rank].content for rank in self._team.ranks]
        return {place: content for place, content in enumerate(found) if content is not None}

    @contextmanager
    def serve(self) -> Iterator[bool]:
        """Let the root run a script that was written for one process.

        On the root the block runs as any other. Other ranks stay at its head, and answer each forward and backward of any
        container over the same ranks until the root leaves its block, also by an error; then they enter theirs.

        Yields
        ------
        bool
            Whether this rank is the root: ``with dp.serve() as at_root: if at_root: main()``.
        """
        with unwrapped():
            if not self._is_root:
                self._answer_until_left()
        local = self._team.transport.local
        local[_BLOCKS], local[_IN_CALL] = local.get(_BLOCKS, 0) + 1, False
        try:
            yield self._is_root
        finally:
            local[_BLOCKS] -= 1
            if self._is_root and len(self._team.ranks) > 1 and not local[_IN_CALL]:
                with unwrapped():
                    self._meet("leave")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A forward or backward; what the other ranks are not told of leaves them in it."""
        with unwrapped():
            try:
                yield
            except Agreed:
                self._team.transport.local[_IN_CALL] = False
                raise
        self._team.transport.local[_IN_CALL] = False

    def _answer_until_left(self) -> None:
        containers = self._team.transport.local[_CONTAINERS]
        while self._team.place is not None and not self._left:
            try:
                order = self._meet("serve", content={n: tuple(other._served) for n, other in containers.items()})
                containers[order.container]._answer(order)
            except Agreed as agreed:  # the root raises it
                if agreed.is_over:
                    raise
        self._left = max(self._left - 1, 0)
        for other in containers.values():
            other._served.clear()

    def _answer(self, order: Order) -> None:
        for number in order.dropped:
            self._served.pop(number, None)
        if order.kind == "leave":
            self._left += 1
        elif order.kind == "forward":
            run, _ = self._forward(order)
            if any(output.requires_grad for output, _ in run.outputs):
                self._served[order.number] = run
        else:
            self._passes.backward(self._served[order.number], *order.content, self._gather)


_NUMBER = "number of the latest RootDataParallel"
_CONTAINERS = "RootDataParallel by number"
_IN_CALL = "whether the ranks are inside a call of RootDataParallel"
_BLOCKS = "blocks of RootDataParallel.serve that the script is in"


def _unused() -> dict[str, Any]:
    """The attributes of a container that has not been called."""
    return {
        "_team": None,  # `Places`
        "_passes": None,
        "_forwards": 0,  # counted by the root
        "_served": {},  # runs by number, of the forwards that the root may yet go back through
        "_dropped": [],  # on the root, numbers of those it will not
        "_left": 0,  # blocks that the root has left before this rank came to them
    }


class _Returned(torch.autograd.Function):
    """From the root's weights and tensors to its outputs, computed before; elsewhere from nothing to a zero-volume tensor.

    One node for all outputs, so that a root which uses only some of them, or asks for some gradients only, still makes the
    calls that the other ranks make.
    """

    @staticmethod
    def forward(
        ctx: Any,
        container: RootDataParallel,
        run: Run,
        differentiable: list[bool],
        anchor: torch.Tensor,
        *passed: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.container, ctx.run = container, run
        ctx.empty = None if container._is_root else [tensor.detach() for tensor in passed]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.empty(0))
        returned, run.returned = run.returned, []
        ctx.mark_non_differentiable(*[y for y, on in zip(returned, differentiable, strict=True) if not on])
        if container._is_root:
            finalize(run, container._dropped.append, run.number)
        return tuple(returned)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        container, run, error = ctx.container, ctx.run, None
        try:
            _ = ctx.saved_tensors
        except RuntimeError as raised:  # a second backward through a graph that was not kept
            error = raised
        content = backward_keeps_graph(), [gradient is not None for gradient in gradients]
        with container._together(), torch.no_grad():
            order = container._meet("backward", run.number, content, error)
            given = gradients if ctx.empty is None else None
            found = container._passes.backward(run, *order.content, container._gather, given)
        found = found if ctx.empty is None else ctx.empty
        if torch.is_grad_enabled() and found:
            found = _Once.apply(container, run.number, ANCHOR, *found)
        return (None, None, None, None, *found)


class _Once(torch.autograd.Function):
    """The identity of gradients, through which no rank can go back: their own graph was on several ranks."""

    @staticmethod
    def forward(
        ctx: Any, container: RootDataParallel, number: int, anchor: torch.Tensor, *found: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.container, ctx.number = container, number
        return tuple(None if gradient is None else gradient.detach() for gradient in found)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        error = RuntimeError("a gradient of a gradient is not supported: its graph is on several ranks")
        with ctx.container._together():
            ctx.container._meet("backward", ctx.number, error=error)
