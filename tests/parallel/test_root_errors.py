"""An error in a call, wherever it is raised, is the same on all ranks, names the replica, and leaves the next call whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from roots import F64, Odd, Where, assert_same, build, call, real, told
from torch import nn

import distdl_lite as dl


@pytest.mark.check("A28")
@on_ranks(3, mpi=True)
def test_errors_are_the_same_on_all_ranks(world: dl.Partition) -> None:
    net = build(lambda: nn.Linear(2, 2))
    dp = dl.RootDataParallel(net, world)
    good = real(4, 2)
    holder = Where(0)
    holder.inside = nn.Parameter(torch.ones(2))
    cases: list[tuple[tuple[Any, ...], type, str]] = [
        ((good, good[:2]), ValueError, "RootDataParallel: the tensors among the arguments, of shapes (4, 2), (2, 2)"),
        (
            (good.float(),),
            RuntimeError,
            "RootDataParallel: replica 0, on rank 0: mat1 and mat2 must have the same dtype",
        ),
        ((good, lambda: 0), AttributeError, "pickle local object"),
        ((good, good), TypeError, "RootDataParallel: replica 0, on rank 0: Linear.forward() takes 2 positional"),
        ((good.to_sparse(),), TypeError, "RootDataParallel: tensor 0 of the arguments is a tensor of torch.sparse_coo"),
        ((good.to("meta"),), TypeError, "RootDataParallel: tensor 0 of the arguments, of torch.float64 on device meta"),
        ((holder,), TypeError, "RootDataParallel: a tensor that requires grad is inside an object"),
        ((), TypeError, "RootDataParallel: replica 0, on rank 0: Linear.forward() missing 1 required"),
    ]
    for args, kind, text in cases:
        found = told(world, call, dp, world, *args)
        assert (found[0], text in found[1]) == (kind, True), found
        assert_same(*(call(dp, world, good), net(good)) if world.rank == 0 else (call(dp, world), torch.empty(0)))
    found = told(world, dp, good)
    assert found == (ValueError, "RootDataParallel: rank 1 passed tensors of shapes (4, 2), but is not the root")
    with pytest.raises(ValueError, match="has no dim 1 to be cut along"):
        call(dl.RootDataParallel(net, world, 1), world, good, good[0])


@pytest.mark.check("A28")
@on_ranks(3, mpi=True)
def test_errors_of_one_replica(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Where(world.rank), world)
    for error, kind, text in [
        (Odd(1, 2), RuntimeError, "Odd: (1, 2)"),
        (KeyError("a"), KeyError, "a"),
    ]:
        found = told(world, call, dp, world, torch.zeros(7), {2: error})
        expected = f"RootDataParallel: replica 2, on rank 2: {text}"
        assert found == (kind, repr(expected) if kind is KeyError else expected)
    with pytest.raises(ValueError, match="replica 1, on rank 1: first") as raised:
        call(dp, world, torch.zeros(7), {1: ValueError("first"), 2: ValueError("second")})
    assert str(raised.value.__cause__) == {1: "first", 2: "second"}.get(world.rank, "None")
    call(dp, world, torch.zeros(7, requires_grad=True)).sum().backward()


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        if g.max() > 4:
            raise Odd("steep")
        return g


class Steep(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FailsBackward.apply(x)


class Answers(nn.Module):
    """Returns what it is told to, on the ranks after the first something else."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor, kind: str) -> Any:
        if kind == "keys":
            return {"a": x} if self.first else {"a": x, "b": x}
        if kind == "lists":
            return [x] * (2 if self.first else 1)
        if kind == "none":
            return x, None if self.first else x
        if kind == "dtype":
            return x if self.first else x.float()
        if kind == "shape":
            return x if self.first else x[:, :1]
        if kind == "dims":
            return x if self.first else x.sum()
        if kind == "object":
            return Odd, Holder(x)
        return (x if self.first else x.to_sparse()) if kind == "sparse" else x


class Holder:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


@pytest.mark.check("A28")
@on_ranks(3, mpi=True)
def test_errors_of_outputs_and_backwards(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Answers(world.rank == 0), world)
    x = real(5, 2)
    for kind, text in [
        (
            "keys",
            "the outputs differ: replica 0 returned TreeSpec(dict, ['a'], [*]) of tensor, replica 1 TreeSpec(dict, ",
        ),
        ("lists", "the outputs differ: replica 0 returned TreeSpec(list, None, [*, *]) of tensor, tensor, replica 1"),
        ("none", "of tensor, None, replica 1"),
        (
            "dtype",
            "output 0 cannot be put together along dim 0: replica 0 returned torch.float64 of shape (2, 2) on cpu, ",
        ),
        ("shape", "replica 1 torch.float64 of shape (2, 1)"),
        ("dims", "replica 1 torch.float64 of shape ()"),
        ("sparse", "output 0 of replica 1 is a tensor of torch.sparse_coo, which cannot be moved"),
        ("object", "replica 0, on rank 0: the module returned a Holder with tensors"),
    ]:
        kind_of, found = told(world, call, dp, world, x, kind)
        assert kind_of in (ValueError, TypeError), found
        assert text in found, found
    dp = dl.RootDataParallel(Steep(), world)
    y = call(dp, world, x)
    g = torch.tensor([1, 1, 1, 1, 5.0], dtype=F64).view(5, 1).expand(5, 2) if world.rank == 0 else torch.ones(0)
    assert told(world, lambda: y.backward(g)) == (
        RuntimeError,
        "RootDataParallel: replica 2, on rank 2: Odd: steep",
    )
    call(dp, world, x).sum().backward()
    dp = dl.RootDataParallel(nn.Embedding(4, 2, sparse=True), world)
    y = call(dp, world, torch.arange(4))
    assert told(world, y.sum().backward) == (
        TypeError,
        "RootDataParallel: replica 0, on rank 0: sparse gradients (of weights of shapes (4, 2)) cannot be added up over ranks",
    )


class Stops(nn.Module):
    """Ends the program on one rank, in forward or backward."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: torch.Tensor, which: int, error: BaseException, phase: str) -> torch.Tensor:
        return StopsBackward.apply(x, self.stop(which, error) if phase == "forward" else self.stop, which, error)

    def stop(self, which: int, error: BaseException) -> None:
        if self.rank == which:
            raise error


class StopsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stop: Any, *arguments: Any) -> torch.Tensor:
        ctx.stop, ctx.arguments = stop, arguments
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        ctx.stop(*ctx.arguments)
        return g, None, None, None


@on_ranks(3, mpi=True)
def test_ends_of_the_program_inside_a_call(world: dl.Partition) -> None:
    """Stay what they are on the root, and are errors on the others; serve is left as by an error of the script."""
    dp, x = dl.RootDataParallel(Stops(world.rank), world), real(5, 2)
    for which in (0, 2):
        for error in (SystemExit(3), KeyboardInterrupt()):
            for phase in ("forward", "backward"):
                kind = type(error) if which == world.rank == 0 else RuntimeError
                text = f"RootDataParallel: replica {which}, on rank {which}: {type(error).__name__}: {error}"
                text = str(error) if kind is not RuntimeError else text
                with pytest.raises(kind) as raised:
                    call(dp, world, x, which, error, phase).sum().backward()
                assert str(raised.value) == text
                if world.rank:
                    with dp.serve() as at_root:
                        assert not at_root
                    continue
                with pytest.raises(kind) as raised, dp.serve():
                    dp(x, which, error, phase).sum().backward()
                assert str(raised.value) == text
