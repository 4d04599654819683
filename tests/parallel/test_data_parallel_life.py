"""A container's start, states, copies and end."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from copies import assert_gradients, assert_parameters, draw, mean_square, mlp, train, twins
from ranks import on_ranks
from torch import nn

import distdl_lite as dl
from distdl_lite.testing import count


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


@pytest.mark.check("A22")
@on_ranks(3, mpi=True)
def test_construction_touches_neither_weights_nor_random_numbers(world: dl.Partition) -> None:
    torch.manual_seed(10 + world.rank)
    model = net()
    nn.init.normal_(model[0].weight)
    model[1].running_mean.normal_()
    model.register_buffer("number", torch.tensor(world.rank))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    objects = list(model.parameters())
    dp = dl.DataParallel(model, world)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(dp.parameters(), objects, strict=True))
    told = world.allgather_data({k: v.tolist() for k, v in before.items()})
    assert told[0] != told[1]
    assert {k: v.tolist() for k, v in dp.state_dict().items()} == told[0]
    dp.check_replicas()


@pytest.mark.check("A22")
@on_ranks(2)
def test_starts_that_check_or_leave_alone(world: dl.Partition) -> None:
    model = mlp(3, 2)
    dl.DataParallel(model, init="check")
    with torch.no_grad():
        model[0].bias += world.rank
    own = model[0].bias.tolist()
    dp = dl.DataParallel(model, init="none")
    assert dp.module[0].bias.tolist() == own
    text = r"the ranks \[0, 1\] hold different values of 0\.bias$"
    with pytest.raises(RuntimeError, match=text):
        dp.check_replicas()
    del dp
    with pytest.raises(RuntimeError, match=text):
        dl.DataParallel(model, init="check")


@pytest.mark.check("A24")
@on_ranks(2)
def test_states_are_the_modules(world: dl.Partition) -> None:
    plain = net()
    dp = dl.DataParallel(net())
    assert list(dp.state_dict()) == list(plain.state_dict())
    train(dp, torch.optim.SGD(dp.parameters(), 0.1), [draw(4, 3)])
    state = copy.deepcopy(dp.state_dict())
    with_prefix = {f"module.{key}": value for key, value in state.items()}
    for given in (state, with_prefix):
        for target in (dl.DataParallel(net()), nn.Sequential(dl.DataParallel(net()), nn.Linear(1, 1))):
            inside = "" if isinstance(target, dl.DataParallel) else "0."
            others = {k: v for k, v in target.state_dict().items() if not k.startswith("0.") or not inside}
            full = {f"{inside}{k}": v for k, v in given.items()} | (others if inside else {})
            assert not any(target.load_state_dict(full))
            found = {k: v for k, v in target.state_dict().items() if inside in k[:2] and k[:2] != "1."}
            if inside:
                assert list(target.state_dict())[: len(state)] == [f"0.{key}" for key in state]
            assert all(torch.equal(v, state[k.removeprefix(inside)]) for k, v in found.items() if v.dim() or inside)
    plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        dl.DataParallel(net()).load_state_dict({k: v for k, v in state.items() if k != "0.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*strange"):
        dl.DataParallel(net()).load_state_dict({**state, "strange": torch.zeros(1)})


@pytest.mark.check("A24")
@on_ranks(2, mpi=True)
def test_a_run_that_is_resumed_is_the_same_run(world: dl.Partition) -> None:
    def new() -> tuple[dl.DataParallel, torch.optim.Optimizer]:
        dp = dl.DataParallel(net(), world, engine="thread", bucket_mb=1e-4)
        return dp, torch.optim.AdamW(dp.parameters(), 0.01)

    data = [draw(3 + world.rank, 3, seed=step) for step in range(8)]
    dp, optimizer = new()
    train(dp, optimizer, data[:4])
    file = io.BytesIO()
    torch.save((dp.state_dict(), optimizer.state_dict()), file)
    train(dp, optimizer, data[4:])
    file.seek(0)
    again, its_optimizer = new()
    states = torch.load(file, weights_only=True)
    again.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    train(again, its_optimizer, data[4:])
    assert_parameters(again, dp, 0.0)


@pytest.mark.check("A24")
@on_ranks(2)
def test_attributes_are_the_modules(world: dl.Partition) -> None:
    dp = dl.DataParallel(net())
    dp.module.note = "kept"
    assert dp.note == "kept"
    assert dp.append.__self__ is dp.module
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dp.nothing
    assert "average='samples'" in repr(dp)
    dp.eval()
    assert not dp.module[1].training


@pytest.mark.check("A24")
@on_ranks(2)
def test_a_bare_layers_weight_is_not_hidden(world: dl.Partition) -> None:
    """A number that is set there is for the loss, so that it cannot take the place of a parameter unseen."""
    dp, _ = twins(nn.Linear(3, 2))
    assert dp.weight is dp.module.weight
    assert dp.bias is dp.module.bias
    dp.weight = 5
    assert dp.loss_weight == 5
    assert dp.weight is dp.module.weight
    assert list(dp.state_dict()) == ["weight", "bias"]
    with pytest.raises(TypeError, match=r"weight is the loss's, a number, not a tensor of shape \(2, 3\)"):
        dp.weight = torch.zeros(2, 3)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        _ = dl.DataParallel(mlp(3, 2)).weight


@pytest.mark.check("A25")
@on_ranks(2, mpi=True)
def test_copies_work_on_their_own(world: dl.Partition) -> None:
    for trained in (False, True):
        dp, single = twins(mlp(3, 4, 2), world, bucket_mb=1e-4, average="sum")
        x = draw(4, 3)
        mine = x[2 * world.rank :][:2]
        if trained:
            dp(mine).square().sum().backward()
            (single(x).square().sum() / 4).backward()
        inner = copy.deepcopy(dp.module)
        with count() as c:
            inner(mine).square().sum().backward()
        assert not c.messages
        for make in (copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))):
            twin = make(dp)
            assert twin.P == dp.P
            twin.zero_grad()
            plain = copy.deepcopy(single)
            plain.zero_grad()
            for _ in range(2):
                twin(mine).square().sum().backward()
                (plain(x).square().sum() / 4).backward()
            assert_gradients(twin, plain)
            assert_gradients(dp, single)  # untouched
        file = io.BytesIO()
        torch.save(dp.module, file)
        file.seek(0)
        with count() as c:
            torch.load(file, weights_only=False)(mine).sum().backward()
        assert not c.messages


@on_ranks(2)
def test_what_has_come_apart_is_seen(world: dl.Partition) -> None:
    """Also in a copy, and in parameters that have taken the place of others, before a forward has seen them."""

    def other(dp: dl.DataParallel) -> dl.DataParallel:
        dp.load_state_dict({"weight": torch.ones(1, 2), "bias": torch.zeros(1) + world.rank}, assign=True)
        return dp

    for make in (copy.deepcopy, lambda dp: pickle.loads(pickle.dumps(dp)), other):
        dp = dl.DataParallel(nn.Linear(2, 1), world)
        dp.check_replicas()
        with torch.no_grad():
            dp.module.bias.fill_(world.rank)
        twin = make(dp)
        with pytest.raises(RuntimeError, match=r"hold different values of bias"):
            twin.check_replicas()


@on_ranks(2, mpi=True)
def test_copies_may_begin_with_unequal_numbers_of_steps(world: dl.Partition) -> None:
    for steps in ((0, 2), (3, 1)):
        dp, single = twins(mlp(3, 2), world)
        dp = copy.deepcopy(dp)
        with dp.join():
            for _ in range(steps[world.rank]):
                dp.zero_grad()
                mean_square(dp(draw(2, 3))).backward()
        mean_square(single(draw(2, 3))).backward()
        if steps[world.rank]:
            assert_gradients(dp, single)
    dp = copy.deepcopy(dl.DataParallel(dl.SyncBatchNorm(3), world))
    with pytest.raises(RuntimeError, match="join is not for it"), dp.join():
        pass


@pytest.mark.check("A25")
@on_ranks(2, mpi=True)
def test_containers_come_and_go(world: dl.Partition) -> None:
    """Hundreds of one module and hundreds of others; they share communicators, and leave no hooks."""
    lanes, many = world.team.lanes, 50 if world.comm is None else 500  # threads have no communicators
    model, single = mlp(3, 4, 2), mlp(3, 4, 2)
    before, x = len(lanes), draw(4, 3)
    for number in range(many):
        dp = None
        dp = dl.DataParallel(model, world)
        if number % 10 == 0:
            model.zero_grad()
            mean_square(dp(x[2 * world.rank :][:2])).backward()
        assert len(lanes) <= before + 1
    assert all(len(p._post_accumulate_grad_hooks or ()) <= 1 for p in model.parameters())
    model.zero_grad()
    mean_square(dp(x[2 * world.rank :][:2])).backward()
    mean_square(single(x)).backward()
    assert_gradients(dp, single)
    del dp
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    for number in range(many):
        dp = dl.DataParallel(mlp(3, 4), world)
        if number % 10 == 0:
            mean_square(dp(x)).backward()
    assert len(lanes) <= before + 2
    with count() as c:
        mean_square(model(x)).backward()
    assert not c.messages
