"""The two processes of a rank: the child makes the checks one after another, the parent tells what came of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from distdl_lite.bench.table import write_json
from distdl_lite.doctor import checks
from distdl_lite.doctor.verdict import DIRECT, judge, launched, lines_of, machine_rows
from distdl_lite.doctor.watch import GRACE, Voice, watch
from distdl_lite.transport import Transport, current


def child(voice: Voice) -> None:
    """Make the checks, together with the children of the other ranks."""
    voice.begin("start")
    try:
        world = current()
    except (ImportError, RuntimeError, ValueError) as error:
        voice.say(finding="start", ranks=[f"no transport: {type(error).__name__}: {error}"])
        return
    mine = checks.facts() | {"library": _about(world)}
    facts = world.gather_objects(world.team(range(world.size)), mine)
    if world.rank == 0:
        voice.say(finding="facts", ranks=facts)
    examine(voice, world, checks.Devices() if all(one["gpus"] for one in facts) else None)
    voice.begin("end")


def _about(world: Any) -> dict[str, str]:
    if world.name != "MPI":
        is_direct = world.home(torch.device("cuda")).type == "cuda"
        return {"transport": world.name, "device tensors": "by NCCL" if is_direct else "through host memory"}
    from distdl_lite.transport.mpi.about import about

    return {"transport": "MPI"} | about()


def examine(voice: Any, world: Transport, devices: Any) -> None:
    """Make all steps that this job can make; rank 0 says what each rank found."""
    team = world.team(range(world.size))
    for name, check in _steps(world, devices):
        voice.begin(name, risky=name in DIRECT)
        try:
            mine = check()
        except Exception as error:  # whatever it is, it is the answer
            mine = f"{type(error).__name__}: {error}"
            print(f"rank {world.rank}: {name}: {mine}", file=sys.stderr, flush=True)  # the others may wait for ever
        found = world.gather_objects(team, mine)
        if world.rank == 0:
            voice.say(finding=name, ranks=found)


def _steps(world: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, device in (("", torch.device("cpu")), *([("device ", devices.device)] if devices else [])):
        yield f"{name}messages", partial(checks.messages, world, device)
        yield f"{name}sums", partial(checks.sums, world, device)
        if world.size > 1:
            yield f"{name}speed", partial(checks.speeds, world, device)
    if devices is None:
        return
    yield "stream order", partial(checks.stream_order, world, devices)
    if world.name != "MPI":
        return
    from distdl_lite.transport.mpi.about import posted_sum, ring, takes_cuda

    if takes_cuda() is not False:  # the last, for they may crash the process
        before, total = (world.rank - 1) % world.size, sum(range(world.size))
        for name, call, right in zip(DIRECT, (ring, posted_sum), (before, total), strict=True):
            yield name, partial(checks.direct, devices, partial(call, world.comm), world.rank, right)


def doctor(arguments: argparse.Namespace) -> int:
    """Run the checks in a child process; rank 0 prints what they found. Returns the exit code."""
    launcher, found = launched(os.environ), dict[str, Any]()

    def tell(line: dict[str, Any]) -> None:
        lines = [f"{line['begin']} is tried; if the job ends here, MPI takes none"] if line.get("risky") else []
        if "finding" in line:
            found[line["finding"]] = line["ranks"]
            lines = lines_of(line["finding"], line["ranks"])
        if launcher.rank == 0 and not arguments.json:
            print(*lines, sep="\n", end="\n" * bool(lines), flush=True)

    failure = watch("distdl_lite.doctor", arguments.limit, tell)
    if failure is not None:
        print(f"rank {launcher.rank}: {failure}\n{failure.stack}", file=sys.stderr, flush=True)
    if launcher.rank != 0:
        if failure is not None:  # mpirun would end the others, before they have said what they know
            time.sleep(arguments.limit + 2 * GRACE)
        return int(failure is not None and not failure.risky)
    verdict = judge(found, failure, launcher, os.environ)
    print(json.dumps(verdict.to_dict(found), indent=1) if arguments.json else f"\n{verdict}", flush=True)
    if arguments.out and (rows := machine_rows(found)):
        write_json(rows, arguments.out)
    return int(bool(verdict.wrong))
