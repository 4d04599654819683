"""Replicas that a program has set apart: found on all ranks, and made equal."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch.nn.utils import parametrizations
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import count


def network(world: dl.Partition) -> torch.nn.Sequential:
    """Weights that all ranks hold, in blocks that two hold each, and on a part of the ranks in an order of their own."""
    return torch.nn.Sequential(
        dnn.DistributedConv2d(world.grid((1, 1, 2, 2)), 2, 2, 3),
        dnn.DistributedConv2d(world.grid((1, 2, 2, 1)), 2, 4, 3),
        dnn.DistributedBatchNorm(world.grid((1, 1, 2, 1), [3, 1]), 2),
        torch.nn.PReLU(),
    )


@on_ranks(4, mpi=True)
def test_set_apart(world: dl.Partition) -> None:
    net = network(world)
    dl.check_replicas(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        if world.rank == 3:
            for tensor in net.state_dict().values():
                tensor.add_(1)
        if world.rank == 2:
            net[1].weight.data = net[1].weight.neg().transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(RuntimeError) as raised, count() as c:
        dl.check_replicas(net)
    assert c.messages == 0  # but for a gather of small objects
    text = str(raised.value)
    assert text == "; ".join(f"{name}: ranks [3] hold other values than the first rank" for name in before)
    assert world.allgather_data(text) == [text] * 4
    dl.synchronise_replicas(net)
    dl.check_replicas(net)
    for name, tensor in net.state_dict().items():
        is_negated = name == "1.weight" and world.rank >= 2  # whose first rank is 2
        assert torch.equal(tensor, -before[name] if is_negated else before[name]), name


@on_ranks(4)
def test_refusals(world: dl.Partition) -> None:
    """Where ranks hold other tensors all refuse, as where nobody knows how the parts of a weight are cut."""
    P = world.create_partition_inclusive([0, 1, 2]).grid((1, 1, 3))
    net = torch.nn.Sequential(dnn.DistributedConv1d(P, 1, 1, 3), torch.nn.Linear(2 + (world.rank == 1), 1))
    assert_refused(world, P, lambda: dl.synchronise_replicas(net), "1.weight: ranks [1] hold other kinds of tensors")
    assert_refused(world, P, lambda: dl.check_replicas(net), "1.weight: ranks [1] hold other values", RuntimeError)
    net[1] = torch.nn.Identity() if world.rank == 2 else torch.nn.Linear(2, 1)
    for call in (dl.synchronise_replicas, dl.check_replicas):
        assert_refused(world, P, lambda call=call: call(net), "the ranks disagree: rank 2: weights and buffers")
    cut = dnn.DistributedConv1d(world.grid((1, 4, 1)), 1, 4, 3)
    parametrizations.weight_norm(cut)
    for call in (dl.synchronise_replicas, dl.check_replicas):
        assert_refused(world, cut.P_x, lambda call=call: call(cut), "weight of shape (4, 1, 3) is cut over ranks")
