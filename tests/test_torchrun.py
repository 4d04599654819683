"""Jobs under torchrun: which world there is, groups and meshes of the user, and jobs that go wrong."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from jobs import ROOT, run, torchrun

pytestmark = pytest.mark.jobs
NO_MPI = {"MPI4PY_LIBMPI": "/no/such/libmpi.so"}


def job(folder: Path, ranks: int, text: str, **variables: str) -> tuple[int, str, str]:
    (folder / "program.py").write_text(text)
    done = torchrun(ranks, str(folder / "program.py"), **{"OMP_NUM_THREADS": "1", **NO_MPI, **variables})
    return done.returncode, done.stdout, done.stdout + done.stderr


WORLDS = """
import gc, os, threading
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
import distdl_lite as dl
from distdl_lite import nn as dnn

world = dl.Partition.world()
rank = int(os.environ["RANK"])
assert (world.rank, world.size, world.world_transport.name) == (rank, 4, "torch.distributed")
assert dl.Partition(dist.group.WORLD) == world
assert "mpi4py" not in __import__("sys").modules

# The user's groups: in the partition's order, made by the team alone, and shared.
pair = world.create_partition_inclusive([3, 1])
if pair.active:
    assert dist.get_rank(pair.comm) == pair.rank
    assert pair.comm is world.create_partition_inclusive([3, 1]).comm
    x = torch.tensor([rank])
    dist.broadcast(x, group_src=0, group=pair.comm)
    assert x.item() == 3
else:
    assert pair.comm is None
total = torch.tensor([rank])
dist.all_reduce(total, group=world.comm)
assert total.item() == 6

# Partitions over groups and meshes of the user.
halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
half = dl.Partition(halves[rank % 2])
assert half.allgather_data(rank) == [rank % 2, rank % 2 + 2]
assert dl.Partition(halves[rank % 2]) == half
try:
    dl.Partition(halves[1 - rank % 2])
    raise SystemExit("a group without this rank was taken")
