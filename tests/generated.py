"""Layers beside torch's serial ones in combinations drawn at random, each of which its family and number bring back.

``python tests/generated.py FAMILY FIRST [LAST]`` runs cases on threads, or on MPI ranks under ``mpirun -n 4``, and prints what
is wrong; FAMILY may be ``all``.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from twins import uneven

import distdl_lite as dl
from distdl_lite.grid import balanced
from distdl_lite.nn.conv import overlap
from distdl_lite.testing import spmd

SIZE = 4  # ranks of the world; the partitions have 1 to 4 of them, in any order
COPIED = overlap.LEAST_BYTES

Slices = tuple[slice, ...]
Part = Callable[[Sequence[int]], "Slices | None"]  # from a whole tensor's shape to this rank's block, None outside
Cuts = Sequence[Sequence[int]]


# ---- what is drawn ---------------------------------------------------------------------------------------------------


class Draw(random.Random):
    """The choices of a case, the same on all ranks."""

    def __init__(self, world: dl.Partition, family: str, number: int) -> None:
        super().__init__(f"{family} {number}")
        self.world = world

    def each(self, n: int, *choices: Any) -> tuple[Any, ...]:
        return tuple(self.choice(choices) for _ in range(n))

    def chance(self, p: float) -> bool:
        return self.random() < p

    def grid(self, dims: int, fixed: Mapping[int, int] | None = None) -> tuple[int, ...]:
        """A shape of at most four ranks; some axes may be fixed."""
        shape = [(fixed or {}).get(axis, 1) for axis in range(dims)]
        free = [axis for axis in range(dims) if axis not in (fixed or {})]
        room = SIZE // math.prod(shape) if free else 1
        ranks = self.choice([n for n in (1, 2, 2, 3, 4, 4, 4, 4) if n <= room])
        for factor in {1: (), 4: self.choice([(4,), (2, 2)])}.get(ranks, (ranks,)):
            shape[self.choice(free)] *= factor
        return tuple(shape)

    def over(self, shape: Sequence[int]) -> dl.CartesianPartition:
        """A grid over ranks in any order."""
        return self.world.grid(shape, self.sample(range(SIZE), math.prod(shape)))

    def partition(self, dims: int) -> dl.CartesianPartition:
        return self.over(self.grid(dims))

    def cuts(self, shape: Sequence[int], grid: Sequence[int], wild: float = 0.5) -> Cuts:
        """Balanced, or anywhere with the given probability."""
        if self.chance(wild):
            return uneven(self, shape, grid)
        return [balanced(n, p) for n, p in zip(shape, grid, strict=True)]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(40))
        return torch.randn(
            shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=generator
        ).to(dtype)

    def integers(self, *shape: int, dtype: torch.dtype = torch.float64, low: int = -4, high: int = 5) -> torch.Tensor:
        """Sums of products of them are exact in most dtypes."""
        generator = torch.Generator().manual_seed(self.getrandbits(40))
        x = torch.randint(low, high, shape, generator=generator).to(dtype)
        return x + 1j * torch.randint(low, high, shape, generator=generator) if dtype.is_complex else x

    def with_integers(self, serial: torch.nn.Module) -> torch.nn.Module:
        """The layer with integer weights."""
        with torch.no_grad():
            for parameter in serial.parameters():
                parameter.copy_(self.integers(*parameter.shape, dtype=parameter.dtype))
        return serial


def block(P: dl.Partition, cuts: Cuts | Mapping[int, Sequence[int]], axes: Sequence[int] | None = None) -> Part:
    """The rank's block of a tensor whose dims are cut along the axes given, all of the grid's by default."""
    if P.index is None:
        return lambda shape: None
    axes = range(len(cuts)) if axes is None else axes
    slices = tuple(slice(cuts[a][P.index[a]], cuts[a][P.index[a] + 1]) for a in axes)
    return lambda shape: slices


def even(P: dl.CartesianPartition) -> Part:
    """Balanced blocks."""
    return P.block


# ---- a case ----------------------------------------------------------------------------------------------------------


@dataclass
class Twins:
    """A layer and torch's, not made yet.

    Attributes
    ----------
    text : str
        Everything that was drawn.
    layer, serial : callable
        Make them.
    inputs : sequence of tensors
        Whole, the same on every rank.
    take : sequence of Part
        This rank's block of each.
    give : Part
        This rank's block of the output.
    team : partitions
        Of the layer: their ranks refuse together.
    tolerance : float
        Of the largest number of a tensor, or of one if that is larger.
    modes : tuple of bool
        Training or not.
    refusals : tuple of str
        What the layer refuses although torch does not.
    expands : bool
        Whether the first input may be constant along a dim, of which memory then holds one.
    """

    text: str
    layer: Callable[[], torch.nn.Module]
    serial: Callable[[], torch.nn.Module]
    inputs: Sequence[torch.Tensor]
    take: Sequence[Part]
    give: Part
    team: Sequence[dl.Partition]
    tolerance: float = 0.0
    modes: tuple[bool, ...] = (True,)
    refusals: tuple[str, ...] = ()
    expands: bool = True


Family = Callable[[Draw], Twins]


class Function(torch.nn.Module):
    """A serial layer out of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(*x)


