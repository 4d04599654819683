"""The command line, and the end of a job in which one rank raises."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from jobs import mpirun, run

from distdl_lite.__main__ import PRIMITIVES, main
from distdl_lite.transport import abort
from distdl_lite.transport.abort import abort_on_exception

CASES = {
    "Broadcast": ["--grid", "1x2", "--to", "2x2", "--shape", "3x5"],
    "SumReduce": ["--grid", "2x2", "--to", "1x2", "--shape", "3x5"],
    "Repartition": ["--grid", "2x2", "--to", "1x4", "--shape", "7x5"],
    "AllSumReduce": ["--grid", "2x2", "--axes", "0", "--shape", "7x5x3"],
    "AllGather": ["--grid", "2x2", "--axes", "1", "--shape", "7x5"],
    "ReduceScatter": ["--grid", "2x2", "--axes", "0", "--shape", "7x5"],
    "HaloExchange": ["--grid", "2x2", "--halo", "1,0:2", "--shape", "7x5", "--boundary", "circular"],
}
PATTERNS = {
    "Broadcast": ("Bcast", "Reduce"),
    "SumReduce": ("Reduce", "Bcast"),
    "AllSumReduce": ("Allreduce", "Allreduce"),
    "AllGather": ("Allgather", "Reduce_scatter"),
    "ReduceScatter": ("Reduce_scatter", "Allgather"),
}


@pytest.fixture(autouse=True)
def _hooks() -> object:
    """`main` turns the abort on; take it back."""
    yield
    abort_on_exception(False)


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["explain", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PRIMITIVES)
def test_explain_names_pattern_and_every_rank(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(capsys, name, *CASES[name])
    forward, adjoint = PATTERNS.get(name, ("packed messages", "packed messages"))
    assert f"runs as {forward}, its adjoint as {adjoint}\n" in text
    assert all(f"rank {rank} " in text for rank in range(4))
    assert "all ranks together: " in text


def test_explain_a_repartition_box_by_box(capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(capsys, "Repartition", "--grid", "2x1", "--to", "1x2", "--shape", "7x5", "--dtype", "float64")
    assert "rank 0  at 0,0  holds [0:4, 0:5]" in text
    assert "rank 0  sends to       rank 1  64 bytes  [0:4, 3:5]" in text
    assert "all ranks together: 2 messages, 136 bytes for others" in text


def test_explain_one_rank_of_many(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["HaloExchange", "--grid", "64x64", "--halo", "1,1", "--shape", "640x640"]
    assert "rank 0 of 4096: 3 messages" in explained(capsys, *words)
    text = explained(capsys, *words, "--rank", "70")
    assert "rank 70 of 4096: 8 messages, 176 bytes for others" in text
    assert "rank 0 " not in text


def test_names_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--grid", "2", "--to", "2", "--shape", "3"]
    assert explained(capsys, "rePartition", *words) == explained(capsys, "Repartition", *words)


def test_explain_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explained(capsys, "Repartition", *CASES["Repartition"], "--svg", str(tmp_path / "blocks.svg"))
    picture = (tmp_path / "blocks.svg").read_text()
    assert [picture.count(f'id="{kind}-') for kind in ("input", "output", "message")] == [4, 4, 8]
    explained(capsys, "Repartition", *CASES["Repartition"], "--rank", "1", "--svg", str(tmp_path / "blocks.png"))
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["Broadcast", "--grid", "2", "--shape", "3"], "Broadcast needs --to"),
        (["HaloExchange", "--grid", "2", "--shape", "3"], "HaloExchange needs --halo"),
        (["AllGather", "--grid", "2", "--to", "2", "--shape", "3"], "AllGather has one grid"),
        (["Broadcast", "--grid", "2", "--to", "3", "--shape", "3"], "cannot match a partition of shape (2,) to (3,)"),
        (["Repartition", "--grid", "2", "--to", "2", "--shape", "3x4"], "a tensor of shape (3, 4) cannot be cut"),
        (
            ["Repartition", "--grid", "2", "--to", "2", "--shape", "3", "--rank", "2"],
            "--rank 2 is not among the 2 ranks",
        ),
        (["Repartition", "--grid", "2x", "--to", "2", "--shape", "3"], "argument --grid: invalid"),
        (["Repartition", "--grid", "0", "--to", "2", "--shape", "3"], "argument --grid: invalid"),
        (["Repartition", "--grid", "2", "--to", "2", "--shape", "3", "--dtype", "nn"], "argument --dtype: invalid"),
        (["AllSumReduce", "--grid", "2", "--shape", "3", "--dtype", "bool"], "AllSumReduce: bool tensors can be moved"),
        (["AllSumReduce", "--grid", "2", "--shape", "3", "--svg", "/no/such/folder.svg"], "No such file or directory"),
        (["AllSumReduce", "--grid", "2", "--shape", "3", "--svg", "blocks.word"], "Format 'word' is not supported"),
        (["AllSumReduce", "--grid", "2048", "--shape", "3", "--svg", "a.svg"], "room for 2048 messages"),
        (["HaloExchange", "--grid", "2", "--shape", "3", "--halo", "1:2:3"], "argument --halo: invalid halo, such as"),
        (
            ["AllSumReduce", "--grid", "8192x8192", "--shape", "3"],
            "grids of at most 16777216 ranks can be explained, not",
        ),
        (["Scatter", "--grid", "2", "--shape", "3"], "argument PRIMITIVE: invalid choice: 'Scatter'"),
    ],
)
def test_wrong_use_is_a_usage_error(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["explain", *words])
    assert left.value.code == 2
    assert text in capsys.readouterr().err


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AvgPool2d(3, 1, 1), torch.nn.ReLU())


A_MODEL = model()


def not_a_model() -> int:
    return 3


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file can be imported by its name."""
    monkeypatch.setitem(sys.modules, "these_tests", sys.modules[__name__])


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", "these_tests:model", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("_here")
def test_plan_reports_a_model_over_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--grid", "1x1x2x2", "--shape", "1x3x36x26"]
    text = planned(capsys, *words)
    assert "avg_pool2d" in text
    assert "(1, 3, 36/2, 26/2)" in text
    assert "grid 1x1x2x2, 4 ranks" in text
    assert "DOES NOT FIT" not in text
    assert "DOES NOT FIT 10 bytes" in planned(capsys, *words, "--memory", "10")
    assert planned(capsys, *words, "--markdown").startswith("| module | operations |")
    told = json.loads(planned(capsys, *words, "--json", "--eval"))
    assert told["grid"] == [1, 1, 2, 2]
    assert told["backward"]["messages"] == 0
    path = tmp_path / "machine.json"
    path.write_text('[{"what": "latency", "ours": 2e6, "unit": "us"}, {"what": "rate", "ours": 3, "unit": "G/s"}]')
    slow = json.loads(planned(capsys, *words, "--json", "--machine", str(path)))
    assert slow["seconds"] > 2 > told["seconds"]
    assert slow["machine"]["rate"] == 3e9
    wide = json.loads(planned(capsys, "--grid", "1x1x2x2", "--shape", "1x3x36x26:float64", "--json", "--eval"))
    assert wide["forward"]["bytes"] == 2 * told["forward"]["bytes"] > 0


