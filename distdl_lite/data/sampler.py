"""Which samples of a dataset each rank reads: all of them once an epoch, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import Sampler, default_collate

from distdl_lite.partition import Partition, partition_of

Batch = TypeVar("Batch")


def permutation(length: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    """A permutation of ``range(length)`` that every rank draws alike; the global generators are left alone.

    It is the one that ``torch.utils.data.DistributedSampler(seed=seed)`` draws in this epoch.

    Parameters
    ----------
    length, seed, epoch : int
        The same on all ranks.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> dl.data.permutation(5, seed=1, epoch=2).tolist()
    [1, 0, 3, 4, 2]
    """
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch))


class ShardSampler(Sampler[int]):
    """Deals the samples of a dataset over ranks: each sample goes to one rank, none is lost, doubled or padded.

    Shard r of p takes the places r, r + p, r + 2 p, ... of the order, as in ``torch.utils.data.DistributedSampler``, whose
    order this is. That one works here too, as ``DistributedSampler(data, num_replicas=p, rank=r)``, but repeats samples until
    all shards are equally long; here they differ by one at most. It communicates nothing.

    Parameters
    ----------
    data : sized or int
        The dataset or its length, the same on all ranks.
    P : Partition or communicator, optional
        The shards lie along its first axis; ranks that differ in other axes alone, as those that share a sample's space,
        take the same samples. A rank outside takes none. None is that of the dataset, if it has one, as `Blocks`, else the
        ambient world.
    shuffle : bool
        Whether each epoch has an order of its own, `permutation` of seed and epoch; else the order is that of the dataset.
    seed : int
        The same on all ranks.

    Attributes
    ----------
    epoch : int
        The epoch of the next iteration. Each iteration, when it begins to give, adds one to it; `set_epoch` sets it, as where
        training is resumed.
        All ranks begin the same number of iterations, or call `set_epoch`: nothing is communicated that could tell.

    Raises
    ------
    TypeError, ValueError
        If the length or the seed is not an integer, or the length is negative.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> dl.testing.spmd(3, lambda world: list(dl.data.ShardSampler(7, world, shuffle=False)))
    [[0, 3, 6], [1, 4], [2, 5]]
    """

    def __init__(self, data: Sized | int, P: Any = None, *, shuffle: bool = True, seed: int = 0) -> None:
        self.length = _natural(type(self).__name__, "length", len(data) if isinstance(data, Sized) else data)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{type(self).__name__}: seed={seed!r} is not an integer")
        own = getattr(data, "P", None)  # that of `Blocks`
        P = partition_of(own if P is None else P)
        self.shard, self.shards = _shard(P)
        if isinstance(own, Partition) and _shard(own) != (self.shard, self.shards):
            raise ValueError(f"{type(self).__name__}: blocks that are cut over {own} cannot be dealt over {P}")
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch."""
        self.epoch = _natural(type(self).__name__, "epoch", epoch)

    def order(self) -> torch.Tensor:
        """The samples of the epoch in the order in which they are dealt; int64, the same on all ranks."""
        return permutation(self.length, self.seed, self.epoch) if self.shuffle else torch.arange(self.length)

    def indices(self) -> torch.Tensor:
        """This rank's samples of the epoch, in order; int64 of shape ``(len(self),)``."""
        return torch.empty(0, dtype=torch.int64) if self.shard is None else self.order()[self.shard :: self.shards]

    def __iter__(self) -> Iterator[int]:
        # A generator, since a DataLoader with workers asks for two iterators and uses one.
        indices = self.indices()
        self.epoch += 1
        yield from indices.tolist()

    def __len__(self) -> int:
        return 0 if self.shard is None else len(range(self.shard, self.length, self.shards))


