"""The doctor: its checks against transports and devices that err, its verdicts, and children that crash or wait for ever."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import mpirun, run
from ranks import over_mpi

import distdl_lite as dl
from distdl_lite.bench.table import write_json
from distdl_lite.doctor import checks, examine
from distdl_lite.doctor.verdict import DIRECT, Launched, judge, launched, lines_of, machine_rows
from distdl_lite.doctor.watch import Failure, watch
from distdl_lite.testing import spmd

HOST = torch.device("cpu")


class FakeDevices:
    """A device on the host, whose stream does nothing before it is waited for."""

    device = HOST

    def __init__(self) -> None:
        self.late: list[Any] = []
        self.synchronised = 0

    def synchronise(self) -> None:
        self.synchronised += 1
        for call in self.late:
            call()
        self.late.clear()

    def fill_late(self, x: torch.Tensor, value: float) -> None:
        self.late.append(lambda: x.fill_(value))

    side_stream = nullcontext


class Said(list[dict[str, Any]]):
    """What a child says."""

    def begin(self, step: str, risky: bool = False) -> None:
        self.append({"begin": step, "risky": risky})

    def say(self, **what: Any) -> None:
        self.append(what)


def channels(world: Any, start: Any = None, finish: Any = None) -> None:
    """Let a transport's channels do something before they start, or to what they finish with."""
    bind = world.bind

    def bound(*what: Any) -> Any:
        channel = bind(*what)
        begin, end = channel.start, channel.finish
        channel.start = lambda x: (start and start(), begin(x))[1]
        channel.finish = lambda *given: end(*given) if finish is None else finish(end(*given))
        return channel

    world.bind = bound


def test_checks_find_nothing_wrong_with_ranks_that_are_threads() -> None:
    def body(P: Any) -> tuple[Said, dict[str, Any]]:
        said = Said()
        examine.examine(said, P.world_transport, None)
        return said, checks.speeds(P.world_transport, HOST)

    (said, speeds), (other, _), _ = spmd(3, body)
    found = {line["finding"]: line["ranks"] for line in said if "finding" in line}
    assert [line["begin"] for line in other] == list(found) == ["messages", "sums", "speed"]
    assert found["messages"] == found["sums"] == [""] * 3
    assert list(found["speed"][0]) == list(speeds) == ["one host"]
    assert all(seconds > 0 for seconds in speeds["one host"]["seconds"].values())
    assert spmd(1, lambda P: [check(P.world_transport, HOST) for check in (checks.messages, checks.sums)]) == [["", ""]]


def test_wrong_values_and_errors_are_findings(capsys: pytest.CaptureFixture[str]) -> None:
    def body(P: Any) -> Said:
        world, said = P.world_transport, Said()
        channels(world, finish=lambda y: y + 1 - world.rank)
        broadcast = world.broadcast
        world.broadcast = lambda team, x, root: broadcast(team, x, root) or x.add_(1)
        world.gather_objects(P.team, checks.sums(world, HOST))
        examine.examine(said, world, None)
        return said

    first, _ = spmd(2, body)  # each rank goes on to the end, or the other would wait for it
    found = {line["finding"]: line["ranks"] for line in first if "finding" in line}
    assert found["messages"] == ["1 of 1 torch.float32 from rank 1 arrived wrong", ""]
    assert found["sums"] == ["the copy of rank 0's of 1 torch.float32 is wrong: 1.0, not 0"] * 2
    (text,) = lines_of("messages", found["messages"])
    assert text.startswith("messages: ")
    assert text.endswith("arrived wrong")

    def failing(P: Any) -> Said:
        said = Said()
        P.world_transport.agree = None
        examine.examine(said, P.world_transport, None)
        return said

    (said,) = spmd(1, failing)
    assert said[-1] == {"finding": "sums", "ranks": ["TypeError: 'NoneType' object is not callable"]}
    assert "rank 0: sums: TypeError" in capsys.readouterr().err


