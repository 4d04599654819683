"""Where weights live: the serial values for the same seed, replicas equal for ever, state in and out."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import block, check_held, held
from ranks import on_ranks
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite import reducer as red
from distdl_lite.nn import DistributedBatchNorm, DistributedLinear, DistributedMSELoss, draws
from distdl_lite.partition import Partition
from distdl_lite.testing import spmd

GRIDS = ((1, 1), (1, 2), (2, 2), (4, 1))  # of height and width


def pairs(world: Partition) -> Iterator[tuple]:
    """Functions that make torch's layer and ours."""
    P, line, wide = world.grid((1, 1, 2, 2)), world.grid((1, 2, 1), (3, 1)), world.grid((1, 2), (2, 0))
    cube = world.grid((4, 1, 1, 1, 1))
    yield lambda: torch.nn.Conv2d(3, 5, 3), lambda: dnn.DistributedConv2d(P, 3, 5, 3)
    yield lambda: torch.nn.Conv1d(4, 6, 2, groups=2), lambda: dnn.DistributedConv1d(line, 4, 6, 2, groups=2)
    yield lambda: torch.nn.Conv3d(2, 3, 2, bias=False), lambda: dnn.DistributedConv3d(cube, 2, 3, 2, bias=False)
    yield lambda: torch.nn.Linear(7, 5), lambda: DistributedLinear(wide, wide, world.grid((2, 2)), 7, 5)
    yield lambda: torch.nn.Linear(3, 1), lambda: DistributedLinear(wide, wide, None, 3, 1)
    yield lambda: torch.nn.BatchNorm2d(5), lambda: DistributedBatchNorm(world.grid((1, 2, 2, 1)), 5)
    yield lambda: torch.nn.BatchNorm1d(5, affine=False), lambda: DistributedBatchNorm(wide, 5, affine=False)


def with_seed(seed: int, make) -> tuple[torch.nn.Module, torch.Tensor]:
    """A module, and what the generator draws next."""
    torch.manual_seed(seed)
    return make(), torch.rand(3)


@on_ranks(4, mpi=True)
def test_start_values(world: Partition) -> None:
    for serial_of, layer_of in pairs(world):
        (serial, after), (layer, after_ours) = with_seed(1, serial_of), with_seed(1, layer_of)
        assert torch.equal(after, after_ours)
        check_held(layer, serial, world.rank)
        assert [n for n, _ in layer.named_parameters()] == [n for n, _ in serial.named_parameters()]
        assert list(layer.state_dict()) == list(serial.state_dict())
        for name, p in layer.named_parameters():
            assert p.is_leaf
            assert p.requires_grad
            assert layer._distdl_places[name].layout.box(world.rank) is not None or p.numel() == 0


@on_ranks(4)
def test_a_large_weight_is_drawn_in_blocks(world: Partition) -> None:
    at_once, draws._DRAWN_AT_ONCE = draws._DRAWN_AT_ONCE, 100
    P = world.grid((1, 2))
    try:
        (serial, after), (layer, after_ours) = (
            with_seed(2, lambda: torch.nn.Linear(37, 41)),
            with_seed(2, lambda: DistributedLinear(P, P, world.grid((2, 2)), 37, 41)),
        )
    finally:
        draws._DRAWN_AT_ONCE = at_once
    assert torch.equal(after, after_ours)
    check_held(layer, serial, world.rank)


def check_replicas(net: torch.nn.Module, world: Partition) -> None:
    """Assert that every rank's copy of a weight or buffer has the same bits."""
    mine = {}
    for prefix, inner in net.named_modules():
        for name, place in getattr(inner, "_distdl_places", {}).items():
            if place.layout.box(world.rank) is not None:
                mine[f"{prefix}.{name}", place.layout.box(world.rank)] = getattr(inner, name).detach().numpy().tobytes()
    found: dict = {}
    for theirs in world.allgather_data(mine):
        for key, value in theirs.items():
            assert found.setdefault(key, value) == value, key


@on_ranks(4, mpi=True)
def test_ranks_with_different_seeds_agree(world: Partition) -> None:
    for _, layer_of in pairs(world):
        torch.manual_seed(world.rank)
        check_replicas(layer_of(), world)


