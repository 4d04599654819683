"""Loaders that go on in the middle of an epoch, on another number of ranks: no sample comes twice, none is lost."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import pytest
import torch

import distdl_lite as dl
from distdl_lite.data import Loader, ShuffledLoader
from distdl_lite.testing import spmd


def loader_of(
    world: dl.Partition, length: int, batch: int, whole: int | None, shuffles_rows: bool, workers: int
) -> Any:
    if not shuffles_rows:
        return Loader(range(length), world, batch, global_batch_size=whole, seed=3, num_workers=workers)
    first, last = (length * rank // world.size for rank in (world.rank, world.rank + 1))
    return ShuffledLoader(torch.arange(first, last), batch, world, seed=3)


def check(draw: random.Random, workers: int = 0) -> None:
    length, batch, whole = draw.randint(1, 30), draw.randint(1, 4), draw.choice([None, 1, 3, 5, 8])
    shuffles, epochs, stop = draw.random() < 0.5 and not workers, draw.randint(0, 2), draw.randint(1, 5)
    arguments = length, batch, whole, shuffles, workers

    def begun(world: dl.Partition) -> tuple[list[int], dict[str, Any]]:
        loader = loader_of(world, *arguments)
        for _ in range(epochs):
            list(loader)
        taken: list[int] = []
        for step, samples in enumerate(loader, 1):
            taken += samples.tolist()
            if step == stop:
                return taken, loader.state_dict()
        return [], loader.state_dict()

    def resumed(world: dl.Partition) -> tuple[list[int], list[int], int]:
        loader = loader_of(world, *arguments)
        loader.load_state_dict(states[0])
        rest, size = [], 0
        for step, samples in enumerate(loader):
            rest += samples.tolist()
            size += loader.global_size(step)
        return rest, [n for samples in loader for n in samples.tolist()], size

    taken, states = zip(*spmd(draw.randint(1, 4), begun), strict=True)
    assert all(state == states[0] for state in states)
    assert states[0]["samples"] == sum(map(len, taken))
    rest, following, sizes = zip(*spmd(draw.randint(1, 4), resumed), strict=True)
    assert sorted(chain(*taken, *rest)) == list(range(length))
    assert sorted(chain(*following)) == list(range(length))
    assert set(sizes) == {sum(map(len, rest))}


def test_random_loaders() -> None:
    for number in range(40):
        check(random.Random(number))
    check(random.Random(0), workers=2)  # which read ahead


def test_another_order_is_refused() -> None:
    def body(world: dl.Partition) -> None:
        state = Loader(range(9), world, seed=1).state_dict()
        for other, text in (
            (Loader(range(9), world, seed=2), "seed was 1, here it is 2"),
            (Loader(range(8), world, seed=1), "length was 9"),
        ):
            with pytest.raises(ValueError, match=text):
                other.load_state_dict(state)

    spmd(2, body)
