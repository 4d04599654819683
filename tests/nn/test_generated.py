"""Every layer equal to torch's in combinations of options, shapes, grids, blocks and dtypes drawn at random.

A failure prints the line that reproduces it; `generated` says how to run any number of other cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from families import FAMILIES
from generated import SIZE, run

import distdl_lite as dl
from distdl_lite.testing import spmd

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of options such as an even kernel with padding="same"

ON_THREADS = dict.fromkeys(FAMILIES, 85)
ON_MPI = dict.fromkeys(FAMILIES, 14)


def compared(family: str, wanted: int, first: int, run_case: Callable[[int], str]) -> None:
    """Run cases until as many as wanted came out equal, few having been refused."""
    outcomes: Counter[str] = Counter()
    for number in range(first, first + wanted + wanted // 4 + 2):
        outcomes[run_case(number)] += 1
        equal = outcomes["equal"] + outcomes["equal, overlapped"]
        if equal == wanted:
            break
    print(f"{family}: {dict(outcomes)}")
    assert equal == wanted, outcomes
    assert outcomes["refused"] <= wanted / 8, outcomes
    assert family != "conv_overlapping" or outcomes["equal, overlapped"] > wanted // 8, outcomes


def test_numbers() -> None:
    assert sum(ON_THREADS.values()) >= 2000
    assert sum(ON_MPI.values()) >= 300


@pytest.mark.parametrize("family", FAMILIES)
def test_on_threads(family: str) -> None:
    compared(family, ON_THREADS[family], 0, lambda n: spmd(SIZE, lambda world: run(world, FAMILIES, family, n))[0])


@pytest.mark.mpi(min_size=SIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_mpi(family: str) -> None:
    world = dl.Partition().create_partition_inclusive(range(SIZE))
    if world.active:
        compared(family, ON_MPI[family], 10_000, lambda n: run(world, FAMILIES, family, n))
