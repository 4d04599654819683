"""One rank run without data, memory or other ranks' data: what it moves, computes and holds.

Its blocks are fake tensors, which have shapes alone. The operators are the real ones, on a transport that counts their runs
and hands out fake results; autograd is torch's. So what is found follows from the program, and from no table of operations.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distdl_lite.model.compile import Program
from distdl_lite.nn.compiler import nothing
from distdl_lite.nn.source import Line
from distdl_lite.nn.value import Movement, Value
from distdl_lite.plan import Plan
from distdl_lite.private import next_node, running_node
from distdl_lite.transport import Team, Transport, _ambient, enter
from distdl_lite.transport.sums import Done

Runs = tuple[int, int]  # in forward and in backward


class DryTransport(Transport):
    """One rank of a world in which no tensor moves.

    Its ranks agree by another transport, `meets`, where there is one.
    """

    launcher = "a grid of {} ranks"

    def __init__(self, rank: int, size: int, meets: Transport | None = None) -> None:
        self.rank, self.size, self.proc_null, self.meets = rank, size, -1, meets
        self.local: dict[str, Any] = {"tallies": []}
        self.path: str | None = None  # of the module whose forward runs; None in backward
        self.inside: list[str] = []  # the paths of modules whose forwards run, also of those that backward runs again
        # The first number of those of the graph, and the path of their module.
        self.nodes: tuple[list[int], list[str]] = [], []
        # Where, as `where` says, and what operators have moved.
        self.moves: list[tuple[str, bool, Plan, torch.dtype]] = []
        self.sums: list[tuple[str, bool, int, int]] = []  # where, and bytes and ranks of what is no operator's

    def enter(self, path: str) -> None:
        """Note that a module's forward begins."""
        self.inside.append(path)
        self._now()

    def leave(self) -> None:
        """Note that the innermost forward ends."""
        self.inside.pop()
        self._now()

    def _now(self) -> None:
        if self.path is not None:
            self.path = self.inside[-1] if self.inside else ""
        for found, new in zip(self.nodes, (next_node(), self.inside[-1] if self.inside else ""), strict=True):
            found.append(new)

    def where(self) -> tuple[str, bool]:
        """The path of the module for which this rank does what it does now, and whether that is in backward."""
        node = running_node()
        if self.path is not None or self.inside:
            return self.inside[-1] if self.inside else self.path or "", self.path is None
        if node is None or not self.nodes[0]:
            return "gradients", True
        return self.nodes[1][bisect_right(self.nodes[0], node._sequence_nr()) - 1], True

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> DryChannel:
        return DryChannel(plan, dtype, self)

    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if team.size > 1:
            self.sums.append((*self.where(), tensor.nbytes, team.size))
        return tensor

    def broadcast(self, team: Team, tensor: torch.Tensor, root: int) -> None:
        self.all_reduce(team, tensor)

    def _sum(self, team: Team, tensor: torch.Tensor, engine: str, lane: str, fill: Any, then: Any) -> Done:
        """Those that begin before their backward has ended are of gradients."""
        self.sums.append(("gradients", True, tensor.nbytes, team.size))
        for call in (fill, then):
            if call is not None:
                call()
        return Done()

    def start_agreeing(self, team: Team, value: int) -> None:
        self._met.start_agreeing(self._met.team(team.ranks), value)

    def agreed(self, team: Team) -> int:
        return self._met.agreed(self._met.team(team.ranks))

    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        return self._met.maxima(self._met.team(team.ranks), numbers)

    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        """Raises RuntimeError if ranks are absent, whose objects nobody knows; unless one is an error, which then goes first."""
        told = self._met.gather_objects(self._met.team(team.ranks), value)
        if len(told) < team.size and not any(isinstance(v, tuple) and isinstance(v[0], type) for v in told):
            raise RuntimeError(
                f"of {team.size} ranks, which tell each other more than lengths along axes, as those of dl.distribute do, only "
                f"{len(told)} are looked at: ask for fewer ranks"
            )
        return told

    @property
    def _met(self) -> Transport:
        assert self.meets is not None
        return self.meets