except ValueError as error:
    assert "that this rank" in str(error), error
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
P = dl.Partition(mesh).grid(mesh.shape)
assert P.index == tuple(mesh.get_coordinate()), (P.index, mesh.get_coordinate())
line = dl.Partition(mesh["space"])
assert line.allgather_data(rank) == [rank // 2 * 2, rank // 2 * 2 + 1]
for wrong in ("world", 3, object()):
    try:
        dl.Partition(wrong)
        raise SystemExit("no communicator was taken")
    except TypeError as error:
        assert "an mpi4py communicator, a process group or a device mesh is needed" in str(error)
try:
    dl.MPIProcessGroup.init()
    raise SystemExit("MPI was found")
except ValueError as error:
    assert str(error) == "a process group over MPI needs MPI ranks, not torch.distributed"
try:
    world.grid((5,))
except ValueError as error:
    assert "needs 5 ranks, the partition has 4: start it with torchrun --nproc-per-node 5" in str(error)

# The user's traffic under way does not meet ours, which other threads leave alone.
layer, x = dnn.HaloExchange(world.grid((4, 1)), [1, 0]), torch.full((2, 3), float(rank))
sent = [dist.isend(torch.full((4,), 7.0), (rank + 1) % 4), dist.all_reduce(torch.ones(1000), async_op=True)]
y = layer(x)
came = torch.empty(4)
dist.recv(came, (rank - 1) % 4)
for work in sent:
    work.wait()
assert came.tolist() == [7.0] * 4
assert y[:, 0].tolist() == [float(r) for r in (rank - 1, rank, rank, rank + 1) if 0 <= r < 4]

# Enough layers of enough shapes, and teams, for what is not given back to show.
def files():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
before = files()
for number in range(200):
    dnn.AllSumReduce(world.grid((4,)), [0])(torch.ones(number + 1))
assert files() <= before + 40, (before, files())
print("right", flush=True)
"""


def test_worlds_groups_and_meshes(tmp_path: Path) -> None:
    code, out, said = job(tmp_path, 4, WORLDS)
    assert (code, out.count("right")) == (0, 4), said


JOINS = """
import torch.distributed as dist
import distdl_lite as dl
{}
world = dl.Partition.world()
print(f"{{world.world_transport.name}} {{world.size}}", flush=True)
"""


def test_which_world_there_is(tmp_path: Path) -> None:
    """torch's where a process group is; what the variable says; no launcher and no MPI is an error that says both ways."""
    program = tmp_path / "program.py"
    alone = "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)"
    program.write_text(JOINS.format(alone))
    assert run(sys.executable, str(program)).stdout == "torch.distributed 1\n"
    program.write_text(JOINS.format(""))
    done = run(sys.executable, str(program), **NO_MPI)
    assert done.returncode == 1
    for text in (
        "there are no ranks",
        "torchrun --nproc-per-node N program.py",
        "mpirun -n N python program.py",
        "spmd",
    ):
        assert text in done.stderr, done.stderr
    done = run(sys.executable, str(program), DISTDL_LITE_TRANSPORT="gloo")
    assert "DISTDL_LITE_TRANSPORT='gloo' is neither mpi nor torch" in done.stderr
    variables = {"PMI_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert "both MPI's launcher (PMI_SIZE=2) and torchrun" in run(sys.executable, str(program), **variables).stderr
    code, out, said = job(tmp_path, 2, JOINS.format(""), PMI_SIZE="2", DISTDL_LITE_TRANSPORT="torch")
    assert (code, out.count("torch.distributed 2")) == (0, 2), said


BESIDE = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
import distdl_lite as dl
from distdl_lite import nn as dnn

world = dl.Partition.world()
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("groups", "space"))
P = dl.Partition(mesh["space"]).grid((1, 1, 2, 1))

class OfLayers(dnn.Module):
    def __init__(self):
        super().__init__()
        self.a = dnn.DistributedConv2d(P, 1, 4, 3, padding=1, dtype=torch.float64)
        self.b = dnn.DistributedConv2d(P, 4, 1, 3, padding=1, dtype=torch.float64)
    def forward(self, x):
        return self.b(self.a(x).tanh())

class Serial(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Conv2d(i, o, 3, padding=1, dtype=torch.float64) for i, o in ((1, 4), (4, 1)))
    def forward(self, x):
        return self.b(self.a(x).tanh())

def whole(weight):
    grad = weight.grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad

x = torch.randn(4, 1, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
mine = x.chunk(2)[mesh["groups"].get_local_rank()][P.block((2, 1, 11, 5))]
wanted = Serial()
(wanted(x).square().sum() / 2).backward()  # torch takes the mean over the groups
right = [p.grad for p in wanted.parameters()]
for made in (lambda: dl.distribute(Serial(), P), OfLayers):
    for around in ("ddp", "fsdp", "fsdp by layer"):
        torch.manual_seed(0)
        net = made()
        if around == "ddp":
            model = DDP(net, process_group=mesh["groups"].get_group())
        else:
            for layer in (net.a, net.b) if around == "fsdp by layer" and isinstance(net, OfLayers) else ():
                fully_shard(layer, mesh=mesh["groups"])
            model = fully_shard(net, mesh=mesh["groups"])
        for step in range(3):
            model.zero_grad()
            model(mine).square().sum().backward()
            for p, grad in zip(model.parameters(), right, strict=True):
                torch.testing.assert_close(whole(p), grad, msg=lambda text: f"{made} {around} {step}: {text}")
print("right", flush=True)
"""


def test_gradients_inside_ddp_and_fsdp2(tmp_path: Path) -> None:
    code, out, said = job(tmp_path, 4, BESIDE)
    assert (code, out.count("right")) == (0, 4), said


ENDS = """
import os, signal, sys, threading, time
import torch
import distdl_lite as dl
{}
world = dl.Partition.world()
layer = dl.nn.AllSumReduce(world.grid((3,)), [0])
for _ in range({}):
    layer(torch.ones(2))
def fail():
    raise RuntimeError("only this rank")
if world.rank == 1:
    {}
layer(torch.ones(2))
layer(torch.ones(3))
time.sleep(60)
"""
HOOK = "dl.abort_on_exception()"


@pytest.mark.parametrize(
    ("before", "calls", "end", "texts"),
    [
        (HOOK, 1, "os.kill(os.getpid(), signal.SIGKILL)", ["rank      : 1", "Signal 9 (SIGKILL)"]),
        (HOOK, 1, "fail()", ["only this rank", "rank      : 1"]),
        (HOOK, 1, "threading.Thread(target=fail).start(); time.sleep(60)", ["only this rank", "rank      : 1"]),
        *(
            (
                "dl.abort_on_timeout(2)",
                n,
                "time.sleep(60)",
                ["has waited for others for more than 2 s", " wait in layer ("],
            )
            for n in (0, 1)  # with none the ranks wait for each other's connections
        ),
    ],
)
def test_a_rank_that_ends_or_waits_alone_ends_the_job(
    tmp_path: Path, before: str, calls: int, end: str, texts: list[str]
) -> None:
    began = time.monotonic()
    code, _, said = job(tmp_path, 3, ENDS.format(before, calls, end))
    assert time.monotonic() - began < 45
    assert code != 0
    for text in texts:
        assert text in said, said


TESTS = """
import pytest
import distdl_lite as dl

def test_fails_on_one():
    assert dl.Partition.world().rank != 1, "only here"

@pytest.mark.mpi(min_size=3)
def test_needs_three():
    assert False

@pytest.mark.mpi(min_size=2)
def test_still_together():
    assert dl.Partition.world().allgather_data(5) == [5, 5]
"""


def test_the_plugin_without_mpi(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = -p distdl_lite.pytest_plugin -p no:cacheprovider --color=no\n"
    )
    (tmp_path / "test_it.py").write_text(TESTS)
    done = torchrun(2, "-m", "pytest", "--with-mpi", "test_it.py", cwd=tmp_path, OMP_NUM_THREADS="1", **NO_MPI)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert said.count("1 failed, 1 passed, 1 skipped") == 2, said
    assert "the call of test_it.py::test_fails_on_one failed on ranks [1] of 2" in said


def test_the_main_example(tmp_path: Path) -> None:
    """The file that mpirun starts too, on as many steps as show that the loss is the same everywhere."""
    words = str(ROOT / "docs/examples/denoise.py"), "--steps", "2", "--out", str(tmp_path / "picture.png")
    done = torchrun(2, *words, OMP_NUM_THREADS="1", **NO_MPI)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 10_000
