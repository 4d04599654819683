"""Ranks as forked processes that talk by gloo, new ones for each case, so that one failure cannot spoil the next."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cut_cases import CASES, Case, shown, worst
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard


def main(run: Callable[[Case], str]) -> None:
    """Print a verdict on every case, or on those with the words of the command line in their names."""
    for case in CASES:
        if " ".join(sys.argv[1:]) in case.name:
            print(f"{case.name}: {on_ranks(math.prod(case.grid), lambda rank, case=case: run(case))}", flush=True)


def mesh_of(case: Case) -> tuple[DeviceMesh, Callable[[torch.Tensor], list[Placement]]]:
    """The mesh of the axes that are longer than one, and how a tensor lies on it."""
    axes = [axis for axis, n in enumerate(case.grid) if n > 1]

    def placements(x: torch.Tensor) -> list[Placement]:
        dims = {axis: dim for dim, axis in enumerate(case.axes(x))}
        return [Shard(dims[axis]) if axis in dims else Replicate() for axis in axes]

    return init_device_mesh("cpu", tuple(case.grid[axis] for axis in axes)), placements


def on_ranks(ranks: int, body: Callable[[int], str], seconds: float = 180) -> str:
    """What the ranks say, first the worst; or that some ended or none did."""
    context = multiprocessing.get_context("fork")
    told: Any = context.Queue()
    with tempfile.NamedTemporaryFile() as store:
        jobs = [context.Process(target=_rank, args=(r, ranks, store.name, body, told)) for r in range(ranks)]
        for job in jobs:
            job.start()
        verdicts, end = dict[int, str](), time.monotonic() + seconds
        while len(verdicts) < ranks and time.monotonic() < end and all(job.is_alive() for job in jobs):
            try:
                verdicts |= [told.get(timeout=1)]
            except queue.Empty:
                if any(v.startswith("error") for v in verdicts.values()):
                    break
        lost = "hangs" if all(job.is_alive() for job in jobs) else "crashes"
        for job in jobs:
            job.kill()
            job.join()
    errors = [v for v in verdicts.values() if v.startswith("error")]  # the first one, which made the others
    return errors[0] if errors else worst([verdicts[r] for r in sorted(verdicts)]) if len(verdicts) == ranks else lost


def _rank(rank: int, ranks: int, store: str, body: Callable[[int], str], told: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        told.put((rank, body(rank)))
    except Exception as error:
        told.put((rank, shown(error)))
    time.sleep(600)  # a rank that leaves makes errors of others; the parent ends all
