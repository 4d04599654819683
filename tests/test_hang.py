"""Why a job hangs: what its ranks tell of themselves, and the sentence that names who keeps the others waiting."""

from __future__ import annotations

import atexit
import os
import re
from multiprocessing import AuthenticationError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import mpirun, torchrun

from distdl_lite.__main__ import main
from distdl_lite.transport import sidechannel
from distdl_lite.transport.abort import abort_on_exception
from distdl_lite.transport.frames import here
from distdl_lite.transport.hang import Told, sentence, table, team_text

ALL = (0, 1, 2, 3)


def waits(rank: int, call: str = "net.a", **more: object) -> Told:
    team = more.get("team", ALL)
    return Told(
        rank, True, call, "t.py:1", **{"team": ALL, "meeting": team and team_text(team), "seconds": 5.0, **more}
    )  # type: ignore


def test_who_is_named() -> None:
    late = Told(1, place="t.py:9")
    assert sentence([late]) == "no rank waits for another"
    assert sentence([waits(0), late, waits(2)]) == (
        "ranks 0, 2 wait in net.a (t.py:1) for rank 1; "
        "rank 1 is at t.py:9: it has not called net.a, which the others called 5 s ago"
    )
    # One that has come to the call and gone on is not to blame.
    gone_on = Told(3, place="t.py:9", counts={"ranks 0 to 3": 7})
    said = sentence([waits(0, counts={"ranks 0 to 3": 7}), late, gone_on])
    assert "for rank 1;" in said
    # Nor is one that waits for another in turn: the last of the chain is.
    chain = [waits(0, team=(0, 1)), waits(1, "net.b", team=(1, 2)), Told(2, silent="is stopped")]
    assert sentence(chain) == (
        "rank 1 waits in net.b (t.py:1) for rank 2; rank 2 is stopped; rank 0 waits in net.a (t.py:1) for rank 1"
    )
    circle = [waits(0, team=(0, 1), counts={"ranks 0, 1": 2}), waits(1, team=(1, 2), counts={"ranks 1, 2": 2})]
    circle.append(waits(2, team=(0, 2), counts={"ranks 0, 2": 2}, seconds=6.0))
    assert [part.split()[1] for part in sentence(circle).split("; ")] == ["2", "0", "1"]
    # Messages: most wait in one layer, one in another.
    swapped = [
        waits(r, "net.b" if r == 1 else "net.a", team=(), awaited={(r + 1) % 3: 8, (r + 2) % 3: 8}) for r in range(3)
    ]
    assert sentence(swapped).startswith(
        "ranks 0, 2 wait in net.a (t.py:1) for messages of rank 1; rank 1 waits in net.b"
    )
    assert "none of them has left a call out, in net.a" in sentence([waits(0), waits(1)])
    # Two calls of one team, each the third, of which some make one and some the other.
    three = {"ranks 0 to 3": 3}
    differ = [waits(r, "net" if r == 2 else "save", counts=three) for r in range(4)]
    assert sentence(differ).startswith(
        "ranks 0, 1, 3 wait in save (t.py:1) for rank 2; rank 2 waits in net (t.py:1) for ranks"
    )
    # Messages: rank 0 has sent its own and gone on; rank 2 has not, and waits in another layer.
    halos = {"team": (), "meeting": "messages of a", "awaited": {0: 8, 2: 8}, "counts": {"messages of a": 4}}
    others = {
        "team": (),
        "meeting": "messages of b",
        "awaited": {1: 8},
        "counts": {"messages of a": 3, "messages of b": 1},
    }
    gone_on = Told(0, place="t.py:9", counts={"messages of a": 4})
    said = sentence([gone_on, waits(1, **halos), waits(2, "net.b", **others)])
    assert said.startswith(
        "rank 1 waits in net.a (t.py:1) for messages of rank 2; rank 2 waits in net.b (t.py:1) for"
    ), said
    many = [waits(0, team=tuple(range(9))), *(Told(r, place="t.py:9") for r in range(1, 9))]
    assert sentence(many).endswith("; and 4 more")
    assert table(circle)[1][5] == "ranks 0, 1"
    assert table(swapped)[1][5] == "8 bytes of rank 1, 8 bytes of rank 2"
    assert team_text((3, 4, 5)) == "ranks 3 to 5"


