"""How ranks keep together where one of them alone knows what comes next: it says so, and all raise what one has found."""

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
    """What a rank does next: on the root what all shall do, elsewhere what the rank came for.

    Attributes
    ----------
    kind : str
        "construct", "forward" and in it "outputs", "backward" and in it "gradients", "leave", or "serve", which is whatever
        the root says.
    container : int
        Its number; of "serve", none.
    number : int
        Of the forward that a backward belongs to.
    content : Any
        What the root tells; of "outputs" and "gradients", what each rank has; of "serve", the containers' numbers, and those
        of their forwards that await a backward.
    error : (type, str) or None
        The kind and text of an error, for which nothing can be done.
    dropped : tuple of int
        Numbers of the container's forwards whose graphs the root has let go.
    """

    kind: str
    container: int = 0
    number: int = 0
    content: Any = None
    error: tuple[type[Exception], str] | None = None
    dropped: tuple[int, ...] = ()

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
    """The orders of all of the team; `error` is what happened here.

    Raises
    ------
    Agreed
        On all ranks, with the first one's error, or if one disagrees with the root. What ends the program on the root, such as
        SystemExit, stays what it is there.
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
