"""Samplers, rows that move between ranks, and the loader that moves them while an epoch runs. All of it is exact."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.data import Collate, ShardBatchSampler, ShardSampler, ShuffledLoader, permutation, redistribute
from distdl_lite.grid import balanced
from distdl_lite.partition import Partition
from distdl_lite.testing import spmd


def everywhere(world: Partition, mine: list[Any]) -> list[Any]:
    """What all ranks have, one after the other."""
    return [value for values in world.allgather_data(mine) for value in values]


def cut(whole: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
    return whole.split(counts)[rank]


# ---- samplers --------------------------------------------------------------------------------------------------------


def test_blocks_are_dealt_over_their_own_partition() -> None:
    """Ranks that share a sample's space get the same samples, also where nobody says so; another partition is refused."""

    def body(world: Partition) -> list[int]:
        P = world.grid((1, 2, 2))
        blocks = dl.data.Blocks(torch.zeros(8, 4, 4), P)
        assert list(ShardSampler(blocks)) == list(ShardSampler(8, P))
        assert len(next(iter(dl.data.Loader(blocks, global_batch_size=4)))) == 4
        with pytest.raises(ValueError, match="ShardSampler: blocks that are cut over"):
            ShardBatchSampler(blocks, world)
        return list(ShardSampler(blocks))

    assert len({tuple(samples) for samples in spmd(4, body)}) == 1


@pytest.mark.check("A43")
@on_ranks(3, mpi=True)
def test_no_sample_is_lost_or_doubled(world: Partition) -> None:
    for length in (11, 2, 0, 12):
        for batch_size in (1, 2, 5):
            sampler, batches = ShardSampler(length, world), ShardBatchSampler(length, world, batch_size)
            orders = []
            for epoch in range(10):
                mine, steps = list(sampler), list(batches)
                assert mine == [i for step in steps for i in step]
                sizes = world.allgather_data((len(mine), len(sampler), len(steps), len(batches)))
                assert all(a == b and c == d for a, b, c, d in sizes)
                assert max(sizes)[0] - min(sizes)[0] <= 1
                assert len({size[2] for size in sizes}) == 1
                orders.append(everywhere(world, mine))
                assert sorted(orders[epoch]) == list(range(length))
                for step, batch in enumerate(steps):
                    assert len(everywhere(world, batch)) == batches.global_size(step)
            assert length < 11 or len(set(map(tuple, orders))) == 10  # each epoch has an order of its own


@on_ranks(3)
def test_order_is_that_of_torch(world: Partition) -> None:
    """Where nothing needs padding."""
    data = list(range(12))
    for shuffle in (False, True):
        ours = ShardSampler(data, world, shuffle=shuffle, seed=5)
        theirs = DistributedSampler(data, world.size, world.rank, shuffle=shuffle, seed=5)
        for epoch in (0, 1, 7):
            theirs.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert list(ours) == list(theirs)
            assert ours.epoch == epoch + 1


@on_ranks(4)
def test_shards_lie_along_the_first_axis(world: Partition) -> None:
    P = world.grid((2, 1, 2))
    assert list(ShardSampler(5, P, shuffle=False)) == ([0, 2, 4] if P.index[0] == 0 else [1, 3])
    pair = world.create_partition_inclusive([3, 1])
    batches = ShardBatchSampler(3, pair, 1, shuffle=False)
    assert list(batches) == [[[], []], [[1], []], [[], []], [[0], [2]]][world.rank]
    assert len(batches.sampler) == [0, 1, 0, 2][world.rank]


@on_ranks(3)
def test_dropped_samples_change(world: Partition) -> None:
    batches = ShardBatchSampler(11, world, 2, drop_last=True)
    left_out = []
    for _ in range(8):
        steps = list(batches)
        assert [len(step) for step in steps] == [2]
        left_out.append(frozenset(range(11)) - set(everywhere(world, steps[0])))
    assert {len(one) for one in left_out} == {5}
    assert len(set(left_out)) > 1


