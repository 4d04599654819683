"""How ranks ask each other where they are while their communicators are stuck: a thread of each answers on a socket.

The ranks of a world tell each other at its beginning where they listen. Who reports asks all of them at once; of one that
does not answer, its host may tell what has become of the process.
"""

from __future__ import annotations

import atexit
import os
import platform
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NamedTuple

from distdl_lite.transport.frames import OWN_THREADS, here, place_of
from distdl_lite.transport.hang import Told
from distdl_lite.transport.sockets import own_address

_MOST_RANKS = 4096  # of a world whose ranks learn where all listen
_PATIENCE = 3.0  # seconds for an answer
_TURN = 5.0  # seconds in which one rank reports, and no other
_PINGS = 20
_TRIES = 3  # ranks that are asked for the turn, or told of an error, until one answers


class Address(NamedTuple):
    """Where a rank of a world listens."""

    host: str
    network: str
    port: int
    pid: int
    key: bytes
    world: int  # its number in the process

    def connected(self) -> Connection:
        """A connection on which questions are answered; OSError, EOFError or AuthenticationError where there is none."""
        network = "127.0.0.1" if self.host == platform.node() else self.network
        return Client((network, self.port), authkey=self.key)

    def ask(self, question: str, value: Any = None) -> Any:
        """The answer."""
        with self.connected() as connection:
            connection.send((question, self.world, value))
            return connection.recv()

    def clock_ahead(self) -> float:
        """The seconds by which its clock, `time.perf_counter`, is ahead: the shortest of some messages there and back tells."""
        found = []
        with self.connected() as connection:
            for _ in range(_PINGS):
                began = time.perf_counter()
                connection.send(("time", self.world, None))
                there = connection.recv()
                ended = time.perf_counter()
                found.append((ended - began, there - (began + ended) / 2))
        return min(found)[1]

    def state(self, answer: Exception | None) -> str:
        """What is known of a process that does not answer, or whose host does not let it."""
        if self.host != platform.node():
            return f"on {self.host} does not answer"
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return "has ended"
        if state in "TtZ":
            return "has ended" if state == "Z" else "is stopped"
        if answer is not None:
            return "has ended its program"
        return "does not answer: it has ended its program, or is in a call that keeps Python's lock"


class Desk:
    """This process's answers."""

    def __init__(self) -> None:
        self._key, self._pid = secrets.token_bytes(16), os.getpid()
        self._listener = socket.create_server(("", 0), backlog=128)
        self.worlds: list[Any] = []
        self._ended: list[tuple[int, int, str]] = []  # world, rank, and how that ended
        self._turns: dict[int, float] = {}  # by world, when that of the last rank that asked ends
        atexit.register(self._close)
        start_thread("answers", self._accept)

    def address(self, world: Any) -> Address:
        """Where a world's ranks may ask this one."""
        self.worlds.append(world)
        return Address(
            platform.node(),
            own_address(),
            self._listener.getsockname()[1],
            os.getpid(),
            self._key,
            len(self.worlds) - 1,
        )

    def _accept(self) -> None:
        with suppress(OSError):  # when it is closed
            while True:
                start_thread("answer", self._answer, Connection(self._listener.accept()[0].detach()))

    def _answer(self, connection: Any) -> None:
        with connection, suppress(OSError, EOFError, AuthenticationError):
            deliver_challenge(connection, self._key)  # a stranger fails it
            answer_challenge(connection, self._key)
            while True:  # until there are no more questions
                question, world, value = connection.recv()
                connection.send(getattr(self, f"_{question}")(world, value))

    def _tell(self, world: int, _: Any) -> tuple[Told, list[tuple[int, str]]]:
        """Where this rank is, and what it knows of others' ends."""
        try:
            told = here(self.worlds[world])
        except Exception as error:  # such as one of the program's objects
            told = Told(self.worlds[world].rank, silent=f"cannot say where it is: {type(error).__name__}: {error}")
        return told, [(rank, how) for number, rank, how in self._ended if number == world]

    def _turn(self, world: int, _: Any) -> bool:
        """Whether the rank that asks may report."""
        now = time.monotonic()
        if now < self._turns.get(world, 0.0):
            return False
        self._turns[world] = now + _TURN
        return True

    def _time(self, world: int, _: Any) -> float:
        return time.perf_counter()

    def _remember(self, world: int, told: tuple[int, str]) -> None:
        self._ended.append((world, *told))

    def _close(self) -> None:
        """Answer no more. A rank after this one learns of the error that ends it."""
        if os.getpid() != self._pid:  # a child, whose parent goes on
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread, unlike close
        self._listener.close()
        error = getattr(sys, "last_value", None)
        if error is None:
            return
        place, _ = place_of([frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1])
        how = f"has ended by {type(error).__name__}: {error} ({place})"
        for world in self.worlds:
            addresses, told = world.local["addresses"], (world.rank, how)
            others = [*addresses[world.rank + 1 :], *addresses[: world.rank]]
            _first_answer(others, lambda address, told=told: address.ask("remember", told) or True)  # type: ignore[misc]


