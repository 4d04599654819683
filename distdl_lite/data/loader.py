"""Batches of rows that ranks hold, which are dealt anew between the ranks while the epoch before runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import default_collate

from distdl_lite.agreement import check_alike, is_unanimous
from distdl_lite.data.rows import LocalRows, inverse, line_of, picked, route
from distdl_lite.data.sampler import Collate, ShardBatchSampler, permutation


@dataclass(frozen=True)
class _Epoch:
    """The rows of an epoch as this rank holds them."""

    number: int  # of the epoch, -1 for the rows as they were given
    start: int  # so many rows of the epoch had been given before: they stand last on each rank
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
        self._now = _Epoch(-1, 0, torch.arange(length), self._rows.cuts, torch.arange(len(leaves[0])), leaves)

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

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many rows of all ranks have been given in it; empty on a rank outside."""
        return self._batches.position() if self._line.active else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the rows that had been given, on any number of ranks, with the whole array that it was made with.

        Raises
        ------
        ValueError
            If the number of rows or the seed was another.
        """
        if self._line.active:
            self._batches.go_on(state)

    def __iter__(self) -> Iterator[Any]:
        if not self._line.active:
            return iter(())
        epoch, start, steps = self.epoch, self._batches.start, len(self)
        self._agree((epoch, start))
        self._finish()
        if (self._now.number, self._now.start) != (epoch, start):
            self._begin(epoch, start)
            self._finish()
        self._begin(epoch + 1, 0)
        given = self._batches.counted(lambda: self._give(self._now, self._coming, steps))
        self._batches.sampler.epoch, self._batches.start = epoch + 1, 0
        return given

    def _give(self, now: _Epoch, coming: _Epoch | None, steps: int) -> Iterator[Any]:
        """The batches of an epoch; at its end the rows of the next are waited for."""
        size, line = self._batches.batch_size, self._line
        mine = now.places[: len(range(line.rank, self._batches.sampler.length - now.start, line.size))]
        for step in range(steps):
            if now is not self._now:
                raise RuntimeError(f"ShuffledLoader: the rows of epoch {now.number} are gone, a later one has begun")
            places = mine[step * size : (step + 1) * size]
            yield self._rows.tree([picked(x, places) for x in now.leaves])
            _ = self.in_flight  # lets MPI move rows
        if coming is self._coming:
            self._finish()

    @torch.inference_mode(False)  # type: ignore[untyped-decorator]  # tensors made in it could not be written to again outside
    def _begin(self, number: int, start: int) -> None:
        """Send each rank its rows of an epoch; the rows of this one are then taken from what is sent."""
        line, sampler = self._line, self._batches.sampler
        given, rest = permutation(sampler.length, sampler.seed, number).tensor_split([start])
        dealt = [torch.cat([rows[shard :: line.size] for rows in (rest, given)]) for shard in range(line.size)]
        order, cuts = torch.cat(dealt), (0, *accumulate(map(len, dealt)))
        way = route(inverse(self._now.order)[order], self._now.cuts, cuts, line.rank)
        leaving = [picked(x, self._now.places[way.leaving]) for x in self._now.leaves]
        self._now = replace(self._now, places=inverse(way.leaving), leaves=leaving)  # lets go of the rows before
        self._coming = _Epoch(number, start, order, cuts, way.places, leaves=())
        self._moving = self._rows.start(way, leaving)

    def _finish(self) -> None:
        """Wait for the rows that come, if any do."""
        if self._coming is not None:
            leaves = [part.finish() for part in self._moving]
            self._now, self._coming, self._moving = replace(self._coming, leaves=leaves), None, []

    def _agree(self, position: tuple[int, int]) -> None:
        """Raise on all ranks if they are about to exchange rows for different epochs or parts of one."""
        transport, team = self._line.world_transport, self._line.team
        mine = hash(position) % 2**64  # of integers: the same in every process
        if not is_unanimous(team, mine):
            told = dict(zip(team, transport.gather_objects(team, position), strict=True))
            for number, what in enumerate(("epoch", "first row")):
                check_alike(what, {rank: one[number] for rank, one in told.items()})


class Loader(torch.utils.data.DataLoader[Any]):
    """A DataLoader whose samples are dealt over ranks as `ShardBatchSampler` deals them, and which can be resumed.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        Map-style, the same on all ranks, or of each rank's blocks of the same samples, such as `Blocks`.
    P, batch_size, shuffle, seed, drop_last, global_batch_size
        As in `ShardBatchSampler`.
    collate_fn : callable
        As in `Collate`, which makes the empty batches.
    **options
        Of torch's DataLoader, such as ``num_workers``.

    Notes
    -----
    ``state_dict()`` counts the samples of all ranks that have been taken from the loader, whatever its workers have read
    ahead. After ``load_state_dict`` the next sample is the first that had not been taken, on any number of ranks. The seeds of
    workers are the same on all ranks, and come from a generator of the loader's own.

    Examples
    --------
    >>> from distdl_lite.testing import spmd
    >>> def begun(world):
    ...     loader = Loader(range(10), world, global_batch_size=4, shuffle=False)
    ...     batch = next(iter(loader))
    ...     return batch.tolist(), loader.state_dict()
    >>> taken, states = zip(*spmd(2, begun))
    >>> taken
    ([0, 2], [1, 3])
    >>> def resumed(world):
    ...     loader = Loader(range(10), world, global_batch_size=4, shuffle=False)
    ...     loader.load_state_dict(states[0])
    ...     return [batch.tolist() for batch in loader]
    >>> spmd(3, resumed)
    [[[4, 7], [8]], [[5], [9]], [[6], []]]
    """

    batch_sampler: ShardBatchSampler

    def __init__(
        self,
        dataset: Any,
        P: Any = None,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        global_batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ) -> None:
        batches = ShardBatchSampler(
            dataset, P, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, global_batch_size=global_batch_size
        )
        # One of its own: each epoch draws a seed for workers, which torch's would give in the middle of a resumed run, too.
        options.setdefault("generator", torch.Generator().manual_seed(seed))
        super().__init__(dataset, batch_sampler=batches, collate_fn=Collate(dataset, collate_fn), **options)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch."""
        self.batch_sampler.set_epoch(epoch)

    def global_size(self, step: int) -> int:
        """The samples that all ranks together have at a step of the epoch."""
        return self.batch_sampler.global_size(step)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many samples of all ranks have been taken in it."""
        return self.batch_sampler.position()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the samples that had been taken.

        Raises
        ------
        ValueError
            If the dataset's length, `shuffle` or the seed was another.
        """
        self.batch_sampler.go_on(state)

    def __iter__(self) -> Any:
        return self.batch_sampler.counted(super().__iter__)
