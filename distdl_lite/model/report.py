"""What a model cut over a grid moves, computes and holds, and how long that takes, found without ranks and without data."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distdl_lite.buckets import cut
from distdl_lite.factors import Dims, all_axes, blocks, length_of, local_shape
from distdl_lite.grid import Grid, unravel
from distdl_lite.layout import Shape
from distdl_lite.model.capture import Captured, as_module, capture
from distdl_lite.model.compile import Axes, Program, check_used, compiled, fitting_axes
from distdl_lite.model.dry import DryTransport, Runs, dry_run
from distdl_lite.nn.module import Module
from distdl_lite.nn.value import Movement, Value
from distdl_lite.operator import wire_itemsize
from distdl_lite.partition import Partition, integers_of
from distdl_lite.plan import Pattern, Plan, plan
from distdl_lite.reducer import BUCKET_BYTES, EARLY_BYTES, Replicas
from distdl_lite.text import columns

_ORDER = "is it report(model, grid, shape), or summary(model, shape, grid)?"
ALL_UP_TO = 64  # ranks of a grid are looked at; of a larger one some


@dataclass(frozen=True)
class Machine:
    """What predicted times are found from.

    Attributes
    ----------
    latency : float
        Seconds a message takes beside its bytes.
    bandwidth : float
        Bytes a second that a rank sends.
    rate : float
        Multiply-adds a second of one rank, in convolutions and other products.
    memory_bandwidth : float
        Bytes a second that a rank's operations read and write.
    optimizer : float
        Copies of the weights that the optimizer keeps; Adam two.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> slow = dl.Machine(latency=1e-3)
    >>> dl.report(torch.nn.Conv2d(3, 8, 3), (1, 1, 2, 1), (2, 3, 37, 29), machine=slow).parts["latency"]
    0.003
    """

    latency: float = 1e-5
    bandwidth: float = 1e10
    rate: float = 5e12
    memory_bandwidth: float = 1e12
    optimizer: float = 2.0

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Machine:
        """The numbers that ``python -m distdl_lite bench machine --json FILE`` or ``doctor --out FILE`` has measured.

        Of several rows for a number the last counts; a number without one is `TYPICAL`'s.

        Raises
        ------
        ValueError
            If the file holds no such rows.
        """
        units = {"us": 1e-6, "GB/s": 1e9, "G/s": 1e9}
        names = {field.name for field in fields(cls)}
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
            found = {row["what"]: row["ours"] * units[row["unit"]] for row in rows if row["what"] in names}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no rows of measured numbers: {error!r}") from error
        if not found:
            raise ValueError(f"{path} has no row for any of {', '.join(sorted(names))}")
        return cls(**found)


TYPICAL = Machine()


@dataclass(frozen=True)
class Traffic:
    """What one rank sends.

    Attributes
    ----------
    messages, bytes : int
        As `distdl_lite.testing.count` counts them: a collective is one message.
    latencies, wire : int, float
        For predicted times: messages one after another, and bytes on the links. A collective of p ranks takes log2 p messages
        and (p - 1) / p of its bytes, an all-reduce twice that (Thakur, Rabenseifner and Gropp 2005).
    """

    messages: int = 0
    bytes: int = 0
    latencies: int = 0
    wire: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        messages, size = self.messages + other.messages, self.bytes + other.bytes
        return Traffic(messages, size, self.latencies + other.latencies, self.wire + other.wire)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.messages * times, self.bytes * times, self.latencies * times, self.wire * times)


Index = tuple[int, ...]
Both = tuple[Traffic, Traffic]  # forward and backward
Cuts = tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]  # length and axes of each factor of each dim


@dataclass(frozen=True)
class Row:
    """A module, as far as it calls operations itself.

    Attributes
    ----------
    path : str
        Under "inputs" are the blocks that come in, and sums of their gradients where several ranks hold them; under
        "gradients" the sums of those of weights; under "outputs" outputs go into their layouts.
    operations : tuple of str
        In a network of layers the class of the module.
    output : str
        The global shape of its last output with its cuts: ``37/2`` is cut in two, ``18*37/2`` are two dims made one. Where
        nobody knows how it lies, the shape of a block.
    movements : dict
        How many of each kind in forward; in a network of layers by their pattern.
    forward, backward : Traffic
        The most that any rank sends.
    multiply_adds : int
        Of the products (convolutions, matrices) in the forward on the fullest rank.
    weights, kept : int
        Bytes of its own parameters and buffers, and of what it leaves behind for backward on the fullest rank.
    gathered : tuple of str
        Its operations whose inputs are made whole on every rank, with their lines.
    cuts : tuple
        The same as `output`, in numbers: for each dim the factors that it is a product of, each the length and the axes of
        the grid that cut it.
    """

    path: str
    operations: tuple[str, ...]
    output: str
    movements: dict[str, int]
    forward: Traffic
    backward: Traffic
    multiply_adds: int
    weights: int
    kept: int
    gathered: tuple[str, ...]
    cuts: Cuts = ()


@dataclass(frozen=True)
class Report:
    """What a model or a network over a grid moves, computes and holds; `print` shows it as a table.

    Attributes
    ----------
    grid : tuple of int
    rows : tuple of Row
        In the order of the forward.
    forward, backward : Traffic
        The most messages, and the most bytes, that any rank sends; of a grid of more than 64 ranks, corners, edges and
        ranks within are looked at. Sums of weights' gradients are those from the second step on.
    multiply_adds, backward_multiply_adds : int
        On the fullest rank.
    touched : int
        Bytes that its operations read and write, in forward and backward.
    weights, gradients, optimizer, kept, peak : int
        Bytes a rank: of parameters and buffers, of gradients, of the optimizer, of what forward keeps for backward with the
        inputs, and the most of all together.
    ratio : float
        Elements that operations make on the fullest rank, times ranks, over those in the model: 1 if every rank does
        its share alone, the number of ranks if every rank does everything. That nothing is gathered does not make it 1.
    machine : Machine

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> report = dl.report(torch.nn.Conv2d(3, 8, 3, padding=1), (1, 1, 2, 1), (2, 3, 38, 29))
    >>> report.forward.messages, report.forward.bytes, report.ratio
    (1, 696, 1.0)
    """

    grid: Shape
    rows: tuple[Row, ...]
    forward: Traffic
    backward: Traffic
    multiply_adds: int
    backward_multiply_adds: int
    touched: int
    weights: int
    gradients: int
    optimizer: int
    kept: int
    peak: int
    ratio: float
    machine: Machine

    @property
    def ranks(self) -> int:
        return math.prod(self.grid)

    @property
    def gathered(self) -> tuple[str, ...]:
        """The operations that every rank does whole, with module and line."""
        return tuple(text for row in self.rows for text in row.gathered)

    @property
    def parts(self) -> dict[str, float]:
        """The predicted seconds of a step by what takes them."""
        moved = self.forward + self.backward
        return {
            "arithmetic": (self.multiply_adds + self.backward_multiply_adds) / self.machine.rate,
            "memory": self.touched / self.machine.memory_bandwidth,
            "latency": moved.latencies * self.machine.latency,
            "bytes": moved.wire / self.machine.bandwidth,
        }

    @property
    def seconds(self) -> float:
        """The predicted time of a step, nothing of which overlaps."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, lists and dicts."""
        return asdict(self) | {"ranks": self.ranks, "seconds": self.seconds, "parts": self.parts}

    def to_markdown(self) -> str:
        """The table and what follows it, in Markdown."""
        return "\n".join([in_markdown(_cells(self)), "", *(f"* {line}" for line in _summary(self))])

    def __str__(self) -> str:
        return "\n".join([columns(_cells(self)), "", *_summary(self)])

    def print(self, file: Any = None) -> None:
        """Print it; on a terminal with the head, the total and the peak bold, and red what is gathered."""
        text, file = str(self), sys.stdout if file is None else file
        if file.isatty():
            text = re.sub(r"(?m)^(module|total|peak) .*", "\033[1m\\g<0>\033[m", text)
            text = re.sub(r"(?m)^.*GATHERED.*", "\033[31m\\g<0>\033[m", text)
        print(text, file=file)


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the head first."""
    head, *rest = lines
    cells = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in cells)


def _cells(made: Report) -> list[list[str]]:
    """The table's lines."""
    total = Row("total", (), "", {}, made.forward, made.backward, made.multiply_adds, made.weights, made.kept, ())
    lines = [["module", "operations", "output", "moves", "messages", "bytes", "multiply-adds", "weights", "kept"]]
    for row in (*made.rows, total):
        forward, backward = row.forward, row.backward
        words = [*row.operations, *(["GATHERED"] if row.gathered else [])]
        numbers = forward.messages, backward.messages, row.multiply_adds, row.weights, row.kept
        first, second, *others = map(number, numbers)
        sent = f"{number(forward.bytes)} + {number(backward.bytes)}"
        moves = ", ".join(f"{n} {kind}" for kind, n in row.movements.items())
        lines.append([row.path or ".", ", ".join(words), row.output, moves, f"{first} + {second}", sent, *others])
    return lines


