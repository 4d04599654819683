"""Proof that a model cut over ranks computes what it does on one device, on small random inputs in one process."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from distdl_lite.factors import length_of
from distdl_lite.model.capture import Captured, as_module, capture, name_of, path_of
from distdl_lite.model.compile import Program, fitting_axes
from distdl_lite.model.distributed import Distributed, Given
from distdl_lite.model.report import shape_of
from distdl_lite.nn.value import Value
from distdl_lite.partition import Partition

Found = dict[str, list[torch.Tensor]]  # outputs, gradients, buffers and weights, under the names of `Proof.differences`


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> proof = dl.prove(torch.nn.Conv1d(2, 3, 3), (1, 1, 2), (1, 2, 9), steps=0)
    >>> sorted(proof.differences), proof.worst < 1e-9
    (['buffers', 'input gradient 0', 'output 0', 'parameter gradients'], True)
    """

    differences: dict[str, float]
    program: Program = field(repr=False)

    @property
    def worst(self) -> float:
        """The largest of the differences; nan if any is."""
        return max(self.differences.values(), key=_badness, default=0.0)


def prove(
    model: torch.nn.Module,
    grid: Partition | Sequence[int],
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
    grid : Partition or sequence of int
        Of the ranks, or its shape.
    *inputs : tuple of int or Any
        The arguments: whole tensors, shapes of random ones, or plain values.
    dtype : torch.dtype or None
        That the model and floating inputs are taken to; complex ones are taken to complex numbers of it.
    in_axes, out_axes
        As of `distribute`.
    tolerance : float
        Of relative differences.
    steps : int
        Of Adam, after which the weights are compared; 0 for none.

    Returns
    -------
    Proof

    Raises
    ------
    AssertionError
        If something differs by more than the tolerance; the text names the first module whose values differ.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3, padding=1), torch.nn.BatchNorm1d(3))
    >>> dl.prove(model, (1, 1, 2), (2, 2, 9)).worst < 1e-9
    True
    """
    trial = Trial(as_module(model), *inputs, dtype=dtype, steps=steps, seed=seed)
    return trial.on(shape_of(grid), in_axes, out_axes, tolerance)


class Trial:
    """A model run serially and captured once, to be compared on several grids; its arguments are those of `prove`."""

    def __init__(
        self,
        model: torch.nn.Module,
        *inputs: Any,
        dtype: torch.dtype | None = torch.float64,
        steps: int = 2,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(model)._apply(lambda t: _in_dtype(t, dtype))
        self.inputs, self.steps = [_drawn(x, dtype, self.generator) for x in inputs], steps
        self.captured: dict[str, Captured] = {}
        self.wanted, self.gradients = self._run(copy.deepcopy(self.model), self.inputs)

    def on(self, grid: Sequence[int], in_axes: Given = None, out_axes: Given = None, tolerance: float = 1e-9) -> Proof:
        """Compare on a grid; see `prove`."""
        from distdl_lite.transport.threads import spmd

        def body(world: Partition) -> tuple[dict[str, float], Program, str]:
            return self._on_rank(world.grid(grid), in_axes, out_axes, tolerance)

        told = spmd(math.prod(grid), body)
        differences = {name: max((d[name] for d, *_ in told), key=_badness) for name in self.wanted}
        if not all(d <= tolerance for d in differences.values()):
            text = next((text for *_, text in told if text), "no operation of the forward differs")
            nodes = (node for captured in self.captured.values() for node in captured.nodes)
            if any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in nodes):
                text += "; it draws random numbers, of which the serial run has others"
            raise AssertionError(f"on a grid of {tuple(grid)} the model differs: {differences}; {text}")
        return Proof(differences, told[0][1])

    def _on_rank(
        self, P: Partition, in_axes: Given, out_axes: Given, tolerance: float
    ) -> tuple[dict[str, float], Program, str]:
        """The differences that this rank finds, its program, and what differs first, if anything does on any rank."""
        net = self._network(P, in_axes, out_axes)
        blocks, gradients = _blocks(self.inputs, P, in_axes), _blocks(self.gradients, P, out_axes)
        found, _ = self._run(net, blocks, gradients)
        differences = {}
        for name, values in self.wanted.items():
            parts = values
            if name.startswith(("output", "input")):
                axes, number = out_axes if name.startswith("output") else in_axes, int(name.rpartition(" ")[2])
                parts = [_block(v, P, axes, number) for v in values]
            elif name != "buffers" and values:
                parts = [_held(net, n, v) for (n, _), v in zip(net.named_parameters(), values, strict=True)]
            scale = max(map(_largest, values), default=0.0)
            scale = max(scale, 1e-3)  # of gradients that are zero there is only rounding
            pairs = zip(parts, found[name], strict=True)
            differences[name] = max((_apart(v, f) / scale for v, f in pairs), key=_badness, default=0.0)
        worst = max(P.allgather_data(max(differences.values(), key=_badness, default=0.0)) or [], key=_badness)
        if worst <= tolerance:
            return differences, net.program, ""
        return differences, net.program, self._first_difference(self._network(P, in_axes, out_axes), blocks, tolerance)

    def _network(self, P: Partition, in_axes: Given, out_axes: Given) -> Distributed:
        """The model over ranks."""
        net = Distributed(copy.deepcopy(self.model), P, in_axes, out_axes)
        net.__dict__["_capture"] = self._capture
        return net

    def _capture(self, model: torch.nn.Module, args: Any, kwargs: Any, whole: Any, device: str) -> Captured:
        """As `capture` does, once for all ranks and grids."""
        key = str((args, kwargs, device))
        if key not in self.captured:
            self.captured[key] = capture(model, args, kwargs, whole, device)
        return self.captured[key]

    def _run(
        self, net: torch.nn.Module, args: Sequence[Any], gradients: Sequence[torch.Tensor] | None = None
    ) -> tuple[Found, list[torch.Tensor]]:
        """What a network makes in some steps, and the gradients of its outputs, which are drawn if none are given."""
        weights, found = list(net.parameters()), Found()
        # The large eps, since a gradient that is zero but for rounding would count as much as others with a small one.
        optimizer = torch.optim.Adam(weights, lr=1e-3, eps=1e-3) if self.steps and weights else None
        for step in range(max(self.steps, 1)):
            args = [a.detach().clone().requires_grad_() if _is_inexact(a) else a for a in args]
            net.zero_grad()
            outputs = [y for y in pytree.tree_leaves(net(*args)) if isinstance(y, torch.Tensor)]
            if gradients is None:
                gradients = [
                    torch.randn(y.shape, generator=self.generator, dtype=_wide(y)).to(y.dtype) for y in outputs
                ]
            pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
            if pairs:
                torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
            if step == 0:
                found = _found(net, [a for a in args if isinstance(a, torch.Tensor)], outputs)
            if optimizer is not None:
                optimizer.step()
        if self.steps:
            found[f"after {self.steps} steps"] = [p.detach().clone() for p in weights]
        return found, list(gradients or ())

    def _first_difference(self, net: Distributed, blocks: Sequence[Any], tolerance: float) -> str:
        """The first operation, in the order of the forward, whose values differ from the serial ones; all ranks call it.

        The network is a new one, as steps have changed the weights of that which was compared.
        """
        net(*blocks)
        with torch.no_grad():
            for own, serial_one in zip(net.buffers(), self.model.buffers(), strict=True):
                own.copy_(serial_one)
        c, running = net.program.compiler, net._distdl_plan
        assert running is not None
        serial = _serial_values(running.captured, copy.deepcopy(self.model), self.inputs)
        pairs = zip(serial, net.program.operations, strict=True)
        shown = [(node, v, whole) for (node, whole), (_, _, v) in pairs if isinstance(v, Value) and _is_inexact(whole)]
        run = c.compiled(net.program.arguments[0], [v for _, v, _ in shown])
        with torch.no_grad():
            made = run(*running.taken(net, blocks))
        for (node, value, whole), mine in zip(shown, made, strict=True):
            factors = [factor for of_dim in value.dims for factor in of_dim]
            part = whole.reshape([*map(length_of, factors)])[tuple(slice(*c.range(factor)) for factor in factors)]
            apart = _apart(part.reshape(c.local(value.dims)), mine)
            if not apart <= tolerance * max(_largest(whole), 1.0):
                return (
                    f"first at {name_of(node)} in module {path_of(node) or type(self.model).__name__!r}, by {apart:.1e}"
                )
        return ""


def _badness(difference: float) -> tuple[bool, float]:
    return math.isnan(difference), difference


def _is_inexact(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float64)


def _in_dtype(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return x if dtype is None or not _is_inexact(x) else x.to(dtype.to_complex() if x.is_complex() else dtype)


def _drawn(x: Any, dtype: torch.dtype | None, generator: torch.Generator) -> Any:
    """An argument; a random one for a shape."""
    if isinstance(x, tuple) and all(isinstance(n, int) for n in x):
        return torch.randn(x, generator=generator, dtype=dtype or torch.float32)
    return _in_dtype(x.detach(), dtype).clone() if isinstance(x, torch.Tensor) else x


def _blocks(values: Sequence[Any], P: Partition, given: Given) -> list[Any]:
    """This rank's blocks of the tensors among arguments or outputs, and the rest as it is."""
    numbers = itertools.count()
    return [_block(x, P, given, next(numbers)) if isinstance(x, torch.Tensor) else x for x in values]


