"""Networks of operations drawn at random, graphs and not chains, each of which its number brings back.

``python -m zoo.random_graphs FIRST [LAST]`` in the folder of tests runs cases and prints what is wrong, with the part of the
graph up to the first value that is.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distdl_lite.model.prove import Trial
from zoo import layers, operations
from zoo.graphs import LARGEST, Draw, Network

OPERATIONS = [operation for operation, times in {**operations.TIMES, **layers.TIMES}.items() for _ in range(times)]
REFUSALS = ("cannot be captured", "is not supported", "has no rule")  # with the operation's name or line


def drawn(number: int) -> tuple[Draw, tuple[int, ...], Any]:
    """The graph of a number, its grid, and how its inputs are cut."""
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
        f"reproduce: cd tests; python -m zoo.random_graphs {number}"
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
