"""Which grid to cut a model over: a report for each that a number of ranks allows, the fastest that fits first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distdl_lite.layout import Shape
from distdl_lite.model.report import TYPICAL, Machine, Report, example, in_markdown, number, reports
from distdl_lite.text import columns


@dataclass(frozen=True)
class Suggestion:
    """A grid, its report, and why it stands where it stands."""

    grid: Shape
    report: Report
    fits: bool
    reason: str


class Suggestions(list[Suggestion]):
    """Grids, the best first; `print` lists them."""

    def _lines(self) -> list[tuple[str, str]]:
        return [("x".join(map(str, s.grid)), s.reason) for s in self]

    def to_markdown(self) -> str:
        """The list in Markdown."""
        return in_markdown([("grid", "reason"), *self._lines()])

    def __str__(self) -> str:
        return columns(self._lines())


def suggest(
    model: Any,
    *inputs: Any,
    ranks: int,
    memory: float = math.inf,
    channels: bool = False,
    in_axes: Any = None,
    out_axes: Any = None,
    train: bool = True,
    machine: Machine = TYPICAL,
) -> Suggestions:
    """Grids of a number of ranks for a model, the one with the shortest predicted step among those that fit first.

    Of those alike in three digits, one that cuts earlier dims comes first, as its halos are contiguous in memory.

    Parameters
    ----------
    model, *inputs, in_axes, out_axes, train, machine
        As of `report`. The grids have an axis for each dim of the first tensor: batch, channels, space.
    ranks : int
    memory : float
        Bytes that a rank has.
    channels : bool
        Whether grids that cut channels (dim 1) are tried.

    Returns
    -------
    list of Suggestion
        With `grid`, `report`, `fits` and `reason`; those that do not fit stand behind, the smallest first.

    Raises
    ------
    ValueError
        If no grid of so many ranks has an axis of at most each dim's length.
    RuntimeError, TypeError
        As of `report`.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> [s.grid for s in dl.suggest(torch.nn.Conv2d(3, 8, 3, padding=1), (2, 3, 512, 512), ranks=2)]
    [(2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
    """
    args = [example(x, model) for x in inputs]
    first = next((x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)), None)
    if first is None:
        raise ValueError("suggest: a shape or a tensor is needed among the inputs")
    grids = [grid for grid in _grids(ranks, tuple(first.shape)) if channels or len(grid) < 2 or grid[1] == 1]
    if not grids:
        raise ValueError(f"suggest: {ranks} ranks have no grid for a tensor of shape {tuple(first.shape)}")
    found = reports(model, args, grids, in_axes, train, machine, out_axes=out_axes)
    fitting = sorted((r for r in found if r.peak <= memory), key=_order)
    others = sorted((r for r in found if r.peak > memory), key=lambda r: r.peak)
    made = [Suggestion(r.grid, r, True, _reason(r, fitting)) for r in fitting]
    made += [
        Suggestion(r.grid, r, False, f"does not fit: {number(r.peak, 'B')} of {number(memory, 'B')}") for r in others
    ]
    return Suggestions(made)


def _grids(ranks: int, lengths: Sequence[int]) -> Iterator[Shape]:
    """The shapes of grids of so many ranks, no axis longer than its dim."""
    if not lengths:
        yield from [()] if ranks == 1 else []
        return
    for n in range(1, min(ranks, lengths[0]) + 1):
        if ranks % n == 0:
            yield from ((n, *rest) for rest in _grids(ranks // n, lengths[1:]))


def _order(made: Report) -> tuple[float, list[int]]:
    """By time; of those alike in three digits one that cuts earlier dims is first, whose halos are contiguous in memory."""
    return float(f"{made.seconds:.2e}"), [-n for n in made.grid]


def _reason(made: Report, fitting: Sequence[Report]) -> str:
    """What takes the time, and what takes more of it than in the first, or in the first less than in the next."""
    is_first = made is fitting[0]
    other, sign = ((fitting[1:] or [made])[0], -1) if is_first else (fitting[0], 1)
    apart = {name: sign * (seconds - other.parts[name]) for name, seconds in made.parts.items()}
    most, differs = (max(parts, key=parts.__getitem__) for parts in (made.parts, apart))
    share = 100 * made.parts[most] / made.seconds if made.seconds else 0
    texts = [f"{number(made.seconds, 's')}, {share:.0f} % of it {most}, {number(made.peak, 'B')}"]
    if apart[differs] > made.seconds / 100:
        than = "less {} than the next" if is_first else "more {} than the first"
        texts.append(f"{number(apart[differs], 's')} {than.format(differs)}")
    texts += [f"{len(made.gathered)} operations gathered"] if made.gathered else []
    return "; ".join(texts)