def nets(world: Partition, grid: tuple[int, int]) -> tuple[torch.nn.Module, torch.nn.Module, Partition, Partition]:
    """torch's network and ours, of a convolution, batch normalisation and a linear layer along the width."""
    h, w = grid
    P_x, P_y = world.grid((1, 1, h, w)), world.grid((1, 1, h, 1))
    P_w = world.grid((1, 1, h, 1, w))
    torch.manual_seed(7)
    serial = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.BatchNorm2d(3), torch.nn.Tanh(), torch.nn.Linear(6, 4)
    ).double()
    kind = {"dtype": torch.float64}
    ours = torch.nn.Sequential(
        dnn.DistributedConv2d(P_x, 2, 3, 3, padding=1, **kind),
        DistributedBatchNorm(P_x, 3, **kind),
        torch.nn.Tanh(),
        DistributedLinear(P_x, P_y, P_w, 6, 4, **kind),
    )
    dl.load_serial_state_dict(ours, serial.state_dict())
    return serial, ours, P_x, P_y


@on_ranks(4, mpi=True)
def test_training_is_serial_training(world: Partition) -> None:
    """20 steps stay within 1e-6: rounding of sums in another order grows from 1e-16 on the way."""
    optimizers = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 1e-2})
    for number, grid in enumerate(GRIDS):
        for optimizer, options in optimizers if grid == (2, 2) else optimizers[number % 2 :][:1]:
            serial, ours, P_x, P_y = nets(world, grid)
            loss = DistributedMSELoss(P_y)
            steps = [optimizer(net.parameters(), **options) for net in (serial, ours)]
            dl.check_optimizer(steps[1])
            generator = torch.Generator().manual_seed(0)
            for _ in range(20):
                x = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=generator)
                t = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
                wanted = torch.nn.functional.mse_loss(serial(x), t)
                value = loss(ours(block(x, P_x, P_x.bounds(x.shape))), block(t, P_y, P_y.bounds(t.shape)))
                for step, result in zip(steps, (wanted, value), strict=True):
                    step.zero_grad()
                    result.backward()
                    step.step()
                if P_y.active:
                    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
            check_replicas(ours, world)
            state = dl.serial_state_dict(ours)
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, serial.state_dict()[name], rtol=1e-6, atol=1e-6)


@on_ranks(4, mpi=True)
def test_state_in_and_out(world: Partition) -> None:
    for grid in GRIDS:
        for root in (0, 3):
            serial, ours, *_ = nets(world, grid)
            state = {name: tensor.clone() for name, tensor in serial.state_dict().items()}
            for tensor in state.values():
                tensor.copy_(torch.randint(-9, 9, tensor.shape))
            dl.load_serial_state_dict(ours, state if world.rank == root else None, root)
            back = dl.serial_state_dict(ours, root)
            assert list(back) == (list(state) if world.rank == root else [])
            for name, tensor in back.items():
                assert torch.equal(tensor, state[name])
                assert tensor.dtype is state[name].dtype
            check_replicas(ours, world)


@on_ranks(4, mpi=True)
def test_a_state_that_does_not_fit(world: Partition) -> None:
    serial, ours, *_ = nets(world, (2, 2))
    state = serial.state_dict()
    before = copy.deepcopy(ours.state_dict())
    for wrong, text in (
        ({**state, "more": torch.ones(2)}, r"more: module has none, state \(2,\)"),
        ({k: v for k, v in state.items() if k != "0.bias"}, r"0.bias: module \(3,\), state has none"),
        ({**state, "3.weight": torch.ones(4, 3)}, r"3.weight: module \(4, 6\), state \(4, 3\)"),
        (None, r"state_dict\(\) is needed on the root, not NoneType"),
        ({"model": state}, r"model: module has none, state OrderedDict"),
    ):
        with pytest.raises(ValueError, match=text) as found:
            dl.load_serial_state_dict(ours, wrong if world.rank == 0 else None)
        texts = world.allgather_data(str(found.value))
        assert texts is not None
        assert len(set(texts)) == 1
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name])


