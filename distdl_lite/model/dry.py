"""One rank's program run without other ranks, memory or data: what it moves, computes and holds.

Its blocks are fake tensors, which have shapes alone. The operators are the real ones, on a transport that counts their runs
and hands out fake results; autograd is torch's. So what is found follows from the program, and from no table of operations.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
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
from distdl_lite.transport import Team, Transport

Runs = tuple[int, int]  # in forward and in backward


class DryTransport(Transport):
    """One rank of a world without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.proc_null = rank, size, -1
        self.local: dict[str, Any] = {"tallies": []}
        self.path: str | None = None  # of the module whose forward runs; None in backward
        self.sums: list[tuple[str | None, int, int]] = []  # path, bytes and ranks of those that are no operator's

    def bind(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> DryChannel:
        return DryChannel(plan, self)

    def all_reduce(self, team: Team, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if team.size > 1:
            self.sums.append((self.path, tensor.nbytes, team.size))
        return tensor


class DryChannel:
    """A channel that counts its runs in forward and in backward."""

    def __init__(self, plan: Plan, transport: DryTransport) -> None:
        self.plan, self.transport, self.runs = plan, transport, [0, 0]

    def start(self, x: torch.Tensor) -> torch.Tensor:
        self.runs[self.transport.path is None] += 1
        return x

    def finish(self, pending: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        return pending.new_empty(self.plan.returned_shape) if into is None else into


@dataclass(frozen=True)
class DryRun:
    """What was found, by the path of the module where it happens, None in backward."""

    runs: list[tuple[Movement, Runs, Runs]]  # how often each movement, and how often its adjoint, ran
    sums: list[tuple[str | None, int, int]]  # as of `DryTransport`
    multiply_adds: Counter[str | None]
    touched: int  # bytes that operations read and write
    kept: Counter[str | None]  # bytes that the forward leaves behind
    peak: int  # the most bytes that blocks, activations and gradients took together, without weights
    reached: set[int]  # the numbers of the program's inputs that got a gradient


def dry_run(program: Program) -> DryRun:
    """Run a program that was compiled over a `DryTransport` forward and, where it has gradients, backward."""
    # Here, since it takes a quarter of a second that programs without a captured model need not spend.
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs, outputs = program.arguments
    transport: Any = program.compiler.transport
    meter = Meter(transport)
    with FakeTensorMode(allow_non_fake_inputs=True):
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
        from torch.utils.flop_counter import flop_registry

        self.transport = transport
        self.multiply_adds: Counter[str | None] = Counter()
        self.live = self.peak = self.touched = 0
        self._held: dict[int, tuple[str | None, int]] = {}
        self._flops: Any = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, path = kwargs or {}, self.transport.path
        made = func(*args, **kwargs)
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