def _block(x: torch.Tensor, P: Partition, given: Given, number: int) -> torch.Tensor:
    """This rank's block of the tensor of a number among the arguments' or the outputs'."""
    axes = given[number] if given is not None and number < len(given) else None
    axes = fitting_axes(axes, x.dim(), x.dtype, P.grid_of_ranks)
    return P.cut(x, axes)  # type: ignore[attr-defined]


def _held(net: Distributed, name: str, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, or of its gradient."""
    dims = net._placed.get(name)
    return whole if dims is None else whole[tuple(slice(*net.program.compiler.range(f)) for (f,) in dims)]


def _largest(x: torch.Tensor) -> float:
    """The largest of the finite numbers."""
    finite = x[x.isfinite()].to(_wide(x))
    return float(finite.abs().max()) if finite.numel() else 0.0


def _apart(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference; infinities and nan are like themselves."""
    if wanted.shape != found.shape or wanted.dtype is not found.dtype:
        return math.inf
    wanted, found = (t.to(_wide(wanted)) for t in (wanted, found))
    is_same = (wanted == found) | (wanted.isnan() & found.isnan())
    difference = (wanted - found).abs().masked_fill(is_same, 0)
    return float(difference.max()) if difference.numel() else 0.0


def _found(net: torch.nn.Module, tensors: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Found:
    """What a step has made: outputs, the gradients of inputs and weights, buffers."""
    found = Found({f"output {i}": [y.detach().clone()] for i, y in enumerate(outputs)})
    for i, x in enumerate(tensors):
        if _is_inexact(x):
            found[f"input gradient {i}"] = [torch.zeros_like(x) if x.grad is None else x.grad]
    weights = net.parameters()
    found["parameter gradients"] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights]
    found["buffers"] = [b.detach().clone() for b in net.buffers()]
    return found


def _serial_values(captured: Captured, model: torch.nn.Module, whole: Sequence[Any]) -> list[tuple[Node, Any]]:
    """What each operation of the graph makes of the whole inputs."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    given = {
        feed.node: whole[feed.target] if feed.kind == "user_input" else tensors.get(feed.target, feed.target)
        for feed in captured.feeds
    }
    operations = [
        n for n in captured.nodes if name_of(n) != "getitem" and not name_of(n).startswith(("_assert", "sym_"))
    ]
    if not operations:
        return []
    run = Interpreter(operations[0].graph.owning_module, garbage_collect_values=False)
    with torch.no_grad():
        run.run(initial_env=given)
    made = [(node, run.env[node]) for node in operations]
    return [(node, y[0] if isinstance(y, (tuple, list)) else y) for node, y in made]
