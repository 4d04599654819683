"""Pictures of reports: how a network is cut, what its layers hold and send, and how that scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from distdl_lite.model.report import Report, Row
from distdl_lite.show.drawing import Colour, colour, pyplot, rectangle
from distdl_lite.show.places import Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNCUT: Colour = (0.85, 0.85, 0.85)
_BLUE, _ORANGE, _GREEN, _PURPLE, _RED = colour(5), colour(1), colour(2), colour(3), colour(6)
_MOST_PARTS = 64  # of a dim that can be seen


def cuts(report: Report, ax: Axes | None = None) -> Axes:
    """Draw how the outputs of a network's modules are cut, from the first below each other.

    A line is a module, or several one after another whose outputs are alike; a column is a dim. A bar is the longer, the longer
    the dim (by its logarithm). It is in the colours of the axes of the grid that cut it, in as many parts, and grey where every
    rank holds all of it.

    Parameters
    ----------
    report : Report
        Of `dl.report` or ``net.report()``.
    ax : matplotlib.axes.Axes, optional

    Raises
    ------
    TypeError
        If it is no Report.
    ValueError
        If it has no module with an output.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> ax = dl.show.cuts(dl.report(model, (1, 1, 2, 2), (2, 3, 37, 29)))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['0 \N{EN DASH} 1', '2']
    """
    _check(report)
    levels = [list(rows) for _, rows in groupby((row for row in report.rows if row.cuts), lambda row: row.cuts)]
    if not levels:
        raise ValueError("the report has no module with an output to draw")
    count = max(len(rows[0].cuts) for rows in levels)
    if ax is None:
        size = 1.3 * count + 0.07 * max(len(_name_of(rows)) for rows in levels), 0.27 * len(levels) + 1.0
        ax = pyplot().figure(figsize=size, layout="constrained").subplots()
    shapes = [[_length(factors) for factors in rows[0].cuts] for rows in levels]
    longest = [max((shape[d] for shape in shapes if d < len(shape)), default=1) for d in range(count)]
    for y, (rows, shape) in enumerate(zip(levels, shapes, strict=True)):
        words = rows[0].output[1:-1].split(", ")
        for d, (factors, n, text) in enumerate(zip(rows[0].cuts, shape, words, strict=True)):
            width = max(0.9 * math.log(1 + n) / math.log(1 + max(longest[d], 1)), 0.05)
            _draw_dim(ax, report, [axis for _, axes in factors for axis in axes], (d, y - 0.36, width, 0.72))
            ax.text(d + 0.04, y, text, fontsize=8, va="center", bbox=_PAPER)
    ax.set_xlim(0, count)
    ax.set_ylim(len(levels) - 0.5, -0.5)
    ax.set_yticks(range(len(levels)), [_name_of(rows) for rows in levels], fontsize=8)
    for rows, mark in zip(levels, ax.get_yticklabels(), strict=True):
        mark.set_color(_RED if any(row.gathered for row in rows) else "black")
    ax.xaxis.tick_top()
    ax.set_xticks([d + 0.45 for d in range(count)], [f"dim {d}" for d in range(count)], fontsize=8)
    _without_lines(ax)
    ax.tick_params(length=0)
    _tell_axes(ax, report)
    return ax


_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "boxstyle": "round,pad=0.15"}


def _check(report: Any) -> None:
    if not isinstance(report, Report):
        raise TypeError(f"a Report of dl.report is needed, not {report!r}")


def _length(factors: Sequence[tuple[int, tuple[int, ...]]]) -> int:
    return math.prod(n for n, _ in factors)


def _name_of(rows: Sequence[Row]) -> str:
    """The first and the last module."""
    ends = dict.fromkeys((rows[0].path or ".", rows[-1].path or "."))
    return " \N{EN DASH} ".join(ends) + (" (gathered)" if any(row.gathered for row in rows) else "")


def _draw_dim(ax: Axes, report: Report, axes: Sequence[int], place: Rectangle) -> None:
    """A dim in as many parts as the axes cut it, these in turn in their colours."""
    x, y, width, height = place
    parts = math.prod(report.grid[axis] for axis in axes)
    drawn = min(parts, _MOST_PARTS)
    for part in range(drawn):
        face = colour(axes[part % len(axes)]) if axes else _UNCUT
        border = min(1.0, 12 / drawn) if drawn > 1 else 0
        piece = (x + part * width / drawn, y, width / drawn, height)
        rectangle(ax, piece, facecolor=face, edgecolor="white", linewidth=border)


def _tell_axes(ax: Axes, report: Report) -> None:
    from matplotlib.patches import Patch

    used = sorted({axis for row in report.rows for factors in row.cuts for _, axes in factors for axis in axes})
    marks = [Patch(color=colour(axis), label=f"cut in {report.grid[axis]} by axis {axis}") for axis in used]
    marks.append(Patch(color=_UNCUT, label="whole on every rank"))
    _legend_below(ax, marks)


def _legend_below(ax: Axes, marks: Any) -> None:
    ax.legend(
        handles=marks,
        loc="upper left",
        bbox_to_anchor=(0, -0.02),
        ncols=2,
        fontsize=8,
        frameon=False,
        handlelength=1,
        columnspacing=1,
        borderaxespad=0,
    )


def _without_lines(ax: Axes) -> None:
    for side in ax.spines.values():
        side.set_visible(False)


def layers(report: Report, most: int = 40) -> Figure:
    """Draw the bytes of each module as bars: on the left what a rank holds, on the right what it sends.

    As in the report they are those of the fullest rank, modules below each other in the order of the forward.

    Parameters
    ----------
    report : Report
        Of `dl.report` or ``net.report()``.
    most : int
        Of more modules than this those of the most bytes have a bar, the rest one together.

    Raises
    ------
    TypeError
        If it is no Report.
    ValueError
        If it has no rows, or `most` is not positive.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> figure = dl.show.layers(dl.report(torch.nn.Conv2d(3, 8, 3, padding=1), (1, 1, 2, 2), (2, 3, 37, 29)))
    >>> [ax.get_title(loc="left") for ax in figure.axes]
    ['memory a rank', 'bytes sent a rank']
    """
    _check(report)
    if most < 1 or not report.rows:
        raise ValueError(f"at least one bar is needed, not {most} of {len(report.rows)} modules")
    numbers = {row.path or ".": [row.weights, row.kept, row.forward.bytes, row.backward.bytes] for row in report.rows}
    chosen = sorted(numbers, key=lambda path: -sum(numbers[path]))[: len(numbers) if len(numbers) <= most else most]
    bars = {path: held for path, held in numbers.items() if path in chosen}
    rest = [held for path, held in numbers.items() if path not in chosen]
    if rest:
        bars[f"{len(rest)} others"] = [sum(of_kind) for of_kind in zip(*rest, strict=True)]
    size = 6.0 + 0.07 * max(map(len, bars)), 0.24 * len(bars) + 1.1
    figure = pyplot().figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    held, sent = (("weights", _BLUE), ("kept for backward", _ORANGE)), (("forward", _GREEN), ("backward", _PURPLE))
    for ax, title, kinds, first in ((left, "memory a rank", held, 0), (right, "bytes sent a rank", sent, 2)):
        _draw_bars(ax, [values[first : first + 2] for values in bars.values()], kinds)
        ax.set_title(title, fontsize=9, loc="left", pad=20)
    left.set_yticks(range(len(bars)), list(bars), fontsize=8)
    left.set_ylim(len(bars) - 0.5, -0.5)
    return figure


def _draw_bars(ax: Axes, values: Sequence[Sequence[int]], kinds: Sequence[tuple[str, Colour]]) -> None:
    """Bars of several kinds of bytes one behind the other."""
    before = [0] * len(values)
    for number, (name, ink) in enumerate(kinds):
        mine = [of_bar[number] for of_bar in values]
        ax.barh(range(len(values)), mine, left=before, color=ink, label=name, height=0.7)
        before = [a + b for a, b in zip(before, mine, strict=True)]
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False, handlelength=1, borderaxespad=0
    )
    ax.set_xlim(0, 1.05 * max(before) or 1)
    ax.xaxis.set_major_formatter(_engineering("B"))
    ax.xaxis.set_major_locator(_few_ticks())
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _engineering(unit: str) -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit=unit)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)


def scaling(reports: Iterable[Report]) -> Figure:
    """Draw how a dry run over several grids scales: peak memory, predicted seconds of a step and bytes sent, each of a rank.

    Ranks and numbers have logarithmic axes; a point is a grid, and the line goes through the lowest for each number of ranks. A
    dashed line is ideal, half as much a rank on twice as many ranks, from the fewest on, or, of bytes, from the fewest that send
    any. A rank that sends nothing has no point among the bytes.

    Parameters
    ----------
    reports : iterable of Report
        Of one model and inputs, over grids of at least two numbers of ranks, such as
        ``[dl.report(model, grid, shape) for grid in grids]``.

    Raises
    ------
    TypeError
        If one of them is no Report.
    ValueError
        If all grids have as many ranks, or the predicted times are of different machines.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> model, grids = torch.nn.Conv2d(3, 8, 3, padding=1), [(1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 2, 2)]
    >>> figure = dl.show.scaling([dl.report(model, grid, (2, 3, 64, 64)) for grid in grids])
    >>> figure.axes[0].lines[0].get_xdata().tolist()
    [1, 2, 4]
    """
    found = list(reports)
    for report in found:
        _check(report)
    found.sort(key=lambda report: (report.ranks, report.grid))
    if len({report.ranks for report in found}) < 2:
        raise ValueError("a picture of scaling needs grids of at least two numbers of ranks")
    if len({report.machine for report in found}) > 1:
        raise ValueError("the predicted times of different machines cannot be compared")
    figure = pyplot().figure(figsize=(6.4, 6.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    kinds: list[tuple[str, str, Callable[[Report], float]]] = [
        ("peak memory a rank", "B", lambda report: report.peak),
        ("predicted step", "s", lambda report: report.seconds),
        ("sent a rank and step", "B", lambda report: report.forward.bytes + report.backward.bytes),
    ]
    for ax, (title, unit, number_of) in zip(panels, kinds, strict=True):
        _draw_scaling(ax, [(report.ranks, number_of(report)) for report in found], unit)
        ax.set_title(title, fontsize=9, loc="left")
    grids = {ranks: list(of_ranks) for ranks, of_ranks in groupby(found, lambda report: report.ranks)}
    names = ["\n".join([str(n), *("x".join(map(str, report.grid)) for report in same)]) for n, same in grids.items()]
    panels[-1].set_xticks(list(grids), names, fontsize=7)
    panels[-1].set_xlabel("ranks and grids", fontsize=8)
    return figure


def _draw_scaling(ax: Axes, pairs: Sequence[tuple[int, float]], unit: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    ax.yaxis.set_major_formatter(_engineering(unit))
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    drawn = [(ranks, value) for ranks, value in pairs if value > 0]
    if not drawn:
        return
    best = {ranks: min(value for n, value in drawn if n == ranks) for ranks, _ in drawn}
    first, start = next(iter(best.items()))
    ax.plot(list(best), list(best.values()), color=_BLUE, linewidth=1.5, zorder=2)
    ideal = [start * first / ranks for ranks in best]
    ax.plot(list(best), ideal, color="0.4", linestyle="--", linewidth=1.2, label="ideal", zorder=1)
    ax.scatter(*zip(*drawn, strict=True), color=_BLUE, s=22, zorder=3)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, borderaxespad=0)
