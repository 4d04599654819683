"""Sums through memory that ranks share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count, spmd
from distdl_lite.transport import shared

CPU = torch.device("cpu")


def files() -> set[str]:
    return {name for name in os.listdir(shared._FOLDER) if name.startswith("distdl_lite-")}


@on_ranks(4, mpi=True)
def test_all_ranks_get_the_sum_in_place(world: dl.Partition) -> None:
    transport = world.world_transport
    for team in (tuple(range(4)), (1, 3), (0, 1, 2)):
        if transport.rank not in team:
            continue
        for size in (1, 2, 3, 5, 1000, 4097):  # also fewer than ranks
            for dtype in (torch.float32, torch.float64):
                sums = shared.shared_sums(transport, team, size, dtype, CPU)
                assert sums is not None
                assert torch.equal(sums.mine, torch.zeros(size, dtype=dtype))
                for step in range(3):
                    sums.mine.copy_(torch.arange(size) + 10 * transport.rank + step)
                    transport.agree(team, 0)
                    with count() as counted:
                        sums.add_up()
                    assert (counted.messages, counted.bytes) == (1, size * dtype.itemsize)
                    expected = len(team) * (torch.arange(size) + step) + 10 * sum(team)
                    assert torch.equal(sums.mine, expected.to(dtype))
    transport.agree((0, 1, 2, 3), 0)
    assert not files()


def test_where_no_memory_can_be_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ranks learn of it, and nothing is left behind."""

    def none(
        world: dl.Partition, size: int = 8, dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> bool:
        return shared.shared_sums(world.world_transport, (0, 1), size, dtype, device) is None

    for arguments in ({"size": 0}, {"dtype": torch.bfloat16}, {"device": torch.device("cuda")}):
        assert spmd(2, lambda world, arguments=arguments: none(world, **arguments)) == [True, True]
    opened = shared._opened
    with monkeypatch.context() as patch:  # another host
        patch.setattr(shared, "_opened", lambda path, nbytes: None if dl.Partition().rank else opened(path, nbytes))
        assert spmd(2, none) == [True, True]
    with monkeypatch.context() as patch:
        patch.setattr(shared, "_FOLDER", str(tmp_path / "is not there"))
        assert spmd(2, none) == [True, True]
    with monkeypatch.context() as patch:

        def full(handle: int, start: int, nbytes: int) -> None:
            raise OSError("no space left on device")

        patch.setattr(os, "posix_fallocate", full)
        assert spmd(2, none) == [True, True]
    assert shared._opened(str(tmp_path / "is not there"), 8) is None
    with pytest.raises(RuntimeError, match="deadlock"):  # a rank that never comes
        spmd(2, lambda world: world.rank or none(world))
    assert not files()
