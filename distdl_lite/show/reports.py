"""Pictures of reports: how a network is cut, what its layers hold and send, and how that scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from distdl_lite.model.report import Report
from distdl_lite.model.suggest import Suggestion
from distdl_lite.show.drawing import colour, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND: dict[str, Any] = {"ncols": 2, "fontsize": 8, "frameon": False, "handlelength": 1, "borderaxespad": 0}


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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> ax = dl.show.cuts(dl.report(model, (1, 1, 2, 2), (2, 3, 37, 29)))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['0 \N{EN DASH} 1', '2']
    """
    levels = [list(rows) for _, rows in groupby((row for row in report.rows if row.cuts), lambda row: row.cuts)]
    if not levels:
        raise ValueError("no module of the report says how its output is cut")
    names = [" \N{EN DASH} ".join(dict.fromkeys(row.path or "." for row in (rows[0], rows[-1]))) for rows in levels]
    names = [name + " (gathered)" * any(row.gathered for row in rows) for name, rows in zip(names, levels, strict=True)]
    count = max(len(rows[0].cuts) for rows in levels)
    if ax is None:
        size = 1.3 * count + 0.07 * max(map(len, names)), 0.27 * len(levels) + 1.0
        ax = pyplot().figure(figsize=size, layout="constrained").subplots()
    lengths = [[math.prod(n for n, _ in factors) for factors in rows[0].cuts] for rows in levels]
    longest = [max(line[d] for line in lengths if d < len(line)) for d in range(count)]
    used = set[int]()
    for y, (rows, line) in enumerate(zip(levels, lengths, strict=True)):
        for d, text in enumerate(rows[0].output[1:-1].split(", ")):
            axes = [axis for _, cut in rows[0].cuts[d] for axis in cut]
            parts = math.prod(report.grid[axis] for axis in axes)
            step = max(0.9 * math.log(1 + line[d]) / math.log(1 + max(longest[d], 1)), 0.05) / parts
            faces = [colour(axes[part % len(axes)]) if axes else "0.85" for part in range(parts)]
            pieces = [(d + part * step, step) for part in range(parts)]
            ax.broken_barh(pieces, (y - 0.36, 0.72), facecolors=faces, edgecolor="white", linewidth=min(1, 12 / parts))
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "boxstyle": "round,pad=0.15"}
            ax.text(d + 0.04, y, text, fontsize=8, va="center", bbox=paper)
            used |= {*axes}
    ax.set(xlim=(0, count), ylim=(len(levels) - 0.5, -0.5), frame_on=False)
    ax.set_yticks(range(len(levels)), names, fontsize=8)
    ax.set_xticks([d + 0.45 for d in range(count)], [f"dim {d}" for d in range(count)], fontsize=8)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    for axis in sorted(used):
        ax.bar(0, 0, color=colour(axis), label=f"cut in {report.grid[axis]} by axis {axis}")
    ax.bar(0, 0, color="0.85", label="whole on every rank")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.02), **_LEGEND)
    return ax


