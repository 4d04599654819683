"""The command line: `python -m distdl_lite info`, `doctor`, `explain`, `plan`, `checkpoint`, `report` and `bench`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy
import torch

import distdl_lite
from distdl_lite import layout as lay
from distdl_lite import nn as dnn
from distdl_lite.checkpoint import command as checkpoint
from distdl_lite.grid import Grid
from distdl_lite.nn.conv import overlap
from distdl_lite.operator import wire_itemsize
from distdl_lite.partition import Partition
from distdl_lite.plan import plan
from distdl_lite.show import messages
from distdl_lite.show.text import MPI_NAMES, layout_text, plan_text
from distdl_lite.transport import enter, reports
from distdl_lite.transport.abort import abort_on_exception
from distdl_lite.transport.threads import ThreadTransport, World
from distdl_lite.transport.wire import wire_dtype

_MOST_LISTED = 16
_MOST_RANKS = 2**24


def info(arguments: argparse.Namespace) -> str | None:
    """Versions and what joins the ranks; None on those that do not print."""
    lines = [
        ("distdl_lite", distdl_lite.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("numpy", numpy.__version__),
        ("CUDA in torch", f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "not available"),
    ]
    try:
        P = Partition.world()
    except (RuntimeError, ValueError) as error:
        return _listed([*lines, ("ranks", f"none: {error}")])
    lines.append(("transport", P.world_transport.name))
    if P.world_transport.name == "MPI":
        from distdl_lite.transport.mpi.about import about

        lines += about().items()
    hosts = Counter(P.allgather_data(platform.node()) or ())
    lines += [("ranks", str(P.size)), ("hosts", ", ".join(f"{host} ({number})" for host, number in hosts.items()))]
    return _listed(lines) if P.rank == 0 else None


def doctor(arguments: argparse.Namespace) -> None:
    """Check a job's ranks, cores, messages and devices; exit code 1 if something is wrong."""
    from distdl_lite.doctor import doctor as examined

    sys.exit(examined(arguments))


def _listed(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name + ':':16}{value}" for name, value in facts)


_TWO_GRIDS = ("Broadcast", "SumReduce", "Repartition")
_AXES = {"AllSumReduce": "axes_reduce", "AllGather": "axes_all_gather", "ReduceScatter": "axes_reduce_scatter"}
_WHOLE = ("Broadcast", "SumReduce", "AllSumReduce")
PRIMITIVES = (*_TWO_GRIDS, *_AXES, "HaloExchange")


def explain(arguments: argparse.Namespace) -> str:
    """Who sends what to whom; no rank but this process is needed."""
    size = math.prod(arguments.grid)
    ranks = max(size, math.prod(arguments.to or (1,)))
    if ranks > _MOST_RANKS:
        raise ValueError(f"grids of at most {_MOST_RANKS} ranks can be explained, not of {ranks}")
    rank = arguments.rank or 0
    if not 0 <= rank < ranks:
        raise ValueError(f"--rank {rank} is not among the {ranks} ranks of the grids")
    enter(ThreadTransport(World(ranks), rank))
    try:
        layer = _primitive(arguments)
        X, Y = layer.layouts(_local_shapes(arguments, layer.P_x.grid_of_ranks))
        if arguments.dtype == "bool" and (X.overlaps or plan(X, Y, 0).pattern.sums):
            raise ValueError(f"{arguments.primitive}: bool tensors can be moved but not added")
    finally:
        enter(None)
    if arguments.svg:
        itemsize = wire_itemsize(plan(X, Y, rank), getattr(torch, arguments.dtype))
        drawn = messages(X, Y, ranks=None if _shows_all(arguments, ranks) else [rank], itemsize=itemsize)
        drawn.figure.savefig(arguments.svg)
    return _explanation(arguments, X, Y, ranks)


def _shows_all(arguments: argparse.Namespace, ranks: int) -> bool:
    return ranks <= _MOST_LISTED and arguments.rank is None


