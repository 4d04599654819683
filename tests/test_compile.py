"""torch.compile of networks with distributed layers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn


class Residual(dnn.Module):
    """A network of its own kind, whose layers ride on one agreement."""

    def __init__(self, P: dl.Partition) -> None:
        super().__init__()
        self.inside = network(P, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inside(x)


def network(P: dl.Partition, a: int, b: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        dnn.DistributedConv2d(P, a, b, 3, padding=1), torch.nn.GELU(), dnn.DistributedBatchNorm(P, b), torch.nn.Tanh()
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within Dynamo
@on_ranks(2, mpi=True)
def test_layers_run_as_they_are(world: dl.Partition) -> None:
    P = world.grid((1, 1, 2, 1))
    torch.manual_seed(0)
    net = torch.nn.Sequential(network(P, 1, 4), Residual(P), *network(P, 4, 1)[:2]).double()
    measure = dnn.DistributedMSELoss(P)
    x = torch.rand(2, 1, 9, 7, dtype=torch.float64)[P.block((2, 1, 9, 7))]
    found = []
    for model in (net, torch.compile(net, backend="aot_eager"), net):
        if len(found) == 2:
            net.compile(backend="aot_eager")
            net[1].compile()
        given = x.clone().requires_grad_()
        loss = measure(model(given), x)
        loss.backward()
        found.append([loss.detach(), given.grad, *(p.grad for p in net.parameters())])
        net.zero_grad()
    for other in found[1:]:
        assert all(map(torch.allclose, found[0], other))
    whole = torch.compile(net[0], backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="Skip inlining"):
        whole(x)


def test_the_library_does_not_load_dynamo() -> None:
    body = "import sys, distdl_lite, distdl_lite.nn; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", body], check=True)