def start_thread(name: str, call: Any, *args: Any) -> threading.Thread:
    """Start one of the library's own threads."""
    thread = threading.Thread(target=call, args=args, name=f"{OWN_THREADS} {name}", daemon=True)
    thread.start()
    return thread


_desk: list[Desk] = []


def worlds() -> list[Any]:
    """The worlds whose ranks can ask this process."""
    return list(_desk[0].worlds) if _desk else []


def join(world: Any) -> None:
    """Let a world's ranks ask each other; all of them call it together, at its beginning."""
    world.local["addresses"] = ()
    if 1 < world.size <= _MOST_RANKS:
        if not _desk:
            _desk.append(Desk())
        mine = _desk[0].address(world)
        world.local["addresses"] = world.gather_objects(world.team(range(world.size)), mine)


def clock_ahead(world: Any, rank: int) -> float:
    """The seconds by which a rank's clock is ahead of this one's; 0 on one host, or if nobody tells."""
    address = world.local.get("addresses", ())[rank : rank + 1]
    if not address or address[0].host == platform.node():
        return 0.0
    (ahead,) = _answers(address, Address.clock_ahead)
    return ahead if isinstance(ahead, float) else 0.0


def _answers(addresses: Sequence[Address], ask: Callable[[Address], Any]) -> list[Any]:
    """What asking each rank gives, None where there was no answer in time, and an error where nobody listens."""
    found: list[Any] = [None] * len(addresses)

    def ask_one(number: int) -> None:
        try:
            found[number] = ask(addresses[number])
        except (OSError, EOFError, AuthenticationError) as error:
            found[number] = error

    threads = [start_thread("question", ask_one, number) for number in range(len(addresses))]
    end = time.monotonic() + _PATIENCE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return list(found)


def _first_answer(addresses: Iterable[Address], ask: Callable[[Address], Any]) -> Any:
    for address in list(addresses)[:_TRIES]:
        (answer,) = _answers([address], ask)
        if answer is not None and not isinstance(answer, Exception):
            return answer
    return True


def told_by_all(world: Any) -> list[Told] | None:
    """Where each rank of a world is; None if another rank has asked in the last seconds."""
    addresses = world.local["addresses"]
    if not addresses:
        return [here(world)]
    if not _first_answer(addresses, lambda address: address.ask("turn")):
        return None
    answers = _answers(addresses, lambda address: address.ask("tell"))
    ended = {rank: how for answer in answers if isinstance(answer, tuple) for rank, how in answer[1]}
    told = []
    for rank, (address, answer) in enumerate(zip(addresses, answers, strict=True)):
        if isinstance(answer, tuple):
            told.append(answer[0])
        else:
            told.append(Told(rank, silent=ended.get(rank) or address.state(answer)))
    return told
