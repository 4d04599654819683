"""What one rank alone finds wrong is raised on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distdl_lite.nn.module import raise_together
from distdl_lite.partition import Partition


@contextmanager
def refused_together(P: Partition, name: str) -> Iterator[None]:
    """Raise an error of the block on all ranks of `P`, with the same text, which begins with a name.

    They come to it together, and in it communicate before anything may raise, or not at all. A rank outside is alone.
    """
    error = None
    try:
        yield
    except Exception as raised:
        if not P.active:
            raise
        error = raised
    if P.active:
        raise_together(P.world_transport, sorted(P.ranks), error, name)
