"""Where the time of a traced program went: computed, packed, moved, and waited for ranks that came late."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distdl_lite.text import columns
from distdl_lite.timeline.notes import Key, Notes

_MOST_NAMED = 3  # ranks that came late
_NOTICED = 1e-3  # seconds, from which on a wait is counted


@dataclass(frozen=True)
class LayerTimes:
    """The seconds of a layer in forward and backward, of the mean rank.

    Attributes
    ----------
    layer : str
        Its path in the model; "gradients" are the sums of replicas' gradients, "outside" calls outside all modules.
    computing, packing, moving, waiting : float
        Between its calls; until its messages have left; until those that were sent have come; for partners that came late.
    balance : float
        The mean of the ranks' computing over the most of any; 1 if all compute for as long.
    late : dict from int to float
        Seconds that all others together waited for a rank.
    """

    layer: str
    computing: float
    packing: float
    moving: float
    waiting: float
    balance: float
    late: dict[int, float]


@dataclass(frozen=True)
class Late:
    """How often a rank cost another more than 1 ms, what it cost all others together in seconds, and how much of that where."""

    rank: int
    times: int
    seconds: float
    layers: dict[str, float]


@dataclass(frozen=True)
class Times:
    """Where the time went.

    Attributes
    ----------
    ranks : int
    seconds : float
        That the trace was on, on the mean rank.
    layers : tuple of LayerTimes
        In the order in which they first ended.
    late : tuple of Late
        The ranks that others waited for, the most expensive first.
    hidden : float
        The share of the time of messages and sums, from when the last part was given, in which their receivers computed.
    """

    ranks: int
    seconds: float
    layers: tuple[LayerTimes, ...]
    late: tuple[Late, ...]
    hidden: float

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, lists and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("module", "computes", "balance", "packs", "moves", "waits", "for")]
        total = LayerTimes("total", *(sum(getattr(row, name) for row in self.layers) for name in _COLUMNS), 1.0, {})
        for row in (*self.layers, total):
            numbers = [f"{1e3 * getattr(row, name):.1f} ms" for name in _COLUMNS]
            first = max(row.late.items(), key=lambda one: one[1], default=None)
            late = f"rank {first[0]}" if first and first[1] >= 5e-5 * self.ranks else ""
            balance = f"{row.balance:.2f}" if row.computing and row is not total else ""
            lines.append((row.layer, numbers[0], balance, *numbers[1:], late))
        words = [columns(lines), "", f"the mean of {self.ranks} ranks in {self.seconds:.3f} s"]
        for one in self.late[:_MOST_NAMED]:
            layer, most = max(one.layers.items(), key=lambda found: found[1])
            words.append(
                f"rank {one.rank} came late {one.times} times, which cost the others {one.seconds:.3g} s, "
                f"{most:.3g} s of that in {layer}"
            )
        words.append(f"hidden behind computation: {100 * self.hidden:.0f} % of the time of messages and sums")
        return "\n".join(words)


_COLUMNS = "computing", "packing", "moving", "waiting"


def given(notes: Sequence[Notes]) -> dict[Key, list[tuple[float, int]]]:
    """When each part was given, and by whom."""
    found: dict[Key, list[tuple[float, int]]] = defaultdict(list)
    for one in notes:
        for key, posted in one.posted.items():
            found[key].append((posted, one.rank))
    return found


def times(notes: Sequence[Notes]) -> Times:
    """Where the time went that all ranks have noted, by one clock."""
    posted, ranks = given(notes), len(notes)
    seconds: dict[str, Counter[str]] = defaultdict(Counter)
    computing: dict[str, Counter[int]] = defaultdict(Counter)
    late: dict[int, Counter[str]] = defaultdict(Counter)
    times_late: Counter[int] = Counter()
    hidden = shown = 0.0
    for one in notes:
        for span in one.spans:
            here = seconds[span.layer]
            if span.kind in ("forward", "backward"):
                here["computing"] += span.own
                computing[span.layer][one.rank] += span.own
            else:
                here["packing" if span.kind == "pack" else "moving"] += span.ended - span.began
        for wait in one.waits:
            span = one.spans[wait.span]
            others = [part for key in wait.keys for part in posted[key] if part[1] != one.rank]
            last, who = max(others, default=(span.began, -1))
            waited = min(last, span.ended) - span.began
            if waited > 0:
                seconds[span.layer]["waiting"] += waited
                seconds[span.layer]["moving"] -= waited
                late[who][span.layer] += waited
                times_late[who] += waited > _NOTICED
            hidden += max(0.0, span.began - max(last, wait.posted))
            shown += span.ended - max(span.began, min(last, span.ended))
    rows = tuple(
        LayerTimes(
            layer,
            *(max(0.0, found[name]) / ranks for name in _COLUMNS),
            balance=_balance(computing[layer], ranks),
            late={rank: cost[layer] for rank, cost in late.items() if cost[layer]},
        )
        for layer, found in seconds.items()
    )
    last_ones = [Late(rank, times_late[rank], cost.total(), dict(cost)) for rank, cost in late.items()]
    whole = sum(one.ended - one.began for one in notes) / ranks
    share = hidden / (hidden + shown) if hidden else 0.0
    return Times(ranks, whole, rows, tuple(sorted(last_ones, key=lambda one: -one.seconds)), share)


def _balance(seconds: Counter[int], ranks: int) -> float:
    most = max(seconds.values(), default=0.0)
    return seconds.total() / ranks / most if most else 1.0
