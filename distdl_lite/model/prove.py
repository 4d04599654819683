"""Proof that a model cut over ranks computes what it does on one device, on small random inputs in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from distdl_lite.model.capture import Captured, capture, name_of, path_of
from distdl_lite.model.compile import Program, default_axes
from distdl_lite.model.distributed import Distributed, Given
from distdl_lite.nn.compiler import Value
from distdl_lite.partition import Partition


@dataclass(frozen=True)
class Proof:
    """The largest differences to the serial model that any rank found.

    Attributes
    ----------
    differences : dict
        By "output 0", "input gradient 0", "parameter gradients", "buffers", "after 2 steps": the largest difference, relative
        to the largest number of its kind.
    program : Program
        That of rank 0, with its movements and what was gathered.
    """

    differences: dict[str, float]
    program: Program

    @property
    def worst(self) -> float:
        """The largest of the differences; nan if any is."""
        return max(self.differences.values(), key=lambda d: (math.isnan(d), d))


def prove(
    model: torch.nn.Module,
    grid: Sequence[int],
    *inputs: Any,
    dtype: torch.dtype | None = torch.float64,
    in_axes: Given = None,
    out_axes: Given = None,
    tolerance: float = 1e-9,
    steps: int = 2,
    seed: int = 0,
) -> Proof:
    """Run a model serially and cut over threads as ranks, and compare.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode it shall be proved in; a copy is used. Where it draws random numbers the two differ.
    grid : sequence of int
        Of the ranks.
    *inputs : tuple of int or Any
        The arguments: whole tensors, shapes of random ones, or plain values.
    dtype : torch.dtype or None
        That the model and floating inputs are taken to.
    in_axes, out_axes
        As of `distribute`.
    tolerance : float
        Of relative differences.
    steps : int
        Of AdamW, after which the weights are compared; 0 for none.

    Returns
    -------
    Proof

    Raises
    ------
    AssertionError
        If something differs by more than the tolerance; the text names the first module whose values differ.
    """
    from distdl_lite.transport.threads import spmd

    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model) if dtype is None else copy.deepcopy(model).to(dtype)
    whole = [_drawn(x, dtype, generator) for x in inputs]
    captured: dict[str, Captured] = {}

    def shared(model: torch.nn.Module, args: Any, kwargs: Any, whole: Any, device: str) -> Captured:
        key = str((args, kwargs))
        if key not in captured:
            captured[key] = capture(model, args, kwargs, whole, device)
        return captured[key]

    serial = copy.deepcopy(model)
    wanted, gradients = _run(serial, whole, None, steps, generator)

    def body(world: Partition) -> tuple[dict[str, float], Program, str]:
        P = world.grid(grid)
        net = Distributed(copy.deepcopy(model), P, in_axes, out_axes)
        net.__dict__["_capture"] = shared
        blocks = [_block(x, P, in_axes, i) for i, x in enumerate(whole)]
        found, _ = _run(net, blocks, [_block(g, P, out_axes, i) for i, g in enumerate(gradients)], steps, generator)
        differences, names = {}, [n for n, _ in serial.named_parameters()]
        for name, values in wanted.items():
            scale = max((float(v.abs().max()) for v in values if v.numel()), default=0.0) or 1.0
            axes = out_axes if name.startswith("output") else in_axes
            is_cut = name.startswith(("output", "input"))
            number = int(name.rpartition(" ")[2]) if is_cut else 0
            own = (
                values
                if is_cut or name == "buffers"
                else [_held(net, n, v) for n, v in zip(names, values, strict=bool(values))]
            )
            parts = [((_block(v, P, axes, number) if is_cut else v), f) for v, f in zip(own, found[name], strict=True)]
            differences[name] = max((_apart(v, f) / scale for v, f in parts), default=0.0)
        worst = max(differences.values(), default=0.0)
        text = "" if worst <= tolerance else _first_difference(net, copy.deepcopy(model), whole, blocks, tolerance)
        return differences, net.program, text

    told = spmd(math.prod(grid), body)
    differences = {name: max(d[name] for d, *_ in told) for name in wanted}
    texts = [text for *_, text in told if text]
    if any(not d <= tolerance for d in differences.values()):
        raise AssertionError(
            f"on a grid of {tuple(grid)} the model differs: {differences}; {texts[0] if texts else ''}"
        )
    return Proof(differences, told[0][1])


def _drawn(x: Any, dtype: torch.dtype | None, generator: torch.Generator) -> Any:
    if isinstance(x, tuple) and all(isinstance(n, int) for n in x):
        x = torch.randn(x, generator=generator, dtype=dtype or torch.float32)
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().to(dtype or x.dtype).clone()
    return x


def _block(x: Any, P: Partition, given: Given, number: int) -> Any:
    """This rank's block of an argument or an output."""
    if not isinstance(x, torch.Tensor):
        return x
    axes = given[number] if given is not None and number < len(given) else None
    axes = default_axes(x.dim(), x.dtype, P.grid_of_ranks) if axes is None else axes
    return x[P.block(x.shape, axes)].clone()  # type: ignore[attr-defined]