def run(world: dl.Partition, families: Mapping[str, Family], family: str, number: int) -> str:
    """Run a case: "equal" or "equal, overlapped", "both refuse" or "refused"; AssertionError on all ranks if it is wrong."""
    d, text = Draw(world, family, number), ""
    torch.default_generator.manual_seed(number)
    overlap.LEAST_BYTES = d.choice((0, 0, COPIED))
    try:
        twins = families[family](d)
        text = twins.text
        found = world.world_transport.gather_objects(world.team, _compared(d, twins))
        return _judged(found, {rank for P in twins.team for rank in P.ranks}, twins.refusals)
    except Exception as error:  # also one that tells of a deadlock
        raise AssertionError(f"{error}\n{text}\nreproduce: python tests/generated.py {family} {number}") from error
    finally:
        overlap.LEAST_BYTES = COPIED


def _overlaps(plan: Any) -> bool:
    """Whether a layer's plan is that of a convolution whose halo travels while it computes."""
    return isinstance(plan, overlap.Fused) and bool(plan.slabs)


Found = tuple[str, str, str, bool]  # what torch refuses, what the layer does, what is wrong; whether it overlapped


def _judged(found: Sequence[Found], team: Iterable[int], known: Sequence[str]) -> str:
    """What a case's outcome on all ranks comes to. AssertionError if they, or torch and the layer, do not agree."""
    torch_refuses, overlapped = found[0][0], any(found[rank][3] for rank in team)
    refused = {text for _, text, *_ in found if text}
    wrong = {rank: text for rank, (_, _, text, _) in enumerate(found) if text}
    if wrong or len(refused) > 1 or any("deadlock" in text for text in refused):
        raise AssertionError(f"{wrong}, refusals: {refused}, torch: {torch_refuses or 'accepts'}")
    if refused and not all(found[rank][1] for rank in team):
        raise AssertionError(f"some of ranks {list(team)} do not refuse: {refused}")
    if torch_refuses and not refused:
        raise AssertionError(f"accepted, but torch: {torch_refuses}")
    if torch_refuses:
        return "both refuse"
    if refused and not any(text in next(iter(refused)) for text in known):
        raise AssertionError(f"refused, but not by torch: {refused}")
    return "refused" if refused else "equal, overlapped" if overlapped else "equal"


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a function returns, or what it raises, in words."""
    try:
        return function(*arguments), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _called(module: torch.nn.Module, inputs: Sequence[torch.Tensor], seed: int, checkpointed: bool) -> Any:
    torch.default_generator.manual_seed(seed)  # manual_seed asks for a GPU, which takes a millisecond
    return checkpoint(module, *inputs, use_reentrant=False) if checkpointed else module(*inputs)


def _compared(d: Draw, twins: Twins) -> Found:
    """Make both and compare them on this rank."""
    seed, rank = d.getrandbits(40), d.world.rank
    torch.default_generator.manual_seed(seed)
    serial, refusal = _attempt(twins.serial)
    torch.default_generator.manual_seed(seed)
    layer, error = _attempt(twins.layer)
    if layer is None:
        return refusal or _attempt(serial, *twins.inputs)[1], error, "", False
    wrong: list[str] = []
    if serial is not None and getattr(layer, "_distdl_places", None):
        wrong += _held(layer, serial, rank, 0.0)
        _share_weights(d, layer, serial, twins.tolerance)
    for mode in twins.modes:
        how = _How(d, twins)
        whole, mine = how.whole(), how.mine(rank)
        calls = seed, how.checkpointed
        y, error_serial = (None, refusal) if serial is None else _attempt(_called, serial.train(mode), whole, *calls)
        z, error = _attempt(_called, layer.train(mode), mine, *calls)
        if error or error_serial:
            return error_serial, error, "; ".join(wrong), False
        wrong += _differences(how, twins, layer, serial, (whole, y), (mine, z), rank)
    plan = getattr(layer, "_distdl_plan", None)
    return "", "", "; ".join(wrong), _overlaps(plan)


def _share_weights(d: Draw, layer: torch.nn.Module, serial: torch.nn.Module, tolerance: float) -> None:
    """Random weights and statistics, and maybe one that is not trained."""
    with torch.no_grad():
        for name, tensor in (*serial.named_parameters(), *serial.named_buffers()):
            drawn = d.normal if tolerance else d.integers
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                tensor.copy_(drawn(*tensor.shape, dtype=tensor.dtype))
            if name == "running_var":
                tensor.abs_().add_(0.5)
    dl.load_serial_state_dict(layer, serial.state_dict(), root=d.randrange(SIZE))
    frozen = d.choice([None] * 9 + [name for name, _ in serial.named_parameters()])
    for module in (layer, serial):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name != frozen)


class _How:
    """How a layer is called: the memory of its inputs, which of them require grad on which ranks, a checkpoint, the gradient.

    torch gets contiguous memory: its own kernels misread strides where a dim has length 1.
    """

    def __init__(self, d: Draw, twins: Twins) -> None:
        self.twins = twins
        self.memory = d.choice(MEMORIES)
        self.inputs = list(twins.inputs)
        x = twins.inputs[0]
        if self.memory == "expanded" and twins.expands and x.dim() and x.numel():
            self.inputs[0] = x.narrow(d.randrange(x.dim()), 0, 1).expand(x.shape)
        self.wants = [self._requiring(d, x) for x in twins.inputs]
        self.upstream = d.choice(MEMORIES)
        self.d, self.dtype_outside = d, d.choice([None, twins.inputs[0].dtype])
        # Statistics are updated again where a backward of the layer, too, recomputes.
        team = {rank for P in twins.team for rank in P.ranks}
        goes_back = all(wants & team for wants in self.wants if wants)
        self.checkpointed = goes_back and random.Random(twins.text).random() < 0.2

    @staticmethod
    def _requiring(d: Draw, x: torch.Tensor) -> set[int]:
        """The ranks whose block requires grad: mostly all."""
        if not (x.is_floating_point() or x.is_complex()):
            return set()
        return set(d.choice([range(SIZE)] * 4 + [(), d.sample(range(SIZE), 1), d.sample(range(SIZE), 2)]))

    def whole(self) -> list[torch.Tensor]:
        return [laid(x, "").requires_grad_(bool(wants)) for x, wants in zip(self.inputs, self.wants, strict=True)]

    def mine(self, rank: int) -> list[torch.Tensor]:
        found = []
        for x, take, wants in zip(self.inputs, self.twins.take, self.wants, strict=True):
            slices = take(x.shape)
            if slices is None:
                x = dl.zero_volume_tensor(dtype=self.dtype_outside)
            else:
                x = laid(x[slices], self.memory, f"{self.twins.text} {rank}")
            can = x.is_floating_point() or x.is_complex()
            found.append(x.detach().requires_grad_(can and rank in wants))
        return found

    def gradient(self, y: torch.Tensor) -> torch.Tensor:
        """The gradient of the whole output, maybe one number."""
        return y.new_full(y.shape, 3) if self.upstream == "expanded" else self.d.integers(*y.shape, dtype=y.dtype)

    def gradient_here(self, g: torch.Tensor, slices: Slices | None, z: torch.Tensor, rank: int) -> torch.Tensor:
        """This rank's block of it, in the memory that was drawn."""
        if slices is None:
            return torch.zeros_like(z)
        if self.upstream == "expanded":
            return g.new_full((), 3).expand(z.shape)
        return laid(g[slices], self.upstream, f"{rank} {self.twins.text}")


