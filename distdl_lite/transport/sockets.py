"""What processes tell and send each other over sockets of the library's own: votes, numbers, objects, and tensors of the host.

Gloo has threads that carry messages, which wait for milliseconds where all cores compute, and tell each other of each: on two
cores a vote of 2 ranks took 23 us, Gloo's all-reduce of 8 bytes 110 to 160, and 8 convolutions with halos 61 ms, not 101. No
mode of torch, such as another default device or a transform of functions, comes between.
"""

from __future__ import annotations

import os
import pickle
import secrets
import select
import socket
import struct
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from distdl_lite.transport.team import Team

_ELSEWHERE = "192.0.2.1"  # of no host, by RFC 5737
_WAIT = 0.01  # seconds after which a thread looks what others have done for it
_PATIENCE = 10.0  # seconds for who connects to say who it is
_SMALL = 1 << 14  # bytes that any socket takes while the other end reads nothing


class Switchboard:
    """Where the ranks of a world reach each other: each listens, and says in a store where."""

    def __init__(self, store: Any, rank: int) -> None:
        self.rank, self._store, self._secret = rank, store, secrets.token_bytes(16)
        address = own_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=128)
        self._listener.settimeout(_WAIT)
        store.set(f"{rank}", pickle.dumps((self._listener.getsockname(), self._secret)))
        self._came: dict[Any, socket.socket] = {}

    def connected(self, rank: int, call: Any) -> socket.socket:
        """A connection to a rank, which awaits a call of this name."""
        address, secret = pickle.loads(self._store.get(f"{rank}"))
        try:
            made = socket.create_connection(address)
        except OSError as error:
            raise ConnectionError(f"rank {self.rank} cannot reach rank {rank} at {address}: {error}") from error
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.sendall(secret + _framed(pickle.dumps(call)))
        return made

    def awaited(self, call: Any) -> socket.socket:
        """The connection of the rank that makes a call of this name."""
        while call not in self._came:
            try:
                came, _ = self._listener.accept()
            except TimeoutError:  # another thread may have taken it
                continue
            came.settimeout(_PATIENCE)
            try:
                if not secrets.compare_digest(_received(came, len(self._secret)), self._secret):
                    raise ConnectionError("a stranger")
                name = pickle.loads(_frame(came))
            except OSError:
                came.close()
                continue
            came.settimeout(None)
            came.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._came[name] = came
        return self._came.pop(call)


def own_address() -> str:
    """The address of this host in the network in which it reaches the job's first, to which nothing is sent for that.

    Where there are more hosts, and the first's name leads back to itself, it is the address of the default route.
    """
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    has_more = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    for name in (host, _ELSEWHERE):
        with suppress(OSError):
            for family, kind, *_, address in socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM):
                with suppress(OSError), socket.socket(family, kind) as probe:
                    probe.connect(address)
                    mine = str(probe.getsockname()[0])
                    if not (has_more and name is host and ip_address(mine).is_loopback):
                        return mine
    return "127.0.0.1"