@pytest.mark.usefixtures("_here")
def test_plan_suggests_grids(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ranks", "4", "--shape", "1x3x36x26"]
    assert planned(capsys, *words).splitlines()[0].startswith("1x1x4x1  ")
    assert planned(capsys, *words, "--markdown").startswith("| grid | reason |")
    assert json.loads(planned(capsys, *words, "--json"))[0]["grid"] == [1, 1, 4, 1]
    assert "does not fit" in planned(capsys, *words, "--memory", "10")


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["these_tests:model", "--shape", "3"], "plan needs either --grid, for a report, or --ranks"),
        (["these_tests:model", "--shape", "3", "--grid", "1", "--ranks", "1"], "plan needs either --grid"),
        (
            ["these_tests:model", "--grid", "1", "--shape", "3", "--machine", "/no/such/file"],
            "No such file or directory",
        ),
        (["these_tests:model", "--grid", "1x1x2x2"], "plan needs --shape, once for each argument"),
        (["these_tests", "--grid", "1", "--shape", "3"], "'these_tests' does not say package.module:factory"),
        (["no_such_module:model", "--grid", "1", "--shape", "3"], "No module named 'no_such_module'"),
        (["these_tests:none", "--grid", "1", "--shape", "3"], "these_tests has no function none"),
        (["these_tests:CASES", "--grid", "1", "--shape", "3"], "these_tests:CASES cannot be called"),
        (["these_tests:not_a_model", "--grid", "1", "--shape", "3"], "returned a int, not a torch.nn.Module"),
        (["these_tests:model", "--grid", "1x1x2x2", "--shape", "4:nn"], "argument --shape: invalid shape, such as"),
        (["these_tests:A_MODEL", "--grid", "1x1x2x2", "--shape", "36x26"], "cannot be captured"),
        (["these_tests:model", "--ranks", "7", "--shape", "1x3x2x2"], "7 ranks have no grid for a tensor of shape"),
    ],
)
def test_wrong_plans_are_usage_errors(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", *words])
    assert left.value.code == 2
    assert text in capsys.readouterr().err


def test_explain_imports_no_mpi4py() -> None:
    words = ["explain", "AllSumReduce", "--grid", "4", "--shape", "3"]
    code = f"import sys; from distdl_lite.__main__ import main; main({words}); sys.exit('mpi4py' in sys.modules)"
    assert run(sys.executable, "-c", code).returncode == 0


def test_info_without_an_mpi_library_says_so() -> None:
    done = run(sys.executable, "-m", "distdl_lite", "info", MPI4PY_LIBMPI="/no/such/libmpi.so")
    assert done.returncode == 0
    assert (
        "ranks:          none: there are no ranks: torchrun has not started this process, and MPI cannot be"
        in done.stdout
    )


# ---- under mpirun ----------------------------------------------------------------------------------------------------


@pytest.mark.jobs
def test_info_and_bench_print_once_and_bench_refuses_a_number_of_ranks_that_does_not_fit() -> None:
    calls = "main(['info']); main(['bench', 'machine', '--seconds', '0']); main(['bench', 'primitives'])"
    done = mpirun(3, "-c", f"from distdl_lite.__main__ import main; {calls}")
    numbers = re.findall(
        r"^(latency|bandwidth|rate|memory_bandwidth) +[a-z -]*([0-9.e+]+) (?:us|GB/s|G/s)", done.stdout, re.M
    )
    assert [name for name, _ in numbers] == ["latency", "bandwidth", "rate", "memory_bandwidth"]
    assert all(float(value) > 0 for _, value in numbers)
    assert done.stdout.count("MPI library:") == 1
    assert "ranks:          3\n" in done.stdout
    assert done.returncode != 0
    assert "bench primitives runs on 2, 4, 8, 16 ranks, not on 3" in done.stderr


_ENDS = """
import os, runpy, signal, threading
from mpi4py import MPI
world = MPI.COMM_WORLD
def gloo():
    import torch.distributed as dist
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = world.bcast(store and store.port)
    store = store or dist.TCPStore("localhost", port)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
def fail():
    raise RuntimeError("only this rank")
{}
world.Barrier()
if world.rank == 1:
    {}
world.Barrier()
"""
_HOOK = f"runpy.run_path({abort.__file__!r})['abort_on_exception']()"  # torch is not read
_LIBRARY = "import distdl_lite as dl; dl.abort_on_exception(); "


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("before", "end"),
    [
        (_HOOK, "os.kill(os.getpid(), signal.SIGKILL)"),
        (_HOOK, "fail()"),
        (_HOOK, "threading.Thread(target=fail).start()"),
        (_LIBRARY + "gloo()", "fail()"),
        (_LIBRARY + "gloo(); dl.abort_on_exception()", "fail()"),
        (_LIBRARY + "dl.MPIProcessGroup.init()", "fail()"),
    ],
)
def test_a_rank_that_ends_alone_ends_the_job(before: str, end: str) -> None:
    """In the middle: the other waits for it. torch's `init_process_group` puts its own hook before ours."""
    done = mpirun(2, "-c", _ENDS.format(before, end))
    assert done.returncode != 0
    assert ("RuntimeError: only this rank" in done.stderr) == ("fail" in end)
    assert "RecursionError" not in done.stderr