MEMORIES = ("contiguous", "contiguous", "permuted", "permuted", "channels_last", "sliced", "expanded")


def laid(x: torch.Tensor, memory: str, seed: str = "") -> torch.Tensor:
    """The tensor, of no graph, in other memory: its dims in another order, or every second number of it."""
    x = x.detach()
    if memory == "expanded":
        return x
    if memory == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    order = list(range(x.dim()))
    if memory == "permuted":
        random.Random(seed).shuffle(order)
    elif memory == "channels_last" and x.dim() > 2:
        order = [0, *order[2:], 1]
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _differences(
    how: _How,
    twins: Twins,
    layer: torch.nn.Module,
    serial: torch.nn.Module,
    of_serial: tuple[list[torch.Tensor], Any],
    of_layer: tuple[list[torch.Tensor], Any],
    rank: int,
) -> Iterable[str]:
    """Go back through both, and tell what differs: outputs, gradients, buffers."""
    (whole, y), (mine, z) = of_serial, of_layer
    for module in (layer, serial):
        module.zero_grad()
    ys, zs = (values if isinstance(values, tuple) else (values,) for values in (y, z))
    g = how.gradient(ys[0])
    if ys[0].requires_grad:
        ys[0].backward(g)
    slices = twins.give(ys[0].shape)
    if zs[0].requires_grad:
        _, error = _attempt(zs[0].backward, how.gradient_here(g, slices, zs[0], rank))
        if error:
            yield f"in backward {error}"
            return
    for number, (a, b) in enumerate(zip(zs, ys, strict=True)):
        if slices is not None:
            yield from _difference(f"output {number}", a, b[slices], twins.tolerance)
    for number, (a, b, take, wants) in enumerate(zip(mine, whole, twins.take, how.wants, strict=True)):
        slices = take(b.shape)
        if slices is not None:
            wanted = None if b.grad is None or rank not in wants else b.grad[slices]
            yield from _difference(f"gradient of input {number}", a.grad, wanted, twins.tolerance)
    yield from _held(layer, serial, rank, twins.tolerance)


