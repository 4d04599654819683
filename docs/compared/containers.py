"""Data parallelism on two ranks: ``python docs/compared/containers.py ddp`` (or fsdp, sync), ``mpirun -n 2 ... heat``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from cut_cases import judge, shown, worst
from harness import on_ranks
from torch import nn


class Unused(nn.Linear):
    """A layer with another one that no forward uses."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.other = nn.Linear(3, 2)


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


CASES = [
    ("mean loss, 4 + 4 rows", lambda: nn.Linear(3, 2), (4, 4)),
    ("mean loss, 5 + 2 rows", lambda: nn.Linear(3, 2), (5, 2)),
    ("mean loss, 7 + 0 rows", lambda: nn.Linear(3, 2), (7, 0)),
    ("batch norm, 4 + 4 rows", norm, (4, 4)),
    ("batch norm, 5 + 2 rows", norm, (5, 2)),
    ("a layer that no rank uses", Unused, (4, 4)),
]


def run(make: Callable[[], nn.Module], rows: tuple[int, int], rank: int, wrap: Callable[[nn.Module], Any]) -> str:
    """Two steps of SGD on the mean loss of each rank's rows, against the same of all rows in one process."""
    torch.manual_seed(0)
    x, target = torch.randn(2, sum(rows), 3).double(), torch.randn(2, sum(rows), 2).double()
    mine = slice(0, rows[0]) if rank == 0 else slice(rows[0], None)
    model, serial = make().double(), make().double()
    net, optimizer = wrap(model)
    serial.load_state_dict(state_of(net))  # Heat draws new weights
    of_serial = torch.optim.SGD(serial.parameters(), lr=0.1)
    for step in range(2):
        for m, o, part in [(net, optimizer, mine), (serial, of_serial, slice(None))]:
            o.zero_grad()
            nn.functional.mse_loss(m(x[step][part]), target[step][part]).backward()
            o.step()
    net.eval()  # Heat's last step that was put off
    return judge({n: v for n, v in state_of(serial).items() if v.is_floating_point()}, state_of(net))


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    state = {n.removeprefix("module."): v for n, v in net.state_dict().items()}
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for n, v in state.items()}


def sgd(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def ddp(model: nn.Module) -> Any:
    return sgd(nn.parallel.DistributedDataParallel(model))


def sync(model: nn.Module) -> Any:
    return ddp(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def fsdp(model: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    return sgd(fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,))))


def heat(model: nn.Module, is_blocking: bool = True) -> Any:
    import heat as ht

    optimizer = ht.optim.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), is_blocking)
    return ht.nn.DataParallel(model, ht.MPI_WORLD, optimizer, is_blocking), optimizer


def heat_nonblocking(model: nn.Module) -> Any:
    return heat(model, is_blocking=False)


def main(which: str) -> None:
    for name, make, rows in CASES:
        if which.startswith("heat"):
            from mpi4py import MPI

            try:
                verdict = run(make, rows, MPI.COMM_WORLD.rank, globals()[which])
            except Exception as error:
                verdict = shown(error)
            verdict = worst(MPI.COMM_WORLD.allgather(verdict))
            if MPI.COMM_WORLD.rank:
                continue
        else:
            verdict = on_ranks(2, lambda rank, m=make, r=rows: run(m, r, rank, globals()[which]))
        print(f"{name}: {verdict}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
