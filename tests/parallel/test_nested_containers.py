"""Containers inside containers."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from twins import assert_refused

import distdl_lite as dl


@on_ranks(2)
def test_a_parameter_is_in_one_container(world: dl.Partition) -> None:
    """Also where one rank alone has it in two, or it comes into the second one later; one that is gone counts no more."""

    def refuse(module: torch.nn.Module) -> None:
        inner = dl.DataParallel(module, world)
        inner(torch.ones(1, 2)).sum().backward()
        text = (
            "DataParallel: another container has {} already; put both modules into one container, or delete the other"
        )
        second = module if world.rank else torch.nn.Linear(2, 2)
        assert_refused(world, world, lambda: dl.DataParallel(second, world), text.format("weight, bias"))
        outer = torch.nn.Sequential(torch.nn.Tanh(), inner)
        names = "1.module.weight, 1.module.bias"
        assert_refused(world, world, lambda: dl.DataParallel(outer, world), text.format(names))
        other = dl.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 2)), world)
        other(torch.ones(1, 2)).sum().backward()
        other.module[0].bias = module.bias
        assert_refused(world, world, lambda: other(torch.ones(1, 2)), text.format("0.bias"))

    module = torch.nn.Linear(2, 2)
    refuse(module)
    dl.DataParallel(module, world)(torch.ones(1, 2)).sum().backward()


@on_ranks(2)
def test_a_root_holds_no_containers(world: dl.Partition) -> None:
    """Which would wait in forward for ranks that may have no rows."""
    for kind in (dl.DataParallel, dl.RootDataParallel):
        module = torch.nn.Sequential(torch.nn.Tanh(), kind(torch.nn.Linear(2, 1), world))
        with pytest.raises(TypeError, match=r"RootDataParallel: the module holds distributed layers \(1\)"):
            dl.RootDataParallel(module, world)
