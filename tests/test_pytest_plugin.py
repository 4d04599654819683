"""The pytest plugin, proved on small jobs under mpirun."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import mpirun, run

from distdl_lite import pytest_plugin

pytestmark = pytest.mark.jobs

SETTINGS = """
[pytest]
addopts = -p plugin -p no:cacheprovider --color=no
mpi_timeout = 60
filterwarnings = error
"""


def job(folder: Path, text: str, *options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a test file with pytest, on several ranks if there are.

    The plugin is copied beside it, which shows that it needs nothing else and spares the jobs the reading of torch.
    """
    shutil.copy(str(pytest_plugin.__file__), folder / "plugin.py")
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "test_it.py").write_text(text)
    words = ["-m", "pytest", "-rfEs", *options, "test_it.py"]
    if ranks == 1:
        return run(sys.executable, *words, cwd=folder, PYTHONPATH="")
    return mpirun(ranks, *words, "--with-mpi", cwd=folder, PYTHONPATH="")


OUTCOMES = """
import pytest
from mpi4py import MPI
world = MPI.COMM_WORLD

@pytest.fixture
def broken():
    assert world.rank != 1, "set-up broke"

@pytest.fixture
def untidy():
    yield
    assert world.rank != 0, "clean-up broke"

def test_passes(): pass
def test_fails_on_one(): assert world.rank != 1, "only here"
def test_fails_everywhere(): assert world.rank == -1
def test_setup_breaks(broken): world.Barrier()
def test_teardown_breaks(untidy): world.Barrier()
def test_skips_on_one():
    if world.rank == 0:
        pytest.skip("not here")
@pytest.mark.mpi(min_size=3)
def test_needs_three(): assert False
@pytest.mark.mpi(min_size=2)
def test_needs_two(): assert world.allreduce(1) == 2
@pytest.mark.xfail(strict=True)
def test_expected_on_one(): assert world.rank != 1
@pytest.mark.xfail(strict=True)
def test_expected_everywhere(): assert False
def test_still_together(): assert world.allgather(world.rank) == [0, 1]
"""


def test_ranks_agree_on_each_outcome(tmp_path: Path) -> None:
    done = job(tmp_path, OUTCOMES)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    # teardown failures are errors beside the passed call, on both ranks
    assert said.count("4 failed, 4 passed, 1 skipped, 1 xfailed, 2 errors") == 2, said
    assert "the call of test_it.py::test_fails_on_one failed on ranks [1] of 2" in said
    assert "test_it.py:" in said
    assert "only here" in said
    assert "the call of test_it.py::test_fails_everywhere failed on ranks [0, 1] of 2" in said
    assert "the setup of test_it.py::test_setup_breaks failed on ranks [1] of 2" in said
    assert "the teardown of test_it.py::test_teardown_breaks failed on ranks [0] of 2" in said
    assert "the call of test_it.py::test_skips_on_one ended differently on the 2 ranks" in said
    assert "not here" in said


HANGS = """
import pytest, time, torch
import distdl_lite as dl
world = dl.Partition.world()
layer = dl.nn.AllSumReduce(world.grid((2,)), [0])

@pytest.mark.mpi_timeout(30)
def test_may_take_longer(): time.sleep(2.5)
def test_raises_inside_a_collective():
    if world.rank == 1:
        raise ValueError("left the others waiting")
    layer(torch.ones(1))
"""


def test_time_limit_ends_a_job_whose_ranks_wait_for_a_failed_one(tmp_path: Path) -> None:
    began = time.monotonic()
    done = job(tmp_path, HANGS, "--mpi-timeout", "2")
    assert time.monotonic() - began < 40
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "test_may_take_longer took" not in said
    assert "rank 0: test_it.py::test_raises_inside_a_collective took more than 2 s" in said
    assert "rank 1: test_it.py::test_raises_inside_a_collective took more than 2 s in waiting for the others" in said
    assert "left the others waiting" in said
    assert "in test_raises_inside_a_collective" in said  # the stack of rank 0
    assert "most recent call first" in said
    assert "rank 0 waits in layer (test_it.py:12) for rank 1; rank 1 is at " in said


UNREADABLE_ON_ONE = """
from mpi4py import MPI
assert MPI.COMM_WORLD.rank != 1, "cannot be read"
def test_it(): MPI.COMM_WORLD.Barrier()
"""


def test_collection_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    done = job(tmp_path, UNREADABLE_ON_ONE)
    assert done.returncode not in (0, 1)
    said = done.stdout + done.stderr
    assert "cannot be read" in said
    assert "collecting the tests failed on ranks [1] of 2" in said


DIFFERENT = """
import pytest
from mpi4py import MPI

@pytest.mark.parametrize("number", [0, MPI.COMM_WORLD.rank + 5])
def test_it(number): MPI.COMM_WORLD.Barrier()
"""


def test_ranks_must_collect_the_same(tmp_path: Path) -> None:
    done = job(tmp_path, DIFFERENT)
    assert done.returncode not in (0, 1)
    text = (
        "the ranks collected different tests: 2 on rank 0 and 2 on rank 1; "
        "number 1 is test_it.py::test_it[5] on rank 0 and test_it.py::test_it[6] on rank 1"
    )
    assert (done.stdout + done.stderr).count(text) == 2
    assert "number 1 is b on rank 0 and nothing on rank 1" in pytest_plugin.difference(["ab", "a"])
    assert pytest_plugin.difference(["ab", "ab"]) == ""


def test_without_mpirun_the_plugin_loads_neither_mpi_nor_torch(tmp_path: Path) -> None:
    done = job(tmp_path, "import sys\ndef test_it(): assert not {'mpi4py', 'torch'} & {*sys.modules}\n", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