def _held(layer: torch.nn.Module, serial: torch.nn.Module, rank: int, tolerance: float) -> Iterable[str]:
    """What differs between the weights and buffers that this rank holds, or their gradients, and the serial ones."""
    places = getattr(layer, "_distdl_places", {})
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name not in places:
            continue
        box, other = places[name].layout.box(rank), getattr(serial, name)
        if box is None:
            if tensor.numel() or (tensor.grad is not None and tensor.grad.numel()):
                yield f"{name} is here too"
            continue
        part = tuple(slice(*r) for r in box)
        yield from _difference(name, tensor, other[part], tolerance)
        wanted = None if other.grad is None else other.grad[part]
        yield from _difference(f"gradient of {name}", tensor.grad, wanted, tolerance)


def _difference(name: str, a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float) -> Iterable[str]:
    if a is None or b is None:
        if a is not b:
            yield f"{name}: {'none' if a is None else 'one'}, of torch {'none' if b is None else 'one'}"
        return
    a, b = a.detach(), b.detach()
    finite = b[b.isfinite()] if tolerance else b.new_empty(0)
    size = finite.abs().max().item() if finite.numel() else 0.0
    try:
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance * max(1.0, size), equal_nan=True)
    except AssertionError as error:
        yield f"{name}: {error}"


# ---- by hand ---------------------------------------------------------------------------------------------------------


def main(name: str, first: str, last: str = "") -> None:
    from families import FAMILIES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    world, numbers = dl.Partition(), range(int(first), int(last or int(first) + 1))

    def run_case(family: str, number: int) -> str:
        if world.size == SIZE:
            return run(world, FAMILIES, family, number)
        return spmd(SIZE, lambda threads: run(threads, FAMILIES, family, number))[0]

    for family in FAMILIES if name == "all" else [name]:
        began, outcomes, text = perf_counter(), Counter(), ""
        for number in numbers:
            outcome, error = _attempt(run_case, family, number)
            outcomes[outcome or "wrong"] += 1
            text += f"{family} {number}: {error}\n" if error else ""
        spent = (perf_counter() - began) / len(numbers) * 1e3
        if world.rank == 0:
            print(f"{text}{family}: {dict(outcomes)}, {spent:.1f} ms a case", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
