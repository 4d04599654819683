"""Norms and clipping of cut and replicated weights against torch's on the serial model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from blocks import block, check_held
from ranks import on_ranks
from torch.nn.utils import prune
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.nn import DistributedBatchNorm, DistributedLinear
from distdl_lite.partition import Partition

ORDERS = (1.0, 2.0, 3.5, math.inf)


def with_gradients(world: Partition, grid: tuple[int, int]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's and our convolution, normalisation and plain scale, after backward; weights are cut where the second is 2."""
    over, features = grid
    P, P_w = world.grid((over, features, 1)), world.grid((over, features, features, 1), range(over * features**2))
    torch.manual_seed(5)
    serial = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3), torch.nn.BatchNorm1d(6)).double()
    ours = torch.nn.Sequential(
        dnn.DistributedConv1d(P, 4, 6, 3, P_w=P_w, dtype=torch.float64), DistributedBatchNorm(P, 6, dtype=torch.float64)
    )
    dl.load_serial_state_dict(ours, serial.state_dict())
    x, g = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 6, 6, dtype=torch.float64)
    serial(x).backward(g)
    y = ours(block(x, P, P.bounds(x.shape)))
    if y.requires_grad:
        y.backward(block(g, P, P.bounds(g.shape)).view(y.shape))
    return serial, ours


@on_ranks(4, mpi=True)
def test_norms_and_clipping(world: Partition) -> None:
    for grid in ((1, 1), (4, 1), (2, 1), (1, 2)):
        serial, ours = with_gradients(world, grid)
        gradients = [p.grad for p in serial.parameters()]
        team = range(grid[0] * grid[1] ** 2)
        for order in ORDERS:
            norm = dl.grad_norm(ours, order)
            wanted = (
                torch.nn.utils.get_total_norm(gradients, order)
                if world.rank in team
                else torch.zeros((), dtype=torch.float64)
            )
            torch.testing.assert_close(norm, wanted)  # sums in another order
            values = world.allgather_data(norm.item())
            assert values is not None
            assert len({values[rank] for rank in team}) == 1
            for max_norm in (1e-2, 1e6):
                models = copy.deepcopy(serial), copy.deepcopy(ours)
                for model, original in zip(models, (serial, ours), strict=True):
                    for p, q in zip(model.parameters(), original.parameters(), strict=True):
                        p.grad = None if q.grad is None else q.grad.clone()
                torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm, order)
                assert dl.clip_grad_norm_(models[1], max_norm, order).item() == norm.item()
                for mine, theirs in zip(models[1], models[0], strict=True):
                    check_held(mine, theirs, world.rank, rtol=1e-9, atol=1e-9)


@on_ranks(4)
def test_a_plain_torch_layer_counts_once(world: Partition) -> None:
    P = world.grid((4, 1))
    layer, plain = DistributedLinear(P, P, None, 1, 1), torch.nn.Linear(1, 1)
    net = torch.nn.Sequential(layer, plain)
    assert dl.grad_norm(net).item() == 0
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)
    assert dl.grad_norm(net).item() == 6
    if world.rank == 1:  # one rank's model changes
        net.append(torch.nn.Linear(1, 1))
        net[2].weight.grad = torch.full((1, 1), 8.0)
    assert dl.grad_norm(net).item() == 10
    for order in (0, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"norm_type must be above 0, not {order}"):
            dl.clip_grad_norm_(net, 1.0, order)


@on_ranks(2)
def test_norms_that_are_not_finite(world: Partition) -> None:
    P = world.grid((1, 2))
    layer = DistributedLinear(P, P, None, 2, 4)
    for p in layer.parameters():
        p.grad = torch.full_like(p, math.nan if world.rank == 1 else 1.0)
    assert dl.grad_norm(layer).isnan()
    assert dl.grad_norm(layer, math.inf).isnan()
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        dl.clip_grad_norm_(layer, 1.0, error_if_nonfinite=True)


WAYS: tuple[Callable[[torch.nn.Module], Any], ...] = (
    torch.nn.utils.parametrizations.weight_norm,
    torch.nn.utils.weight_norm,
    partial(prune.l1_unstructured, name="weight", amount=0.5),
)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@on_ranks(2)
def test_a_weight_that_is_made_of_others(world: Partition) -> None:
    """Of a block nobody knows how the others are cut; of a weight that all ranks hold whole, they are whole too."""
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for way in WAYS:
        torch.manual_seed(5)
        serial = torch.nn.Conv1d(4, 6, 3, dtype=torch.float64)
        way(serial)
        serial(x).square().sum().backward()
        for grid in ((1, 2, 1), (1, 1, 2)):
            P = world.grid(grid)
            torch.manual_seed(5)
            layer = dnn.DistributedConv1d(P, 4, 6, 3, dtype=torch.float64)
            net = torch.nn.Sequential(layer)
            if grid[1] == 1 or world.rank == 1:  # one rank is enough
                way(layer)
            net(x[P.block(x.shape)]).square().sum().backward()
            if grid[1] == 1:
                norm = torch.nn.utils.get_total_norm([p.grad for p in serial.parameters()])
                torch.testing.assert_close(dl.grad_norm(net), norm)
                continue
            for ask in (dl.grad_norm, dl.grad_norm, dl.serial_state_dict):
                assert_refused(world, P, partial(ask, net), "0.weight of shape (6, 4, 3) is cut over ranks")
            load = partial(dl.load_serial_state_dict, net, torch.nn.Sequential(serial).state_dict())
            assert_refused(world, P, load, "0.weight of shape (6, 4, 3) is cut over ranks")


def test_check_optimizer() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        dl.check_optimizer(kind(weights, lr=0.1))
    for kind in (torch.optim.LBFGS, torch.optim.Adafactor):
        with pytest.raises(ValueError, match=f"{kind.__name__} is not known to update each element by itself"):
            dl.check_optimizer(kind(weights))


def test_the_model_is_needed() -> None:
    with pytest.raises(TypeError, match=r"the model is needed, a torch.nn.Module, not generator"):
        dl.clip_grad_norm_(torch.nn.Linear(1, 1).parameters(), 1.0)
