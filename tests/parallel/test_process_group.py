"""The calls of torch.distributed over MPI, and their errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from groups import group_over, on_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distdl_lite as dl
from distdl_lite.parallel.process_group import MPIProcessGroup
from distdl_lite.testing import spmd

pytestmark = [pytest.mark.check("A44"), pytest.mark.filterwarnings("ignore")]  # torch's modules warn of each other

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]


def values(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, other ones on each rank, exact in every dtype."""
    drawn = torch.randint(0, 4, (3, 2), generator=torch.Generator().manual_seed(rank))
    return drawn.to(dtype) * (1 + 2j) if dtype.is_complex else drawn.to(dtype)


def awkward(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in other memory orders."""
    yield tensor.clone()
    yield tensor.t().contiguous().t()
    yield torch.stack([tensor, tensor], -1)[..., 0]


# ---- the calls ---------------------------------------------------------------------------------------------------------

OP = dist.ReduceOp
OPS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    OP.SUM: torch.add,
    OP.PRODUCT: torch.mul,
    OP.MIN: torch.minimum,
    OP.MAX: torch.maximum,
    OP.BAND: torch.bitwise_and,
    OP.BOR: torch.bitwise_or,
    OP.BXOR: torch.bitwise_xor,
}
ORDERED = {OP.MIN, OP.MAX}
BITWISE = {OP.BAND, OP.BOR, OP.BXOR}


def reduced(op: Any, size: int, dtype: torch.dtype) -> torch.Tensor:
    result = values(0, dtype)
    for rank in range(1, size):
        result = OPS[op](result, values(rank, dtype))
    return result


def refused(op: Any, dtype: torch.dtype) -> bool:
    return (op in BITWISE and (dtype.is_floating_point or dtype.is_complex)) or (op in ORDERED and dtype.is_complex)


@on_group(3)
def test_reductions(group: MPIProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    for dtype in (*FLOATS, *INTEGERS, *COMPLEX):
        for op in OPS:
            if refused(op, dtype):
                with pytest.raises(TypeError, match=f"{dtype} tensors have no reduction {op.name} over MPI"):
                    group.allreduce([values(rank, dtype)], all_reduce_options(op))
                continue
            if dtype.is_complex and op is OP.PRODUCT:  # torch reduces complex numbers as pairs, which have no product
                y = values(rank, dtype)
                group.allreduce([y], all_reduce_options(op))
                assert torch.equal(y, reduced(op, size, dtype))
                continue
            wanted = reduced(op, size, dtype)
            for x in awkward(values(rank, dtype)):
                y = x.clone(memory_format=torch.preserve_format)
                dist.all_reduce(y, op)
                assert torch.equal(y, wanted), (dtype, op)
                y = x.clone()
                dist.reduce(y, 1, op)
                assert rank != 1 or torch.equal(y, wanted), (dtype, op)
                whole = torch.stack([x + k if op is OP.SUM else x for k in range(size)])
                dist.reduce_scatter_tensor(out := torch.empty_like(x), whole, op)
                assert torch.equal(out, wanted + size * rank if op is OP.SUM else wanted), (dtype, op)
                dist.reduce_scatter(out := torch.empty_like(x), list(whole), op)
                assert torch.equal(out, wanted + size * rank if op is OP.SUM else wanted), (dtype, op)


def all_reduce_options(op: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


@on_group(3)
def test_means_and_bools(group: MPIProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    for dtype in (*FLOATS, *COMPLEX):
        dist.all_reduce(y := torch.full((2,), 3.0 * rank, dtype=dtype), OP.AVG)
        assert torch.equal(y, torch.full((2,), 3.0, dtype=dtype))
    with pytest.raises(TypeError, match=r"torch.int64 tensors have no reduction AVG over MPI"):
        dist.all_reduce(torch.ones(2, dtype=torch.int64), OP.AVG)
    flags = torch.tensor([True, rank == 1, False])
    for op, wanted in ((OP.SUM, [1, 1, 0]), (OP.MAX, [1, 1, 0]), (OP.PRODUCT, [1, 0, 0]), (OP.BXOR, [size % 2, 1, 0])):
        dist.all_reduce(y := flags.clone(), op)
        assert y.tolist() == [bool(v) for v in wanted]
    # 256 + 1 is 256 in bfloat16, 256 + 1 + 1 is 258
    dist.all_reduce(y := torch.full((2,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16))
    assert torch.equal(y, torch.full((2,), 258.0, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"torch.float32 tensors have no reduction PREMUL_SUM over MPI"):
        dist.all_reduce(torch.ones(2), dist._make_nccl_premul_sum(2.0))
    with pytest.raises(TypeError, match=r"moves no tensors of layout torch.sparse_coo"):
        dist.all_reduce(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"moves no tensors of layout torch.sparse_csr"):
        dist.irecv(torch.eye(2).to_sparse_csr(), 0)


@on_group(3)
def test_copies(group: MPIProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    for dtype in (*FLOATS, *INTEGERS, *COMPLEX, torch.bool, torch.float8_e4m3fn):
        everyones = [values(r, torch.int64).to(dtype) for r in range(size)]
        for x in awkward(everyones[rank].view(torch.uint8) if dtype.itemsize == 1 else everyones[rank]):
            x = x if x.is_contiguous() or dtype.itemsize > 1 else x.clone(memory_format=torch.preserve_format)
            check_copies(x, [e.view(x.dtype) if dtype.itemsize == 1 else e for e in everyones], rank)
    x = torch.tensor([1 + 2j, 3 - 1j])
    group.broadcast([y := x.clone().conj()], broadcast_options(0))  # lazily conjugated
    assert torch.equal(y, x.conj())
    memory = np.full(2 * size, float(rank))
    whole, mine = torch.from_numpy(memory), torch.from_numpy(memory[2 * rank : 2 * rank + 2])  # storages of their own
    dist.all_gather_into_tensor(whole, mine)
    assert whole.tolist() == [float(r) for r in range(size) for _ in range(2)]
    parts = [torch.empty(r) for r in range(size)]
    dist.all_gather(parts, torch.full((rank,), float(rank)))  # uneven, and nothing of rank 0
    assert [part.tolist() for part in parts] == [[], [1.0], [2.0, 2.0]]


def broadcast_options(root: int) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = root, 0
    return options


def check_copies(x: torch.Tensor, everyones: list[torch.Tensor], rank: int, group: Any = None) -> None:
    size, whole = len(everyones), torch.stack(everyones)
    y = x.clone(memory_format=torch.preserve_format)
    dist.broadcast(y, 2, group)
    assert torch.equal(y, everyones[2])
    got = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(got, x, group)
    assert torch.equal(torch.stack(got), whole)
    dist.all_gather_into_tensor(y := torch.empty_like(whole), x, group)
    assert torch.equal(y, whole)
    dist.gather(x, got := [torch.empty_like(x) for _ in range(size)] if rank == 1 else None, 1, group)
    assert got is None or torch.equal(torch.stack(got), whole)
    dist.scatter(y := torch.empty_like(x), everyones if rank == 0 else None, 0, group)
    assert torch.equal(y, everyones[rank])
    got = [torch.empty_like(x) for _ in range(size)]
    dist.all_to_all(got, [everyones[(rank + r) % size] for r in range(size)], group)
    assert torch.equal(torch.stack(got), torch.stack([everyones[(rank + r) % size] for r in range(size)]))
    dist.all_to_all_single(y := torch.empty_like(whole), whole, group=group)
    assert torch.equal(y, everyones[rank].expand(size, *x.shape))
    # of rank r's rows the first r go to rank 0, the others to rank 1
    rows = torch.cat([x] * 2)[: size + 1]
    n = len(rows)
    takes = [list(range(size)), [n - r for r in range(size)], [0] * size][rank]
    out = x.new_empty(sum(takes), *x.shape[1:])
    dist.all_to_all_single(out, rows, takes, [rank, n - rank, *[0] * (size - 2)], group)
    pieces = [torch.cat([e] * 2)[: size + 1] for e in everyones]
    wanted = [[p[:r] for r, p in enumerate(pieces)], [p[r:] for r, p in enumerate(pieces)], [pieces[0][:0]]][rank]
    assert torch.equal(out, torch.cat(wanted))


@on_group(3)
def test_work_objects(group: MPIProcessGroup) -> None:
    y = torch.ones(2)
    work = dist.all_reduce(y, async_op=True)
    assert work.wait()
    assert work.is_completed()
    assert torch.equal(y, torch.full((2,), 3.0))
    assert torch.equal(work.get_future().then(lambda future: future.value()[0] + 1).wait(), y + 1)
    assert dist.barrier(async_op=True).wait()
    with dist._coalescing_manager(async_ops=True) as together:
        dist.all_reduce(a := torch.ones(2))
        dist.all_reduce(b := torch.ones(3))
    together.wait()
    assert a.sum() + b.sum() == 15
    with dist._coalescing_manager(device=torch.device("cpu")):
        dist.broadcast(a := torch.full((1,), float(group.rank())), 1)
    assert a == 1
    p = nn.Parameter(torch.full((2,), float(group.rank())))
    version = p._version
    dist.broadcast(p, 1)
    assert torch.equal(p, torch.ones(2))
    assert p._version == version


@on_group(3)
def test_messages(group: MPIProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    left, right = (rank - 1) % size, (rank + 1) % size
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        x = torch.full((4, 3), rank).to(dtype)
        y = torch.zeros(3, 4, dtype=dtype).t()
        receiving = dist.irecv(y, left)
        assert not receiving.is_completed()
        dist.barrier()
        sending = dist.isend(x, right)
        assert receiving.wait(timedelta(seconds=30))
        assert sending.wait()
        assert receiving.is_completed()
        assert torch.equal(y, torch.full((4, 3), left).to(dtype))
    assert receiving.source_rank() == left
    batch = [
        dist.P2POp(dist.irecv, y := torch.zeros(2), left),
        dist.P2POp(dist.isend, torch.full((2,), rank + 0.0), right),
    ]
    for request in dist.batch_isend_irecv(batch):
        request.wait()
    assert torch.equal(y, torch.full((2,), left + 0.0))
    if rank == 0:
        assert {dist.recv(torch.zeros(1), tag=7) for _ in range(size - 1)} == set(range(1, size))
    else:
        dist.send(torch.ones(1), 0, tag=7)
    # sends that nobody waits for live until they end
    for n in range(50):
        dist.isend(torch.full((20_000,), n + 0.0), right)
        dist.recv(y := torch.zeros(20_000), left)
        assert torch.equal(y, torch.full((20_000,), n + 0.0))
    dist.barrier()
    assert len(group._transfers) < 10
    request = dist.irecv(torch.zeros(3), left)
    dist.isend(torch.zeros(2), right)
    with pytest.raises(ValueError, match=f"8 bytes came from rank {left} for a tensor of 12 bytes"):
        request.wait()


@on_group(4)
def test_objects_and_sub_groups(group: MPIProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    dist.all_gather_object(got := [None] * size, {"rank": rank, "list": [1] * rank})
    assert got == [{"rank": r, "list": [1] * r} for r in range(size)]
    dist.broadcast_object_list(got := [rank, "a"] if rank == 2 else [None, None], src=2)
    assert got == [2, "a"]
    dist.scatter_object_list(out := [None], [r * "x" for r in range(size)] if rank == 1 else None, src=1)
    assert out == ["x" * rank]
    dist.gather_object(rank, got := [None] * size if rank == 0 else None)
    assert got in (None, [0, 1, 2, 3])
    odd, even = dist.new_group([1, 3]), dist.new_group([2, 0])
    mine = odd if rank % 2 else even
    dist.all_reduce(y := torch.full((1,), rank + 0.0), group=mine)
    assert y == (4 if rank % 2 else 2)
    dist.broadcast(y := torch.full((1,), rank + 0.0), src=3 if rank % 2 else 2, group=mine)
    assert y == (3 if rank % 2 else 2)
    local = dist.new_group([rank - rank % 2, rank - rank % 2 + 1], use_local_synchronization=True)
    dist.all_reduce(y := torch.full((1,), rank + 0.0), group=local)
    assert y == (1 if rank < 2 else 5)
    dist.destroy_process_group(local)
    with pytest.raises(RuntimeError, match="Barrier: the process group is destroyed"):
        local.barrier()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    dist.all_reduce(y := torch.full((1,), rank + 0.0), group=mesh["data"].get_group())
    assert y == (2 if rank % 2 == 0 else 4)


@on_group(3, ranks=lambda size: [2, 0, 1])
def test_a_partition_gives_the_order(group: MPIProcessGroup) -> None:
    here = dl.Partition().rank
    assert group.rank() == [1, 2, 0][here]
    dist.all_gather(got := [torch.zeros(1) for _ in range(3)], torch.tensor([float(here)]))
    assert torch.cat(got).tolist() == [2, 0, 1]
    team = dist.new_group([1, 2])
    if group.rank() > 0:
        dist.all_gather(got := [torch.zeros(1) for _ in range(2)], torch.tensor([float(here)]), group=team)
        assert torch.cat(got).tolist() == [0, 1]


# ---- errors ------------------------------------------------------------------------------------------------------------


@on_group(2)
def test_arguments_that_do_not_fit(group: MPIProcessGroup) -> None:
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(
        ValueError, match=r"a torch.float32 tensor of shape \(3,\) is not 2 times a torch.float32 tensor"
    ):
        dist.all_gather_into_tensor(torch.ones(3), one)
    with pytest.raises(ValueError, match=r"a torch.float32 tensor of shape \(2,\) is not 2 times a torch.float32"):
        dist.reduce_scatter_tensor(two, two)
    with pytest.raises(ValueError, match="are not 2 tensors of one dtype"):
        dist.all_gather([one], one)
    with pytest.raises(
        ValueError, match=r"its part in the list and its tensor do not fit: torch.float32 of shape \(1,\)"
    ):
        dist.all_gather([one, one], two)
    with pytest.raises(ValueError, match="3 rows cannot be cut evenly over 2 ranks"):
        dist.all_to_all_single(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="this process group over MPI has no store"):
        dist.distributed_c10d._get_default_store().set("key", "value")
    with pytest.raises(RuntimeError, match=r"(?i)rank"):  # MPI's own error
        group.send([one], 5, 0)
    dist.barrier()


@on_group(2)
def test_an_error_of_mpi_in_backward_is_an_exception(group: MPIProcessGroup) -> None:
    """In the future of a work object in Python it would end the process with a segmentation fault."""
    model = DistributedDataParallel(nn.Linear(3, 3))
    comm, group._comm = group._comm, group._MPI.COMM_NULL
    try:
        with pytest.raises(RuntimeError, match=r"(?i)communicator"):
            model(torch.ones(2, 3)).sum().backward()
    finally:
        group._comm = comm
    dist.barrier()


@on_group(2, timeout=60)
def test_a_limit(group: MPIProcessGroup) -> None:
    team = dist.new_group(timeout=timedelta(seconds=0.2))
    dist.all_reduce(y := torch.ones(2))
    dist.recv(y, 0) if group.rank() else dist.send(y, 1)
    assert torch.equal(y, torch.full((2,), 2.0))
    with pytest.raises(TimeoutError, match=f"rank {group.rank()} of 2: recv has waited 0.1 s for other ranks"):
        dist.irecv(y, 1 - group.rank()).wait(timedelta(seconds=0.1))
    dist.barrier()
    if group.rank() == 0:
        with pytest.raises(TimeoutError, match=r"rank 0 of 2: Allreduce has waited 0.2 s for other ranks"):
            dist.all_reduce(y, group=team)
        with pytest.raises(RuntimeError, match=r"Bcast: a call before has failed: rank 0 of 2: Allreduce has waited"):
            dist.broadcast(y, 0, group=team)
    dist.send(torch.ones(2), 1 - group.rank())  # ends the message above
    dist.barrier()


@on_group(3, timeout=60)
def test_different_calls_are_told_under_a_limit(group: MPIProcessGroup) -> None:
    """A rank that leaves a call out meets the others at its next."""
    rank = group.rank()
    everyones = [values(r, torch.float32) for r in range(3)]
    check_copies(everyones[rank], everyones, rank)
    with pytest.raises(
        RuntimeError,
        match=r"different calls: rank 0 Barrier, rank 1 Allreduce of 3 float32, rank 2 Allreduce of 3 float32",
    ):
        dist.all_reduce(torch.ones(3)) if rank else dist.barrier()
    with pytest.raises(
        RuntimeError, match=r"rank 1 Bcast of 8 uint8 with root 0, rank 2 Bcast of 12 uint8 with root 0"
    ):
        dist.broadcast(torch.ones(rank + 1), 0)
    with pytest.raises(
        RuntimeError, match=r"rank 0 Allreduce of 3 float32, rank 1 Allreduce of 3 float32 by MAX, rank 2 Allr"
    ):
        dist.all_reduce(torch.ones(3), OP.MAX if rank == 1 else OP.SUM)
    dist.all_reduce(y := torch.ones(3))
    assert torch.equal(y, torch.full((3,), 3.0))


@on_group(3)
def test_different_calls_are_told_under_debug(group: MPIProcessGroup) -> None:
    before, rank = dist.get_debug_level(), group.rank()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        checked = dist.new_group()
    finally:
        dist.set_debug_level(before)
    everyones = [values(r, torch.float32) for r in range(3)]
    check_copies(everyones[rank], everyones, rank, checked)
    dist.reduce(torch.ones(2), 1, group=checked)
    with pytest.raises(
        RuntimeError, match=r"the ranks make different calls: rank 0 Allreduce of 2 float32, rank 1 Allr"
    ):
        dist.all_reduce(torch.ones(2 + rank), group=checked)
    with pytest.raises(RuntimeError, match=r"rank 1 Bcast of 8 uint8 with root 1, rank 2 Bcast of 8 uint8 with root 2"):
        dist.broadcast(torch.ones(2), rank, checked)
    with pytest.raises(RuntimeError, match=r"rank 0 Barrier, rank 1 Allreduce of 2 float32"):
        dist.all_reduce(torch.ones(2), group=checked) if rank else dist.barrier(checked)


def test_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.excepthook", hook := lambda *error: None)
    with group_over(dl.Partition().create_partition_inclusive([dl.Partition().rank])) as group:
        assert (group.rank(), group.size(), group.name(), dist.get_backend()) == (0, 1, "distdl", "distdl")
        model = DistributedDataParallel(nn.Linear(3, 3))
        model(torch.ones(2, 3)).sum().backward()
        assert torch.equal(model.module.weight.grad, torch.full((3, 3), 2.0))
        dist.all_gather_object(got := [None], "a")
        assert got == ["a"]
        with pytest.raises(ValueError, match="trying to initialize the default process group twice"):
            MPIProcessGroup.init()
        assert sys.excepthook is hook  # torch's would keep its words from being printed before it ends the job


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a timeout of -1 s is not positive"):
        MPIProcessGroup.init(timeout=-1)
    with pytest.raises(ValueError, match="needs MPI ranks, not threads of one process"):
        spmd(1, lambda world: MPIProcessGroup.init(world))
    assert not dist.is_initialized()
