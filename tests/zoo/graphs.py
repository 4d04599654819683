"""A graph of operations in the making: steps over a growing list of values."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 3000  # elements of a value


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
            has_buffers = step.layer is not None and any(True for _ in self.layers[step.layer].buffers())
            if needed & set(step.makes) or "_(" in step.text or has_buffers:  # or it changes something in place
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

    def step(self, text: str, takes: int | Sequence[int], function: Callable[..., Any], layer: Any = None) -> bool:
        """Append an operation, of a layer if any, unless torch refuses it, or it makes too much or too large numbers."""
        step = Step(text, (takes,) if isinstance(takes, int) else tuple(takes), function)
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

    def evaluate(self, text: str, *takes: int, **names: Any) -> bool:
        """A step whose text is its program."""
        letters = "abcdefgh"[: len(takes)]
        program = f"lambda {', '.join(letters)}: {text.format(*letters)}"
        return self.step(text, takes, eval(program, {"torch": torch, "F": torch.nn.functional, **names}))

    def apply(self, layer: nn.Module, take: int) -> bool:
        """A step that calls a layer."""
        return self.step(f"{layer}({{0}})".replace("\n", ""), take, _called, layer)


def _called(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


Operation = Callable[[Draw], Any]  # draws its options and appends a step