class Odd:
    """An object that does not say what it is."""

    @property
    def __class__(self) -> type:
        raise ArithmeticError

    def told(self, world: Any) -> Told:
        return here(world)


def test_what_a_process_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(rank=1, size=2, local={"teams": {}})
    assert Odd().told(world).place.startswith(("tests/test_hang.py:", __file__))
    desk = sidechannel.Desk()
    try:
        address = desk.address(world)
        assert address.ask("tell")[0].rank == 1
        assert [address.ask("turn"), address.ask("turn")] == [True, False]
        monkeypatch.setattr(sidechannel, "_TURN", 0.0)
        assert desk._turn(7, None)
        assert desk._turn(7, None)
        assert abs(address.clock_ahead()) < 0.01
        with pytest.raises(AuthenticationError):
            address._replace(key=b"of a stranger").ask("tell")
        child = os.fork()
        if child == 0:  # which goes the way of any child that ends as a program
            desk._close()
            os._exit(0)
        os.waitpid(child, 0)
        address.ask("remember", (0, "has ended"))
        monkeypatch.setattr(sidechannel, "here", lambda world: 1 / 0)
        told, ended = address.ask("tell")
        assert told.silent == "cannot say where it is: ZeroDivisionError: division by zero"
        assert ended == [(0, "has ended")]
    finally:
        atexit.unregister(desk._close)
        desk._close()
    world.local["addresses"] = [
        address,
        address._replace(pid=2**30),
        address._replace(host="elsewhere", network="127.0.0.1"),
    ]
    world.size = 3
    silent = [one.silent for one in sidechannel.told_by_all(world) or ()]
    assert silent == ["has ended its program", "has ended", "on elsewhere does not answer"]


# A thread of rank 0 asks while rank 1 is late; then the job goes on, up to a deadlock and its end.
PROGRAM = """
import os, signal, sys, threading, time
import torch
import distdl_lite as dl, distdl_lite.nn as dnn
from distdl_lite.transport import reports, sidechannel

sidechannel._TURN = 0.1
world = dl.Partition.world()
rank = world.rank
transport = world.world_transport

class Net(dnn.Module):
    def __init__(self, P):
        super().__init__(P)
        self.down = torch.nn.ModuleList(dnn.DistributedConv2d(P, 1, 1, 3, padding=1) for _ in range(2))
    def forward(self, x, swapped=False):
        one, two = self.down
        return two(one(x)) if not swapped else one(two(x))

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, number):
        late()
        return torch.ones(1, 8, 8)

def late():
    if rank == 1:
        time.sleep(1.5)  # late

def barrier():
    torch.distributed.barrier() if "TORCHELASTIC_RUN_ID" in os.environ else __import__("mpi4py.MPI").MPI.COMM_WORLD.Barrier()

def ask(name):
    time.sleep(0.7)
    if name == "signal":
        return os.kill(os.getpid(), signal.SIGUSR1)
    print(f"<{name}> {reports.report(transport).splitlines()[0]}", flush=True)
    if name == "stopped":
        os.kill(transport.local["addresses"][1].pid, signal.SIGCONT)

def case(name, *calls):
    barrier()
    asking = threading.Thread(target=ask, args=(name,), name="distdl_lite test")
    if rank == 0:
        asking.start()
    try:
        for call in calls:
            call()
    except ValueError as error:
        if rank == 0:
            print(f"<{name} error> {error}", flush=True)
    if rank == 0:
        asking.join()

P = world.grid((1, 1, 1, 4))
net, conv, whole = Net(P), dnn.DistributedConv2d(P, 1, 1, 3, padding=1), torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1))
free = dl.distribute(whole, P)
x = torch.ones(1, 1, 8, 8)
net(x), conv(x), free(x)

if sys.argv[1] == "teams":
    case("slept", late, lambda: net(x))
    case("signal", late, lambda: net(x))
    case("free", lambda: free(x), late, lambda: free(x))
    loss = net(x).sum()
    case("backward", late, lambda: loss.backward())
    case("loading", lambda: net(next(iter(torch.utils.data.DataLoader(Samples())))))
    case("stopped", lambda: rank == 1 and os.kill(os.getpid(), signal.SIGSTOP), lambda: net(x))
    case("left out", lambda: rank == 1 or conv(x), late, lambda: net(x))
    case("swapped", lambda: net(x, swapped=rank == 1))

teams = [world.create_partition_inclusive(ranks) for ranks in ([0, 1], [1, 2], [0, 2])]
mine = [dnn.AllSumReduce(team.grid((2,)), [0]) for team in teams if team.active]
for pair in mine:
    pair(x)
dl.abort_on_timeout(1)
if sys.argv[1] == "user":
    barrier() if rank == 1 else net(x)
if sys.argv[1] == "raised":
    if rank == 1:
        raise ArithmeticError("only here")
    net(x)
for pair in mine if rank == 0 else mine[::-1]:
    pair(x)
time.sleep(99)
"""

