"""Containers inside containers."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl


@on_ranks(2)
def test_a_root_holds_no_containers(world: dl.Partition) -> None:
    """Which would wait in forward for ranks that may have no rows."""
    for kind in (dl.DataParallel, dl.RootDataParallel):
        module = torch.nn.Sequential(torch.nn.Tanh(), kind(torch.nn.Linear(2, 1), world))
        with pytest.raises(TypeError, match=r"RootDataParallel: the module holds distributed layers \(1\)"):
            dl.RootDataParallel(module, world)
