"""An optimizer's state goes from one grid to another, and to and from the serial model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from blocks import block
from ranks import on_ranks
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.partition import Partition

KIND = {"dtype": torch.float64}
STEPS = 5
Net = tuple[torch.nn.Module, Any, Any]  # with the partitions of its input and output
Make = Callable[[Any], torch.optim.Optimizer]


def tied(net: torch.nn.Sequential) -> torch.nn.Sequential:
    """With one weight for the first two convolutions, and a bias that stays as it is, as batch normalisation undoes it."""
    net[1].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    return net


def serial_net() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return tied(
        torch.nn.Sequential(
            torch.nn.Conv2d(2, 2, 3, padding=1),
            torch.nn.Conv2d(2, 2, 3, padding=1),
            torch.nn.Conv2d(2, 3, 3, padding=1),
            torch.nn.BatchNorm2d(3),
            torch.nn.Tanh(),
            torch.nn.Linear(6, 4),
        ).double()
    )


def net_on(world: Partition, grid: tuple[int, int]) -> Net:
    """The network on a grid of height and width, its last layer cut by features too."""
    h, w = grid
    P_x, P_y, P_w = world.grid((1, 1, h, w)), world.grid((1, 1, h, 1)), world.grid((1, 1, h, 1, w))
    net = torch.nn.Sequential(
        *(dnn.DistributedConv2d(P_x, 2, outs, 3, padding=1, **KIND) for outs in (2, 2, 3)),
        dnn.DistributedBatchNorm(P_x, 3, **KIND),
        torch.nn.Tanh(),
        dnn.DistributedLinear(P_x, P_y, P_w, 6, 4, **KIND),
    )
    return tied(net), P_x, P_y


def groups(net: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups, of biases and of the rest, in another order than ``parameters()`` has them."""
    names = dict(net.named_parameters())
    biases = [p for name, p in names.items() if "bias" in name]
    return [{"params": biases, "lr": 0.02}, {"params": [p for n, p in names.items() if "bias" not in n]}]