@pytest.mark.parametrize("waits", [True, False])
def test_a_missing_synchronisation_is_found(waits: bool) -> None:
    def body(P: Any) -> str:
        devices = FakeDevices()
        channels(P.world_transport, start=devices.synchronise if waits else None)
        said = checks.stream_order(P.world_transport, devices)
        assert devices.synchronised == (6 if waits else 4)
        return said

    wrong = "300000 of 300000 numbers were sent before the stream had computed them"
    assert spmd(2, body) == ["" if waits else wrong] * 2


def test_device_steps_are_made_where_there_is_a_device() -> None:
    def body(P: Any) -> Said:
        said, devices = Said(), FakeDevices()
        channels(P.world_transport, start=devices.synchronise)
        examine.examine(said, P.world_transport, devices)
        return said

    said, _ = spmd(2, body)
    steps = ["messages", "sums", "speed"]
    found = {line["finding"]: line["ranks"] for line in said if "finding" in line}
    assert list(found) == [*steps, *(f"device {step}" for step in steps), "stream order"]
    assert not any(text for name, ranks in found.items() if "speed" not in name for text in ranks)


def test_direct_calls_see_a_device_that_is_ready() -> None:
    devices = FakeDevices()
    assert checks.direct(devices, lambda x: x + 2, 1, 3) == ""
    assert devices.synchronised == 6
    assert checks.direct(devices, torch.Tensor.clone, 1, 3) == "of 1 numbers some are 1.0, not 3"


def test_neighbours_and_the_line_through_times() -> None:
    assert checks.neighbours(list("aabbb")) == {"one host": [(0, 1), (2, 3)], "across hosts": [(0, 2), (1, 3)]}
    assert checks.neighbours(["a"]) == {"one host": [], "across hosts": []}
    sizes = [8, 1000, 10**6]
    assert checks.fit(sizes, [1e-5 + n / 2e9 for n in sizes]) == pytest.approx((1e-5, 2e9))
    latency, bandwidth = checks.fit(sizes, [3e-5, 2e-5, 1e-5])
    assert latency > 0
    assert bandwidth > 0


# ---- verdicts --------------------------------------------------------------------------------------------------------


def facts(rank: int = 0, **changes: Any) -> dict[str, Any]:
    """Of a rank with a core and a thread of its own."""
    return {
        "host": "a",
        "cores": [rank],
        "quota": None,
        "host_cores": 8,
        "threads": 1,
        "versions": {"torch": "2"},
        "library": {"transport": "MPI", "MPI library": "MPICH", "thread level": "MULTIPLE"},
        "gpus": 0,
        "mpirun": None,
        "interfaces": ["eth0"],
        "route": "eth0",
        "infiniband": [],
    } | changes


def judged(
    *ranks: dict[str, Any], failure: Failure | None = None, size: int = 0, environ: Any = None, **more: Any
) -> Any:
    launcher = Launched("MPICH's mpirun", 0, size or len(ranks))
    return judge({"facts": list(ranks), **more}, failure, launcher, environ or {})


def test_a_good_job_is_well() -> None:
    made = judged(facts(0), facts(1), messages=["", ""])
    assert str(made) == "all is well\nMPI carries all tensors"
    assert made.to_dict({})["ok"] is True
    assert "one rank alone: start `mpirun" in str(judged(facts()))
    assert "mpirun is not on PATH" in str(judged(facts()))


@pytest.mark.parametrize(
    ("ranks", "wrong", "threads"),
    [
        ([{"cores": [0, 1, 2, 3], "threads": 4}] * 2, "a: 2 ranks with 8 threads share 4 cores, and all are slow", "2"),
        (
            [{"cores": [0, 1, 2, 3], "threads": 1, "quota": 1.5}] * 2,
            "a: 2 ranks with 2 threads share 1 cores, and all are slow: start at most 1",
            "",
        ),
        ([{"cores": [0]}] * 2, "a: 2 ranks are bound to the same cores [0]: mpirun --bind-to core", ""),
        ([{"cores": [0], "threads": 2}, {"cores": [1, 2]}], "a: a rank with 2 threads is bound to cores [0]", "1"),
    ],
)
def test_cores_that_are_too_few(ranks: Any, wrong: str, threads: str) -> None:
    made = judged(*(facts(**rank) for rank in ranks))
    assert made.wrong[0].startswith(wrong)
    assert made.variables == ({"OMP_NUM_THREADS": threads} if threads else {})
    assert not judged(*(facts(**rank) for rank in ranks), environ={"OMP_NUM_THREADS": threads}).variables


