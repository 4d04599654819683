"""What one rank does while a trace is on: spans of modules, and of the calls of transports inside them."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from distdl_lite.private import at_end_of_backward, running_backward
from distdl_lite.timeline.notes import Key, Notes, Span, Wait
from distdl_lite.transport.counts import Event
from distdl_lite.transport.hang import team_text
from distdl_lite.transport.team import Team

OUTSIDE = "outside"  # of all modules
GRADIENTS = "gradients"  # their sums over replicas


@dataclass
class _Open:
    """A module whose forward or backward runs."""

    layer: str
    began: float
    inner: float = 0.0  # seconds of modules and calls inside
    has_modules: bool = False


class Recorder:
    """Takes notes of one rank; a listener of its transports."""

    def __init__(self, world: Any) -> None:
        self.world, self.thread, self.is_on = world, threading.get_ident(), True
        self.notes = Notes(world.rank)
        self._numbers: Counter[Any] = Counter()
        self._awaited: dict[Any, list[tuple[float, list[Key]]]] = defaultdict(list)  # by plan, or time of a sum
        # Of each plan the bytes to peers, and who sends here.
        self._sent: dict[int, tuple[Any, dict[int, int], list[int]]] = {}
        self._texts: dict[Any, str] = {}
        self._stack: list[_Open] = []
        self._backward: _Open | None = None
        self._task = -1  # the number of the backward whose end is awaited
        self._marked: _Open | None = None
        self._paths: dict[int, str] = {}
        self._labels: Counter[str] = Counter()
        self._prefixes: dict[str, str] = {}  # of paths, by the name of their network
        self._roots = list[torch.nn.Module]()  # kept, so that no other module gets its address

    # Modules

    def enter(self, module: torch.nn.Module) -> None:
        """The forward of a module begins."""
        if threading.get_ident() != self.thread:
            return
        if id(module) not in self._paths:
            self._add_root(module)
        self._stack.append(_Open(self._paths[id(module)], perf_counter()))

    def _add_root(self, module: torch.nn.Module) -> None:
        """Name the modules of a network: those of the first one by their paths, of others with the name of their network."""
        label = getattr(module, "_distdl_label", type(module).__name__)
        number = self._labels[label] = self._labels[label] + 1
        root = label if number == 1 else f"{label} {number}"
        prefix = self._prefixes[root] = f"{root}." if self._roots else ""
        self._roots.append(module)
        known = {id(inner): f"{prefix}{path}" if path else root for path, inner in module.named_modules()}
        self._paths = known | self._paths

    def leave(self, module: torch.nn.Module, output: Any) -> None:
        """It has ended, and the backward of what it gives is to be found again."""
        if threading.get_ident() == self.thread and self._stack:
            self._end_marked(output)
            opened = self._stack.pop()
            self._close(opened, "forward")
            if not opened.has_modules:  # else it is found as its modules
                self._find_again(opened.layer, output)

    def mark(self, path: str, value: Any) -> None:
        """In a compiled program a module's forward begins; the one before it has ended with a value."""
        self._end_marked(value)
        root = self._stack[-1].layer
        self._marked = _Open(f"{self._prefixes.get(root, '')}{path}" if path else root, perf_counter())

    def _end_marked(self, value: Any) -> None:
        opened, self._marked = self._marked, None
        if opened is not None:
            self._close(opened, "forward")
            self._find_again(opened.layer, value)

    def _innermost(self) -> _Open | None:
        """The forward or backward that runs now: a checkpoint runs forwards in backward, and a forward may ask for gradients."""
        if self._backward is not None and running_backward() < 0:
            self._backward = None  # an error has ended it
        opened = [one for one in (*self._stack[-1:], self._marked, self._backward) if one is not None]
        return max(opened, key=lambda one: one.began, default=None)

    def _close(self, opened: _Open, kind: str) -> None:
        now = perf_counter()
        own = max(0.0, now - opened.began - opened.inner)
        self.notes.spans.append(Span(opened.layer, opened.layer, kind, opened.began, now, own))
        outer = self._innermost()
        if outer is not None:
            outer.inner += now - opened.began
            outer.has_modules |= kind == "forward"

    def _find_again(self, layer: str, output: Any) -> None:
        """Let the backward that comes to an output note that the layer's backward begins."""
        node = getattr(output, "grad_fn", None)
        if node is not None:
            node.register_prehook(lambda gradients: self._begin_backward(layer))

    def _begin_backward(self, layer: str) -> None:
        if not self.is_on:
            return
        self._end_backward()
        if self._task != running_backward():
            self._task = running_backward()
            at_end_of_backward(self._end_backward)
        self._backward = _Open(layer, perf_counter())

    def _end_backward(self) -> None:
        opened, self._backward = self._backward, None
        if opened is not None:
            self._close(opened, "backward")

    # Calls

    def add(self, event: Event) -> None:
        """A transport has done something."""
        if event.kind == "thread":
            self.notes.in_threads.append(Span("sum", GRADIENTS, "thread", event.began, event.ended))
            return
        opened = self._innermost()
        is_of_gradients = event.label == "sums" or event.kind == "sum" or (opened is None and running_backward() >= 0)
        layer = GRADIENTS if is_of_gradients else opened.layer if opened else OUTSIDE
        if opened is not None:
            opened.inner += event.ended - event.began
        posted, keys = self._awaits(event) if event.world is self.world else (0.0, [])
        kind = "wait" if keys or event.kind == "finish" else "pack"
        name = event.label or event.kind
        self.notes.spans.append(Span(name, layer, kind, event.began, event.ended))
        if keys:
            self.notes.waits.append(Wait(len(self.notes.spans) - 1, posted, tuple(keys)))

    def _awaits(self, event: Event) -> tuple[float, list[Key]]:
        """When this rank posted its part, and what the event waits for."""
        if event.kind == "start":
            is_collective = any(leg.team for leg in event.whom.legs)  # which may wait here
            posted = event.began if is_collective else event.ended
            keys = self._messages(event, posted)
            self._awaited[id(event.whom)].append((posted, keys))
            return posted, keys if is_collective else []
        if event.kind in ("finish", "sum"):
            waiting = self._awaited[id(event.whom) if event.kind == "finish" else event.posted]
            return waiting.pop(0) if waiting else (0.0, [])
        team = event.whom if isinstance(event.whom, Team) else tuple(event.whom)
        if team not in self._texts:
            self._texts[team] = team_text(team)
        key = event.kind, self._texts[team], self._next(event.kind, team)
        self.notes.posted[key] = event.posted
        if event.kind == "start sum":
            self._awaited[event.posted].append((event.posted, [key]))
            return event.posted, []
        return event.posted, [key]

    def _messages(self, event: Event, posted: float) -> list[Key]:
        """The keys of the messages that an operator receives, after those that it sends are posted."""
        me, plan = self.world.rank, event.whom
        if id(plan) not in self._sent:
            itemsize, bytes_to = event.traffic[1] // max(plan.traffic[2], 1), Counter[int]()
            for leg in plan.legs:
                for edge in leg.sends:
                    bytes_to[edge.peer] += edge.size * itemsize
            peers = {edge.peer for leg in plan.legs for edge in leg.receives}
            self._sent[id(plan)] = plan, {p: n for p, n in bytes_to.items() if p != me}, sorted(peers - {me})
        _, sent, received = self._sent[id(plan)]
        for peer, size in sent.items():
            key = me, peer, self._next("to", peer)
            self.notes.posted[key], self.notes.sizes[key] = posted, size
        return [(peer, me, self._next("from", peer)) for peer in received]

    def _next(self, *what: Any) -> int:
        self._numbers[what] += 1
        return self._numbers[what]
