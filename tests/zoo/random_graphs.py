"""Networks of operations drawn at random, graphs and not chains, each of which its number brings back.

``python tests/zoo/random_graphs.py FIRST [LAST]`` runs cases and prints what is wrong, with the shortest part of the graph
that is.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distdl_lite.model.prove import Trial

LARGEST = 3000  # elements of a value
REFUSALS = ("cannot be captured", "is not supported", "has no rule")  # with the operation's name or line


@dataclass
class Step:
    """One operation: its text, the numbers of the values that it takes, and how it is called."""

    text: str
    takes: tuple[int, ...]
    function: Callable[..., Any]
    layer: int | None = None
    makes: tuple[int, ...] = ()


class Network(nn.Module):
    """The steps in order, over a growing list of values, some of which are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.layers = nn.ModuleList()
        self.returns: tuple[int, ...] = ()

    def run(self, step: Step, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = [] if step.layer is None else [self.layers[step.layer]]
        made = step.function(*given, *(values[i] for i in step.takes))
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for step in self.steps:
            values += self.run(step, values)
        return tuple(values[i] for i in self.returns)

    def source(self, inputs: Sequence[Tensor]) -> str:
        """What leads to the values that are returned, as text."""
        needed, lines = set(self.returns), list[str]()
        for step in reversed(self.steps):
            if needed & set(step.makes) or "_(" in step.text:  # in place
                needed |= set(step.takes)
                names = ", ".join(f"v{i}" for i in step.makes)
                lines.append(f"    {names} = {step.text.format(*(f'v{i}' for i in step.takes))}")
        shapes = [f"    v{i}: {tuple(x.shape)} {x.dtype}" for i, x in enumerate(inputs)]
        return "\n".join([*shapes, *reversed(lines), f"    return {', '.join(f'v{i}' for i in self.returns)}"])


class Draw(random.Random):
    """A graph in the making: the values so far, and choices among them."""

    def __init__(self, number: int) -> None:
        super().__init__(f"graph {number}")
        self.generator = torch.Generator().manual_seed(number)
        self.net, self.values, self.inputs = Network(), list[Tensor](), list[Tensor]()

    def chance(self, p: float) -> bool:
        return self.random() < p

    def real(self) -> int:
        """The number of a value, mostly a late one."""
        numbers = [i for i, v in enumerate(self.values) if v.is_floating_point()]
        return numbers[-1 - min(int(self.expovariate(0.5)), len(numbers) - 1)]

    def dims(self, n: int) -> list[int]:
        return self.sample(range(n), self.randint(1, n)) if n else []

    def signed(self, d: int, n: int) -> int:
        return d - n if self.chance(0.3) else d

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def add(self, step: Step, layer: nn.Module | None = None) -> bool:
        """Append a step, unless torch refuses it or it makes too much, or numbers too large."""
        if layer is not None:
            layer = layer.double()
            with torch.no_grad():
                for p in layer.parameters():
                    p.copy_(0.5 * self.randn(*p.shape))
            step.layer = len(self.net.layers)
            self.net.layers.append(layer)
        before = [v.clone() for v in self.values]
        try:
            with torch.no_grad():
                made = self.net.run(step, before)
            fine = all(v.numel() <= LARGEST and v.numel() > 0 and v.double().abs().max() < 1e3 for v in made)
        except (RuntimeError, ValueError, IndexError, TypeError):
            fine = False
        if not fine:
            if layer is not None:
                del self.net.layers[-1]
            return False
        step.makes = tuple(range(len(self.values), len(self.values) + len(made)))
        self.values = [*before, *(v.clone() for v in made)]  # with what it changed in place
        self.net.steps.append(step)
        return True


def drawn(number: int) -> tuple[Draw, tuple[int, ...], Any]:
    """The graph of a number, its grid, and how its inputs are cut."""
    from operations import OPERATIONS

    d = Draw(number)
    n = d.choice([1, 2, 3, 4, 4, 4, 5])
    grid = [1] * n
    for factor in d.choice([(2,), (2,), (3,), (4,), (2, 2), (2, 2)]):
        grid[d.choice([0, *range(min(2, n - 1), n), *range(n)])] *= factor
    shape = [d.choice([1, 2, 2]), *(d.choice([1, 2, 3, 4, 4, 5, 6, 7, 8, 9]) for _ in range(n - 1))]
    while math.prod(shape) > LARGEST // 4:
        shape[shape.index(max(shape))] = 3
    if d.chance(0.8) and n > 1:
        shape[1] = d.choice([2, 4, 6])
    d.inputs.append(d.randn(*shape))
    if d.chance(0.4):
        d.inputs.append(d.randn(*(m if d.chance(0.7) else 1 for m in shape[d.randrange(n) :])))
    if d.chance(0.4):
        d.inputs.append(torch.randint(0, 4, d.choice([shape[:1], shape[:1] + shape[2:], shape]), generator=d.generator))
    d.values = [x.clone() for x in d.inputs]
    wanted, tries = d.randint(2, 9), 0
    while len(d.net.steps) < wanted and tries < 200:
        d.choice(OPERATIONS)(d)
        tries += 1
    made = range(len(d.inputs), len(d.values))
    d.net.returns = (
        tuple(sorted({made[-1], *(d.choice(made) for _ in range(d.choice([0, 0, 1, 2])))})) if made else (0,)
    )
    axes = None
    if d.chance(0.25):
        axes = [_axes(d, x.dim(), n) for x in d.inputs]
    return d, tuple(grid), axes


def _axes(d: Draw, dims: int, grid: int) -> tuple[int | None, ...]:
    """Any axes for the dims of an input, each once."""
    chosen: list[int | None] = d.sample(range(grid), min(dims, grid))
    chosen = [a if d.chance(0.7) else None for a in chosen] + [None] * (dims - len(chosen))
    d.shuffle(chosen)
    return tuple(chosen)


def outcome(net: Network, inputs: Sequence[Tensor], grid: Sequence[int], axes: Any) -> str:
    """ "equal", "torch refuses", "refused", or what is wrong."""
    try:
        trial = Trial(net, *inputs)
    except RuntimeError:  # of what is changed in place, although its backward needs it
        return "torch refuses"
    try:
        proof = trial.on(grid, in_axes=axes)
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        is_clear = isinstance(error, (RuntimeError, ValueError, TypeError)) and any(r in str(error) for r in REFUSALS)
        return "refused" if is_clear else f"wrong: {type(error).__name__}: {error}"
    return "equal, gathered" if proof.program.gathered else "equal"


def run(number: int) -> str:
    """What becomes of a case. AssertionError, with the graph, if it is wrong."""
    d, grid, axes = drawn(number)
    found = outcome(d.net, d.inputs, grid, axes)
    if not found.startswith("wrong"):
        return found
    raise AssertionError(
        f"{found}\ngrid {grid}, in_axes {axes}\n{shortest(d, grid, axes)}\n"
        f"reproduce: python tests/zoo/random_graphs.py {number}"
    )


def shortest(d: Draw, grid: Sequence[int], axes: Any) -> str:
    """The part of a wrong graph up to the first value that is wrong alone."""
    steps, returns = d.net.steps, d.net.returns
    for count in range(1, len(steps) + 1):
        d.net.steps, d.net.returns = steps[:count], steps[count - 1].makes
        found = outcome(d.net, d.inputs, grid, axes)
        if found.startswith("wrong"):
            return f"{d.net.source(d.inputs)}\n    {found}"
    d.net.steps, d.net.returns = steps, returns
    return d.net.source(d.inputs)


def main(first: str, last: str = "") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    for number in range(int(first), int(last or int(first) + 1)):
        try:
            outcomes[run(number)] += 1
        except AssertionError as error:
            outcomes["wrong"] += 1
            print(f"{number}: {error}\n", flush=True)
    print(dict(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
