"""What is averaged: what the plan holds, in every dtype and memory, and what rounding on the wire leaves of it."""

from __future__ import annotations

import pytest
import torch
from optim.replicas import plain
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count


@pytest.mark.check("A33")
@on_ranks(2, mpi=True)
def test_frozen_and_unused_parameters(world: dl.Partition) -> None:
    """Averages follow the plan: a frozen parameter between others, and one without a gradient on some rank."""
    for options in ({}, {"wire": torch.float16}, {"chunk": 1}, {"ranks_per_node": 1, "delay": 1, "merge": "replace"}):
        schedule = dl.Periodic(1, 1) if "delay" in options else 1
        tensors = [torch.nn.Parameter(torch.full((3,), n + 2.0 * world.rank)) for n in range(4)]
        tensors[1].requires_grad_(False)
        optimizer = dl.LocalSGD(plain(1.0, *tensors), schedule, P=world, **options)
        if world.rank:
            tensors[0].grad = torch.ones(3)
        tensors[2].grad = torch.ones(3)
        optimizer.step()
        optimizer.drain()
        wanted = [0.5, 1.0 + 2 * world.rank, 2.0, 4.0]
        assert [p.tolist() for p in tensors] == [[value] * 3 for value in wanted], options
        tensors[2].requires_grad_(False)  # later
        with torch.no_grad():
            tensors[2].fill_(world.rank)
            tensors[3].fill_(world.rank)
        optimizer.zero_grad()
        optimizer.synchronise()
        assert tensors[2].tolist() == [world.rank] * 3
        assert tensors[3].tolist() == [0.5] * 3
        tensors[1].requires_grad_(True)
        with pytest.raises(
            RuntimeError, match=r"parameters \[1\] of those that require grad did not before: call replan"
        ):
            optimizer.step()
        optimizer.replan()
        optimizer.synchronise()
        assert tensors[1].tolist() == [2.0] * 3
        extra = torch.nn.Parameter(torch.full((2,), 4.0 * world.rank))
        optimizer.add_param_group({"params": [extra], "lr": 0.5})
        optimizer.synchronise()
        assert extra.tolist() == [2.0] * 2


@on_ranks(2, mpi=True)
def test_dtypes_and_memory(world: dl.Partition) -> None:
    """Halves are averaged in float32; complex, transposed, 0-dim and empty parameters, and several dtypes in one."""
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128
    for wire in (None, torch.bfloat16):
        given = [torch.arange(6).reshape(2, 3).t().to(dtype) + 2 * world.rank for dtype in dtypes]
        given += [torch.tensor(1.0 + 2 * world.rank), torch.empty(0, 3), torch.empty(0, dtype=torch.float64)]
        tensors = [torch.nn.Parameter(x.clone()) for x in given]
        strides = [p.stride() for p in tensors]
        optimizer = dl.LocalSGD(plain(1.0, *tensors), 1, P=world, wire=wire)
        with count() as counted:
            optimizer.step()
        assert counted.messages == 2
        numbers = 6 * 3 + 6 * 2 + 1, 6 + 6 * 2
        assert counted.bytes == (4 * numbers[0] + 8 * numbers[1] if wire is None else 2 * sum(numbers))
        for p, x, stride in zip(tensors, given, strides, strict=True):
            assert torch.equal(p, x - 2 * world.rank + 1)
            assert p.stride() == stride


@on_ranks(2, mpi=True)
def test_buffers(world: dl.Partition) -> None:
    for delay in (0, 1):
        w = torch.nn.Parameter(torch.zeros(2))
        running, frozen = torch.full((3,), 2.0 * world.rank), torch.full((1,), float(world.rank), dtype=torch.bfloat16)
        options = {"delay": delay, "buffers": [running, frozen], "P": world}
        optimizer = dl.LocalSGD(torch.optim.SGD([w], lr=0.5), 2, **options)
        for _ in range(2 + delay):
            w.grad = torch.full((2,), 4.0 * world.rank)
            optimizer.step()
        assert running.tolist() == [1.0] * 3
        assert frozen.tolist() == [0.5]


@pytest.mark.check("A34")
@on_ranks(2, mpi=True)
def test_rounding_on_the_wire(world: dl.Partition) -> None:
    """A step's error is a rounding of the difference; what it keeps comes later, so that small updates add up."""
    for wire, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        for dtype, delay in ((torch.float64, 0), (torch.float32, 0), (torch.float32, 1)):
            start = torch.linspace(0.5, 2.0, 1001, dtype=dtype)
            w = torch.nn.Parameter(start.clone())
            optimizer = dl.LocalSGD(plain(1.0, w), 1, P=world, wire=wire, delay=delay, merge="delta")
            total = torch.zeros(1001, dtype=torch.float64)
            for step in range(100):
                before = w.detach().clone()
                w.grad = -1e-4 * start * (1 + 0.3 * world.rank)  # always rounded to the same side
                both = world.world_transport.all_reduce(world.team, -w.grad.double()) / 2
                total += both
                optimizer.step()
                if step == 0 and dtype is torch.float64:
                    error = (w.detach() - before - both).abs() / both
                    assert 2.0 ** -(digits + 4) < error.max() <= 2.0**-digits
            optimizer.synchronise()
            drift = (w.detach().double() - start.double() - total).abs() / total
            assert drift.max() < (1e-4 if dtype is torch.float64 else 1e-3)
            told = world.allgather_data(w.tolist())
            assert told[0] == told[1]
