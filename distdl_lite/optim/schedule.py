"""When ranks average: pure functions of the epoch, the batch and the losses, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

Skips = tuple[int, int, int]
_PATIENCE = 2  # losses in a row without improvement that are borne
_FIRST = 4  # batches between averages after warm-up


class Schedule(Protocol):
    """When to average over all ranks, within a node, and how many steps later to merge."""

    def __call__(self, epoch: int, batch: int, losses: Sequence[float]) -> Skips:
        """``(global_every, local_every, delay)`` of a step; all ranks must get the same from the same arguments.

        Parameters
        ----------
        epoch, batch : int
            From 0.
        losses : sequence of float
            What the epochs so far have reported.

        Returns
        -------
        global_every : int
            Steps between averages over all ranks; 0 is after every step, and waits for it whatever the delay.
        local_every : int
            Steps between averages within a node; 0: nodes play no part, and an average over all ranks is one flat sum.
        delay : int
            Steps that a rank goes on before it merges the average over all ranks.
        """


@dataclass(frozen=True)
class Periodic:
    """Average every so many steps.

    Parameters
    ----------
    global_every, local_every, delay : int
        As in `Schedule`.

    Raises
    ------
    TypeError, ValueError
        If a number is no integer, or `global_every` is below 1 or another one below 0.

    Examples
    --------
    >>> Periodic(8, delay=2)(0, 5, [])
    (8, 0, 2)
    """

    global_every: int
    local_every: int = 0
    delay: int = 0

    def __post_init__(self) -> None:
        _check(self, 1, "global_every")
        _check(self, 0, "local_every", "delay")

    def __call__(self, epoch: int, batch: int, losses: Sequence[float]) -> Skips:
        return self.global_every, self.local_every, self.delay


@dataclass(frozen=True)
class PostLocal:
    """Average after each of the first steps, then every so many (Lin et al. 2020, "Don't use large mini-batches, use local SGD").

    Parameters
    ----------
    first : int
        Steps with an average after each.
    then : Periodic
        What follows.
    steps_per_epoch : int, optional
        Needed where epochs are counted.

    Raises
    ------
    ValueError
        In a call of a later epoch than the first, without `steps_per_epoch`.

    Examples
    --------
    >>> schedule = PostLocal(3, Periodic(8))
    >>> [schedule(0, batch, [])[0] for batch in range(5)]
    [0, 0, 0, 8, 8]
    """

    first: int
    then: Periodic
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        _check(self, 0, "first")

    def __call__(self, epoch: int, batch: int, losses: Sequence[float]) -> Skips:
        if epoch and self.steps_per_epoch is None:
            raise ValueError("PostLocal: steps_per_epoch is needed where epochs are counted")
        step = epoch * (self.steps_per_epoch or 0) + batch
        return (0, 0, 0) if step < self.first else self.then(epoch, batch, losses)


@dataclass(frozen=True)
class DASOSchedule:
    """Heat's schedule: synchronous at first and at last, in between as rarely as the loss allows.

    In the first `warmup_epochs` and the last `cooldown_epochs` ranks average after every batch, ``(0, 0, 0)``. In between it
    begins with every fourth batch. When the loss has been flat for three epochs, the number is divided by
    `skip_reduction_factor`; at 1 it jumps to `max_global_skips`. Numbers never fall below 1, so that a large factor does
    not end the cycle, nor exceed `max_global_skips`, where 0 is synchronous throughout.

    Parameters
    ----------
    total_epochs, warmup_epochs, cooldown_epochs : int
    stability_level : float
        A loss counts as better if it is below the best by more than this part of it.
    max_global_skips, skip_reduction_factor, local_skip_factor : int
        The jump is to ``max_global_skips`` batches between averages over all ranks, and that over ``local_skip_factor``
        both between averages within a node and for the delay.

    Raises
    ------
    TypeError, ValueError
        If a number is of another type, or too small.

    References
    ----------
    Coquelin et al. 2022, "Accelerating neural network training with distributed asynchronous and selective optimization
    (DASO)", J. Big Data 9:14.

    Examples
    --------
    >>> schedule = DASOSchedule(30, 2, 2)
    >>> [schedule(epoch, 0, [1.0] * epoch)[0] for epoch in range(30)]
    [0, 0, 4, 4, 4, 2, 2, 2, 1, 1, 1, 8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1, 8, 8, 8, 4, 4, 0, 0]
    >>> schedule(11, 0, [1.0] * 11)
    (8, 2, 2)
    """

    total_epochs: int
    warmup_epochs: int = 4
    cooldown_epochs: int = 4
    stability_level: float = 0.05
    max_global_skips: int = 8
    skip_reduction_factor: int = 2
    local_skip_factor: int = 4

    def __post_init__(self) -> None:
        _check(self, 1, "total_epochs")
        _check(self, 0, "warmup_epochs", "cooldown_epochs")
        if not isinstance(self.stability_level, float):
            raise TypeError(f"stability_level must be a float, not {self.stability_level!r}")
        _check(self, 0, "max_global_skips")
        _check(self, 1, "skip_reduction_factor", "local_skip_factor")

    def __call__(self, epoch: int, batch: int, losses: Sequence[float]) -> Skips:
        if not self.warmup_epochs <= epoch < self.total_epochs - self.cooldown_epochs or not self.max_global_skips:
            return 0, 0, 0
        return _after(self, tuple(losses[max(self.warmup_epochs, 1) - 1 : epoch]))

    def lowered(self, skips: Skips) -> Skips:
        """The skips that follow on a flat loss."""
        if skips[0] == 1:
            part = max(self.max_global_skips // self.local_skip_factor, 1)
            return self.max_global_skips, part, part
        every, local = (max(number // self.skip_reduction_factor, 1) for number in skips[:2])
        return every, local, max(skips[2] - 1, 1)


@lru_cache(maxsize=64)
def _after(schedule: DASOSchedule, losses: tuple[float, ...]) -> Skips:
    skips = min(_FIRST, schedule.max_global_skips), 1, 1
    best, bad = float("inf"), 0
    for loss in losses:
        if loss < best and (best == float("inf") or best - loss > schedule.stability_level * abs(best)):
            best, bad = loss, 0
            continue
        bad += 1
        if bad > _PATIENCE:
            bad, skips = 0, schedule.lowered(skips)
    return skips


def _check(schedule: object, least: int, *names: str) -> None:
    for name in names:
        check_int(name, getattr(schedule, name), least)


def check_int(name: str, value: object, least: int) -> None:
    """Raise TypeError unless `value` is an int, ValueError if it is below `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