def on_lines(world: Partition) -> tuple[torch.nn.Module, torch.nn.Module, Partition]:
    """torch's network and ours on the rows of a grid of 2 x 2, whose middle layer is on all of it; and a rank's row."""
    P = world.grid((2, 1, 2), [2, 0, 1, 3])
    row = P.create_cartesian_subtopology_partition([False, True, True])
    torch.manual_seed(3)
    serial = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).double()
    torch.manual_seed(world.rank)
    kind = {"dtype": torch.float64}
    ours = torch.nn.Sequential(
        DistributedLinear(row, row, None, 6, 4, **kind),
        DistributedBatchNorm(world.grid((4, 1)), 4, **kind),
        torch.nn.Linear(4, 3).double(),
    )
    return serial, ours, row


@on_ranks(4, mpi=True)
def test_lines_of_a_grid_hold_the_same(world: Partition) -> None:
    """A state goes to all lines, and comes from the root's."""
    for root in (0, 3):
        serial, ours, row = on_lines(world)
        state = serial.state_dict()
        for net in (ours, pickle.loads(pickle.dumps(ours))):
            dl.load_serial_state_dict(net, state if world.rank == root else None, root)
            for number in (0, 1):
                check_held(net[number], serial[number], world.rank)
            back = dl.serial_state_dict(net, root)
            assert list(back) == (list(state) if world.rank == root else [])
            assert all(torch.equal(value, state[name]) for name, value in back.items())
        with torch.no_grad():
            ours[0].weight.fill_(row.ranks[0])
        back = dl.serial_state_dict(ours, root)
        assert not back or torch.equal(back["0.weight"], torch.full((4, 6), float(row.ranks[0])).double())
    assert world.allgather_data(world.rank) == [0, 1, 2, 3]  # and the ranks are still together


@on_ranks(4, mpi=True)
def test_lines_of_a_grid_hold_different_models(world: Partition) -> None:
    """Each line names a root of its own; a line gives its state also where the others do not call."""
    serial, ours, row = on_lines(world)
    alone, root = ours[0], row.ranks[0]
    own = {name: value + root for name, value in serial[0].state_dict().items()}
    dl.load_serial_state_dict(alone, own if world.rank == root else None, root)
    if root == 2:
        back = dl.serial_state_dict(alone, root)
        assert world.rank != root or all(torch.equal(back[name], value) for name, value in own.items())
    refusals = [
        (lambda: dl.load_serial_state_dict(ours, serial.state_dict(), root), "1.weight lies on ranks [0, 1, 2, 3], b"),
        (lambda: dl.load_serial_state_dict(alone, own, world.rank), f"not all of them name root {world.rank}"),
        (lambda: dl.load_serial_state_dict(alone, own, 3 - root), f"name root {3 - root}, which names root {root}"),
    ]
    for attempt, text in refusals:
        with pytest.raises(ValueError, match=re.escape(text)):
            attempt()
    width = 4 if root == 2 else 5
    other = DistributedLinear(row, row, None, 6, width)
    fits = torch.nn.Linear(6, width).state_dict()
    with pytest.raises(ValueError, match="the ranks disagree: rank 1: shape of weight"):
        dl.load_serial_state_dict(other, fits)
    dl.load_serial_state_dict(other, fits, root)
    outside = world.grid((2, 1), [0, 1]).create_cartesian_subtopology_partition([False, True])
    layer = dnn.DistributedRMSNorm(outside, 4) if outside.active else torch.nn.Sequential()
    if outside.active:
        with pytest.raises(
            ValueError, match=r"each line of a grid over ranks \[0, 1\] has a weight of its own: root 3 must"
        ):
            dl.serial_state_dict(layer, 3)


@on_ranks(4, mpi=True)
def test_lists_of_ranks_hold_different_models(world: Partition) -> None:
    """Each names a root of its own, and asks its model for its state once; a root that a model does not lie on calls, too."""
    ranks = [0, 3] if world.rank in (0, 3) else [2, 1]
    layer, other = (dnn.DistributedConv1d(world.grid((1, 1, 2), r), 2, 3, 3) for r in (ranks, [1, 2]))
    asked: list[str] = []
    layer.register_state_dict_pre_hook(lambda *_: asked.append("state"))
    for root in (ranks[0], ranks[1]):
        state = torch.nn.Conv1d(2, 3, 3).state_dict()
        dl.load_serial_state_dict(layer, state if world.rank == root else None, root)
        back = dl.serial_state_dict(layer, root)
        assert list(back) == (list(state) if world.rank == root else [])
        assert all(torch.equal(value, state[name]) for name, value in back.items())
    assert asked == ["state"] * 4
    state = torch.nn.Conv1d(2, 3, 3).state_dict()
    if world.rank != 3:
        dl.load_serial_state_dict(other, state if world.rank == 0 else None)
        back = dl.serial_state_dict(other)
        assert world.rank or all(torch.equal(back[name], value) for name, value in state.items())


