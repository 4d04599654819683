"""How ranks keep together where one of them alone knows what comes next: it says so, and all raise what one has found."""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.transport import Transport


@dataclass(frozen=True)
class Told:
    """An error as the other ranks are told of it."""

    kind: bytes  # pickled: a rank that lacks the class can still read the rest
    text: str
    trace: str = ""
    interrupt: BaseException | None = None  # one that is more than an error, such as SystemExit; it is not sent

    @staticmethod
    def of(error: BaseException, where: str, traced: bool = False) -> Told:
        """Of an error that happened here; its type stays if it can be sent and made from a text alone.

        One that ends the program here is a RuntimeError elsewhere.
        """
        kind, text = type(error), str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        interrupt = None if isinstance(error, Exception) else error
        try:
            kind(text)
            sent = pickle.dumps(kind if interrupt is None else RuntimeError)
        except Exception:
            sent = pickle.dumps(RuntimeError)
        if pickle.loads(sent) is not kind:
            text = f"{kind.__name__}: {text}"
        text = text if text.startswith(where) else f"{where}: {text}"
        return Told(sent, text, _trace(error) if traced else "", interrupt)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "interrupt": None}

    def error(self) -> BaseException:
        if self.interrupt is not None:
            return self.interrupt
        try:
            made: Exception = pickle.loads(self.kind)(self.text)
        except Exception:
            made = RuntimeError(self.text)
        made.__cause__ = _Trace(self.trace) if self.trace else None
        return made


class Pickler(pickle.Pickler):
    """Refuses what would lose its gradient."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise TypeError("a tensor that requires grad is inside an object that is no tuple, list or dict")


def pickled(value: Any) -> bytes:
    """The bytes of host data."""
    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


class _Trace(Exception):
    """Shows where, on another rank, an error was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Agreed(Exception):
    """Raised on all ranks together; the calls that a user makes raise what was told in its place.

    `is_over` where the root answers no more.
    """

    def __init__(self, told: Told, is_over: bool = False) -> None:
        super().__init__(told.text)
        self.told, self.is_over = told, is_over


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what was agreed on."""
    try:
        yield
    except Agreed as agreed:
        error = agreed.told.error()
        raise error from error.__cause__


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
    error : Told or None
        Why nothing can be done.
    dropped : tuple of int
        Numbers of the container's forwards whose graphs the root has let go.
    """

    kind: str
    container: int = 0
    number: int = 0
    content: Any = None
    error: Told | None = None
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


def meet(name: str, transport: Transport, team: Sequence[int], root: int, mine: Order) -> dict[int, Order]:
    """The orders of all of the team; the first error, or a disagreement with the root, is raised on all as `Agreed`."""
    orders = dict(zip(team, transport.gather_objects(team, mine), strict=True))
    if mine.error is not None and mine.error.interrupt is not None and transport.rank == root:
        raise Agreed(mine.error)
    for order in orders.values():
        if order.error is not None:
            raise Agreed(order.error)
    odd = [f"rank {rank} {order}" for rank, order in orders.items() if not order.fits(orders[root])]
    if odd:
        text = f"the root, rank {root}, {orders[root]}, but {', '.join(odd)}"
        raise Agreed(Told.of(RuntimeError(text), name), orders[root].kind == "leave")
    return orders
