"""Buffers that are made equal on all ranks when gradients have been summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from distdl_lite.buckets import average, broadcast, is_writable
from distdl_lite.transport import Team


class Buffers:
    """The buffers of a module, as `find` returns them: forward may put others in their place. `mode` is `sync_buffers`."""

    def __init__(self, find: Callable[[], Iterable[torch.Tensor | None]], mode: str) -> None:
        self._find, self.mode = find, mode
        self._note()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter({id(b): b for b in self._find() if b is not None}.values())

    def _note(self) -> None:
        """Know from now on what changes; the buffers are kept, lest others get their ids."""
        self._known = list(self)
        self._versions = self._versions_now()

    def _versions_now(self) -> list[tuple[int, int]]:
        return [(id(b), b._version) for b in self] if self.mode != "none" else []

    def have_changed(self) -> bool:
        """Whether forward has changed any since they were last made equal."""
        return self._versions != self._versions_now()

    def are_writable(self) -> bool:
        return all(map(is_writable, self))

    def synchronise(self, team: Team) -> None:
        """Make them equal on all ranks; no change that autograd would see."""
        buffers = list(self)
        averaged = [b for b in buffers if self.mode == "mean" and (b.is_floating_point() or b.is_complex())]
        taken = [b for b in buffers if not any(b is other for other in averaged)]
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
            average(team, averaged)
            broadcast(team, taken)
        self._note()