@on_ranks(4, mpi=True)
def test_layers_on_lists_of_ranks_beside_layers_on_all(world: Partition) -> None:
    """A norm on the ranks at the same place of their lines: states go in and out, and norms count it once."""
    kind = {"dtype": torch.float64}
    for b, p in ((1, 4), (2, 2), (4, 1)):
        P = world.grid((b, 1, p))
        same = [world.grid((b, 1, 1), ranks=range(i, b * p, p)) for i in range(p)][world.rank % p]
        serial = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 16)).double()
        ours = torch.nn.Sequential(
            dnn.DistributedLayerNorm(same, 8, **kind), dnn.DistributedColumnParallelLinear(P, 8, 16, **kind)
        )
        for root in (0, 3):
            state = {name: torch.randn_like(value) for name, value in serial.state_dict().items()}
            dl.load_serial_state_dict(ours, state if world.rank == root else None, root)
            back = dl.serial_state_dict(ours, root)
            assert all(torch.equal(value, state[name]) for name, value in back.items())
            assert list(back) == (list(state) if world.rank == root else [])
        states = world.allgather_data(state)
        assert states is not None
        serial.load_state_dict(states[root])
        optimizers = [torch.optim.Adam(model.parameters()) for model in (serial, ours)]
        x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1), **kind)
        ours(x.chunk(b)[world.rank // p]).square().sum().backward()
        serial(x).square().sum().backward()
        for order in (2.0, math.inf):
            wanted = torch.nn.utils.get_total_norm([q.grad for q in serial.parameters()], order)
            torch.testing.assert_close(dl.grad_norm(ours, order), wanted)
        for optimizer in optimizers:
            optimizer.step()
        told = dl.serial_optimizer_state_dict(ours, optimizers[1], root)
        for number, states in optimizers[0].state_dict()["state"].items() if world.rank == root else ():
            for name, value in states.items():
                torch.testing.assert_close(told["state"][number][name], value)
        dl.load_serial_optimizer_state_dict(ours, optimizers[1], optimizers[0].state_dict(), root)


@on_ranks(4)
def test_copies_train_like_the_original(world: Partition) -> None:
    _, ours, P_x, P_y = nets(world, (2, 2))
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    mine, twins = block(x, P_x, P_x.bounds(x.shape)), []
    for net in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours):
        y = net(mine)
        DistributedMSELoss(P_y)(y, torch.zeros_like(y)).backward()
        twins.append([p.grad for p in net.parameters() if p.grad is not None])
    for copied in twins[:2]:
        assert all(torch.equal(a, b) for a, b in zip(copied, twins[2], strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_a_model_and_its_copy_in_one_backward(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if early:
        monkeypatch.setattr(red, "EARLY_BYTES", 8)
    spmd(4, check_a_model_and_its_copy)


@on_ranks(4, mpi=True)
def test_a_model_and_its_copy(world: Partition) -> None:
    check_a_model_and_its_copy(world)


def check_a_model_and_its_copy(world: Partition) -> None:
    """Whose parameters have the same places in the order of sums: one after the other, in each other, and twice."""
    line = world.grid((1, 1, 4), (2, 0, 3, 1))

    def both(conv: type, norm: type, *P: Partition) -> list[torch.nn.Module]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(conv(*P, 2, 3, 3, padding=1), norm(*P, 3), conv(*P, 3, 2, 3, padding=1)).double()
        return [net, copy.deepcopy(net)]

    ours = both(dnn.DistributedConv1d, DistributedBatchNorm, line)
    serial = both(torch.nn.Conv1d, torch.nn.BatchNorm1d)
    loss, zero = DistributedMSELoss(line), torch.zeros(())
    for x in (torch.randn(3, 2, 9).double(), torch.randn(2, 2, 2).double()):  # the latter with empty blocks
        for use in USES * 2:
            for (a, b), of, t in ((ours, loss, x[line.block(x.shape)]), (serial, torch.nn.MSELoss(), x)):
                for p in (*a.parameters(), *b.parameters()):
                    p.grad = None
                for y in use(a, b, t):
                    of(y, zero.to(y).expand(y.shape)).backward()
            for net, twin in zip(ours, serial, strict=True):
                for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
                    with torch.no_grad():
                        p -= 0.01 * p.grad
                        q -= 0.01 * q.grad


USES = [
    lambda a, b, x: [a(x) - 3 * b(x)],
    lambda a, b, x: [a(2 * x) * b(x) + a(x)],
    lambda a, b, x: [a(b(x)), b(a(x))],
    lambda a, b, x: [b(b(a(x)))],
]


FROZEN = {
    "a convolution": lambda P, Q: dnn.DistributedConv1d(P, 2, 2, 3, padding=1),
    "a norm": lambda P, Q: DistributedBatchNorm(P, 2),
    "a pool": lambda P, Q: dnn.DistributedAvgPool1d(P, 3, 1, 1),
    "a softmax": lambda P, Q: dnn.DistributedSoftmax(P, 2),
    "movements": lambda P, Q: torch.nn.Sequential(
        dnn.Repartition(P, Q), DistributedLinear(Q, None, None, 8, 8), dnn.Repartition(Q, P)
    ),
}


@on_ranks(2, mpi=True)
def test_some_ranks_have_nothing_to_differentiate(world: Partition) -> None:
    """One goes towards its input, the other has frozen weights alone and calls backward()."""
    P, Q = world.grid((1, 1, 2)), world.grid((2, 1, 1))
    loss, whole = DistributedMSELoss(P), torch.arange(48.0).view(3, 2, 8).sin()
    for make in FROZEN.values():
        net = make(P, Q).requires_grad_(False)
        for holder in (0, 1):
            found = []
            for way in ("everywhere", "inputs", "grad"):
                x = P.cut(whole).requires_grad_(way == "everywhere" or world.rank == holder)
                y = net(x) ** 2
                value = loss(y, torch.zeros_like(y))
                if way == "inputs" and x.requires_grad:
                    value.backward(inputs=[x])
                elif way == "grad" and x.requires_grad:
                    (x.grad,) = torch.autograd.grad(value, x)
                else:
                    value.backward()
                found.append(x.grad)
            assert world.rank == holder or found[1:] == [None, None]
            assert world.rank != holder or all(torch.equal(found[0], g) for g in found[1:])


@on_ranks(2, mpi=True)
def test_ranks_that_differentiate_otherwise_are_refused(world: Partition) -> None:
    """Where weights are not frozen, backward() sums their gradients, which the other rank leaves out or sums at once."""
    P = world.grid((2, 1, 1))
    check_ends(world, dnn.DistributedConv1d(P, 2, 2, 3), None)
    linear = DistributedLinear(P, None, None, 4, 2)
    check_ends(world, linear, linear)


class Around(dnn.Module):
    """A network whose layer rides on its agreement."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


WEIGHTS: list[tuple[str, int, Any]] = [  # a weight, the lengths that it gets on one rank, and its layer
    ("weight", 2, lambda P: dnn.DistributedConv2d(P, 4, 4, 3, padding=1)),
    ("bias", 5, lambda P: dnn.DistributedConvTranspose2d(P, 4, 4, 3)),
    ("weight", 9, lambda P: DistributedLinear(P, None, None, 6, 4)),
    ("weight", 1, lambda P: dnn.DistributedGroupNorm(P, 2, 4)),
    ("running_var", 5, lambda P: DistributedBatchNorm(P, 4)),
]


@on_ranks(3)
def test_a_weight_of_another_shape_is_refused(world: Partition) -> None:
    """Where it is used, on all ranks, and no longer than it is there."""
    P, x = world.grid((1, 1, 3, 1)), torch.rand(2, 4, 3, 6)
    block = x[P.block(x.shape)]
    for name, length, make in WEIGHTS:
        layer = make(P)
        for module in (layer, Around(layer)):
            good, y = getattr(layer, name), module(block)
            if world.rank == 1:
                other = torch.rand([length] * good.dim())
                setattr(layer, name, torch.nn.Parameter(other) if good.requires_grad else other)
            text = rf"rank 1 has a {name} of shape \({length},.*its part of"
            for _ in range(2):
                with pytest.raises(ValueError, match=text) as found:
                    module(block)
                assert len(set(world.allgather_data(str(found.value)) or ())) == 1
            setattr(layer, name, good)
            torch.testing.assert_close(module(block), y, rtol=0, atol=0)


@on_ranks(2)
def test_ranks_that_make_a_layer_instead_are_refused(world: Partition) -> None:
    P = world.grid((2, 1, 1))
    check_ends(world, DistributedLinear(P, None, None, 4, 2), lambda x: dnn.DistributedRMSNorm(P, 4))


def check_ends(world: Partition, layer: torch.nn.Module, next_call: Any) -> None:
    """Rank 0 goes towards its input and on, unless that sums weights, where rank 1 sums them as backward() ends."""
    at_end = r"rank 1.* the end of a backward\(\) that has reached"
    x = torch.ones(2, 2, 4, requires_grad=world.rank == 0)
    value = layer(x).sum()
    if world.rank == 1:
        with pytest.raises(RuntimeError, match=f"meet in different calls: rank 0.*; {at_end}"):
            value.backward()
    elif next_call is None:
        with pytest.raises(RuntimeError, match=f"meet in different calls: .* sums at once.*{at_end}"):
            value.backward(inputs=[x])
    else:
        value.backward(inputs=[x])
        with pytest.raises(RuntimeError, match=f"meet in different calls: .*{at_end}"):
            next_call(x)
    layer.zero_grad()
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@on_ranks(2)
def test_gradients_of_replicas_by_every_way_into_autograd(world: Partition) -> None:
    """backward, accumulation, autograd.grad and create_graph all give the sum over the replicas."""
    P = world.grid((2, 1))
    layer = DistributedLinear(P, P, None, 3, 2, dtype=torch.float64)
    x_global = torch.randint(-4, 5, (5, 3)).double()
    x = block(x_global, P, P.bounds(x_global.shape))
    wanted = x_global.sum(0).expand(2, 3)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, wanted)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, 2 * wanted)
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=create_graph)
        assert torch.equal(found, wanted)
    layer.weight.requires_grad_(False)
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((2,), 5.0).double())


class _Squared(torch.nn.Module):
    """A parametrization that saves a tensor, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return w * w


@on_ranks(2)
def test_a_parametrized_weight_in_a_checkpoint(world: Partition) -> None:
    """Set-up does not ask for the weight: the checkpoint runs the layer again without it."""
    P, Q, line = world.grid((1, 1, 2)), world.grid((1, 2, 1)), world.grid((2,))
    kind: dict[str, Any] = {"dtype": torch.float64}
    x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1), **kind)
    cases: list[tuple[Any, Any, torch.nn.Module]] = [
        (P.block(x.shape), torch.nn.Conv1d(6, 6, 3, padding=1, **kind), dnn.DistributedConv1d(P, 6, 6, 3, padding=1, **kind)),
        (P.block(x.shape), torch.nn.BatchNorm1d(6, **kind), DistributedBatchNorm(P, 6, **kind)),
        (Q.block(x.shape), torch.nn.Linear(6, 6, **kind), DistributedLinear(Q, None, None, 6, 6, **kind)),
        (..., torch.nn.Linear(6, 6, **kind), dnn.DistributedColumnParallelLinear(line, 6, 6, gather_output=True, **kind)),
    ]  # fmt: skip
    for part, serial, layer in cases:
        dl.load_serial_state_dict(layer, serial.state_dict())
        for module in (serial, layer):
            parametrize.register_parametrization(module, "weight", _Squared())
        before = [module.parametrizations["weight"][0].calls for module in (serial, layer)]
        y, wanted = (checkpoint(*call, use_reentrant=False) for call in ((layer, x[part]), (serial, x)))
        torch.testing.assert_close(y, wanted[part])
        y.square().sum().backward()
        wanted.square().sum().backward()
        calls = [module.parametrizations["weight"][0].calls for module in (serial, layer)]
        assert calls[1] - before[1] == calls[0] - before[0] == 2
        check_held(layer, serial, world.rank, 1e-9, 1e-9)
        found, whole = (module.parametrizations["weight"].original.grad for module in (layer, serial))
        torch.testing.assert_close(found, held(layer, "weight", whole, world.rank))
