"""Jobs of their own under mpirun: against torch's DDP, ranks that fail or fall silent, long runs, weak thread support."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from jobs import mpirun

pytestmark = pytest.mark.jobs

START = """
import os, signal, sys, threading, time
import torch
import distdl_lite as dl
from mpi4py import MPI
torch.set_num_threads(1)
world, here = MPI.COMM_WORLD, sys.argv[1]

def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b, dtype=dtype) for a, b in ((3, 40), (40, 30), (30, 2))]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])

def loss(model, seed=0):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * seed + world.rank))
    return model(x.to(next(model.parameters()).dtype)).square().mean()

def now():
    with open(os.path.join(here, "time"), "w") as file:
        file.write(str(time.time()))
"""


def start(
    folder: Path, text: str, ranks: int = 2, options: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script on several ranks."""
    script = folder / "job.py"
    script.write_text(START + text)
    return mpirun(ranks, *options, str(script), str(folder), **variables)


LOADED = 20  # seconds that a busy machine may take to end what ends in one


def seconds_since(folder: Path, ended: float) -> float:
    return ended - float((folder / "time").read_text())


SILENT = """
def wait(call):
    began = time.monotonic()
    try:
        call()
    except TimeoutError as error:
        assert 0.5 <= time.monotonic() - began < LOADED
        print(error, flush=True)

for engine in ("inline", "thread", "poll"):  # rank 1 leaves a backward out
    dp = dl.DataParallel(net(), engine=engine, timeout=0.5)
    loss(dp).backward()
    world.Barrier()
    if world.rank == 0:
        wait(lambda: loss(dp).backward())
        try:
            dp(torch.ones(1, 3))
        except RuntimeError as error:
            print(error, flush=True)
    world.Barrier()

for engine in ("poll", "thread"):  # rank 1 comes as far as the buckets that were planned
    model = net()
    model[4].bias.requires_grad_(False)
    dp = dl.DataParallel(model, engine=engine, timeout=0.5)
    loss(dp).backward()
    world.Barrier()
    model[4].bias.requires_grad_()
    if world.rank == 1:
        dp._sync._unplanned = lambda: [world.Barrier()][1:]
    wait(lambda: loss(dp).backward())
    if world.rank == 0:
        world.Barrier()
now()
"""


@pytest.mark.check("A37")
def test_a_rank_that_others_wait_for(tmp_path: Path) -> None:
    """A program that catches the errors still ends with one, and at once."""
    done = start(tmp_path, f"LOADED = {LOADED}\n{SILENT}")
    ended = time.time()
    late = "was not reduced after 0.5 s: some rank did not take part"
    skipped = [
        f"rank 0: bucket 0 (4.bias, 4.weight, 2.bias, ...) {late}",
        "DataParallel: an earlier sum was not completed by all ranks; end the job",
    ]
    stuck = [f"rank 0: a bucket of its own (4.bias) {late}"]
    assert done.stdout.splitlines() == 3 * skipped + 2 * stuck, done.stderr
    assert done.returncode != 0
    assert " ends with an error: a sum was not completed by all ranks" in done.stderr
    assert seconds_since(tmp_path, ended) < LOADED


FAILS = """
dl.abort_on_exception()
with open(os.path.join(here, f"process {{world.rank}}"), "w") as file:
    file.write(str(os.getpid()))
dp = dl.DataParallel(net(), engine=os.environ["ENGINE"])
for step in range(3):
    loss(dp, step).backward()
if world.rank == world.size - 1:
    now()
    {fails}
for step in range(10**6):
    loss(dp, step).backward()
"""