class ShardBatchSampler(Sampler[list[int]]):
    """The samples of `ShardSampler` in batches, of which every rank gets the same number.

    The batches of all ranks at one step are the next run of ``p batch_size`` samples of the order. The last run may be
    shorter: it is dealt as evenly as it goes, and ranks may get an empty batch, but all make the step. A mean over it is
    exact where sums are divided by `global_size`; a `DataParallel` container weighs by the rows that each rank has.

    Parameters
    ----------
    data, P, shuffle, seed
        As in `ShardSampler`. A rank outside `P` gets empty batches, as many as the others.
    batch_size : int
        Samples on each rank.
    drop_last : bool
        Whether to leave out a last run that is shorter.
    global_batch_size : int, optional
        In place of `batch_size`, samples on all ranks together: the batches are then the same on any number of ranks.

    Attributes
    ----------
    sampler : ShardSampler
        Has the epoch.
    global_batch_size : int
        Samples of a step that is not the last.

    Raises
    ------
    TypeError, ValueError
        As in `ShardSampler`, or if a batch's size is not a positive integer.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite.testing import spmd
    >>> spmd(3, lambda world: list(ShardBatchSampler(7, world, 2, shuffle=False)))
    [[[0, 3], [6]], [[1, 4], []], [[2, 5], []]]

    A DataLoader takes it; `Collate` makes the empty batches:

    >>> data = torch.utils.data.TensorDataset(torch.arange(7.0))
    >>> def shapes(world):
    ...     batches = ShardBatchSampler(data, world, 2)
    ...     loader = torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=Collate(data))
    ...     return [tuple(x.shape) for x, in loader]
    >>> spmd(3, shapes)
    [[(2,), (1,)], [(2,), (0,)], [(2,), (0,)]]
    """

    def __init__(
        self,
        data: Sized | int,
        P: Any = None,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        global_batch_size: int | None = None,
    ) -> None:
        self.sampler = ShardSampler(data, P, shuffle=shuffle, seed=seed)
        self.batch_size = _natural(type(self).__name__, "batch_size", batch_size, least=1)
        if global_batch_size is None:
            global_batch_size = batch_size * self.sampler.shards
        self.global_batch_size = _natural(type(self).__name__, "global_batch_size", global_batch_size, least=1)
        self.drop_last = drop_last
        self.start = 0  # samples of the next iteration's epoch that are left out, as they have been given before
        self._first = 0  # of the iteration that has begun
        self._given: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch; one that is to be gone on with stays as it is."""
        if epoch != self.sampler.epoch:
            self.sampler.set_epoch(epoch)
            self.start = 0
        self._given = None

    def global_size(self, step: int) -> int:
        """The samples that all ranks together have at a step of the iteration that has begun."""
        return min(self.global_batch_size, self.sampler.length - self._first - step * self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        dealt, run = self.sampler, self.global_batch_size
        order, start, stop = dealt.order().tolist(), self.start, self.start + len(self) * run
        dealt.epoch += 1
        self._first, self.start = self.start, 0
        for first in range(start, stop, run):
            yield [] if dealt.shard is None else order[first : first + run][dealt.shard :: dealt.shards]

    def __len__(self) -> int:
        rest = max(self.sampler.length - self.start, 0)
        return rest // self.global_batch_size if self.drop_last else -(-rest // self.global_batch_size)

    def counted(self, make: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
        """The batches that `make` returns for the next iteration, of which `position` counts those that have been taken."""
        epoch, start = self._given = self.sampler.epoch, self.start
        self._first = start

        def taken(batches: Iterable[Batch]) -> Iterator[Batch]:
            for step, batch in enumerate(batches, 1):
                self._given = epoch, min(start + step * self.global_batch_size, self.sampler.length)
                yield batch
            self._given = None

        return taken(make())

    def position(self) -> dict[str, Any]:
        """What has been taken of `counted` batches, in epochs and samples of all ranks, for `go_on`."""
        epoch, samples = self._given or (self.sampler.epoch, self.start)
        return {"epoch": epoch, "samples": samples, **self._settings()}

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Let the next iteration begin with the first sample that had not been taken, on any number of ranks.

        Raises
        ------
        ValueError
            If the order was another.
        """
        for name, value in self._settings().items():
            if position[name] != value:
                raise ValueError(f"{type(self).__name__}: {name} was {position[name]}, here it is {value}")
        self.set_epoch(position["epoch"])
        self.start = position["samples"]

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self.sampler, name) for name in ("length", "shuffle", "seed")}


class Collate:
    """A ``collate_fn`` for DataLoaders that also makes batches of no samples: those of one sample, cut to no rows.

    Parameters
    ----------
    dataset
        Its sample 0 is read where a batch is empty.
    collate_fn : callable
        Makes a batch of samples, by default torch's ``default_collate``. Tensors of the batch have the samples along their
        first dim; a list or tuple of strings has one for each sample.

    Raises
    ------
    ValueError
        When called for a batch of no samples of a dataset that has none.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> collate = dl.data.Collate([torch.ones(3)])
    >>> collate([torch.ones(3)] * 2).shape, collate([]).shape
    (torch.Size([2, 3]), torch.Size([0, 3]))
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] = default_collate) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        if samples:
            return self.collate_fn(samples)
        try:
            sample = self.dataset[0]
        except IndexError:
            raise ValueError("Collate: a dataset without samples has none to make an empty batch of") from None
        return tree_map(_no_rows, self.collate_fn([sample]), is_leaf=_are_strings)


def _no_rows(value: Any) -> Any:
    is_rows = _are_strings(value) or (isinstance(value, torch.Tensor) and value.dim())
    return value[:0] if is_rows else value


def _are_strings(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, (str, bytes)) for v in value)
    )


def _shard(P: Partition) -> tuple[int | None, int]:
    return (None if P.index is None else P.index[0]), P.shape[0]


def _natural(name: str, what: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {what}={value!r} is not an integer")
    if value < least:
        raise ValueError(f"{name}: {what}={value} must be {least} or more")
    return value