def test_hosts_are_judged_one_by_one() -> None:
    wide = {"cores": [0, 1, 2, 3]}
    made = judged(facts(**wide, threads=4), facts(host="b", **wide), facts(host="b", **wide))
    assert not made.wrong
    assert made.notes[-1] == "b: of 4 cores 2 are used"
    assert made.variables == {"OMP_NUM_THREADS": "2"}


def test_ranks_that_do_not_belong_together() -> None:
    assert judged(facts(), size=2).wrong[0].startswith("MPICH's mpirun started 2 ranks, and MPI knows 1: they do not")
    assert judged(facts(0), facts(1, versions={"torch": "3"})).wrong == ["ranks differ in torch: 2, 3"]
    funneled = facts(library=facts()["library"] | {"thread level": "FUNNELED"})
    assert judged(funneled, size=1).notes[-1].endswith("sums not beside the backward: its threads are FUNNELED")


def test_failures_are_wrong_unless_they_are_the_answer() -> None:
    died = Failure("sums", False, "ended by SIGSEGV", "")
    assert judged(facts(0), facts(1), failure=died).wrong == ["sums: ended by SIGSEGV"]
    assert judged(facts(0), facts(1), messages=["", "no"]).wrong == ["messages: no (rank 1; on 1 ranks of 2)"]
    made = judge({"start": ["no transport: ImportError"]}, None, Launched("srun", 0, 2), {})
    assert made.wrong == ["start: no transport: ImportError (rank 0; on 1 ranks of 1)"]
    assert made.notes[-1].startswith("srun started this")


def test_the_way_of_device_tensors() -> None:
    ranks = facts(0, gpus=2), facts(1, gpus=2)
    right = {name: ["", ""] for name in DIRECT}
    assert judged(*ranks, **right).variables == {"DISTDL_LITE_MPI_CUDA": "direct"}
    assert not judged(*ranks, **right, environ={"DISTDL_LITE_MPI_CUDA": "direct"}).variables
    assert judged(*ranks).notes[-1].endswith("through host memory: MPI's library says that it takes none")
    staged = judged(*ranks, **right | {DIRECT[1]: ["", "of 1 numbers"]}, environ={"DISTDL_LITE_MPI_CUDA": "direct"})
    assert staged.variables == {"DISTDL_LITE_MPI_CUDA": "staged"}
    assert not staged.wrong
    died = Failure(DIRECT[0], True, "ended by SIGSEGV", "")
    cray = {"library": ranks[0]["library"] | {"MPI library": "CRAY MPICH 8"}, "gpus": 1}
    made = judged(facts(0, **cray), facts(1, **cray), failure=died)
    assert not made.wrong
    assert made.variables == {"MPICH_GPU_SUPPORT_ENABLED": "1"}
    assert "a: 2 ranks share 1 CUDA devices, which NCCL refuses" in made.notes
    assert "some ranks have no CUDA device" in judged(ranks[0], facts(1)).notes


def network(library: str, transport: str = "MPI", bandwidth: float = 1e8, **changes: Any) -> dict[str, str]:
    ranks = [facts(host=host, **changes) for host in "ab"]
    for one in ranks:
        one["library"] = {"transport": transport, "MPI library": library}
    measured = {"across hosts": {"latency": 1e-5, "bandwidth": bandwidth}}
    return judged(*ranks, speed=[measured] * 2).variables