LAUNCHERS = {"mpirun": mpirun, "torchrun": torchrun}
LATE = r"rank 1 is at train.py:\d+, `time.sleep\(1.5\)  # late`: it has not called"
SAID = {
    "slept": rf"ranks 0, 2, 3 wait in net \(train.py:\d+\) for rank 1; {LATE} net,",
    "free": rf"ranks 0, 2, 3 wait in free \(train.py:\d+\) for rank 1; {LATE} free,",
    "backward": r"ranks 0, 2 wait in backward of DistributedConv2d \(train.py:\d+\) for messages of rank 1; "
    f"{LATE} backward of DistributedConv2d,",
    "loading": rf"ranks 0, 2, 3 wait in net \(train.py:\d+\) for rank 1; {LATE} net,",
    "stopped": r"ranks 0, 2, 3 wait in net \(train.py:\d+\) for rank 1; rank 1 is stopped",
    "left out": rf"ranks 0, 2, 3 wait in conv \(train.py:\d+\) for rank 1; {LATE} conv,",
    "left out error": "DistributedConv2d: the ranks disagree: rank 1: call of layer Net number 1, others",
    "swapped error": "DistributedConv2d: the ranks disagree: rank 1: call of layer DistributedConv2d number 3, others",
}
LAST = {
    "teams": r"(rank \d waits in pair \(train.py:\d+\) for rank \d(; )?){3}",
    "user": r"ranks 0, 2, 3 wait in net \(train.py:\d+\) for rank 1; rank 1 is at train.py:\d+, `torch.distributed.barrier",
    "raised": r"ranks 0, 2, 3 wait in net \(train.py:\d+\) for rank 1; rank 1 has ended by ArithmeticError: only here \(train",
}


@pytest.mark.jobs
@pytest.mark.parametrize("case", LAST)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_reports_of_jobs(launcher: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text(PROGRAM.lstrip())
    done = LAUNCHERS[launcher](4, "train.py", case, cwd=tmp_path, DISTDL_LITE_REPORTS=str(tmp_path))
    said = done.stdout + done.stderr
    assert done.returncode != 0
    for name, text in SAID.items() if case == "teams" else ():
        assert re.search(f"<{name}> {text}", said), (name, said)
    if case == "teams":
        assert len(re.findall(SAID["slept"], done.stderr)) == 1, said  # on the signal
    if (launcher, case) != ("torchrun", "raised"):  # where the others' sockets close
        assert re.search(LAST[case], done.stderr), said
        folder = re.findall("distdl_lite report ([^ ]*) prints", done.stderr)[-1]
        assert main(["report", folder, "--stacks"]) == 0
        abort_on_exception(False)  # which the command line turns on
        again = capsys.readouterr().out
        assert again.splitlines()[0] in done.stderr
        assert "rank 3:\n  File" in again
