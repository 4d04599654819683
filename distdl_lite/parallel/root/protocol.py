"""Protocol between the root and the other ranks: the root announces each operation, and an error on any rank is raised on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distdl_lite.transport import Team

NAME = "RootDataParallel"  # with which errors begin


class Agreed(Exception):
    """Raised on all ranks together; the calls that a user makes raise its `error` in its place.

    `is_over` where the root answers no more.
    """

    def __init__(self, error: BaseException, is_over: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.is_over = error, is_over


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what was agreed on."""
    try:
        yield
    except Agreed as agreed:
        raise agreed.error from agreed.__cause__


@dataclass(frozen=True)
class Order:
    """A rank's next operation: on the root the one that all shall do, elsewhere the one that the rank came for.

    Its kind is "construct", "forward" and in it "outputs", "backward" and in it "gradients", "leave", or "serve", which is
    whatever the root says.
    """

    kind: str
    container: int = 0  # its number; of "serve", none
    number: int = 0  # of the forward that a backward belongs to
    # The root's data; of "outputs" and "gradients" each rank's; of "serve" the numbers of containers, and those of their
    # forwards that await a backward.
    content: Any = None
    error: tuple[type[Exception], str] | None = None  # for which nothing can be done
    dropped: tuple[int, ...] = ()  # numbers of the container's forwards whose graphs the root has let go

    def fits(self, root: Order) -> bool:
        if self.kind == "serve":
            known = root.kind in ("forward", "backward", "leave") and root.container in self.content
            return known and (root.kind != "backward" or root.number in self.content[root.container])
        return (self.kind, self.container) == (root.kind, root.container) and (
            self.kind == "forward" or self.number == root.number
        )

    def __str__(self) -> str:
        if self.kind == "serve":
            return f"serves containers {sorted(self.content)}"
        which = f" of forward {self.number}" if self.number and self.kind != "forward" else ""
        return f"is at {self.kind}{which} of container {self.container}"


def meet(team: Team, root: int, mine: Order, error: BaseException | None = None) -> dict[int, Order]:
    """The orders of all of the team; `error` is one that this rank has found.

    Raises `Agreed` on all ranks with the first one's error, or if one disagrees with the root. An exception that ends the
    program on the root, such as SystemExit, stays what it is there.
    """
    orders = dict(zip(team, team.world.gather_objects(team, mine), strict=True))
    if error is not None and not isinstance(error, Exception) and team.world.rank == root:
        raise Agreed(error)
    for order in orders.values():
        if order.error is not None:
            kind, text = order.error
            raise Agreed(kind(text)) from error
    odd = [f"rank {rank} {order}" for rank, order in orders.items() if not order.fits(orders[root])]
    if odd:
        text = f"{NAME}: the root, rank {root}, {orders[root]}, but {', '.join(odd)}"
        raise Agreed(RuntimeError(text), orders[root].kind == "leave")
    return orders
