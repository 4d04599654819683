"""Heat's DASO: nodes that train by themselves and average asynchronously, on any device and number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distdl_lite.agreement import refused_together
from distdl_lite.buckets import Flat, average, average_flats
from distdl_lite.optim.local_sgd import LocalSGD
from distdl_lite.optim.schedule import DASOSchedule, Skips, check_int
from distdl_lite.partition import partition_of

_WIRES = torch.bfloat16, torch.half, torch.float


class DASO(LocalSGD):
    """Distributed asynchronous and selective optimization, with Heat's arguments.

    Ranks of a node average after every batch or few; one rank of each node in turn averages with those of the other nodes,
    and the result, which is some batches old when it arrives, is merged with what the node has learned since. `DASOSchedule`
    says how often, from the losses that `epoch_loss_logic` is told. After the last batch of an epoch all ranks are equal.

    Parameters
    ----------
    local_optimizer : torch.optim.Optimizer
        Takes the steps.
    total_epochs : int
    comm : Partition or communicator, optional
        All ranks; the ambient world by default.
    warmup_epochs, cooldown_epochs, stability_level, max_global_skips, skip_reduction_factor, local_skip_factor
        See `DASOSchedule`.
    scheduler : LRScheduler or subclass, optional
        One made for `local_optimizer`, or a class to be made with it alone. It is stepped after every batch. One that is
        used by the caller as usual, outside, does as well.
    sending_chunk_size : int
        The most elements in a message.
    downcast_type : torch.dtype
        bfloat16 or float16: what is sent are rounded differences, see `LocalSGD`, in all phases. float: numbers travel as
        they are.
    use_mpi_groups : bool
        Without effect: communicators are made once for all optimizers, from groups.
    verbose : bool
        Whether `print0` prints.
    ranks_per_node : int, optional
        So many ranks in a row count as a node; by default those of a host.
    steps_per_epoch : int, optional
        Sets `last_batch` to one less.
    groups, buffers, engine, timeout
        As those of `LocalSGD`.

    Attributes
    ----------
    last_batch : int or None
        The number of an epoch's last batch, counted from 0; to be set before the first step unless `steps_per_epoch` is given.
    global_skip, local_skip, batches_to_wait : int
        What the schedule says now.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of the above.

    See Also
    --------
    LocalSGD : what the two have in common: collective calls, state_dict, errors.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     w = torch.nn.Parameter(torch.zeros(1))
    ...     optimizer = dl.DASO(torch.optim.SGD([w], lr=1.0), total_epochs=9, steps_per_epoch=1)
    ...     w.grad = torch.full((1,), -1.0 - 2 * world.rank)
    ...     optimizer.step()
    ...     return w.item()
    >>> dl.testing.spmd(2, body)
    [2.0, 2.0]
    """

    def __init__(
        self,
        local_optimizer: torch.optim.Optimizer,
        total_epochs: int,
        comm: Any = None,
        warmup_epochs: int = 4,
        cooldown_epochs: int = 4,
        scheduler: LRScheduler | type[LRScheduler] | None = None,
        stability_level: float = 0.05,
        max_global_skips: int = 8,
        sending_chunk_size: int = 10_000_000,
        downcast_type: torch.dtype = torch.bfloat16,
        use_mpi_groups: bool = True,
        skip_reduction_factor: int = 2,
        local_skip_factor: int = 4,
        verbose: bool = False,
        *,
        ranks_per_node: int | None = None,
        steps_per_epoch: int | None = None,
        **options: Any,
    ) -> None:
        P = partition_of(comm)
        with refused_together(P, type(self).__name__):
            if not isinstance(local_optimizer, torch.optim.Optimizer):
                raise TypeError(f"local_optimizer must be a torch.optim.Optimizer, not {local_optimizer!r}")
            schedule = DASOSchedule(
                total_epochs,
                warmup_epochs,
                cooldown_epochs,
                stability_level,
                max_global_skips,
                skip_reduction_factor,
                local_skip_factor,
            )
            check_int("sending_chunk_size", sending_chunk_size, 1)
            if not isinstance(downcast_type, torch.dtype):
                raise TypeError(f"downcast_type must be a torch.dtype, not {downcast_type!r}")
            if downcast_type not in _WIRES:
                raise ValueError(f"downcast_type must be one of {_WIRES}, not {downcast_type}")
            for name, value in (("use_mpi_groups", use_mpi_groups), ("verbose", verbose)):
                if not isinstance(value, bool):
                    raise TypeError(f"{name} must be a bool, not {value!r}")
            if steps_per_epoch is not None:
                check_int("steps_per_epoch", steps_per_epoch, 1)
            unknown = set(options) - {"groups", "buffers", "engine", "timeout"}
            if unknown:
                raise TypeError(f"DASO has no arguments {sorted(unknown)}")
            self.scheduler = _scheduler_of(scheduler, local_optimizer)
        self.last_batch = None if steps_per_epoch is None else steps_per_epoch - 1
        self.verbose = verbose
        super().__init__(
            local_optimizer,
            schedule,
            P=P,
            ranks_per_node=ranks_per_node,
            wire=downcast_type,
            chunk=sending_chunk_size,
            **options,
        )
        self._means_gradients = False

    @property
    def global_skip(self) -> int:
        return self.schedule(self.epoch, self.batch, self.losses)[0]

    @property
    def local_skip(self) -> int:
        return self.schedule(self.epoch, self.batch, self.losses)[1]

    @property
    def batches_to_wait(self) -> int:
        return self.schedule(self.epoch, self.batch, self.losses)[2]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and begin, merge or make the average that is due; the last batch's ends the epoch.

        Raises
        ------
        ValueError
            If `last_batch` is not set; or is another on some rank, on all ranks, at the first step of an epoch.
        """
        if self.batch == 0:  # or else they would soon make different calls
            self._agree(self._settings())
        if self.last_batch is None:
            raise ValueError(
                "DASO: set last_batch, the number of an epoch's last batch counted from 0, or give steps_per_epoch"
            )
        if self._means_gradients:
            self._prepare_gradients(closure)
        loss = super().step(closure)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.batch > self.last_batch:
            self.epoch, self.batch = self.epoch + 1, 0
        return loss

    def _settings(self) -> dict[str, Any]:
        return {"last_batch": self.last_batch}

    def _skips(self) -> Skips:
        every, local_every, delay = super()._skips()
        return (1, local_every, 0) if self.batch >= (self.last_batch or 0) else (every, local_every, delay)

    def _is_due(self, every: int, since: int) -> bool:
        return self.batch % every == 0

    def epoch_loss_logic(self, loss: float | torch.Tensor, loss_globally_averaged: bool = False) -> None:
        """Tell the schedule an epoch's loss on this rank; all ranks call it, once an epoch, after the last batch's step.

        What the schedule sees is the mean over the ranks, also of a loss that is a mean over them already, as a sum by MPI
        may differ in its last digit between ranks, and they would no longer follow the same schedule.
        """
        before = self.global_skip, self.local_skip, self.batches_to_wait
        self.losses = (*self.losses, self._mean_loss(loss))
        now = self.global_skip, self.local_skip, self.batches_to_wait
        self.print0(f"epoch {self.epoch}: mean loss {self.losses[-1]:g}, skips {before} -> {now}")

    def set_model(self, model: torch.nn.Module) -> None:
        """Average the model's floating-point buffers too; all ranks call it."""
        with refused_together(self._P, type(self).__name__):
            if not isinstance(model, torch.nn.Module):
                raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.replan()

    def reset(self) -> None:
        """Merge what is under way, and begin again with epoch 0; parameters and the optimizer's state stay."""
        self.drain()
        self.steps = self.epoch = self.batch = 0
        self.losses = ()
        self.zero_grad()

    def print0(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank, if `verbose`."""
        if self.verbose and self.levels.rank == self.levels.team[0]:
            print(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["local_sgd"]["scheduler"] = None if self.scheduler is None else self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        scheduler = state_dict.get("local_sgd", {}).get("scheduler")
        if self.scheduler is not None and scheduler is not None:
            self.scheduler.load_state_dict(scheduler)

    def _prepare_gradients(self, closure: Callable[[], Any] | None) -> None:
        """Put the mean over the node into the gradients, in phases in which its ranks step together."""
        if closure is not None or "found_inf" in self.__dict__:
            raise RuntimeError(
                "DASO: with DataParallelMultiGPU there is no closure, and a GradScaler is given to add_scaler"
            )
        were_equal, self._keeps_nodes_equal = self._keeps_nodes_equal, self._skips()[1] <= 1
        if not self._keeps_nodes_equal or self.levels.node.size == 1:
            return
        flats = [flat for flat in self.flats if flat.learns]
        with torch.no_grad():
            if not were_equal:
                self._make_node_equal(flats)
            self._mean_gradients([p for flat in flats for p in flat.tensors])

    def _mean_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Put the mean over the node's ranks into ``.grad``; one without counts as zeros, and stays None where all are.

        So it does on a rank that has frozen the parameter, which the others go on to train.
        """
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        self._transport.all_reduce(self.levels.node, used, "max")
        chosen = [p for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
        for p in chosen:
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        average(self.levels.node, [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen])

    def _make_node_equal(self, flats: Sequence[Flat]) -> None:
        """Average parameters and states such as momentum; of other states, as counts of steps, take the first rank's.

        States of a parameter that some rank has not stepped yet are forgotten.
        """
        states, scaler = self.optimizer.state, self._scaler
        learning = [p for flat in flats for p in flat.tensors]
        names = [sorted(states.get(p, {}), key=str) for p in learning]
        rest = [{k: v for k, v in states.get(p, {}).items() if not _is_averaged(v, p)} for p in learning]
        averaged = {
            (number, name): value
            for number, p in enumerate(learning)
            for name, value in states.get(p, {}).items()
            if p.requires_grad and _is_averaged(value, p)  # a rank may have frozen others
        }
        mine = names, rest, list(averaged), None if scaler is None else scaler.state_dict()
        told = self._transport.gather_objects(self.levels.node, mine)
        for number, p in enumerate(learning):
            if any(other[0][number] != names[number] for other in told):
                states.pop(p, None)
            elif names[number]:
                states[p].update(told[0][1][number])
        if scaler is not None:
            scaler.load_state_dict(told[0][3])
        common = [key for key in told[0][2] if learning[key[0]] in states and all(key in other[2] for other in told)]
        average_flats(self.levels.node, flats)
        average(self.levels.node, [averaged[key] for key in common])


def _is_averaged(state: Any, parameter: torch.Tensor) -> bool:
    """Whether an optimizer's state of a parameter is of its shape and kind, such as momentum."""
    return (
        isinstance(state, torch.Tensor)
        and state.shape == parameter.shape
        and (state.is_floating_point() or state.is_complex())
    )


def _scheduler_of(given: Any, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    if given is None:
        return None
    kind = given if isinstance(given, type) else type(given)
    if not issubclass(kind, LRScheduler) or issubclass(kind, ReduceLROnPlateau):
        raise TypeError(f"scheduler must be an LRScheduler that needs no metric, or a class of them, not {given!r}")
    made: LRScheduler = given(optimizer) if isinstance(given, type) else given
    if made.optimizer is not optimizer:
        raise ValueError("scheduler must have been made for local_optimizer")
    return made