def _summary(made: Report) -> list[str]:
    """The lines below the table."""
    parts = ", ".join(f"{number(seconds, 's')} {name}" for name, seconds in made.parts.items())
    held = {"weights": made.weights, "gradients": made.gradients, "optimizer": made.optimizer, "kept": made.kept}
    memory = ", ".join(f"{number(size, 'B')} {name}" for name, size in held.items())
    lines = [
        f"grid {'x'.join(map(str, made.grid))}, {made.ranks} ranks; messages and bytes of the fullest rank, forward + backward",
        f"predicted step: {number(made.seconds, 's')} ({parts})",
        f"peak memory a rank: {number(made.peak, 'B')} ({memory})",
        f"elements on the fullest rank x ranks / elements in the model: {made.ratio:.2f}",
    ]
    return [*lines, *(f"GATHERED, whole on every rank: {text}" for text in made.gathered)]


def number(value: float, unit: str = "") -> str:
    """Three digits, a prefix and a unit.

    >>> number(0), number(1234567, "B"), number(0.00021, "s")
    ('0', '1.23 MB', '210 us')
    """
    power = 0
    if value and not 1 <= value < 1000:
        power = max(min(math.floor(math.log10(value) / 3), 5), -3)
    return f"{value / 1000.0**power:.3g} {'num kMGTP'[power + 3].strip()}{unit}".rstrip()


