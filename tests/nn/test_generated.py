"""Every layer equal to torch's in combinations of options, shapes, grids, blocks and dtypes drawn at random.

Their numbers move on from day to day. A failure prints the line that reproduces it; `generated` says how to run any others,
and ``tox -e twins`` runs five times as many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import date

import pytest
from families import FAMILIES
from generated import SIZE, run

import distdl_lite as dl
from distdl_lite.testing import spmd

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of options such as an even kernel with padding="same"

EACH = int(os.environ.get("TWINS", 400)) // len(FAMILIES)


def compared(family: str, count: int, first: int, run_case: Callable[[int], str]) -> None:
    """Run cases, of which each is equal or refused, and not too many are refused."""
    outcomes = Counter(run_case(number) for number in range(first, first + count))
    print(f"{family} from {first} on: {dict(outcomes)}")
    assert outcomes["equal"] + outcomes["equal, overlapped"] >= 3 * count // 4 - 8, outcomes  # of a few it is chance
    assert family != "conv_overlapping" or outcomes["equal, overlapped"] >= count // 40, outcomes


def todays(world: dl.Partition) -> int:
    """The first number of the day, that of rank 0's clock."""
    return world.allgather_data(date.today().toordinal())[0] * 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_on_threads(family: str) -> None:
    first = todays(dl.Partition.world())
    compared(family, EACH, first, lambda n: spmd(SIZE, lambda world: run(world, FAMILIES, family, n))[0])


@pytest.mark.mpi(min_size=SIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_mpi(family: str) -> None:
    world = dl.Partition().create_partition_inclusive(range(SIZE))
    if world.active:
        compared(family, EACH // 4, todays(world) + 500, lambda n: run(world, FAMILIES, family, n))