def _primitive(arguments: argparse.Namespace) -> Any:
    world = Partition.world()
    name = arguments.primitive
    P_x = world.grid(arguments.grid)
    if arguments.to and name not in _TWO_GRIDS:
        raise ValueError(f"{name} has one grid: --to is for {', '.join(_TWO_GRIDS)}")
    if name in _TWO_GRIDS and not arguments.to:
        raise ValueError(f"{name} needs --to, the grid of the output")
    if name in _TWO_GRIDS:
        return getattr(dnn, name)(P_x, world.grid(arguments.to))
    if name in _AXES:
        return getattr(dnn, name)(P_x, **{_AXES[name]: _axes(arguments)})
    if arguments.halo is None:
        raise ValueError("HaloExchange needs --halo, a number of points per dim")
    return dnn.HaloExchange(P_x, arguments.halo, arguments.boundary)


def _axes(arguments: argparse.Namespace) -> tuple[int, ...]:
    return tuple(range(len(arguments.grid))) if arguments.axes is None else arguments.axes


def _local_shapes(arguments: argparse.Namespace, grid: Grid) -> dict[int, tuple[int, ...]]:
    """What each rank passes: a whole tensor, or balanced blocks of one."""
    if arguments.primitive in _WHOLE:
        return dict.fromkeys(grid.ranks, arguments.shape)
    X = lay.balanced_blocks(grid, arguments.shape)
    if arguments.primitive == "ReduceScatter":
        X = lay.gathered(X, [axis % grid.dim for axis in _axes(arguments)])
    return {rank: lay.shape_of(X.box(rank) or ()) for rank in grid.ranks}


def _explanation(arguments: argparse.Namespace, X: lay.Layout, Y: lay.Layout, ranks: int) -> str:
    few, rank = _shows_all(arguments, ranks), arguments.rank or 0
    chosen = range(ranks) if few else [rank]
    plans = [plan(X, Y, rank) for rank in chosen]
    pattern, shape = plans[0].pattern, "x".join(map(str, arguments.shape))
    dtype = getattr(torch, arguments.dtype)
    itemsize = (wire_dtype(dtype) if pattern.sums else dtype).itemsize
    grids = " to ".join("x".join(map(str, grid)) for grid in (arguments.grid, arguments.to) if grid)
    each = "a tensor on each rank" if arguments.primitive in _WHOLE else "blocks"
    lines = [
        f"{arguments.primitive} of {shape} {arguments.dtype} ({each}), grid {grids}, {ranks} ranks",
        f"runs as {MPI_NAMES[pattern]}, its adjoint as {MPI_NAMES[pattern.adjoint]}",
    ]
    for title, layout in (("input", X), ("output", Y)):
        lines += ["", f"{title}:", layout_text(layout, chosen) or "nothing"]
    lines += ["", "traffic:", *(plan_text(p, X, Y, itemsize) for p in plans), ""]
    what = "messages" if not any(leg.team for p in plans for leg in p.legs) else "calls of collectives, one a rank"
    whose = "all ranks together" if few else f"rank {rank} of {ranks}"
    lines.append(
        f"{whose}: {sum(p.traffic[1] for p in plans)} {what}, {sum(p.traffic[2] for p in plans) * itemsize} bytes for others"
    )
    return "\n".join(lines)


def plan_model(arguments: argparse.Namespace) -> str:
    """The report of a model over a grid, or the grids for a number of ranks; no rank but this process is needed."""
    from distdl_lite.model.report import TYPICAL, Machine, report
    from distdl_lite.model.suggest import suggest

    if (arguments.grid is None) == (arguments.ranks is None):
        raise ValueError("plan needs either --grid, for a report, or --ranks, for grids of so many")
    if not arguments.shape:
        raise ValueError("plan needs --shape, once for each argument of the model")
    model = _made_by(arguments.factory)
    inputs = [
        shape if dtype is None else torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in arguments.shape
    ]
    train = not arguments.eval
    machine = TYPICAL if arguments.machine is None else Machine.read(arguments.machine)
    try:
        if arguments.grid is None:
            memory = math.inf if arguments.memory is None else arguments.memory
            found: Any = suggest(model, *inputs, ranks=arguments.ranks, memory=memory, train=train, machine=machine)
            told: Any = [{"grid": s.grid, "fits": s.fits, "reason": s.reason} | s.report.to_dict() for s in found]
        else:
            found = report(model, arguments.grid, *inputs, train=train, machine=machine)
            told = found.to_dict()
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    if arguments.json:
        return json.dumps(told, indent=1)
    if arguments.markdown:
        return found.to_markdown()
    too_much = arguments.grid is not None and arguments.memory is not None and found.peak > arguments.memory
    return f"{found}\nDOES NOT FIT {arguments.memory:.3g} bytes" if too_much else str(found)