@pytest.mark.check("A38")
@pytest.mark.parametrize(
    ("fails", "ranks", "engine"),  # every two of them meet
    [
        ("raise ArithmeticError('one rank alone')", 2, "thread"),
        ("raise ArithmeticError('one rank alone')", 3, "poll"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, "poll"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, "thread"),
    ],
)
def test_a_rank_that_fails_ends_the_job(tmp_path: Path, fails: str, ranks: int, engine: str) -> None:
    done = start(tmp_path, FAILS.format(fails=fails), ranks, ENGINE=engine)
    assert seconds_since(tmp_path, time.time()) < LOADED
    assert done.returncode != 0
    assert ("one rank alone" in done.stderr) == ("raise" in fails)
    processes = [Path("/proc") / file.read_text() for file in tmp_path.glob("process *")]
    assert len(processes) == ranks
    end = time.monotonic() + LOADED
    while any(process.exists() for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(process.exists() for process in processes)


AGAINST_TORCH = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
port = world.bcast(store and store.port)
store = store or dist.TCPStore("localhost", port)
dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
for engine in ("inline", "thread", "poll"):
    for megabytes in (25, 0.001):
        for dtype in (torch.float32, torch.float64):
            theirs = DistributedDataParallel(net(dtype), bucket_cap_mb=megabytes)
            ours = dl.DataParallel(net(dtype), average="ranks", engine=engine, bucket_mb=megabytes)
            optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (theirs, ours)]
            for step in range(5):
                for model, optimizer in zip((theirs, ours), optimizers):
                    optimizer.zero_grad()
                    loss(model, step).backward()
                for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
                    assert torch.equal(a.grad, b.grad), (engine, megabytes, dtype, step)
                for optimizer in optimizers:
                    optimizer.step()
dist.destroy_process_group()
print("equal")
"""
LONG = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

containers = [dl.DataParallel(net(), engine=engine, bucket_mb=0.001) for engine in ("poll", "thread")]
optimizers = [torch.optim.SGD(dp.parameters(), 1e-3, momentum=0.9) for dp in containers]
dl.abort_on_timeout(60)

def steps(count):
    for step in range(count):
        for dp, optimizer in zip(containers, optimizers):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            if step % 5 == 0:
                with dp.no_sync():
                    loss(dp, step).backward()
            loss(dp, step).backward()
            optimizer.step()

steps(100)
before, threads = resident(), threading.active_count()
steps(200)
grown = (resident() - before) / before
assert grown < 0.004, grown
assert threading.active_count() == threads
assert sum(thread.name == "distdl_lite sums" for thread in threading.enumerate()) == 1
for dp in containers:
    dp.check_replicas()
print("steady")
"""


@pytest.mark.check("A4")
@pytest.mark.check("A45")
def test_means_are_those_of_torch_and_a_long_run_does_not_grow(tmp_path: Path) -> None:
    """It ends well, too, while a limit for waiting is set."""
    done = start(tmp_path, LONG + AGAINST_TORCH, options=("-X", "dev", "-W", "error::ResourceWarning"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steady") == done.stdout.count("equal") == 2
    assert "ResourceWarning" not in done.stderr


WEAK = """
assert MPI.Query_thread() == MPI.THREAD_SERIALIZED
for engine in ("auto", "thread", "poll", "inline"):
    torch.manual_seed(0)
    large = torch.nn.Sequential(torch.nn.Linear(3, 600), torch.nn.Linear(600, 600)).double()
    dp = dl.DataParallel(large, engine=engine, bucket_mb=0.5)
    for step in range(5):
        dp.zero_grad()
        loss(dp, step).backward()
    assert not any(thread.name == "distdl_lite sums" for thread in threading.enumerate()), engine
    dp.check_replicas()
import pytest
root, others = os.environ["PYTHONPATH"], "not come_and_go and not compiled"
folder = os.path.join(root, "tests", "parallel")
options = ["--with-mpi", "--mpi-timeout", "120", "-m", "mpi", "-k", others, "--rootdir", root]
sys.exit(pytest.main(["-q", *options, folder]))
"""


@pytest.mark.check("A41")
def test_without_thread_multiple_nothing_is_left_to_a_thread(tmp_path: Path) -> None:
    """And all tests of containers that run on two ranks pass."""
    done = start(tmp_path, WEAK, MPI4PY_RC_THREAD_LEVEL="serialized")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