def _received(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("it has gone")
        parts += part
    return bytes(parts)


def _framed(data: bytes) -> bytes:
    return struct.pack("q", len(data)) + data


def _frame(connection: socket.socket) -> bytes:
    return _received(connection, *struct.unpack("q", _received(connection, 8)))


class Line:
    """A team's connections for one purpose: in step k each rank sends to the one 2^k before it (Bruck et al. 1997)."""

    def __init__(self, board: Switchboard, team: Team, purpose: str) -> None:
        self._team, self._size, self._place = team, team.size, team.index(board.rank)
        steps = [1 << k for k in range((self._size - 1).bit_length())]
        given = [board.connected(self._rank(-step), (tuple(team), purpose, step)) for step in steps]
        taken = [board.awaited((tuple(team), purpose, step)) for step in steps]
        self._steps = list(zip(steps, given, taken, strict=True))
        self._vote = b""  # this rank's, while one is open

    def _rank(self, away: int) -> int:
        return int(self._team[(self._place + away) % self._size])

    def _give(self, step: int, given: socket.socket, data: bytes) -> None:
        try:
            given.sendall(data)
        except OSError as error:
            raise ConnectionError(f"rank {self._rank(0)} sends to rank {self._rank(-step)}: {error}") from error

    def _take(self, step: int, taken: socket.socket, size: int | None = None) -> bytes:
        try:
            return _frame(taken) if size is None else _received(taken, size)
        except OSError as error:
            raise ConnectionError(f"rank {self._rank(0)} waits for rank {self._rank(step)}: {error}") from error

    def start(self, value: int) -> None:
        """Give this rank's number of a vote."""
        if self._vote:  # an error kept this rank from asking for the result
            self.finish()
        self._vote = struct.pack("Q", value)
        step, given, _ = self._steps[0]
        self._give(step, given, self._vote)

    def finish(self) -> int:
        """The sum of the ranks' numbers modulo 2^64."""
        held, self._vote = self._vote, b""
        for step, given, taken in self._steps:
            size = 8 * min(step, self._size - step)
            if step > 1:
                self._give(step, given, held[:size])
            held += self._take(step, taken, size)
        return sum(array("Q", held)) % 2**64

    def told(self, value: Any) -> list[Any]:
        """Every rank's object, in the order of the ranks."""
        held = [pickle.dumps(value)]
        for step, given, taken in self._steps:
            held += pickle.loads(self._swapped(step, given, taken, pickle.dumps(held[: self._size - step])))
        return [pickle.loads(held[(place - self._place) % self._size]) for place in range(self._size)]

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """The greatest of the ranks' numbers at each place."""
        held = array("q", numbers)
        for step, given, taken in self._steps:
            other = array("q", self._swapped(step, given, taken, held.tobytes()))
            held = array("q", map(max, held, other))
        return held.tolist()

    def _swapped(self, step: int, given: socket.socket, taken: socket.socket, data: bytes) -> bytes:
        """Send to one and receive from the other, at once where sockets may not take all."""
        if len(data) < _SMALL:
            self._give(step, given, _framed(data))
            return self._take(step, taken)
        sender = threading.Thread(target=self._give, args=(step, given, _framed(data)))
        sender.start()
        came = self._take(step, taken)
        sender.join()
        return came


class Streams:
    """Bytes between this rank and others, which move while it waits for any of them."""

    def __init__(self, board: Switchboard) -> None:
        self._board = board
        self._made: dict[Any, Stream] = {}

    def between(self, ranks: Iterable[int], name: str = "") -> dict[int, Stream]:
        """Streams to these ranks, by rank; those of one name go in one order, and both ends make them."""
        keys = {rank: (name, *sorted((rank, self._board.rank))) for rank in ranks}
        new = {rank: key for rank, key in keys.items() if key not in self._made}
        calls = {rank: self._board.connected(rank, key) for rank, key in new.items() if rank > self._board.rank}
        for rank, key in new.items():  # a lower rank has called by then, or will without waiting for this one
            self._made[key] = Stream(rank, calls.get(rank) or self._board.awaited(key))
        return {rank: self._made[key] for rank, key in keys.items()}

    def move(self, pieces: Sequence[Piece]) -> None:
        """Move what can be moved of all streams, until these pieces have arrived or gone."""
        while True:
            busy = [stream for stream in list(self._made.values()) if stream.push() | stream.pull()]
            if all(piece.is_done for piece in pieces):
                return
            poll = select.poll()
            for stream in busy:
                poll.register(stream, (select.POLLIN if stream.coming else 0) | (select.POLLOUT if stream.going else 0))
            poll.poll(1000 * _WAIT)


class Piece:
    """Memory on its way."""

    def __init__(self, memory: memoryview) -> None:
        self.rest = memory

    @property
    def is_done(self) -> bool:
        return not self.rest


class Stream:
    """A connection, whose pieces go and come in their order."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._rank, self._connection, self._lock = rank, connection, threading.Lock()
        self.fileno = connection.fileno
        self.going: deque[Piece] = deque()
        self.coming: deque[Piece] = deque()

    def send(self, memory: memoryview) -> Piece:
        piece = Piece(memory)
        if memory:
            self.going.append(piece)
            self.push()
        return piece

    def receive(self, memory: memoryview) -> Piece:
        piece = Piece(memory)
        if memory:
            self.coming.append(piece)
        return piece

    def push(self) -> bool:
        """Send what the connection takes; whether there is more."""
        return self._moved(self.going, self._connection.send)

    def pull(self) -> bool:
        """Receive what has come; whether more is to come."""
        return self._moved(self.coming, self._connection.recv_into)

    def _moved(self, pieces: deque[Piece], call: Callable[[memoryview], int]) -> bool:
        with self._lock:
            try:
                while pieces:
                    done = call(pieces[0].rest)
                    if not done:
                        raise ConnectionError("it has gone")
                    pieces[0].rest = pieces[0].rest[done:]
                    if pieces[0].is_done:
                        pieces.popleft()
            except BlockingIOError:
                pass
            except OSError as error:
                raise ConnectionError(f"messages of rank {self._rank}: {error}") from error
        return bool(pieces)
