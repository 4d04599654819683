"""Which samples of a dataset each rank reads: all of them once an epoch, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import Sampler, default_collate

from distdl_lite.partition import partition_of


def permutation(length: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    """A permutation of ``range(length)`` that every rank draws alike; the global generators are left alone.

    It is the one that ``torch.utils.data.DistributedSampler(seed=seed)`` draws in this epoch.
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
        take the same samples. A rank outside takes none. None is the ambient world.
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
    """

    def __init__(self, data: Sized | int, P: Any = None, *, shuffle: bool = True, seed: int = 0) -> None:
        self.length = _natural(type(self).__name__, "length", len(data) if isinstance(data, Sized) else data)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{type(self).__name__}: seed={seed!r} is not an integer")
        P = partition_of(P)
        self.shard, self.shards = (None if P.index is None else P.index[0]), P.shape[0]
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch."""
        self.epoch = _natural(type(self).__name__, "epoch", epoch)

    def indices(self) -> torch.Tensor:
        """This rank's samples of the epoch, in order; int64 of shape ``(len(self),)``."""
        if self.shard is None:
            return torch.empty(0, dtype=torch.int64)
        order = permutation(self.length, self.seed, self.epoch) if self.shuffle else torch.arange(self.length)
        return order[self.shard :: self.shards]

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

    Attributes
    ----------
    sampler : ShardSampler
        Has the epoch.

    Raises
    ------
    TypeError, ValueError
        As in `ShardSampler`, or if `batch_size` is not a positive integer.

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
    ) -> None:
        self.sampler = ShardSampler(data, P, shuffle=shuffle, seed=seed)
        self.batch_size = _natural(type(self).__name__, "batch_size", batch_size, least=1)
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch."""
        self.sampler.set_epoch(epoch)

    def global_size(self, step: int) -> int:
        """The samples that all ranks together have at a step of the epoch."""
        run = self.batch_size * self.sampler.shards
        return min(run, self.sampler.length - step * run)

    def __iter__(self) -> Iterator[list[int]]:
        mine, size = list(self.sampler), self.batch_size
        for step in range(len(self)):
            yield mine[step * size : (step + 1) * size]

    def __len__(self) -> int:
        run = self.batch_size * self.sampler.shards
        return self.sampler.length // run if self.drop_last else -(-self.sampler.length // run)


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


def _natural(name: str, what: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {what}={value!r} is not an integer")
    if value < least:
        raise ValueError(f"{name}: {what}={value} must be {least} or more")
    return value