@on_ranks(3)
def test_data_loader_with_empty_batches(world: Partition) -> None:
    """A mean over all samples comes out right by weights, though the last batch is empty on two ranks."""
    data = TensorDataset(torch.arange(7.0), torch.arange(14).view(7, 2))
    total = 0.0
    for x, y in DataLoader(data, batch_sampler=ShardBatchSampler(data, world, 2), collate_fn=Collate(data)):
        assert y.shape == (len(x), 2)
        assert y.dtype is torch.int64
        total += x.sum().item()
    assert sum(world.allgather_data(total)) / 7 == 3.0


def test_data_loaders_with_workers() -> None:
    """They ask for two iterators and use one."""
    data = TensorDataset(torch.arange(7.0))
    samplers: list[Any] = [ShardSampler(data), ShardBatchSampler(data, None, 2)]
    for workers, options in ((0, {}), (1, {}), (1, {"persistent_workers": True})):
        for sampler, inner, kind in zip(samplers, (samplers[0], samplers[1].sampler), ("", "batch_"), strict=True):
            sampler.set_epoch(3)
            given = {"batch_size": None} if not kind else {}
            loader = DataLoader(data, num_workers=workers, **{kind + "sampler": sampler}, **options, **given)
            for epoch in (3, 4):
                assert torch.cat([x.view(-1) for (x,) in loader]).long().equal(permutation(7, 0, epoch))
                assert inner.epoch == epoch + 1


def test_collate() -> None:
    samples = [{"x": torch.ones(2), "name": "a", "n": 3, "pair": (1.0, "b")}]
    empty = Collate(samples)([])
    assert {name: value.shape for name, value in empty.items() if name in "xn"} == {"x": (0, 2), "n": (0,)}
    assert empty["name"] == []
    assert [len(part) for part in empty["pair"]] == [0, 0]
    assert Collate(samples)(samples)["name"] == ["a"]
    assert Collate(samples, lambda batch: torch.tensor(3.0))([]) == 3.0
    with pytest.raises(ValueError, match="a dataset without samples"):
        Collate([])([])