# Made


def report(
    model: Any,
    grid: Partition | Sequence[int],
    *inputs: Any,
    in_axes: Sequence[Axes | None] | None = None,
    out_axes: Sequence[Axes | None] | None = None,
    train: bool = True,
    strict: bool = False,
    machine: Machine = TYPICAL,
) -> Report:
    """What a model over a grid will move, compute and hold; no ranks, no data and no memory for activations are needed.

    Parameters
    ----------
    model : torch.nn.Module or callable
        As of `distribute`; it is not changed.
    grid : Partition or sequence of int
        The grid that it is to be cut over, or its shape.
    *inputs : tuple of int, torch.Tensor or Any
        Its arguments: global shapes, of tensors in the dtype of the model's weights; tensors of global shapes, also on the
        meta device, which say their dtype and whether they require a gradient; or plain values.
    in_axes, out_axes, strict
        As of `distribute`.
    train : bool
        Whether there is a backward; else the model is looked at in evaluation.
    machine : Machine
        For the predicted times.

    Raises
    ------
    RuntimeError
        As `distribute`'s first call.
    TypeError
        Also for a network of distributed layers, which `summary` looks at.
    ValueError
        If the axes do not fit an input.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> report = dl.report(torch.nn.Conv2d(3, 8, 3, padding=1), (1, 1, 2, 2), (2, 3, 37, 29))
    >>> report.forward.messages, report.multiply_adds, report.peak
    (3, 123120, 83144)
    """
    args, shape = [example(x, model) for x in inputs], shape_of(grid)
    with telling_order(shape, args):
        (made,) = reports(model, args, [shape], in_axes, train, machine, strict=strict, out_axes=out_axes)
    return made


