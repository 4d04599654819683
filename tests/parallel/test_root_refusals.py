"""Wrong arguments, and calls that do not fit together on the ranks, are refused with what was asked; no call hangs."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import on_ranks
from roots import Where, call, told
from torch import nn

import distdl_lite as dl
from distdl_lite.transport.threads import spmd


@on_ranks(2)
def test_refusals(world: dl.Partition) -> None:
    net = nn.Linear(2, 2)
    for options, text in [
        ({"device_ids": []}, "RootDataParallel: device_ids is empty"),
        ({"device_ids": [0, 2]}, "RootDataParallel: ranks [2] are not in a partition of 2 ranks"),
        ({"device_ids": [0, 0]}, "RootDataParallel: ranks [0, 0] name a rank twice"),
        ({"device_ids": [1], "output_device": 0}, "RootDataParallel: output_device=0 is not among device_ids=[1]"),
        ({"dim": "x"}, "RootDataParallel: dim='x' is no integer"),
        ({"dim": world.rank}, "RootDataParallel: the ranks disagree: rank 1: dim 1, others 0"),
        ({"device_ids": [world.rank]}, "RootDataParallel: the ranks disagree: rank 1: device_ids [1], others [0]"),
    ]:
        assert told(world, dl.RootDataParallel, net, world, **options)[1] == text
    assert told(world, dl.RootDataParallel, None, world)[1] == "RootDataParallel: module=None is no torch.nn.Module"
    cut = nn.Sequential(dl.nn.DistributedSoftmax(world.grid((2,)), 0))
    assert "the module holds distributed layers (0)" in told(world, dl.RootDataParallel, cut, world)[1]


@on_ranks(3, mpi=True)
def test_calls_that_do_not_fit(world: dl.Partition) -> None:
    net = nn.Linear(2, 2)
    one, two = dl.RootDataParallel(net, world), dl.RootDataParallel(net, world)
    x = torch.ones(4, 2)
    y = call(one, world, x)
    kind, text = told(world, lambda: call(one, world, x) if world.rank == 1 else y.sum().backward())
    assert kind is RuntimeError
    assert text.endswith("but rank 1 is at forward of container " + text.rsplit(" ", 1)[1])
    kind, text = told(world, lambda: call(two if world.rank else one, world, x))
    assert kind is RuntimeError
    assert "the root, rank 0, is at forward of container" in text
    copied = copy.deepcopy(one) if world.rank == 0 else one
    assert told(world, call, copied, world, x)[0] is RuntimeError


@on_ranks(2, mpi=True)
def test_a_call_that_the_root_alone_has_left(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Where(world.rank), world)
    with dp.serve() as at_root:
        if at_root:
            dp._passes._block = None
            with pytest.raises(TypeError, match="NoneType"):
                dp(torch.ones(()))
            del dp._passes._block
            with pytest.raises(
                RuntimeError, match=r"rank 0, is at forward of container \d+, but rank 1 is at outputs of forward 1 of"
            ):
                dp(torch.ones(()))
            assert dp(torch.ones(())).shape == (1,)


def test_a_forgotten_call_is_a_deadlock_that_names_it() -> None:
    def body(world: dl.Partition) -> None:
        dp = dl.RootDataParallel(nn.Linear(2, 2), world)
        if world.rank == 0:
            dp(torch.ones(3, 2))

    with pytest.raises(RuntimeError, match=r"deadlock: .* in RootDataParallel; rank 1 has ended"):
        spmd(2, body)