def _held(net: Distributed, name: str, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, or of its gradient."""
    c, dims = net.program.compiler, net._placed.get(name)
    return whole if dims is None else whole[tuple(slice(*c.range(f)) for (f,) in dims)]


def _apart(wanted: torch.Tensor, found: torch.Tensor) -> float:
    if wanted.shape != found.shape:
        return math.inf
    difference = (wanted - found).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _run(
    net: torch.nn.Module, args: Sequence[Any], gradients: Sequence[Any] | None, steps: int, generator: torch.Generator
) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
    """The outputs, gradients, buffers and weights after some steps; and the gradients of the outputs, which are drawn if None."""
    found: dict[str, list[torch.Tensor]] = {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3) if steps and any(True for _ in net.parameters()) else None
    for step in range(max(steps, 1)):
        args = [a.detach().clone().requires_grad_() if _is_real(a) else a for a in args]
        net.zero_grad()
        outputs = [y for y in pytree.tree_leaves(net(*args)) if isinstance(y, torch.Tensor)]
        if gradients is None:
            gradients = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        if step == 0:
            found |= {
                f"output {i}": [y.detach().to(torch.complex128 if y.is_complex() else torch.float64)]
                for i, y in enumerate(outputs)
            }
            for i, a in enumerate(args):
                if _is_real(a):
                    found[f"input gradient {i}"] = [torch.zeros_like(a) if a.grad is None else a.grad.detach()]
            zero = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in net.parameters()]
            found["parameter gradients"] = zero
            found["buffers"] = [b.detach().double().clone() for b in net.buffers() if b.dtype is not torch.bool]
        if optimizer is not None:
            optimizer.step()
    found[f"after {steps} steps"] = [p.detach().clone() for p in net.parameters()] if steps else []
    return found, list(gradients or ())


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _first_difference(net: Distributed, model: torch.nn.Module, whole: Any, blocks: Any, tolerance: float) -> str:
    """The first module, in the order of the forward, whose values differ from the serial model's; all ranks call it."""
    program = net.program
    c = program.compiler
    values = [v for _, _, v in program.operations]
    serial = _serial_values(net._distdl_plan.captured, model, whole)
    shown = [(node, v, s) for (node, s), v in zip(serial, values, strict=True) if isinstance(v, Value) and _is_real(s)]
    inputs, _ = program.arguments
    extra = c.compiled(inputs, [v for _, v, _ in shown])
    with torch.no_grad():
        made = extra(*net._distdl_plan.taken(blocks))
    for (node, value, right), mine in zip(shown, made, strict=True):
        if any(len(f) > 1 for f in value.dims):
            continue
        part = right[tuple(slice(*c.range(f[0])) for f in value.dims)]
        bad = 0.0 if part.numel() == 0 and mine.numel() == 0 else _apart(part, mine)
        if not bad <= tolerance * max(float(right.abs().max()), 1.0):
            return f"first at {name_of(node)} in module {path_of(node) or type(model).__name__!r}, by {bad:.1e}"
    return ""


def _serial_values(captured: Captured, model: torch.nn.Module, whole: Sequence[Any]) -> list[tuple[Node, Any]]:
    """What each operation of the graph makes of the whole inputs."""
    tensors: Mapping[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    known: dict[Node, Any] = {}
    for feed in captured.feeds:
        if feed.kind == "user_input":
            known[feed.node] = whole[feed.target]
        else:
            known[feed.node] = tensors[feed.target] if isinstance(feed.target, str) else feed.target
    found = []
    with torch.no_grad():
        for node in captured.nodes:
            args, kwargs = (map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
            known[node] = node.target(*args, **kwargs)
            if name_of(node) != "getitem" and not name_of(node).startswith(("_assert", "sym_")):
                first = known[node]
                found.append((node, first[0] if isinstance(first, (tuple, list)) else first))
    return found
