"""Training on several ranks beside one process on the whole batch."""

from __future__ import annotations

import copy
import itertools
import pickle
import types
from typing import Any

import numpy
import pytest
import torch
from gaussians import difference, network, refusals, tagi, teach, weights
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count, spmd

pytestmark = pytest.mark.check("A35")


def ddp(world: dl.Partition, model: Any, average: bool = False) -> Any:
    return tagi.DDPSequential(model, tagi.DDPConfig(P=world), average)


def data(rows: int, seed: int = 0, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return x, x[:, :2].sin() + 0.1 * torch.randn(rows, 2, generator=generator)


def same_everywhere(world: dl.Partition, net: Any) -> bool:
    """Whether all ranks hold the same bits."""
    told = world.allgather_data([tensor.tolist() for tensor in weights(net)])
    return all(other == told[0] for other in told)


def cuts(shares: list[int], rows: int) -> list[slice]:
    ends = numpy.cumsum([0, *shares]) * rows // sum(shares)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def check_sum_mode(world: dl.Partition, shares: list[int], steps: int = 200, **options: Any) -> None:
    """As many steps as one process, whose numbers come out, and the same bits on all ranks."""
    serial = network(3, 16, 2, **options)
    net = ddp(world, network(3, 16, 2, seed=world.rank, **options))
    mine = cuts(shares, 24)[world.rank]
    for step in range(steps):
        x, y = data(24, seed=step)
        teach(serial, x, y)
        output = teach(net, x[mine].numpy(), y[mine].numpy())
    assert difference(weights(net), weights(serial)) <= 1e-5
    x, _ = data(24, seed=steps)
    assert difference(net(x), serial(x)) <= 1e-5
    assert len(output[0]) == mine.stop - mine.start
    assert same_everywhere(world, net)


@on_ranks(2, mpi=True)
def test_two_ranks_train_as_one_process(world: dl.Partition) -> None:
    check_sum_mode(world, [1, 5], activation="Tanh")
    for shares in ([1, 1], [0, 1], [1, 0]):
        check_sum_mode(world, shares, steps=20)


@on_ranks(3, mpi=True)
def test_three_ranks_train_as_one_process(world: dl.Partition) -> None:
    check_sum_mode(world, [1, 4, 0])
    check_sum_mode(world, [1, 1, 1], steps=20, activation="MixtureReLU")


@on_ranks(4, mpi=True)
def test_four_ranks_train_as_one_process(world: dl.Partition) -> None:
    check_sum_mode(world, [1, 1, 1, 1])
    check_sum_mode(world, [0, 3, 0, 5], steps=20)


@on_ranks(3, mpi=True)
def test_caps_follow_all_rows_or_the_largest_rank(world: dl.Partition) -> None:
    """Across the limits 1 / 2 and 255 / 256, which change from call to call."""
    rank = world.rank
    batches = [
        [1, 0, 0],
        [0, 0, 1],
        [1, 1, 0],
        [1, 1, 1],
        [85, 85, 85],
        [86, 85, 85],
        [0, 255, 0],
        [255, 0, 1],
        [256, 1, 0],
    ]
    batches += [[0, 0, 0], [300, 300, 300]]
    for average in (False, True):
        serial, net = network(3, 8, 2), ddp(world, network(3, 8, 2, seed=rank), average)
        for step, rows in enumerate(batches):
            x, y = data(sum(rows), seed=step)
            start = sum(rows[:rank])
            mine = slice(start, start + rows[rank])
            teach(net, x[mine], y[mine], steps=False)
            teach(serial, x, y, steps=False)
            agreed = max(rows) if average else sum(rows)
            assert net.model.batch_size == agreed
            if average:
                for layer in serial:
                    for name, buffer in layer.named_buffers():
                        if name.startswith("delta"):
                            buffer /= 3
                serial.batch_size = agreed
            assert difference(weights(net, "delta_"), weights(serial, "delta_")) < 1e-5
            net.step()
            serial.step()
            assert difference(weights(net), weights(serial)) < 1e-5
            with torch.no_grad():  # so that differences do not add up
                for a, b in zip(net.model.buffers(), serial.buffers(), strict=True):
                    b.copy_(a)
        assert same_everywhere(world, net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_batch_sizes_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    def body(world: dl.Partition) -> list[int]:
        net, found = ddp(world, network(3, 4, 2).to(dtype)), []
        for rows in ([128, 127], [128, 128], [1000, 0], [1, 0]):
            x, y = data(rows[world.rank])
            teach(net, x, y)
            found.append(tagi.sequential.cap_of(net.model.batch_size))
        assert same_everywhere(world, net)
        return found

    assert spmd(2, body) == [[2.0, 3.0, 3.0, 0.1]] * 2


@on_ranks(2, mpi=True)
def test_one_message_a_backward(world: dl.Partition) -> None:
    with count() as building:
        net = ddp(world, tagi.Sequential(network(3, 8, 2, seed=world.rank), tagi.Sequential(tagi.Linear(2, 2))))
    numbers = (3 * 8 + 8) + (8 * 2 + 2) + (2 * 2 + 2)
    assert (building.messages, building.bytes) == (1, 4 * 2 * numbers)
    assert same_everywhere(world, net)
    x, y = data(4)
    teach(net, x, y)
    memory = net.model.flat_deltas().data_ptr()
    for _ in range(3):
        with count() as counted:
            teach(net, x, y)
        assert (counted.messages, counted.bytes) == (1, 4 * (2 * numbers + 2))
    assert net.model.flat_deltas().data_ptr() == memory == net.model[0][0].delta_mu_w.data_ptr()


@on_ranks(2, mpi=True)
def test_one_rank_may_use_parts_of_its_model(world: dl.Partition) -> None:
    """Slices and containers around the model take its layers' deltas into a tensor of their own."""
    serial, net = network(3, 8, 2), ddp(world, network(3, 8, 2))
    x, y = data(6)
    mine = slice(3 * world.rank, 3 * world.rank + 3)
    for step in range(4):
        teach(serial, x, y)
        teach(net, x[mine], y[mine])
        if world.rank == step % 2:
            net.model[:2](x)
            tagi.Sequential(net.model, tagi.Linear(2, 5))(x)
    assert difference(weights(net), weights(serial)) <= 1e-5
    assert same_everywhere(world, net)


@on_ranks(2, mpi=True)
def test_the_members_of_pytagi(world: dl.Partition) -> None:
    config = tagi.DDPConfig([0, 1], "mpi", world.rank, world.size, P=world)
    assert (config.device_ids, config.backend) == ([0, 1], "mpi")
    assert (config.rank, config.world_size) == (world.rank, 2)
    net = tagi.DDPSequential(network(3, 4, 2), config, average=True)
    with pytest.raises(RuntimeError, match="get_outputs needs a forward"):
        net.get_outputs()
    x, _ = data(4)
    output = net(x.numpy(), var_x=None)
    assert difference(net.forward(mu_x=x.numpy()), output) == 0
    net.output_to_host()
    assert all(isinstance(array, numpy.ndarray) for array in net.get_outputs())
    assert difference(net.get_outputs(), output) == 0
    assert net.output_z_buffer is net.model.output_z_buffer
    assert net.input_delta_z_buffer is net.model.input_delta_z_buffer
    assert net.get_device_with_index() == "cpu"
    net.barrier()
    net.eval()
    assert not net.model.training
    net.train()
    assert net.model.training
    assert net.average
    assert set(net.state_dict()) == set(net.model.state_dict())
    net.load_state_dict(net.model.state_dict())
    assert len(net.parameters()) == 2
    assert "world_size=2" in repr(config)
    x, y = data(4)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)) if world.size == dl.Partition().size else net):
        teach(other, x, y)
        assert same_everywhere(world, other)