def _made_by(text: str) -> Any:
    """What the factory ``package.module:name`` makes."""
    place, _, name = text.partition(":")
    if not place or not name:
        raise ValueError(f"{text!r} does not say package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(import_module(place), name, None)
    except ImportError as error:
        raise ValueError(f"{place}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(factory):
        raise ValueError(f"{place} has no function {name}" if factory is None else f"{text} cannot be called")
    model = factory if isinstance(factory, torch.nn.Module) else factory()
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{text} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


_BENCHMARKS = (
    "primitives", "conv", "layers", "unet", "memory", "plan", "data_parallel", "tagi", "machine", "data", "checkpoint",
)  # fmt: skip


def bench(arguments: argparse.Namespace) -> str | None:
    """Run a benchmark on all ranks; None on the ranks that do not print."""
    from distdl_lite.bench.table import table, write_json

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if arguments.overlap == "off":
        overlap.LEAST_BYTES = sys.maxsize
    P = Partition.world()
    which = import_module(f"distdl_lite.bench.{arguments.which}")
    if arguments.gib is not None:
        which.GIB = arguments.gib
    allowed = which.RANKS or (P.size,)
    if P.size not in allowed:
        counts, start = ", ".join(map(str, allowed)), P.world_transport.launcher.format(2)
        text = f"bench {arguments.which} runs on {counts} ranks, not on {P.size}: use {start}"
        sys.exit(text if P.rank == 0 else 1)
    rows = which.rows(P, arguments.seconds)
    if P.rank != 0:
        return None
    if arguments.json:
        write_json(rows, arguments.json)
    return f"{table(rows)}\n\n{_BARS}"


def _numbers(separator: str, least: int) -> Callable[[str], tuple[int, ...]]:
    def numbers(text: str) -> tuple[int, ...]:
        found = tuple(int(part) for part in text.split(separator))
        if any(n < least for n in found):
            raise ValueError(text)
        return found

    numbers.__name__ = f"list of numbers from {least} on, with {separator} between them,"
    return numbers


def _halo(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [[int(side) for side in part.split(":")] for part in text.split(",")]
    if any(len(pair) > 2 for pair in pairs):
        raise ValueError(text)
    return tuple((pair[0], pair[-1]) for pair in pairs)


_halo.__name__ = "halo, such as 1,1 or 0,1:2"
_BARS = """\
Both columns are medians of calls that took turns, the slower rank of each. `bar` says how much ours may take: so many
microseconds more than the other, or so many times as long. A row that was given less than a second, or a machine that does
other work, tells little."""


def _dtype(text: str) -> str:
    if not isinstance(getattr(torch, text, None), torch.dtype):
        raise ValueError(text)
    return text


def _shape(text: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    shape, _, dtype = text.partition(":")
    return _numbers("x", 0)(shape), getattr(torch, _dtype(dtype)) if dtype else None


_shape.__name__ = "shape, such as 1x3x512x512 or 8x128:int64"


def _primitive_named(text: str) -> str:
    """The primitive's name, whatever the case."""
    return {name.lower(): name for name in PRIMITIVES}.get(text.lower(), text)


def report(arguments: argparse.Namespace) -> str:
    """Why a job hung."""
    return reports.in_words(reports.read(arguments.folder), arguments.stacks)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    made = argparse.ArgumentParser(prog="python -m distdl_lite", description=distdl_lite.__doc__)
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    about = "versions, what joins the ranks, MPI's library, thread level and CUDA awareness, hosts"
    commands.add_parser("info", help=about).set_defaults(run=info)
    _add_doctor(commands)
    _add_explain(commands.add_parser("explain", help="who sends what to whom for a primitive; needs no ranks"))
    _add_plan(
        commands.add_parser("plan", help="what a model cut over a grid moves, computes and holds; needs no ranks")
    )
    checkpoint.add(commands)
    hung = commands.add_parser("report", help="print again why a job hung, as its ranks told in a folder")
    hung.add_argument("folder", metavar="FOLDER", help="that the report named")
    hung.add_argument("--stacks", action="store_true", help="and the stack of each rank")
    hung.set_defaults(run=report)
    timed = commands.add_parser(
        "bench",
        help="our calls beside hand-written ones; start it with mpirun -n 2 or torchrun --nproc-per-node 2",
        description=_BARS,
    )
    timed.add_argument("which", choices=_BENCHMARKS)
    timed.add_argument("--json", metavar="FILE", help="write the rows there too")
    timed.add_argument(
        "--overlap", choices=("on", "off"), default="on", help="whether halos travel during convolutions (on)"
    )
    timed.add_argument("--gib", type=float, help="of the file that `bench data` writes (2)")
    timed.add_argument("--seconds", type=float, default=1.0, help="to spend on each row (1)")
    timed.set_defaults(run=bench)
    return made


def _add_doctor(commands: Any) -> None:
    about = "whether ranks, cores, messages, sums and devices work, how fast, and what to set; exit code 1 if something is wrong"
    told = commands.add_parser(
        "doctor",
        help=about,
        description=f"Under the mpirun, srun or torchrun of your program, with its variables: {about}.",
    )
    told.add_argument("--json", action="store_true", help="print all findings as JSON, on rank 0")
    told.add_argument("--out", metavar="FILE", help="write latency and bandwidth there, for `plan --machine FILE`")
    told.add_argument("--limit", type=float, default=60.0, help="seconds that a check may take (60)")
    told.set_defaults(run=doctor)


def _add_explain(told: argparse.ArgumentParser) -> None:
    grid, dims = _numbers("x", 1), _numbers("x", 0)
    told.add_argument(
        "primitive", type=_primitive_named, choices=PRIMITIVES, metavar="PRIMITIVE", help=", ".join(PRIMITIVES)
    )
    told.add_argument("--grid", type=grid, required=True, help="of the input's ranks, such as 2x2")
    told.add_argument("--to", type=grid, help="grid of the output's ranks, where it is another one")
    told.add_argument(
        "--shape", type=dims, required=True, help="of the whole tensor, such as 7x5; of a rank's for copies and sums"
    )
    told.add_argument("--halo", type=_halo, help="points per dim, left:right where they differ: 1,1 or 0,1:2")
    told.add_argument("--boundary", choices=lay.BOUNDARIES, default="none", help="what lies beyond the global edge")
    told.add_argument("--axes", type=_numbers(",", 0), help="summed, gathered or scattered along (all)")
    told.add_argument("--rank", type=int, help=f"show this rank alone; 0 for more than {_MOST_LISTED} ranks")
    told.add_argument("--dtype", type=_dtype, default="float32", help="of torch, for the bytes (float32)")
    told.add_argument("--svg", metavar="FILE", help="draw the messages there; .png, .pdf and others do too")
    told.set_defaults(run=explain)


def _add_plan(told: argparse.ArgumentParser) -> None:
    told.add_argument(
        "factory", metavar="PACKAGE.MODULE:FACTORY", help="a function without arguments that makes the model"
    )
    told.add_argument("--grid", type=_numbers("x", 1), help="of the ranks, such as 1x1x8x8")
    told.add_argument("--ranks", type=int, help="instead: list the grids of so many ranks, the fastest that fits first")
    told.add_argument(
        "--shape",
        type=_shape,
        action="append",
        help="of an argument's whole tensor, such as 1x3x512x512 or 8x128:int64",
    )
    told.add_argument("--memory", type=float, help="bytes that a rank has, such as 80e9")
    told.add_argument(
        "--machine", metavar="FILE", help="for the times: of `bench machine --json FILE` or `doctor --out FILE`"
    )
    told.add_argument("--eval", action="store_true", help="in evaluation: no backward")
    told.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    told.add_argument("--json", action="store_true", help="print all numbers as JSON")
    told.set_defaults(run=plan_model)


_OF_ONE_PROCESS = {explain: "explain", plan_model: "plan", report: "report"} | dict.fromkeys(
    (checkpoint.ls, checkpoint.verify, checkpoint.diff, checkpoint.export), "checkpoint"
)  # whose errors are the user's


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    abort_on_exception()
    grammar = parser()
    arguments = grammar.parse_args(words)
    try:
        text = arguments.run(arguments)
    except (ImportError, OSError, ValueError) as error:
        name = _OF_ONE_PROCESS.get(arguments.run)
        if name is None:
            raise
        grammar.exit(2, f"{grammar.prog} {name}: error: {error}\n")
    if text is not None:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
