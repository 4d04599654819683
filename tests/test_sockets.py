"""What processes tell each other over sockets, with threads in their places."""

from __future__ import annotations

import gc
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distdl_lite.transport import sockets
from distdl_lite.transport.sockets import Line, Streams, Switchboard
from distdl_lite.transport.team import Team

# The library's sockets live as long as its process.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    yield
    gc.collect()


class Store:
    """Of torch.distributed's stores what is needed."""

    def __init__(self) -> None:
        self._known: dict[str, bytes] = {}
        self._change = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._change:
            self._known[key] = value
            self._change.notify_all()

    def get(self, key: str) -> bytes:
        with self._change:
            assert self._change.wait_for(lambda: key in self._known, timeout=30)
            return self._known[key]


def on_boards(size: int, body: Callable[[Switchboard], Any]) -> list[Any]:
    """The results of as many ranks, each a thread that runs freely."""
    store, results, errors = Store(), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = body(Switchboard(store, rank))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if errors:
        raise errors[0]
    return results


def team(*ranks: int) -> Team:
    return Team(None, ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
def test_all_of_any_number_are_told(size: int) -> None:
    def body(board: Switchboard) -> None:
        rank, line = board.rank, Line(board, team(*range(size)), "data")
        for most in (1, 200_000):  # bytes: in one piece, and more than sockets hold
            told = line.told(("from", rank, b"x" * most * (rank % 3)))
            assert told == [("from", r, b"x" * most * (r % 3)) for r in range(size)]
            assert line.maxima([rank, -rank, -(2**62)] * (most // 50 + 1))[-3:] == [size - 1, 0, -(2**62)]
        if size > 1:
            for value in (1, 2**63 + rank, 2**64 - 1):
                line.start(value)
                everybodys = [2**63 + r for r in range(size)] if value == 2**63 + rank else [value] * size
                assert line.finish() == sum(everybodys) % 2**64

    on_boards(size, body)


def test_votes_of_several_teams_are_open_at_once() -> None:
    """Two of them send from rank 2 to rank 0."""

    def body(board: Switchboard) -> list[int]:
        lines = [Line(board, team(0, 1, 2, 3), "votes")]
        if board.rank in (0, 2):
            lines.append(Line(board, team(0, 2), "votes"))
        for place, line in enumerate(lines):
            line.start(10**place * (1 + board.rank))
        return [line.finish() for line in lines]

    assert on_boards(4, body) == [[10, 40], [10], [10, 40], [10]]


def test_a_vote_that_an_error_left_open() -> None:
    def body(board: Switchboard) -> int:
        line = Line(board, team(0, 1), "votes")
        line.start(5)
        line.start(7)
        return line.finish()

    assert on_boards(2, body) == [14, 14]


def test_who_has_gone_is_named() -> None:
    def body(board: Switchboard) -> str:
        line = Line(board, team(0, 1, 2), "data")
        if board.rank == 1:
            for _, given, taken in line._steps:
                given.shutdown(socket.SHUT_RDWR)
                taken.shutdown(socket.SHUT_RDWR)
            return ""
        with pytest.raises(ConnectionError) as raised:
            line.told("x")
        return str(raised.value)

    texts = on_boards(3, body)
    assert texts[0].startswith("rank 0 waits for rank 1: ")
    assert re.match("rank 2 (sends to|waits for) rank [01]: ", texts[2])


@pytest.mark.parametrize("said", [b"", b"few", bytes(64)])
def test_a_stranger_is_turned_away(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that looks for open ports: it leaves, says something else, or nothing."""
    monkeypatch.setattr(sockets, "_PATIENCE", 0.1)
    store = Store()
    here, there = Switchboard(store, 0), Switchboard(store, 1)
    strangers = [socket.create_connection(here._listener.getsockname()) for _ in range(2)]
    for stranger in strangers:
        stranger.sendall(said)
    strangers[0].close()
    made = there.connected(0, "call")
    assert here.awaited("call").getpeername() == made.getsockname()
    strangers[1].close()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_messages_of_any_length_both_ways(size: int) -> None:
    """Several under way, of which the later are waited for first; empty ones; more than sockets hold."""

    def body(board: Switchboard) -> None:
        streams, rank = Streams(board), board.rank
        others = [other for other in range(size) if other != rank]
        to = streams.between(others)
        assert streams.between(others) == to
        aside = streams.between(others, "aside")
        came: dict[tuple[int, int], bytearray] = {}
        moving = []
        for turn, length in enumerate((3, 0, 5_000_000, 1)):
            for other in others:
                way = aside if turn == 3 else to
                came[turn, other] = bytearray(length)
                moving.append(way[other].receive(memoryview(came[turn, other])))
                moving.append(way[other].send(memoryview(bytes([10 * turn + rank]) * length)))
        for pieces in (moving[-2:], moving[:2], moving):
            streams.move(pieces)
        for (turn, other), data in came.items():
            assert data == bytes([10 * turn + other]) * len(data)

    on_boards(size, body)


def test_who_sends_no_more_is_named() -> None:
    def body(board: Switchboard) -> None:
        streams = Streams(board)
        stream = streams.between([1 - board.rank])[1 - board.rank]
        if board.rank == 1:
            stream._connection.close()
            return
        with pytest.raises(ConnectionError, match="messages of rank 1: "):
            streams.move([stream.receive(memoryview(bytearray(5)))])

    on_boards(2, body)


@pytest.mark.parametrize(
    ("master", "wanted"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("no such host", "127.0.0.1")]
)
def test_the_address_by_which_others_reach_this_host(master: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_ELSEWHERE", "no other host")
    for name, value in (("MASTER_ADDR", master), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    board = Switchboard(Store(), 0)
    assert board._listener.getsockname()[0] == wanted


def test_other_hosts_are_not_told_an_address_that_leads_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_ELSEWHERE", "127.0.0.1")
    for name, value in (("MASTER_ADDR", "127.0.1.1"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert sockets.own_address() == "127.0.0.1"  # as that of the default route
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sockets.own_address() == "127.0.0.1"