def test_the_ambient_world_is_the_default() -> None:
    def body(world: dl.Partition) -> None:
        net = tagi.DDPSequential(network(3, 4, 2, seed=world.rank))
        assert (net.config.rank, net.config.world_size, net.average) == (world.rank, 2, True)
        teach(net, *data(4))
        assert same_everywhere(world, net)

    spmd(2, body)


@on_ranks(2, mpi=True)
def test_the_order_of_calls(world: dl.Partition) -> None:
    net, (x, y) = ddp(world, network(3, 4, 2)), data(4)
    teach(net, x, y)
    with pytest.raises(RuntimeError, match="step needs a backward before it"):
        net.step()
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        net.backward()
    with pytest.raises(RuntimeError, match="step needs a backward before it"):
        net.step()
    net(x)
    if world.rank == 0:  # the other has no deltas of the output, and both must learn of it
        tagi.OutputUpdater().update(net.output_z_buffer, y, 0.1, net.input_delta_z_buffer)
    assert "DDPSequential: rank 1: tagi: backward needs a forward and then" in refusals(
        world, RuntimeError, net.backward
    )
    with pytest.raises(RuntimeError, match="step needs a backward before it"):
        net.step()
    net.train(world.rank == 0)
    text = refusals(world, RuntimeError, lambda: teach(net, x, y))
    assert "DDPSequential: rank 1: tagi: backward needs a forward in training mode" in text
    text = refusals(world, ValueError, lambda: teach(net.train(), x if world.rank else x / 0, y))
    assert "DDPSequential: rank 0: tagi: the output or its deltas are not finite" in text
    teach(net, x, y)
    assert same_everywhere(world, net)