def test_abort_is_taken_back() -> None:
    before = sys.excepthook, threading.excepthook
    abort_on_exception()
    now = sys.excepthook, threading.excepthook
    abort_on_exception()
    assert (sys.excepthook, threading.excepthook) == now != before
    abort_on_exception(False)
    assert (sys.excepthook, threading.excepthook) == before
    abort_on_exception(False)
    assert (sys.excepthook, threading.excepthook) == before


def test_abort_before_and_after_hooks_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hook is called once, and nothing is left of ours when it is taken back."""
    called: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: called.append("first"))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr("distdl_lite.transport.abort.abort", lambda: called.append("abort"))
    abort_on_exception()
    ours = sys.excepthook
    sys.excepthook = lambda *what: (called.append("other"), ours(*what))
    abort_on_exception()
    error = ValueError("text")
    sys.excepthook(ValueError, error, None)
    assert called == ["other", "first", "abort", "abort"]
    abort_on_exception(False)
    called.clear()
    sys.excepthook(ValueError, error, None)
    assert called == ["other", "first"]
    abort_on_exception()
    sys.excepthook(ValueError, error, None)
    assert called[-1] == "abort"
    called.clear()
    sys.excepthook(SystemExit, SystemExit(), None)
    assert called == ["other", "first"]
    abort_on_exception(False)