def shape_of(grid: Partition | Sequence[int]) -> Shape:
    """The shape of a grid that is given by it, or by a partition."""
    shape = tuple(grid.shape if isinstance(grid, Partition) else integers_of("grid", grid))
    if not shape or min(shape) < 1:
        raise ValueError(f"a grid of shape {shape} has no ranks")
    return shape


@contextmanager
def telling_order(grid: Shape, args: Sequence[Any]) -> Iterator[None]:
    """Add to an error that grid and shape may have been passed in the wrong order, where a grid is cut finer than a tensor."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        shape = next((tuple(x.shape) for x in args if isinstance(x, torch.Tensor)), ())
        if len(shape) == len(grid) and any(p > n for p, n in zip(grid, shape, strict=True)):
            raise type(error)(f"{error}; the grid was {grid} and the input {shape}: {_ORDER}") from error
        raise


def reports(
    model: Any, args: Sequence[Any], grids: Sequence[Shape], in_axes: Any, train: bool, machine: Machine, **options: Any
) -> list[Report]:
    """The reports of a model, captured once as it stands or in evaluation, over several grids."""
    module, over = as_module(model), [Grid(shape, range(math.prod(shape))) for shape in grids]
    if any(isinstance(inner, Module) for inner in module.modules()):
        raise TypeError(
            f"{type(module).__name__} is cut already; pass the model of plain torch, or to dl.summary what builds this one"
        )
    feeds = [cut_inputs(args, grid, in_axes) for grid in over]
    modes = {inner: inner.training for inner in module.modules()}
    try:
        for inner in modes:
            inner.training &= train
        captured = capture(module, args, {})
    finally:
        for inner, mode in modes.items():
            inner.training = mode
    pairs = zip(over, feeds, strict=True)
    return [reported(captured, module, grid, feed, machine, grads=train, **options) for grid, feed in pairs]


def example(x: Any, model: Any) -> Any:
    """An argument, a shape as a tensor of it on the meta device."""
    if isinstance(x, Partition):
        raise TypeError(f"a partition stands among the inputs: {_ORDER}")
    if not (isinstance(x, tuple) and all(isinstance(n, Integral) for n in x)):
        return x
    weights = model.parameters() if isinstance(model, torch.nn.Module) else ()
    dtype = next((w.dtype for w in weights if w.is_floating_point()), torch.get_default_dtype())
    return torch.empty([int(n) for n in x], dtype=dtype, device="meta")


def cut_inputs(args: Sequence[Any], grid: Grid, in_axes: Any) -> dict[int, tuple[Dims, bool]]:
    """How each tensor among the arguments, known by the number of its leaf, lies over a grid, and whether it requires grad."""
    feeds, given = {}, iter(in_axes or ())
    for number, leaf in enumerate(pytree.tree_leaves((tuple(args), {}))):
        if isinstance(leaf, torch.Tensor):
            axes = fitting_axes(next(given, None), leaf.dim(), leaf.dtype, grid)
            feeds[number] = blocks(tuple(leaf.shape), axes, grid), leaf.requires_grad
    check_used(given)
    return feeds


def reported(
    captured: Captured,
    module: torch.nn.Module,
    grid: Grid,
    feeds: Mapping[int, tuple[Dims, bool]],
    machine: Machine = TYPICAL,
    **options: Any,
) -> Report:
    """The report of a captured model, whose inputs lie over a grid as `feeds` says; with options of `compiled`."""
    frozen = frozenset(name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad)
    inputs = [feeds.get(number) for number in range(max(feeds, default=-1) + 1)]

    def programmed(rank: int) -> tuple[Program, list[str]]:
        alone, used = DryTransport(rank, grid.size), list[str]()

        def replicas(name: str, dims: Dims) -> Replicas:
            """Sums of gradients, which are looked at afterwards, are of one rank."""
            used.append(name)
            return Replicas(alone.team([rank]), len(used), name)

        return compiled(captured, grid, rank, alone, inputs, frozen=frozen, replicas=replicas, **options), used

    (program, used), chosen = programmed(grid.ranks[0]), representatives(grid)
    sizes = _elements(program, chosen)
    fullest = grid.rank(max(chosen, key=sizes.__getitem__))
    program = program if fullest == program.compiler.rank else programmed(fullest)[0]
    return _Account(program, module, chosen, used).report(max(sizes.values()), machine)


def representatives(grid: Grid) -> list[Index]:
    """The indices of the ranks that are looked at: all of a small grid, else corners, edges, their neighbours and the middle."""
    if grid.size <= ALL_UP_TO:
        return [unravel(i, grid.shape) for i in range(grid.size)]
    return list(product(*(sorted({0, 1, n // 2, n - 2, n - 1} & set(range(n))) for n in grid.shape)))


def _made(program: Program) -> list[Value]:
    return [value for _, _, value in program.operations if isinstance(value, Value)]


def _elements(program: Program, chosen: Sequence[Index]) -> dict[Index, int]:
    """The elements that operations make on each rank."""
    times, grid = Counter(value.dims for value in _made(program)), program.compiler.grid
    return {index: sum(n * math.prod(local_shape(dims, grid, index)) for dims, n in times.items()) for index in chosen}


class _Account:
    """What the ranks that are looked at send and hold, by module."""

    def __init__(self, program: Program, module: torch.nn.Module, chosen: Sequence[Index], used: Sequence[str]) -> None:
        self.program, self.c, self.chosen = program, program.compiler, chosen
        self.grid, self.dry = self.c.grid, dry_run(program)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        tensors = parameters | dict(module.named_buffers(remove_duplicate=False))
        dims = {id(tensors[f.target]): value.dims for f, value in program.feeds if f.kind == "parameter"}
        held = {id(t): (name, t) for name, t in reversed(tensors.items())}  # a tied one by its first name
        lengths = {
            key: math.prod(self.c.local(dims[key])) if key in dims else t.numel() for key, (_, t) in held.items()
        }
        self.tensors = {name: lengths[key] * t.dtype.itemsize for key, (name, t) in held.items()}
        # Those that get a gradient, in the order of their sums.
        reached = {program.feeds[number][0].target for number in self.dry.reached}
        learned = dict.fromkeys(parameters[name] for name in used if name in reached)
        self.learned = [(dims[id(weight)], weight.dtype) for weight in learned]
        self.planned: dict[Any, dict[Index, Both]] = {}  # what a run of each movement and of its adjoint sends
        self.sent: dict[str, dict[Index, Both]] = {}  # by path
        for path, traffic in self._all_sent():
            mine = self.sent.setdefault(path, dict.fromkeys(self.chosen, (Traffic(), Traffic())))
            for index, (forward, backward) in mine.items():
                mine[index] = forward + traffic[index][0], backward + traffic[index][1]

    def report(self, elements: int, machine: Machine) -> Report:
        """All of it; `elements` are those that operations make on the fullest rank."""
        work, dry = self.dry.multiply_adds, self.dry
        forward, backward = (
            most([sum((sent[index][side] for sent in self.sent.values()), Traffic()) for index in self.chosen])
            for side in (0, 1)
        )
        weights, sums = sum(self.tensors.values()), self._sums(self.c.index)
        gradients = sum(math.prod(self.c.local(dims)) * dtype.itemsize for dims, dtype in self.learned)
        after = gradients + max((one.bytes for one in sums), default=0)
        optimizer = int(machine.optimizer * gradients)
        total = sum(math.prod(value.shape) for value in _made(self.program))
        return Report(
            grid=self.grid.shape,
            rows=tuple(self._rows()),
            forward=forward,
            backward=backward,
            multiply_adds=work.total() - work[None],
            backward_multiply_adds=work[None],
            touched=dry.touched,
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            kept=dry.kept.total(),
            peak=weights + optimizer + max(dry.peak, after),
            ratio=elements * self.grid.size / total if total else 1.0,
            machine=machine,
        )

    def _all_sent(self) -> Iterator[tuple[str, Mapping[Index, Both]]]:
        """What each movement, and each sum outside the program, sends from the ranks looked at, forward and backward."""
        for movement, *runs in self.dry.runs:
            yield movement.path, self._of_movement(movement, *runs)
        for path, is_back, size, ranks in self.dry.sums:
            both = (Traffic(), summed(size, ranks))[:: 1 if is_back else -1]
            yield path, dict.fromkeys(self.chosen, both)
        for number in self.dry.reached:
            feed, value = self.program.feeds[number]
            copies = self.c.parts(self.c.free_axes(all_axes(value.dims)))
            if feed.kind == "user_input" and copies > 1:
                sizes = {i: math.prod(local_shape(value.dims, self.grid, i)) for i in self.chosen}
                yield "inputs", {i: (Traffic(), summed(n * value.dtype.itemsize, copies)) for i, n in sizes.items()}
        if self._sums(self.c.index):
            yield "gradients", {i: (Traffic(), sum(self._sums(i), Traffic())) for i in self.chosen}

    def _of_movement(self, movement: Movement, own: Runs, of_adjoint: Runs) -> Mapping[Index, Both]:
        """Ranks that differ along axes alone that cut nothing send the same: one of them is planned."""
        X, Y, operator = movement.X, movement.Y, movement.operator
        used = {a for layout in (X, Y) for dim in layout.dims for a in dim.axes}
        if X.grid != Y.grid or X.team_axes != Y.team_axes:
            used = set(range(self.grid.dim))
        elif not operator or operator.plan.pattern is not Pattern.ALL_REDUCE:
            used |= set(range(self.grid.dim)) - set(X.team_axes)
        known, found = self.planned.setdefault((X, Y, movement.dtype), {}), dict[Index, Both]()
        for index in self.chosen:
            short = tuple(i if a in used else 0 for a, i in enumerate(index))
            if short not in known:
                mine = plan(X, Y, self.grid.rank(short))
                known[short] = of_plan(mine, movement.dtype), of_plan(mine.adjoint(), movement.dtype)
            there, back = known[short]
            found[index] = there * own[0] + back * of_adjoint[0], there * own[1] + back * of_adjoint[1]
        return found

    def _sums(self, index: Index) -> list[Traffic]:
        """Each sum of weights' gradients that a rank takes part in, from the second step on."""
        found, teams = [], dict[tuple[int, ...], list[tuple[torch.dtype, int]]]()
        for dims, dtype in self.learned:
            size = math.prod(local_shape(dims, self.grid, index)) * dtype.itemsize
            teams.setdefault(self.c.free_axes(all_axes(dims)), []).append((dtype, size))
        for free, group in teams.items():
            early = sum(size for _, size in group) >= EARLY_BYTES
            order, most = (group[::-1], EARLY_BYTES) if early else (group, BUCKET_BYTES)
            made = cut(order, lambda one: one[0], lambda one: one[1], most) if free else []
            found += [summed(sum(size for _, size in bucket), self.c.parts(free)) for bucket in made]
        return found

    def _rows(self) -> Iterator[Row]:
        operations: dict[str, list[tuple[str, Any]]] = {"inputs": []}
        for path, name, value in self.program.operations:
            operations.setdefault(path, []).append((name, value))
        kinds: dict[str, Counter[str]] = {path: Counter() for path in (*operations, *self.sent)}
        for movement, *_ in self.dry.runs:
            kinds[movement.path][movement.kind] += 1
        for path in {"inputs", "gradients"} & self.sent.keys():
            kinds[path]["all_reduce"] += max(backward.messages for _, backward in self.sent[path].values())
        weights = self._weights()
        for path, moves in kinds.items():
            done, sent = operations.get(path, []), self.sent.get(path, {}).values()
            values = [value for _, value in done if isinstance(value, Value)]
            yield Row(
                path=path,
                operations=tuple(f"{n} {name}" if n > 1 else name for name, n in Counter(n for n, _ in done).items()),
                output=cut_text(values[-1].dims, self.grid) if values else "",
                movements=dict(moves),
                forward=most([forward for forward, _ in sent]),
                backward=most([backward for _, backward in sent]),
                multiply_adds=self.dry.multiply_adds[path],
                weights=weights[path],
                kept=self.dry.kept[path],
                gathered=tuple(f"{name}, {place}" for where, name, place in self.program.gathered if where == path),
                cuts=cuts_of(values[-1].dims) if values else (),
            )

    def _weights(self) -> Counter[str]:
        """The bytes of parameters and buffers by the path of the module that holds them, or of the next around it with a row."""
        paths, found = {path for path, _, _ in self.program.operations}, Counter[str]()
        for name, size in self.tensors.items():
            path = name.rpartition(".")[0]
            while path and path not in paths:
                path = path.rpartition(".")[0]
            found[path] += size
        return found