@on_ranks(3, mpi=True)
def test_the_first_rank_of_a_partition_gives_the_weights(world: dl.Partition) -> None:
    P = world.create_partition_inclusive([2, 0, 1])
    net = ddp(P, network(3, 4, 2, seed=world.rank))
    assert all(map(torch.equal, weights(net), weights(network(3, 4, 2, seed=2))))
    net(torch.ones(2, 3))
    assert "DDPSequential: rank 1: tagi: backward needs" in refusals(world, RuntimeError, net.backward)


@on_ranks(3, mpi=True)
def test_missing_observations_on_some_ranks(world: dl.Partition) -> None:
    serial, net = network(3, 8, 2), ddp(world, network(3, 8, 2))
    x, y = data(9)
    y[3:6] = float("nan")
    y[7, 1] = float("nan")
    for _ in range(5):
        teach(serial, x, y)
        teach(net, x[3 * world.rank :][:3], y[3 * world.rank :][:3])
    assert difference(weights(net), weights(serial)) < 1e-5
    assert same_everywhere(world, net)


@on_ranks(3, mpi=True)
def test_wrong_configurations_are_refused_on_all_ranks(world: dl.Partition) -> None:
    odd = world.rank == 1
    for wrong, text in [
        ({"backend": "nccl"}, "was given backend='nccl'; write backend=\"mpi\""),
        ({"rank": 2}, "rank 1 of 3 was given rank=2; leave it out, or write 1"),
        ({"world_size": 8}, "rank 1 of 3 was given world_size=8; leave it out, or start 8 ranks"),
        ({"device_ids": [0, -1]}, "device_ids=[0, -1]; -1 is none of the 0 GPUs"),
        ({"device_ids": ["cuda"]}, "device_ids=['cuda']; 'cuda' is none of the 0 GPUs"),
    ]:
        made = lambda wrong=wrong: tagi.DDPConfig(P=world, **(wrong if odd else {}))  # noqa: E731
        assert text in refusals(world, ValueError, made)
        assert text.split(" was ")[-1].split(";")[0] in refusals(
            world, ValueError, lambda wrong=wrong: tagi.DDPConfig(P=world, **wrong)
        )
    assert "rank 1 of 3 was given rank=0" in refusals(world, ValueError, lambda: tagi.DDPConfig(rank=0, P=world))


@on_ranks(3, mpi=True)
def test_different_models_are_refused_on_all_ranks(world: dl.Partition) -> None:
    odd = world.rank == 2
    for mine, theirs, text in [
        (network(3, 4, 2), network(3, 5, 2), "layer 0 Linear(3, 5, bias=True), others Linear(3, 4, bias=True)"),
        (network(3, 4, 2), network(3, 4), "layer 1 missing, others ReLU()"),
        (network(3, 4), network(3, 4, 2), "layer 1 ReLU(), others missing"),
        (network(3, 4, 2), network(3, 4, 2, activation="Tanh"), "layer 1 Tanh(), others ReLU()"),
        (network(3, 4), network(3, 4).append(tagi.ReLU()), "layer 1 ReLU(), others missing"),
        (network(3, 4), tagi.Sequential(network(3, 4)), "layer 0 Sequential, others Linear(3, 4, bias=True)"),
    ]:
        model = theirs if odd else mine
        assert f"rank 2: DDPSequential's {text}" in refusals(world, ValueError, lambda model=model: ddp(world, model))
    model = network(3, 4, 2)
    assert "rank 2: DDPSequential's 0.mu_w (4, 3) of float64" in refusals(
        world, ValueError, lambda: ddp(world, copy.deepcopy(model).double() if odd else model)
    )
    other = copy.deepcopy(model).to("meta") if odd else model
    assert "rank 2: DDPSequential's 0.mu_w (4, 3) of float32 on meta" in refusals(
        world, ValueError, lambda: ddp(world, other)
    )
    assert "rank 2: DDPSequential's average True, others False" in refusals(
        world, ValueError, lambda: ddp(world, model, average=odd)
    )
    assert "average must be a bool, not 'sum'" in refusals(
        world, TypeError, lambda: ddp(world, model, "sum" if odd else True)
    )
    assert "model must be a tagi.Sequential, not a Tensor" in refusals(
        world, TypeError, lambda: ddp(world, torch.ones(2) if odd else model)
    )
    assert "DDPConfig: device_ids must be a list of integers, such as [0, 1], not 0" in refusals(
        world, TypeError, lambda: tagi.DDPConfig(device_ids=0 if odd else None, P=world)
    )