def layers(report: Report) -> Figure:
    """Draw the bytes of each module as bars: on the left what a rank holds, on the right what it sends.

    As in the report they are those of the fullest rank, modules below each other in the order of the forward.

    Parameters
    ----------
    report : Report
        Of `dl.report` or ``net.report()``.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> figure = dl.show.layers(dl.report(torch.nn.Conv2d(3, 8, 3, padding=1), (1, 1, 2, 2), (2, 3, 37, 29)))
    >>> [ax.get_title(loc="left") for ax in figure.axes]
    ['memory a rank', 'bytes sent a rank']
    """
    rows, names = report.rows, [row.path or "." for row in report.rows]
    size = 6.0 + 0.07 * max(map(len, names)), 0.24 * len(names) + 1.1
    figure = pyplot().figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    held = {"weights": [row.weights for row in rows], "kept for backward": [row.kept for row in rows]}
    sent = {"forward": [row.forward.bytes for row in rows], "backward": [row.backward.bytes for row in rows]}
    for ax, title, kinds, inks in ((left, "memory a rank", held, (5, 1)), (right, "bytes sent a rank", sent, (2, 3))):
        before = [0] * len(rows)
        for (kind, sizes), ink in zip(kinds.items(), inks, strict=True):
            ax.barh(range(len(rows)), sizes, left=before, color=colour(ink), label=kind, height=0.7)
            before = sizes
        ax.set_title(title, fontsize=9, loc="left", pad=20)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), **_LEGEND)
        _plain(ax, ax.xaxis, "B")
        ax.locator_params(axis="x", nbins=5)
        ax.tick_params(axis="y", length=0)
    left.set_yticks(range(len(rows)), names)
    left.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _plain(ax: Axes, axis: Any, unit: str) -> None:
    """Few lines, and an axis of numbers with a unit."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(unit=unit))
    axis.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def scaling(reports: Iterable[Report | Suggestion]) -> Figure:
    """Draw how a dry run over several grids scales: peak memory, predicted seconds of a step and bytes sent, each of a rank.

    The axes are logarithmic; a point is a grid that is not at 0, and the line goes through the lowest for each number of ranks.
    A dashed line is ideal, half as much a rank on twice as many ranks, from the first point on. Grids are named below the last
    axes; where there is no room for all names, the fastest for each number of ranks. Bytes are counted as in the report: the
    statistics of a norm count once for each other rank, and sums of gradients once.

    Parameters
    ----------
    reports : iterable of Report or Suggestion
        Of one model, inputs and machine, over grids of several numbers of ranks, such as
        ``[dl.report(model, grid, shape) for grid in grids]``, or what `dl.suggest` returns for one or several of them.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> model, grids = torch.nn.Conv2d(3, 8, 3, padding=1), [(1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 2, 2)]
    >>> figure = dl.show.scaling([dl.report(model, grid, (2, 3, 64, 64)) for grid in grids])
    >>> figure.axes[0].lines[0].get_xdata().tolist()
    [1, 2, 4]
    """
    each = (made.report if isinstance(made, Suggestion) else made for made in reports)
    found = sorted(each, key=lambda report: (report.ranks, report.grid))
    figure = pyplot().figure(figsize=(6.4, 6.4), layout="constrained")
    kinds: list[tuple[str, str, list[float]]] = [
        ("peak memory a rank", "B", [report.peak for report in found]),
        ("predicted step", "s", [report.seconds for report in found]),
        ("sent a rank and step", "B", [report.forward.bytes + report.backward.bytes for report in found]),
    ]
    for ax, (title, unit, numbers) in zip(figure.subplots(3, 1, sharex=True), kinds, strict=True):
        points = [(report.ranks, number) for report, number in zip(found, numbers, strict=True) if number]
        best = {ranks: min(number for n, number in points if n == ranks) for ranks, _ in points}
        ideal = [points[0][0] * best[points[0][0]] / ranks for ranks in best]
        ax.loglog(list(best), list(best.values()), color=colour(5), linewidth=1.5, base=2)
        ax.plot(list(best), ideal, color="0.4", linestyle="--", linewidth=1.2, label="ideal", zorder=1)
        ax.scatter([ranks for ranks, _ in points], [number for _, number in points], color=colour(5), s=22, zorder=3)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(pyplot().LogLocator(subs=(1, 2, 5), numticks=7))
        ax.xaxis.grid(color="0.9")
        _plain(ax, ax.yaxis, unit)
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), **_LEGEND)
    _name_grids(ax, found)
    return figure


def _name_grids(ax: Axes, found: Sequence[Report]) -> None:
    """Numbers of ranks, with their grids below; without room for these with the fastest, aslant."""
    grids = {ranks: list(of) for ranks, of in groupby(found, lambda report: report.ranks)}
    names = {ranks: ["x".join(map(str, report.grid)) for report in of] for ranks, of in grids.items()}
    lines, widest = (max(map(measure, names.values())) for measure in (len, lambda of: max(map(len, of))))
    if lines > 4 or widest * len(names) > 90:
        best = [min(of, key=lambda report: report.seconds) for of in grids.values()]
        texts = [f"{report.ranks}: {'x'.join(map(str, report.grid))}" for report in best]
        ax.set_xticks(list(names), texts, fontsize=7, rotation=20, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks(list(names), ["\n".join([str(ranks), *of]) for ranks, of in names.items()], fontsize=7)
    ax.set_xlabel("ranks and grids", fontsize=8)
