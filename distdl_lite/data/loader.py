"""Batches of rows that ranks hold, which are dealt anew between the ranks while the epoch before runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distdl_lite.agreement import check_alike, is_unanimous
from distdl_lite.data.rows import LocalRows, inverse, line_of, picked, route
from distdl_lite.data.sampler import ShardBatchSampler, permutation
from distdl_lite.grid import balanced


@dataclass(frozen=True)
class _Epoch:
    """The rows of an epoch as this rank holds them."""

    number: int  # of the epoch, -1 for the rows as they were given
    order: torch.Tensor  # the number, among the rows that were given, of each row of the whole array
    cuts: Sequence[int]  # of the whole array over the ranks
    places: torch.Tensor  # of this rank's rows, in the order of the epoch, in the leaves
    leaves: Sequence[torch.Tensor]  # tensors with this rank's rows, none while they are on their way


class ShuffledLoader:
    """Gives batches of the rows that ranks hold, and deals all rows anew over the ranks for each epoch.

    The exchange for the next epoch begins with an epoch and is under way while its batches are used. The rows of epoch e are
    dealt as `ShardBatchSampler` with the same seed deals the whole array: the same batches, whatever number of rows each
    rank brought, and no row is lost or doubled.

    Parameters
    ----------
    rows : tensor or pytree of tensors
        This rank's rows, ``(n, ...)`` in all tensors alike; any n on any rank. The whole array is that of the ranks one after
        the other. They are not copied before the first epoch.
    batch_size : int
        Rows on each rank. All ranks get the same number of batches; the last may be uneven, and empty on some ranks.
    P : Partition or communicator, optional
        Rows move along its first axis; ranks that differ in other axes keep to themselves and draw alike. A rank outside
        gets no batches. None is the ambient world.
    seed : int
        The same on all ranks.
    drop_last : bool
        Whether to leave out the rows of a last batch that is not full on all ranks; others in each epoch.

    Attributes
    ----------
    epoch : int
        The epoch of the next iteration. Each iteration adds one to it; `set_epoch` sets it, as where training is resumed
        with the rows that it began with. Other epochs than the next cost one exchange that is waited for, as does the first.

    Raises
    ------
    TypeError, ValueError
        On all ranks that exchange rows, with the same text, which names the rank: in the constructor if tensors do not fit,
        or an argument is none of those above; in ``iter`` if the ranks are at different epochs.

    Notes
    -----
    All ranks of `P` make it and begin each epoch together. A loop may be left early, on all ranks or on some: the exchange
    then goes on, and is finished when the next epoch begins, with which the older iterator ends. Where a loop runs to its
    end, nothing is left under way.

    An epoch begins with one agreement of 8 bytes and one exchange per tensor (``MPI_Isend`` and ``MPI_Irecv`` on a
    communicator of its own). MPI may move rows only inside its calls: each batch gives it one, as do the sums of gradients
    between them. A rank holds its rows twice, as they are sent, from where the batches are taken, and as they arrive; and
    permutations of the N rows of all ranks, two of them for long.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite.testing import spmd
    >>> def body(world):
    ...     rows = {"x": torch.rand(5, 3), "y": torch.arange(5) + 5 * world.rank}
    ...     loader = ShuffledLoader(rows, 3, world)
    ...     return [[batch["y"].tolist() for batch in loader] for epoch in range(2)]
    >>> first, second = spmd(2, body)
    >>> [len(batch) for epoch in first for batch in epoch]
    [3, 2, 3, 2]
    >>> [sorted(sum(first[epoch] + second[epoch], [])) for epoch in range(2)] == [list(range(10))] * 2
    True
    """

    def __init__(self, rows: Any, batch_size: int, P: Any = None, *, seed: int = 0, drop_last: bool = False) -> None:
        def arguments() -> str:
            self._batches = ShardBatchSampler(0, self._line, batch_size, seed=seed, drop_last=drop_last)
            return f"batch_size={batch_size}, seed={seed}, drop_last={drop_last}"

        self._line = line_of(P)
        self._coming: _Epoch | None = None
        self._moving: list[Any] = []
        if not self._line.active:
            arguments()
            return
        self._rows = LocalRows(type(self).__name__, rows, self._line, arguments)
        self._batches.sampler.length = length = self._rows.length
        leaves, self._rows.leaves = self._rows.leaves, []
        self._now = _Epoch(-1, torch.arange(length), self._rows.cuts, torch.arange(len(leaves[0])), leaves)

    @property
    def epoch(self) -> int:
        return self._batches.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch, on all ranks."""
        self._batches.set_epoch(epoch)

    def global_size(self, step: int) -> int:
        """The rows that all ranks together have at a step of the epoch."""
        return self._batches.global_size(step)

    @property
    def in_flight(self) -> bool:
        """Whether an exchange has begun whose rows have not all arrived."""
        return not all(part.test() for part in self._moving)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        if not self._line.active:
            return iter(())
        epoch = self.epoch
        self._agree(epoch)
        self._finish()
        if self._now.number != epoch:
            self._begin(epoch)
            self._finish()
        self._begin(epoch + 1)
        self.set_epoch(epoch + 1)
        return self._give(self._now, self._coming)

    def _give(self, now: _Epoch, coming: _Epoch | None) -> Iterator[Any]:
        """The batches of an epoch; at its end the rows of the next are waited for."""
        size = self._batches.batch_size
        for step in range(len(self)):
            if now is not self._now:
                raise RuntimeError(f"ShuffledLoader: the rows of epoch {now.number} are gone, a later one has begun")
            places = now.places[step * size : (step + 1) * size]
            yield self._rows.tree([picked(x, places) for x in now.leaves])
            _ = self.in_flight  # lets MPI move rows
        if coming is self._coming:
            self._finish()

    @torch.inference_mode(False)  # type: ignore[untyped-decorator]  # tensors made in it could not be written to again outside
    def _begin(self, number: int) -> None:
        """Send each rank its rows of an epoch; the rows of this one are then taken from what is sent."""
        line, sampler = self._line, self._batches.sampler
        dealt = permutation(sampler.length, sampler.seed, number)
        order = torch.cat([dealt[shard :: line.size] for shard in range(line.size)])
        cuts = balanced(sampler.length, line.size)
        way = route(inverse(self._now.order)[order], self._now.cuts, cuts, line.rank)
        leaving = [picked(x, self._now.places[way.leaving]) for x in self._now.leaves]
        self._now = replace(self._now, places=inverse(way.leaving), leaves=leaving)  # lets go of the rows before
        self._coming = _Epoch(number, order, cuts, way.places, leaves=())
        self._moving = self._rows.start(way, leaving)

    def _finish(self) -> None:
        """Wait for the rows that come, if any do."""
        if self._coming is not None:
            leaves = [part.finish() for part in self._moving]
            self._now, self._coming, self._moving = replace(self._coming, leaves=leaves), None, []

    def _agree(self, epoch: int) -> None:
        """Raise on all ranks if they are about to exchange rows for different epochs."""
        transport, team = self._line.world_transport, self._line.team
        mine = hash((epoch,)) % 2**64  # of an integer: the same in every process
        if not is_unanimous(team, mine):
            check_alike("epoch", dict(zip(team, transport.gather_objects(team, epoch), strict=True)))