@on_ranks(3, mpi=True)
def test_replicas_that_have_come_apart_are_refused_on_all_ranks(world: dl.Partition) -> None:
    odd, (x, y) = world.rank == 1, data(6)
    start, other = network(3, 4, 2).state_dict(), network(3, 4, 2, seed=1).state_dict()
    net = ddp(world, network(3, 4, 2))
    teach(net, x, y)
    net.check_replicas()
    if odd:
        net.load_state_dict(start)
    for check in (net.check_replicas, lambda: teach(net, x, y), lambda: teach(net, x, y)):
        text = refusals(world, RuntimeError, check)
        assert text.startswith("the ranks disagree: rank 1: DDPSequential's 0.mu_w of checksum ")
    net.load_state_dict(other if odd else start)
    assert "rank 1: DDPSequential's 0.mu_w of" in refusals(world, RuntimeError, lambda: teach(net, x, y))
    net.load_state_dict(start)
    if odd:  # with what all have, in the end
        net.load_state_dict(other)
        net.load_state_dict(start)
    teach(net, x, y)
    with count() as counted:
        teach(net, x, y)
    assert counted.messages == 1
    teach(net, x, y, steps=False)  # whose deltas are dropped
    teach(net, x, y)
    teach(net, x, y, steps=False)
    if odd:
        net.step()
    assert "rank 1: DDPSequential's number of steps 5, others 4" in refusals(
        world, RuntimeError, lambda: teach(net, x, y)
    )


@on_ranks(3, mpi=True)
def test_a_cast_of_one_rank_is_refused_on_all_ranks(world: dl.Partition) -> None:
    net, (x, y) = ddp(world, network(3, 4, 2)), data(6)
    if world.rank == 2:
        net.double()
    text = refusals(world, RuntimeError, lambda: teach(net, x, y))
    assert "rank 2: DDPSequential's deltas 52 of torch.float64 on cpu, others 52 of torch.float32 on cpu" in text
    teach(net.double(), x, y)
    assert same_everywhere(world, net)


def test_a_config_of_another_type_is_refused_on_all_ranks() -> None:
    """Also where the others have made theirs before, or make it now."""

    def body(world: dl.Partition) -> None:
        for wrong in ({"rank": 0}, False, world):
            for right in (None, tagi.DDPConfig()):
                config = wrong if world.rank == 1 else right
                text = refusals(world, TypeError, lambda config=config: tagi.DDPSequential(network(3, 4, 2), config))
                assert text.startswith(f"DDPSequential: config must be a DDPConfig, not {str(wrong)[:5]}")

    spmd(3, body)


@on_ranks(3, mpi=True)
def test_a_config_of_another_type_is_refused_in_its_team(world: dl.Partition) -> None:
    """Whose other ranks wait for this one, and nobody else."""
    team = world.create_partition_inclusive([2, 0])
    if team.active:
        right = tagi.DDPConfig(P=team)
        for wrong in (3, "mpi", [0], {}, types.SimpleNamespace(P=None), types.SimpleNamespace(P=world.size)):
            with pytest.raises(TypeError, match="DDPSequential: config must be a DDPConfig, not "):
                tagi.DDPSequential(network(3, 4, 2), wrong if world.rank == 0 else right)


def test_different_devices_are_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where some host has no GPU, or one that does not work."""

    def body(world: dl.Partition, device: str, kind: type[Exception], text: str) -> None:
        config = tagi.DDPConfig()
        monkeypatch.setattr(
            tagi.DDPConfig, "device", property(lambda self: torch.device(device) if self.rank else None)
        )
        assert text in refusals(world, kind, lambda: tagi.DDPSequential(network(3, 4, 2), config))

    spmd(2, lambda world: body(world, "meta", ValueError, "rank 1: DDPSequential's 0.mu_w (4, 3) of float32 on meta"))
    spmd(2, lambda world: body(world, "cuda:99", RuntimeError, "DDPSequential: "))


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def body(world: dl.Partition) -> None:
        text = refusals(world, ValueError, lambda: tagi.DDPConfig(device_ids=[0, 2]))
        assert "2 is none of the 2 GPUs that it sees" in text
        config = tagi.DDPConfig(device_ids=[1, 0])
        assert config.device == torch.device("cuda", 1 - world.rank)

    spmd(2, body)


@on_ranks(2, mpi=True)
def test_a_rank_outside(world: dl.Partition) -> None:
    other = world.create_partition_inclusive([1])
    if world.rank == 0:
        with pytest.raises(ValueError, match="this rank is not in P"):
            tagi.DDPConfig(P=other)
    else:
        teach(ddp(other, network(3, 4, 2)), *data(4))


def test_a_rank_that_fails_before_the_sum_stops_the_others() -> None:
    def body(world: dl.Partition) -> None:
        net, (x, y) = ddp(world, network(3, 4, 2)), data(4)
        teach(net, x[:, : 3 - world.rank], y)

    with pytest.raises(ValueError, match=r"mu_x must be of shape \(B, 3\)"):
        spmd(2, body)