def train(net: Net, optimizer: torch.optim.Optimizer, first: int) -> None:
    """Some steps from the first on, of serial training or of ours."""
    module, P_x, P_y = net
    loss = torch.nn.MSELoss() if P_x is None else dnn.DistributedMSELoss(P_y)
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 2, 5, 6, generator=generator, **KIND)
        target = torch.randn(2, 3, 5, 4, generator=generator, **KIND)
        if P_x is not None:
            x, target = block(x, P_x, P_x.bounds(x.shape)), block(target, P_y, P_y.bounds(target.shape))
        optimizer.zero_grad()
        loss(module(x), target).backward()
        optimizer.step()


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Check states of the same structure to 1e-12."""
    assert isinstance(found, type(wanted)), where
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=lambda text: f"{where}: {text}")
    else:
        assert found == wanted, where


EPS = 1e-2  # where a gradient is nearly 0, a small one would divide rounding by rounding
MAKES: dict[str, Make] = {
    "AdamW": lambda net: torch.optim.AdamW(groups(net), lr=0.01, weight_decay=0.1, eps=EPS),
    "SGD": lambda net: torch.optim.SGD(groups(net), lr=0.05, momentum=0.9, nesterov=True),
    "Adam, amsgrad": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True, eps=EPS),
    "NAdam": lambda net: torch.optim.NAdam(list(net.named_parameters()), lr=0.01, eps=EPS),
    "Adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.01, eps=EPS),
    "ASGD": lambda net: torch.optim.ASGD(net.parameters(), lr=0.01),
}
ROUNDED = {"NAdam", "ASGD"}  # whose float32 numbers torch's load_state_dict makes float64, also in serial training
WAYS: list[tuple[Sequence[Any], Sequence[str]]] = [  # grids of the first and the last steps; None is the serial model
    (((2, 2), (4, 1)), ["AdamW", "SGD", "NAdam"]),
    (((4, 1), (1, 1)), ["ASGD"]),
    (((1, 2), (2, 2)), ["Adagrad"]),
    (((2, 2), None), ["Adam, amsgrad", "SGD"]),
    ((None, (2, 2)), ["AdamW"]),
]


def check_way(world: Partition, ways: Sequence[Any], make: Make, root: int) -> None:
    serial = serial_net()
    reference = make(serial)
    train((serial, None, None), reference, 0)
    if type(reference).__name__ in ROUNDED:
        reference.load_state_dict(copy.deepcopy(reference.state_dict()))
    train((serial, None, None), reference, STEPS)
    weights: Any = serial_net().state_dict()
    state: Any = None
    for first, grid in zip((0, STEPS), ways, strict=True):
        net: Net = (serial_net(), None, None) if grid is None else net_on(world, grid)
        optimizer = make(net[0])
        if grid is None:
            if world.rank == root:
                net[0].load_state_dict(weights)
                if state is not None:
                    optimizer.load_state_dict(state)
                train(net, optimizer, first)
                weights, state = net[0].state_dict(), optimizer.state_dict()
            continue
        dl.load_serial_state_dict(net[0], weights, root)
        if first:
            before = copy.deepcopy(state)
            dl.load_serial_optimizer_state_dict(net[0], optimizer, state if world.rank == root else None, root)
        train(net, optimizer, first)
        if first and world.rank == root:
            assert_same(state, before)  # the optimizer has not worked in the state it was given
        weights, state = dl.serial_state_dict(net[0], root), dl.serial_optimizer_state_dict(net[0], optimizer, root)
        assert bool(state) == (world.rank == root)
    if world.rank == root:
        assert_same(dict(weights), dict(serial.state_dict()))
        assert_same(state, reference.state_dict())


@on_ranks(4, mpi=True)
def test_another_grid_goes_on_as_the_serial_model(world: Partition) -> None:
    """Two groups, a tied weight and a frozen one; five steps here, five there."""
    for number, (ways, names) in enumerate(WAYS):
        for name in names:
            check_way(world, ways, MAKES[name], root=number % 4)


@on_ranks(4, mpi=True)
def test_states_that_do_not_fit(world: Partition) -> None:
    """Refused on all ranks with one text, before anything has changed."""
    net = net_on(world, (2, 2))
    optimizer = MAKES["AdamW"](net[0])
    train(net, optimizer, 0)
    module = net[0]
    state = dl.serial_optimizer_state_dict(module, optimizer)
    narrow = copy.deepcopy(state)
    if world.rank == 0:
        narrow["state"][5]["exp_avg"] = torch.ones(2, 2, 1, 1)
    wrong = [
        (None, "the optimizer has groups of [5, 4] parameters, the state of []"),
        (torch.optim.SGD(serial_net().parameters()).state_dict(), "groups of [5, 4] parameters, the state of [9]"),
        (narrow, "'exp_avg' of 0.weight has shape (2, 2, 1, 1), the weight (2, 2, 3, 3)"),
        ({"param_groups": 3}, "AdamW: "),
    ]
    load = dl.load_serial_optimizer_state_dict
    for given, text in wrong:
        given = given if world.rank == 0 else None
        assert_refused(world, world, lambda given=given: load(module, optimizer, given), text, (ValueError, TypeError))
    for made in (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon):
        matrices = [p for p in module.parameters() if p.dim() == 2] if made is torch.optim.Muon else module.parameters()
        other = made(matrices)
        for attempt in (
            lambda other=other: dl.serial_optimizer_state_dict(module, other),
            lambda other=other: load(module, other, None),
        ):
            assert_refused(world, world, attempt, f"{made.__name__} is not known to update each element by itself")
    foreign = torch.optim.SGD([*module.parameters(), torch.nn.Parameter(torch.ones(2))])
    text = "SGD: parameters [9] are none of the module's"
    assert_refused(world, world, lambda: dl.serial_optimizer_state_dict(module, foreign), text)
    if world.rank == 3:
        optimizer.state[module[0].weight]["step"] += 1
    text = "AdamW: state of 0.weight"
    assert_refused(world, world, lambda: dl.serial_optimizer_state_dict(module, optimizer), text)
    load(module, optimizer, state)
    optimizer.state[module[3].weight]["exp_avg"] = torch.ones(1, 3)
    text = "state of 3.weight: 'exp_avg' on rank 0 is neither a number nor of the weight's shape"
    assert_refused(world, world, lambda: dl.serial_optimizer_state_dict(module, optimizer), text)
    load(module, optimizer, state)
    assert_same(dl.serial_optimizer_state_dict(module, optimizer), state)


@on_ranks(4, mpi=True)
def test_lines_of_a_grid(world: Partition) -> None:
    """Each line has an optimizer of its own; all lines that name a root take its state."""
    P = world.grid((2, 1, 2))
    row = P.create_cartesian_subtopology_partition([False, True, True])
    layer = dnn.DistributedLinear(row, row, None, 6, 4, **KIND)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.weight.grad = torch.full_like(layer.weight, 1.0 + row.ranks[0])
    layer.bias.grad = torch.zeros_like(layer.bias)
    optimizer.step()
    for root in (row.ranks[0], 3):
        state = dl.serial_optimizer_state_dict(layer, optimizer, root)
        if world.rank == root:
            wanted = torch.full((4, 6), 0.1 * (1 + row.ranks[0]), **KIND)
            torch.testing.assert_close(state["state"][0]["exp_avg"], wanted)
    dl.load_serial_optimizer_state_dict(layer, optimizer, state, 3)
    block = optimizer.state[layer.weight]["exp_avg"]
    torch.testing.assert_close(block, torch.full_like(block, 0.3))


@pytest.mark.parametrize("name", MAKES)
def test_the_state_is_copied(name: str) -> None:
    """What comes out is not what the optimizer goes on working in."""

    def body(world: Partition) -> None:
        layer = torch.nn.Sequential(dnn.DistributedConv1d(world.grid((1, 1, 1)), 1, 1, 3), torch.nn.Linear(3, 2))
        optimizer = MAKES[name](layer)
        for _ in range(2):
            layer(torch.ones(1, 1, 5)).sum().backward()
            optimizer.step()
            state = dl.serial_optimizer_state_dict(layer, optimizer)
            before = copy.deepcopy(state)
        optimizer.step()
        assert_same(state, before)

    dl.testing.spmd(1, body)