def most(traffic: Sequence[Traffic]) -> Traffic:
    """The largest of each number."""
    each = ("messages", "bytes", "latencies", "wire")
    return Traffic(*(max((getattr(t, name) for t in traffic), default=0) for name in each))


def of_plan(mine: Plan, dtype: torch.dtype) -> Traffic:
    """What one rank sends in one run."""
    _, messages, elements = mine.traffic
    size, latencies, wire = wire_itemsize(mine, dtype), messages, float(elements)
    for team in (leg.team for leg in mine.legs if leg.team):
        times, tensor = 1 + (mine.pattern is Pattern.ALL_REDUCE), max(_size(mine.shape_in), _size(mine.shape_out))
        latencies += times * math.ceil(math.log2(len(team))) - 1
        wire += times * tensor * (len(team) - 1) / len(team) - elements
    return Traffic(messages, elements * size, latencies, wire * size)


def _size(shape: Shape | None) -> int:
    return 0 if shape is None else math.prod(shape)


def summed(size: int, ranks: int) -> Traffic:
    """What one rank sends in a sum that is no operator's."""
    return Traffic(1, size, 2 * math.ceil(math.log2(ranks)), 2.0 * size * (ranks - 1) / ranks)


def cuts_of(dims: Dims) -> Cuts:
    """Of each dim the lengths that make it up, with the axes that cut them."""
    return tuple(tuple((length_of(dim), dim.axes) for dim in of_dim) for of_dim in dims)


def cut_text(dims: Dims, grid: Grid) -> str:
    """A global shape with its cuts.

    >>> from distdl_lite.factors import cut, uncut
    >>> cut_text(((uncut(3),), (cut(37, (0,), Grid((2,), (0, 1))),)), Grid((2,), (0, 1)))
    '(3, 37/2)'
    """
    factors = [[(length_of(dim), math.prod(grid.shape[a] for a in dim.axes)) for dim in of_dim] for of_dim in dims]
    words = ["*".join(f"{n}/{parts}" if parts > 1 else str(n) for n, parts in of_dim) for of_dim in factors]
    return f"({', '.join(words)})"