@contextmanager
def entered(transport: Transport) -> Iterator[None]:
    """Make a transport this thread's ambient world for a while."""
    outer = getattr(_ambient, "transport", None)
    enter(transport)
    try:
        yield
    finally:
        enter(outer)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let tensors that are made inside have shapes alone."""
    # Here, since it takes a quarter of a second that programs without a captured model need not spend.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class DryChannel:
    """A channel that counts its runs in forward and in backward."""

    def __init__(self, plan: Plan, dtype: torch.dtype, transport: DryTransport) -> None:
        self.plan, self.dtype, self.transport, self.runs = plan, dtype, transport, [0, 0]

    def start(self, x: torch.Tensor) -> torch.Tensor:
        path, is_back = self.transport.where()
        self.transport.moves.append((path, is_back, self.plan, self.dtype))
        self.runs[is_back] += 1
        return x

    def finish(self, pending: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        return pending.new_empty(self.plan.returned_shape) if into is None else into


@dataclass(frozen=True)
class DryRun:
    """What was found, by the path of the module where it happens, None in backward."""

    runs: list[tuple[Movement, Runs, Runs]]  # how often each movement, and how often its adjoint, ran
    sums: list[tuple[str, bool, int, int]]  # as of `DryTransport`
    multiply_adds: Counter[str | None]
    touched: int  # bytes that operations read and write
    kept: Counter[str | None]  # bytes that the forward leaves behind
    peak: int  # the most bytes that blocks, activations and gradients took together, without weights
    reached: set[int]  # the numbers of the program's inputs that got a gradient


def dry_run(program: Program) -> DryRun:
    """Run a program that was compiled over a `DryTransport` forward and, where it has gradients, backward."""
    inputs, outputs = program.arguments
    transport: Any = program.compiler.transport
    meter = Meter(transport)
    with without_numbers():
        blocks = [torch.empty(program.compiler.local(v.dims), dtype=v.dtype).requires_grad_(v.grad) for v in inputs]
        for (feed, _), block in zip(program.feeds, blocks, strict=True):
            meter.hold(block, "inputs", counts=feed.kind == "user_input")
        with meter, torch.set_grad_enabled(any(v.grad for v in outputs)):
            made = _forward(program, dict(zip((v.given for v in inputs), blocks, strict=True)), outputs, meter)
            kept = meter.by_path()
            transport.path = None
            roots = [y for y in made if y.requires_grad]
            if roots:
                torch.autograd.backward(roots, [torch.empty_like(y) for y in roots])
    reached = {number for number, block in enumerate(blocks) if block.grad is not None}
    runs = [(m, _runs(m.operator), _runs(m.operator and m.operator.adjoint)) for m in program.compiler.movements]
    return DryRun(runs, transport.sums, meter.multiply_adds, meter.touched, kept, meter.peak, reached)


def _runs(operator: Any) -> Runs:
    channels = operator.channels if operator else ()
    return sum(channel.runs[0] for channel in channels), sum(channel.runs[1] for channel in channels)


def _forward(program: Program, blocks: dict[str, Any], outputs: Sequence[Value], meter: Meter) -> list[torch.Tensor]:
    """Run the lines one by one, so that each is known by its module."""
    names = dict(program.compiler.names) | blocks
    for line, dead in program.compiler.steps(outputs):
        meter.transport.path = line.path
        try:
            exec(line.text, names)
        except (RuntimeError, TypeError, ValueError):  # a local function that asks for numbers, which are not there
            _stand_in(program, line, names)
        for name in dead:
            del names[name]
    return [names[v.name] for v in outputs]


def _stand_in(program: Program, line: Line, names: dict[str, Any]) -> None:
    c = program.compiler
    for value in (c.values[name] for name in line.writes):
        names[value.name] = nothing([names[n] for n in line.reads], c.local(value.dims), value.dtype, False, True)


class Meter(TorchDispatchMode):
    """Counts the multiply-adds of products that run under it, the bytes that all operations touch, and those of what lives."""

    def __init__(self, transport: DryTransport) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

        self.transport = transport
        self.multiply_adds: Counter[str | None] = Counter()
        self.live = self.peak = self.touched = 0
        self._held: dict[int, tuple[str | None, int]] = {}
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's own table leaves out
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        self._flops: Any = {attention: sdpa_flop, backward: sdpa_backward_flop, **flop_registry}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, path = kwargs or {}, self.transport.path
        made = _with_or_without_numbers(func, args, kwargs)
        given, tensors = ([t for t in tree_iter(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), made))
        flops = self._flops.get(func._overloadpacket)
        if flops is not None:
            self.multiply_adds[path] += int(flops(*args, **kwargs, out_val=made)) // 2
        if tensors and not func.is_view and "empty" not in str(func):
            self.touched += sum(t.nbytes for t in (*given, *tensors))
        for tensor in tensors:
            self.hold(tensor, path)
        if "convolution" in str(func):  # its library copies what it reads into an order of its own
            self.peak = max(self.peak, self.live + sum(t.nbytes for t in given))
        return made

    def hold(self, tensor: torch.Tensor, path: str | None, counts: bool = True) -> None:
        """Count the bytes of a tensor's memory until it is freed, those of a weight not."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() * counts
        if key not in self._held:
            self._held[key] = path, size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._held.pop(key)[1]

    def by_path(self) -> Counter[str | None]:
        """The bytes that live, by the path under which they were made."""
        found: Counter[str | None] = Counter()
        for path, size in self._held.values():
            found[path] += size
        return found


def _with_or_without_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns; where fake tensors lack the numbers that it follows from, it is as if nothing were amiss.

    So no element of a mask is true, a flag is false, and a number is one.
    """
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        kind, name, x = type(error).__name__, str(func), args[0]
        if kind == "DataDependentOutputException":
            return False if x.dtype is torch.bool else 1.0 if x.dtype.is_floating_point else 1
        if kind == "DynamicOutputShapeException":
            if name == "aten.bincount.default":
                return x.new_empty(kwargs.get("minlength", args[-1]), dtype=torch.long)
            if name == "aten.index.Tensor" and len(args[1]) == 1:  # by a mask
                return x.new_empty(0, *x.shape[args[1][0].dim() :])
        raise
