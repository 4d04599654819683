"""The public test functions find what they are for."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import integers
from jobs import mpirun, run
from ranks import on_ranks, over_mpi

import distdl_lite.nn as dnn
from distdl_lite.partition import Partition
from distdl_lite.testing import adjoint_test, assert_equals_serial, count, launch, spmd


class Wrong(torch.autograd.Function):
    """Twice x, whose backward says three times."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
        return 3 * g


@on_ranks(4)
def test_adjoint_test_tells_right_from_wrong(world: Partition) -> None:
    P = world.grid((2, 2))
    layer, x = dnn.HaloExchange(P, [1, (0, 2)], "circular"), integers((3, 4), world.rank) + 1
    before = x.clone()
    assert adjoint_test(layer, x, P=world) < 1e-14
    assert adjoint_test(layer, x.to(torch.complex64), P=world) < 1e-6
    assert adjoint_test(lambda a, b: (layer(a) + layer(b), a - b), x, 2 * x, P=world) < 1e-14
    assert adjoint_test(lambda x: Wrong.apply(x) if world.rank == 2 else x, x, P=world) > 1e-3
    assert adjoint_test(lambda x: x[:0], x[:0], P=world) == 0.0
    errors = world.allgather_data(adjoint_test(Wrong.apply, x.float(), P=world))
    assert len(set(errors)) == 1
    assert torch.equal(x, before)
    assert x.grad is None


@on_ranks(4)
def test_adjoint_test_where_ranks_hold_nothing(world: Partition) -> None:
    P = world.grid((2, 1), [3, 1])
    x = integers((3, 4), world.rank) if P.active else torch.empty(0, dtype=torch.float64)
    team = world.create_partition_inclusive([1, 3])
    assert adjoint_test(dnn.AllSumReduce(P, [0]), x, P=world) < 1e-14
    error = adjoint_test(dnn.AllSumReduce(P, [0]), x, P=team)
    assert error < 1e-14


@on_ranks(4, mpi=True)
def test_assert_equals_serial(world: Partition) -> None:
    """A distributed convolution passes; one whose output, gradients or weights are off is named on all ranks."""
    P = world.grid((1, 1, 2, 2))
    x = integers((2, 2, 5, 6))
    serial = torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in serial.parameters():
            parameter.copy_(integers(parameter.shape, seed=3))
    layer = dnn.DistributedConv2d(P, 2, 3, 3, padding=1, dtype=torch.float64)
    before = serial.weight.detach().clone()
    assert_equals_serial(layer, serial, x, P)
    assert torch.equal(serial.weight.detach(), before)
    assert serial.weight.grad is None

    class Off(type(layer)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + (world.rank == 2)

    def text_of(candidate: torch.nn.Module) -> str:
        with pytest.raises(AssertionError) as raised:
            assert_equals_serial(candidate, serial, x, P)
        return str(raised.value)

    said = text_of(Off(P, 2, 3, 3, padding=1, dtype=torch.float64))
    assert "rank 2: output: Tensor-likes are not" in said
    assert said.count("rank ") == 1
    said = text_of(dnn.DistributedConv2d(P, 2, 3, 3, padding=2, dilation=2, dtype=torch.float64))
    assert "gradient of weight" in said
    assert "gradient of input 0" in said


@on_ranks(2)
def test_assert_equals_serial_of_plain_layers(world: Partition) -> None:
    """Buffers count; a 0-dim output is the same on all ranks."""

    class Loss(torch.nn.Module):
        def __init__(self, P: Partition) -> None:
            super().__init__()
            self.total = dnn.AllSumReduce(P, [0])
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return self.total(x.square().sum().reshape(1))[0]

    class Serial(Loss):
        def __init__(self, by: int) -> None:
            torch.nn.Module.__init__(self)
            self.by = by
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += self.by
            return x.square().sum()

    P = world.grid((2,))
    with pytest.raises(AssertionError) as raised:
        assert_equals_serial(Loss(P), Serial(by=2), integers((5,)), P)
    said = str(raised.value)
    assert "rank 0: buffer seen" in said
    assert "rank 1: buffer seen" in said
    assert "output" not in said
    # the replicas' outputs are added up again in backward: the gradient is the serial one times two
    assert "gradient of input 0" in said


def test_count_ends_with_its_block() -> None:
    def body(world: Partition) -> tuple[int, int, list[str]]:
        layer = dnn.AllSumReduce(world.grid((2,)), [0])
        tallies = []

        def fail() -> None:
            with count() as c:
                tallies.append(c)
                layer(torch.ones(3))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        (c,) = tallies
        layer(torch.ones(3))
        return c.messages, c.collectives, list(c.by_label)

    assert spmd(2, body) == [(1, 1, ["AllSumReduce"])] * 2


def test_count_begins_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make a world is for all of its ranks; the tally counts also what is made in the block."""
    with monkeypatch.context() as patched:
        patched.setattr("distdl_lite.transport.of_communicator", lambda comm: pytest.fail("a world is made"))
        with count() as c:
            pass
    assert c.messages == 0


@over_mpi
@pytest.mark.mpi(min_size=2)
def test_count_over_other_communicators() -> None:
    from mpi4py import MPI

    early = Partition(MPI.COMM_WORLD.Split(0))
    with count() as c:
        for P in (early, Partition(MPI.COMM_WORLD.Split(0)), Partition()):
            dnn.AllSumReduce(P, [0])(torch.ones(3))
    assert (c.messages, c.bytes > 0, list(c.by_label)) == (3, True, ["AllSumReduce"])


@pytest.mark.jobs
def test_launch_goes_on_once_and_wants_its_number_of_ranks() -> None:
    program = "from distdl_lite.testing import launch; print(launch(2, lambda w: w.allgather_data(w.rank)), 'after')"
    assert run(sys.executable, "-c", program).stdout == mpirun(2, "-c", program).stdout == "[0, 1] after\n"
    for body, text in (
        ("lambda w: 0); launch(2, len", "the other processes have ended after the first call"),
        ("lambda w: sys.exit(3) if w.rank else w.allgather_data(0)", r"rank 1 has left launch by sys.exit(3)"),
        ("lambda w: launch(2, len)", "the other processes have ended"),
    ):
        ended = mpirun(2, "-c", f"import sys; from distdl_lite.testing import launch; launch(2, {body})")
        assert ended.returncode != 0
        assert text in ended.stderr
    wrong = mpirun(3, "-c", program)
    assert wrong.returncode != 0
    assert "this program is written for 2 ranks, and the launcher has started 3" in wrong.stderr


def test_launch_inside_ranks_is_refused() -> None:
    for start in (spmd, launch):
        with pytest.raises(RuntimeError, match="ranks run already"):
            start(2, lambda world: launch(2, len))