def test_variables_name_the_network_where_it_is_slow() -> None:
    fast = {"infiniband": ["mlx5_0"]}
    assert network("MPICH") == {"FI_PROVIDER": "tcp", "FI_TCP_IFACE": "eth0"}
    assert network("MPICH", **fast)["FI_PROVIDER"] == "verbs"
    assert network("Open MPI v5")["OMPI_MCA_btl_tcp_if_include"] == "eth0"
    assert network("Open MPI v5", **fast) == {"UCX_NET_DEVICES": "mlx5_0:1"}
    names = network("", "torch.distributed", **fast)
    assert names == {"NCCL_IB_HCA": "mlx5_0", "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert network("MPICH", bandwidth=1e10) == {}


def test_launchers() -> None:
    assert launched({}) == (None, 0, 1)
    assert launched({"RANK": "1", "WORLD_SIZE": "4", "PMI_RANK": "0", "PMI_SIZE": "1"}) == ("torchrun", 1, 4)
    assert launched({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}) == ("Open MPI's mpirun", 2, 3)


def test_the_machine_is_read_back(tmp_path: Path) -> None:
    speeds = {
        kind: {"latency": n * 1e-6, "bandwidth": n * 1e9} for kind, n in (("one host", 2.0), ("across hosts", 3.0))
    }
    path = tmp_path / "machine.json"
    write_json(machine_rows({"messages": [""], "speed": [speeds], "device speed": ["an error"]}), str(path))
    assert dl.Machine.read(path) == dl.Machine(latency=pytest.approx(3e-6), bandwidth=pytest.approx(3e9))
    for text, said in (("{}", "no row for any"), ("[1]", "no rows of measured"), ("", "no rows of measured")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            dl.Machine.read(path)


# ---- children --------------------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from distdl_lite.doctor.watch import Voice
pipe, stack, limit = sys.argv[1:]
voice = Voice(int(pipe), int(stack), float(limit))
voice.say(heard=1)
voice.begin("what it does", risky=True)
print("noise")
{}
"""


@pytest.mark.parametrize(
    ("does", "what", "where"),
    [
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV", "line 9 in <module>"),
        ("time.sleep(60)", "no answer in 1 s", "line 9 in <module>"),
        ("sys.exit(3)", "ended with exit code 3", ""),
        ("", None, None),
    ],
)
def test_ends_of_a_child(
    does: str, what: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_child.py").write_text(CHILD.format(does))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(dl.__file__).parents[1]}")
    heard: list[Any] = []
    failure = watch("a_child", 1.0 if "sleep" in does else 60.0, heard.append)
    assert heard == [{"heard": 1}, {"begin": "what it does", "risky": True}]
    assert capfd.readouterr().out == ""
    if what is None:
        assert failure is None
    else:
        assert (failure.step, failure.risky, failure.what) == ("what it does", True, what)
        assert where in failure.stack


def test_without_an_mpi_library_the_doctor_says_so() -> None:
    done = run(sys.executable, "-m", "distdl_lite", "doctor", MPI4PY_LIBMPI="/no/such/libmpi.so")
    assert done.returncode == 1
    assert "WRONG: start: no transport: " in done.stdout
    assert "pip install mpich" in done.stdout


@over_mpi
@pytest.mark.mpi(min_size=2)
def test_mpi_takes_memory_where_it_lies() -> None:
    """That of the host, in place of a device's."""
    from distdl_lite.transport.mpi.about import posted_sum, ring

    world: Any = dl.Partition.world().world_transport
    before, total = (world.rank - 1) % world.size, sum(range(world.size))
    for call, right in ((ring, before), (posted_sum, total)):
        assert checks.direct(FakeDevices(), partial(call, world.comm), world.rank, right) == ""


@pytest.mark.jobs
def test_a_job_of_two_ranks(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    done = mpirun(2, "-m", "distdl_lite", "doctor", "--json", "--out", str(path), OMP_NUM_THREADS="1")
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 1)
    assert told["findings"]["messages"] == told["findings"]["sums"] == ["", ""]
    assert len(told["findings"]["facts"]) == 2
    measured = told["findings"]["speed"][0]["one host"]
    assert dl.Machine.read(path).latency == pytest.approx(measured["latency"])