def test_random_states_are_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate()
    spmd(2, lambda world: list(ShuffledLoader(torch.arange(5), 2, world)) + list(ShardSampler(5, world)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda P: ShardSampler(-1, P), ValueError, "ShardSampler: length=-1 must be 0 or more"),
        (lambda P: ShardSampler(2.0, P), TypeError, r"ShardSampler: length=2.0 is not an integer"),
        (lambda P: ShardSampler(2, P, seed="a"), TypeError, "ShardSampler: seed='a' is not an integer"),
        (lambda P: ShardSampler(2, P).set_epoch(-1), ValueError, "ShardSampler: epoch=-1 must be 0 or more"),
        (lambda P: ShardBatchSampler(2, P, 0), ValueError, "ShardBatchSampler: batch_size=0 must be 1 or more"),
        (lambda P: ShardBatchSampler(2, P, True), TypeError, "ShardBatchSampler: batch_size=True is not an integer"),
    ],
)
def test_samplers_refuse(make: Callable[[Partition], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        spmd(1, make)


# ---- rows ------------------------------------------------------------------------------------------------------------


@on_ranks(4, mpi=True)
def test_rows_of_the_permuted_array(world: Partition) -> None:
    rng = random.Random(0)
    for case in range(30):
        P = world.create_partition_inclusive(rng.sample(range(4), rng.randint(1, 4)))
        counts = [rng.choice((0, 1, 2, 5)) for _ in range(P.size)]
        total = sum(counts)
        whole = torch.arange(total * 6).view(total, 2, 3)
        seed = case if case % 2 else torch.tensor(rng.sample(range(total), total), dtype=torch.int64)
        order = permutation(total, seed) if case % 2 else seed
        for keep in (False, True):
            rows = cut(whole, counts, P.rank) if P.active else torch.empty(0)
            moved = redistribute(rows, seed, P, keep_counts=keep)
            if not P.active:
                assert moved is rows
                continue
            target = counts if keep else torch.tensor(balanced(total, P.size)).diff().tolist()
            assert torch.equal(moved, cut(whole[order], target, P.rank))


KINDS = (torch.bool, torch.uint16, torch.uint32, torch.int64, torch.bfloat16, torch.float16, torch.complex64)


@on_ranks(3, mpi=True)
def test_pytrees_of_any_tensors(world: Partition) -> None:
    whole = torch.arange(11)
    counts = [7, 0, 4]
    rows = {
        "kinds": [cut(whole.to(torch.int16).to(kind), counts, world.rank) for kind in KINDS],
        "sliced": cut(torch.arange(66).view(11, 6)[:, ::2], counts, world.rank),
        "turned": cut(torch.arange(33).view(3, 11).T.to(torch.uint16), counts, world.rank),
        "conj": (cut(torch.arange(11) * 1j, counts, world.rank).conj(),),
        "stretched": cut(torch.tensor(5).expand(11, 2), counts, world.rank),
        "flat": torch.empty(counts[world.rank], 0),
    }
    order = permutation(11, 3)
    with dl.count() as counted:
        moved = redistribute(rows, 3, world)
    mine = balanced(11, 3)[world.rank], balanced(11, 3)[world.rank + 1]
    order = order[mine[0] : mine[1]]
    for kind, part in zip(KINDS, moved["kinds"], strict=True):
        assert torch.equal(part, whole.to(torch.int16).to(kind)[order])
    assert torch.equal(moved["sliced"], torch.arange(66).view(11, 6)[order, ::2])
    assert torch.equal(moved["turned"], torch.arange(33).view(3, 11).T[order].to(torch.uint16))
    assert torch.equal(moved["conj"][0], -1j * order)
    assert torch.equal(moved["stretched"], torch.full((len(order), 2), 5))
    assert moved["flat"].shape == (len(order), 0)
    assert counted.collectives == len(KINDS) + 5  # one exchange per tensor


@on_ranks(4, mpi=True)
def test_rows_move_along_the_first_axis(world: Partition) -> None:
    """Pixels of an image stay on the ranks that have their part of space."""
    P = world.grid((2, 2))
    whole = torch.arange(20).view(5, 4)
    moved = redistribute(whole[P.block(whole.shape)], 1, P)
    assert torch.equal(moved, whole[permutation(5, 1)][P.block(whole.shape)])


def test_permutations_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: drawn.append(args) or randperm(*args, **options))
    spmd(1, lambda world: redistribute(torch.arange(5), 0, world))
    assert len(drawn) == 1

    def epochs(world: Partition) -> None:
        loader = ShuffledLoader(torch.arange(5), 2, world)
        for _ in range(4):
            list(loader)

    spmd(1, epochs)
    assert len(drawn) == 1 + 5  # the last is that of the epoch to come


@on_ranks(3, mpi=True)
def test_refusals(world: Partition) -> None:
    """All ranks raise the same text, also where one alone is wrong."""
    x, odd = torch.zeros(2, 3), world.rank == 1
    cases: tuple[tuple[Callable[[], Any], str, type[Exception]], ...] = (
        (
            lambda: redistribute(x.double() if odd else x, 0, world),
            "the ranks disagree: rank 1: tensors rows ('n', 3) torch.float64 on cpu, others rows ('n', 3) torch.float32",
            ValueError,
        ),
        (lambda: redistribute({"a": x} if odd else {"b": x}, 0, world), "rank 1: tensors rows['a']", ValueError),
        (lambda: redistribute(x, world.rank // 2, world), "rank 2: arguments seed 1, keep_counts=False", ValueError),
        (
            lambda: redistribute(x, torch.arange(6).flip(0) if odd else torch.arange(6), world),
            "rank 1: arguments an order of 6 numbers with checksum",
            ValueError,
        ),
        (
            lambda: redistribute(x, torch.arange(7), world),
            "redistribute: the order is no permutation of the 6 rows of all ranks",
            ValueError,
        ),
        (lambda: redistribute(x, torch.tensor([0, 1, 1, 2, 3, 4]), world), "is no permutation", ValueError),
        (
            lambda: redistribute(x, torch.zeros(6), world),
            "redistribute: order is a 1-d tensor of int64 or a seed, not torch.float32 of shape (6,)",
            TypeError,
        ),
        (lambda: redistribute(x, None if odd else 0, world), "or a seed, not None", TypeError),
        (
            lambda: redistribute({"a": x, "b": x[1:] if odd else x}, 0, world),
            "redistribute: the tensors have different numbers of rows: {\"rows['a']\": 2, \"rows['b']\": 1}",
            ValueError,
        ),
        (lambda: redistribute([], 0, world), "redistribute: there are no tensors to move rows of", ValueError),
        (lambda: redistribute([x, "y"], 0, world), "rows[1] is no dense tensor with data, but str", TypeError),
        (lambda: redistribute(x.to_sparse(), 0, world), "rows is no dense tensor with data, but Tensor", TypeError),
        (lambda: redistribute(torch.tensor(1.0), 0, world), "rows of shape () has no rows", ValueError),
        (
            lambda: redistribute(x.requires_grad_(odd), 0, world),
            "rows of shape (2, 3) requires grad",
            ValueError,
        ),
        (
            lambda: ShuffledLoader(x.detach(), 0 if odd else 1, world),
            "ShuffledLoader: ShardBatchSampler: batch_size=0 must be 1 or more",
            ValueError,
        ),
        (
            lambda: ShuffledLoader(x.detach(), 1, world, seed=world.rank // 2),
            "rank 2: arguments batch_size=1, seed=1, drop_last=False",
            ValueError,
        ),
        (lambda: iter(at_epoch(ShuffledLoader(x.detach(), 1, world), odd)), "rank 1: epoch 3, others 2", ValueError),
    )
    for attempt, text, error in cases:
        assert_refused(world, world, attempt, text, error)


def at_epoch(loader: ShuffledLoader, odd: bool) -> ShuffledLoader:
    loader.set_epoch(3 if odd else 2)
    return loader


# ---- the loader ------------------------------------------------------------------------------------------------------


def loader_of(
    P: Partition, counts: list[int], batch_size: int, **options: Any
) -> tuple[ShuffledLoader, ShardBatchSampler]:
    """A loader of the numbers of rows of these counts, and the sampler whose batches it gives."""
    numbers = cut(torch.arange(sum(counts)), counts, P.rank) if P.active else torch.empty(0)
    rows = {"n": numbers, "x": numbers.double().view(-1, 1) * 0.5}
    return ShuffledLoader(rows, batch_size, P, **options), ShardBatchSampler(sum(counts), P, batch_size, **options)


def check_epoch(loader: ShuffledLoader, sampler: ShardBatchSampler) -> list[int]:
    seen = []
    for batch, wanted in zip(loader, sampler, strict=True):
        assert batch["n"].tolist() == wanted
        assert torch.equal(batch["x"], torch.tensor(wanted, dtype=torch.float64).view(-1, 1) * 0.5)
        seen += wanted
    return seen


@pytest.mark.check("A43")
@on_ranks(3, mpi=True)
def test_loader_gives_the_batches_of_the_sampler(world: Partition) -> None:
    for counts in ([5, 0, 6], [1, 0, 0], [4, 4, 4], [0, 0, 0]):
        for batch_size, options in ((2, {}), (3, {"seed": 4, "drop_last": True})):
            loader, sampler = loader_of(world, counts, batch_size, **options)
            assert len(loader) == len(sampler)
            for _ in range(10):
                seen = everywhere(world, check_epoch(loader, sampler))
                assert options or sorted(seen) == list(range(sum(counts)))
                assert not loader.in_flight


@pytest.mark.check("A43")
@on_ranks(3, mpi=True)
def test_rows_are_under_way_during_the_epoch(world: Partition) -> None:
    """Other processes begin when rank 0 has used a batch, so that its rows must be under way until then."""
    pairs = {rank: world.create_partition_inclusive([0, rank]) for rank in (1, 2)} if world.comm else {}
    loader, sampler = loader_of(world, [5, 0, 6], 1)
    start = loader._rows.start
    for epoch in range(3):  # the first waits for its own rows before the exchange for the next begins
        if pairs and world.rank and epoch:
            loader._rows.start = lambda *args: (pairs[world.rank].allgather_data(None), start(*args))[1]
        wanted, batches = iter(sampler), iter(loader)
        assert next(batches)["n"].tolist() == next(wanted)
        seen = [loader.in_flight]
        if pairs and world.rank == 0 and epoch:
            assert loader.in_flight
            for pair in pairs.values():
                pair.allgather_data(None)
        for batch, indices in zip(batches, wanted, strict=True):
            assert loader._coming is not None  # nobody has waited for it
            assert batch["n"].tolist() == indices
        assert loader._coming is None
        if not pairs or epoch:
            assert any(everywhere(world, seen))


@on_ranks(3, mpi=True)
def test_loops_left_early(world: Partition) -> None:
    """After other numbers of batches on the ranks; the next epoch is whole, as is one that is jumped to."""
    loader, sampler = loader_of(world, [2, 9, 4], 2)
    for epoch in range(8):
        for step, _ in enumerate(loader):
            if step == (world.rank + epoch) % 3:
                break
        sampler.set_epoch(epoch + 1)
        if epoch % 3 == 2:
            loader.set_epoch(4)
            sampler.set_epoch(4)
        elif epoch % 3 == 1:
            continue
        assert sorted(everywhere(world, check_epoch(loader, sampler))) == list(range(15))
        loader.set_epoch(epoch + 1)


@on_ranks(3, mpi=True)
def test_other_layers_meanwhile(world: Partition) -> None:
    """Sums and exchanges of the same ranks come between; an iterator ends when a newer one begins."""
    loader, sampler = loader_of(world, [5, 4, 2], 2)
    layer = dl.nn.DistributedBatchNorm(world.grid((3, 1)), 1, dtype=torch.float64)
    for epoch in range(3):
        for batch, wanted in zip(loader, sampler, strict=True):
            layer(batch["x"]).sum().backward()
            redistribute(batch["n"], 0, world)
            assert batch["n"].tolist() == wanted
        assert int(layer.num_batches_tracked) == 2 * (epoch + 1)
    older = iter(loader)
    sampler.set_epoch(4)
    check_epoch(loader, sampler)
    with pytest.raises(RuntimeError, match="ShuffledLoader: the rows of epoch 3 are gone, a later one has begun"):
        next(older)
    check_epoch(loader, sampler)


@on_ranks(3, mpi=True)
def test_loaders_dropped_with_rows_under_way(world: Partition) -> None:
    for number in range(20):
        loader, sampler = loader_of(world, [3, 5, number], 2)
        assert next(iter(loader))["n"].tolist() == next(iter(sampler))
        del loader


@on_ranks(4, mpi=True)
def test_loaders_of_teams(world: Partition) -> None:
    """Ranks in an order of their own, grids, and ranks outside."""
    pair = world.create_partition_inclusive([3, 1])
    loader, sampler = loader_of(pair, [1, 4], 2)
    for _ in range(3):
        if pair.active:
            check_epoch(loader, sampler)
        else:
            assert list(loader) == []
    P = world.grid((2, 2))
    whole = torch.arange(20).view(5, 4)
    loader, sampler = ShuffledLoader(whole[P.block(whole.shape)], 1, P), ShardBatchSampler(5, P, 1)
    for _ in range(3):
        for batch, wanted in zip(loader, sampler, strict=True):
            assert torch.equal(batch, whole[wanted][:, P.block(whole.shape)[1]])
    assert loader.global_size(0) == 2


@on_ranks(2)
def test_inference_mode_and_the_rows_given(world: Partition) -> None:
    """Epochs in and out of it; the rows that were given are not written to, nor kept."""
    rows = torch.arange(5) + 5 * world.rank
    loader, sampler = ShuffledLoader(rows, 2, world), ShardBatchSampler(10, world, 2)
    for epoch in range(4):
        with torch.inference_mode(epoch % 2 == 0):
            assert [batch.tolist() for batch in loader] == list(sampler)
    assert torch.equal(rows, torch.arange(5) + 5 * world.rank)
    held = [*loader._rows.leaves, *loader._now.leaves]
    assert rows.data_ptr() not in {tensor.data_ptr() for tensor in held}


@on_ranks(3)
def test_messages_of_an_epoch(world: Partition) -> None:
    loader, _ = loader_of(world, [5, 4, 2], 2)
    list(loader)
    with dl.count() as counted:
        list(loader)
    assert (counted.collectives, counted.bytes) == (2, 16 * len(range(world.rank, 11, 3)))
