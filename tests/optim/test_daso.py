"""DASO keeps Heat's arguments and schedule, and none of its mistakes: any device, any node, what is frozen stays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.replicas import Replicas, adam, assert_near, momentum_sgd, start_of, train
from ranks import on_ranks

import distdl_lite as dl
from distdl_lite.testing import count, spmd

CYCLING = {"warmup_epochs": 0, "cooldown_epochs": 0}


def daso(world: dl.Partition, optimizer: torch.optim.Optimizer, epochs: int = 5, **options: Any) -> dl.DASO:
    return dl.DASO(optimizer, epochs, world, **{"downcast_type": torch.float, "ranks_per_node": 1, **options})


def check_by_hand(world: dl.Partition, epochs: int, batches: int, make: Any = momentum_sgd, **options: Any) -> None:
    """Train nodes of one rank as section by section of the paper says, with a constant loss."""
    optimizer = daso(world, make(start_of(world.rank)), epochs, steps_per_epoch=batches, **options)
    by_hand = Replicas(world.size, make)
    schedule_options = {k: v for k, v in options.items() if "epochs" in k or "max" in k}
    schedule = dl.DASOSchedule(epochs, **schedule_options)
    for epoch in range(epochs):
        every, _, wait = schedule(epoch, 0, [1.0] * epoch)
        assert (optimizer.epoch, optimizer.global_skip, optimizer.batches_to_wait) == (epoch, every, wait)
        sent, begun = [], 0
        steps = range(epoch * batches, (epoch + 1) * batches)
        for batch, _ in enumerate(by_hand.beside(world, optimizer, steps)):
            is_last = batch == batches - 1
            if sent and (batch - begun == wait or is_last or batch % every == 0):
                by_hand.merge("daso", by_hand.values(), sent, batch - begun, world.size)
                sent = []
            if every == 0 or is_last:
                by_hand.put(by_hand.mean())
            elif batch % every == 0:
                begun, sent = batch, by_hand.mean()
        optimizer.epoch_loss_logic(1.0)
    assert optimizer.losses == (1.0,) * epochs


@pytest.mark.check("A32")
@on_ranks(2, mpi=True)
def test_phases_and_merges_on_two_ranks(world: dl.Partition) -> None:
    check_by_hand(world, 5, 7, warmup_epochs=1, cooldown_epochs=1)
    check_by_hand(world, 11, 10, **CYCLING, sending_chunk_size=3)


@pytest.mark.check("A32")
@on_ranks(4, mpi=True)
def test_phases_and_merges_on_four_ranks(world: dl.Partition) -> None:
    check_by_hand(world, 4, 6, warmup_epochs=1, cooldown_epochs=1)


@on_ranks(2)
def test_adam(world: dl.Partition) -> None:
    check_by_hand(world, 3, 5, adam, **CYCLING)


@pytest.mark.check("A33")
@on_ranks(2, mpi=True)
def test_frozen_parameters_small_chunks_one_process_per_node(world: dl.Partition) -> None:
    """On the CPU, with the default wire: small integers are exact, and every parameter gets its own numbers."""
    for chunk in (1, 2, 5, 10_000_000):
        tensors = [torch.nn.Parameter(torch.full((n + 1, 2), 4.0 * n)) for n in range(4)]
        tensors[1].requires_grad_(False)
        optimizer = dl.DASO(
            torch.optim.SGD(tensors, lr=1.0), 2, world, 1, 1, sending_chunk_size=chunk, ranks_per_node=1
        )
        optimizer.last_batch = 0
        for n, p in enumerate(tensors):
            p.grad = None if n == 1 else torch.full_like(p, 2.0 * world.rank)
        with count() as counted:
            optimizer.step()
        assert counted.messages == -(-16 // chunk)
        assert counted.bytes == 2 * 16
        for n, p in enumerate(tensors):
            assert torch.equal(p, torch.full_like(p, 4.0 * n - (n != 1)))


@on_ranks(4, mpi=True)
def test_nodes_of_two(world: dl.Partition) -> None:
    """Within a node every step or every second, between the nodes rarely; equal after the last batch."""
    for reduced in (0, 10):
        optimizer = daso(world, momentum_sgd(start_of(world.rank)), 20, ranks_per_node=2, steps_per_epoch=6, **CYCLING)
        optimizer.epoch = reduced
        optimizer.losses = (1.0,) * reduced
        by_hand, sent, begun = Replicas(4, momentum_sgd), [], 0
        every, local, wait = optimizer.global_skip, optimizer.local_skip, optimizer.batches_to_wait
        assert (every, local, wait) == ((8, 2, 2) if reduced else (4, 1, 1))
        for batch in by_hand.beside(world, optimizer, range(6)):
            is_last, is_due = batch == 5, batch % every == 0
            if sent and (batch - begun == wait or is_last or is_due):
                by_hand.merge("daso", by_hand.values(), sent, batch - begun, 2)
                sent = []
            if batch % local == 0 or is_last or is_due:
                for node in ((0, 1), (2, 3)):
                    by_hand.put(by_hand.mean(node), node)
            if is_last:
                by_hand.put(by_hand.mean())
            elif is_due:
                begun, sent = batch, by_hand.mean()


@on_ranks(2, mpi=True)
def test_losses(world: dl.Partition) -> None:
    """The schedule sees the mean loss, bit for bit the same on all ranks, also one that differs in its last digit."""
    optimizer = daso(world, momentum_sgd(start_of(0)), 9, steps_per_epoch=1)
    optimizer.epoch_loss_logic(1.0 + world.rank)
    optimizer.epoch_loss_logic(torch.tensor(2.0 * world.rank, requires_grad=True))
    optimizer.epoch_loss_logic(0.1 + 1e-17 * world.rank, loss_globally_averaged=True)
    told = world.allgather_data(optimizer.losses)
    assert told[0] == told[1]
    assert told[0][:2] == (1.5, 1.0)


@on_ranks(2)
def test_attributes_and_reset(world: dl.Partition) -> None:
    optimizer = daso(world, momentum_sgd(start_of(0)), 9, **CYCLING)
    with pytest.raises(
        ValueError, match=r"set last_batch, the number of an epoch's last batch counted from 0, or give"
    ):
        optimizer.step()
    optimizer.last_batch = 3
    parameters = train(world, optimizer, range(5))
    assert (optimizer.epoch, optimizer.batch, optimizer.steps) == (1, 1, 5)
    optimizer.epoch_loss_logic(2.0)
    assert optimizer._flight is not None
    optimizer.reset()
    assert optimizer._flight is None
    assert (optimizer.epoch, optimizer.batch, optimizer.steps, optimizer.losses) == (0, 0, 0, ())
    assert all(p.grad is None for p in parameters)


def test_print0(capsys: pytest.CaptureFixture[str]) -> None:
    def body(world: dl.Partition) -> None:
        for verbose in (False, True):
            optimizer = daso(world, momentum_sgd(start_of(0)), 9, warmup_epochs=0, verbose=verbose)
            optimizer.print0("seen", verbose)
            optimizer.epoch_loss_logic(1.0)

    spmd(2, body)
    assert capsys.readouterr().out == "seen True\nepoch 0: mean loss 1, skips (4, 1, 1) -> (4, 1, 1)\n"


@on_ranks(2)
def test_schedulers(world: dl.Partition) -> None:
    """The optimizer steps, then the scheduler, of which a class is made with the optimizer alone."""

    class Halving(torch.optim.lr_scheduler.LambdaLR):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer, lambda step: 0.5**step)

    for makes in (False, True):
        w = torch.nn.Parameter(torch.zeros(1))
        inner = torch.optim.SGD([w], lr=1.0)
        given = Halving if makes else torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
        optimizer = daso(world, inner, scheduler=given, steps_per_epoch=10)
        for _ in range(3):
            w.grad = -torch.ones(1)
            optimizer.step()
        assert w.item() == 1.75
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        optimizer.load_state_dict(state)
        assert optimizer.scheduler.last_epoch == 3
        assert optimizer.param_groups[0]["lr"] == 0.125


@on_ranks(2, mpi=True)
def test_state_dict(world: dl.Partition) -> None:
    """Saved in the middle of an epoch and of an average, with the default wire."""
    options = {"ranks_per_node": 1, "steps_per_epoch": 4, **CYCLING}
    parameters = start_of(world.rank)
    optimizer = dl.DASO(adam(parameters), 9, world, **options)

    def go_on(optimizer: dl.DASO, steps: range) -> None:
        for step in steps:
            train(world, optimizer, [step])
            if optimizer.batch == 0:
                optimizer.epoch_loss_logic(1.0)

    go_on(optimizer, range(5))
    assert optimizer._flight is not None
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    go_on(optimizer, range(5, 15))
    other = dl.DASO(adam(resumed), 9, world, **options)
    other.load_state_dict(saved)
    go_on(other, range(5, 15))
    assert_near(resumed, parameters, atol=0)
    assert (other.epoch, other.batch, other.losses) == (3, 3, (1.0,) * 3)


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )


def batch_of(rank: int, step: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(100 * rank + step))


@on_ranks(2, mpi=True)
def test_container_keeps_the_first_ranks_weights(world: dl.Partition) -> None:
    model, wanted = model_of(world.rank), model_of(0).state_dict()
    state = torch.get_rng_state()
    net = dl.DataParallelMultiGPU(model, daso(world, momentum_sgd(model.parameters())), world)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    x = batch_of(0, 0)
    assert torch.equal(net(x), model(x))
    assert next(iter(net.state_dict())) == "module.0.weight"


@pytest.mark.parametrize("per_node", [1, 2, 4])
@pytest.mark.parametrize("make", [momentum_sgd, adam])
def test_container_synchronous(per_node: int, make: Any) -> None:
    """In warm-up: steps with the mean of the node's gradients, then the mean over the nodes."""

    def body(world: dl.Partition) -> None:
        model = model_of(world.rank).double()
        optimizer = daso(world, make(model.parameters()), 9, ranks_per_node=per_node, steps_per_epoch=3)
        net = dl.DataParallelMultiGPU(model, optimizer)
        nodes = [range(start, start + per_node) for start in range(0, 4, per_node)]
        twins = [model_of(0).double() for _ in nodes]
        steppers = [make(twin.parameters()) for twin in twins]
        for step in range(4):
            optimizer.zero_grad()
            net(batch_of(world.rank, step).double()).square().mean().backward()
            optimizer.step()
            told = world.allgather_data([b.tolist() for b in model.buffers()])
            assert told[0] == told[1] == told[2] == told[3]
            for node, twin, stepper in zip(nodes, twins, steppers, strict=True):
                twin.zero_grad()
                sum(twin(batch_of(rank, step).double()).square().mean() / per_node for rank in node).backward()
                stepper.step()
            with torch.no_grad():
                for tensors in zip(*(twin.parameters() for twin in twins), strict=True):
                    mean = torch.stack(tensors).mean(0)
                    for tensor in tensors:
                        tensor.copy_(mean)
            assert_near(list(model.parameters()), list(twins[0].parameters()))

    spmd(4, body)


@on_ranks(4, mpi=True)
def test_container_through_all_phases(world: dl.Partition) -> None:
    """The ranks of a node are equal wherever they step together, and all after each epoch."""
    model = model_of(world.rank)
    unused = torch.nn.Linear(2, 2)
    model.add_module("unused", unused)
    optimizer = dl.DASO(adam(model.parameters()), 16, world, 1, 1, ranks_per_node=2, steps_per_epoch=5)
    optimizer.add_scaler(torch.amp.GradScaler("cpu", init_scale=4.0))
    net = dl.DataParallelMultiGPU(model, optimizer, world)
    seen = set()
    for epoch in range(16):
        for step in range(5):
            local = optimizer.local_skip
            seen.add(local)
            optimizer.zero_grad()
            out = model[3](model[2](model[1](model[0](batch_of(world.rank, 5 * epoch + step)))))
            if world.rank == 3 and step == 1:
                out = out + unused(out)  # one rank uses more, which the others count as zeros
            optimizer._scaler.scale(out.square().mean()).backward()
            optimizer.step()
            told = world.allgather_data([p.tolist() for p in model.parameters()])
            assert told[0] == told[1] or (local == 2 and step in (1, 3))
            assert told[2] == told[3] or (local == 2 and step in (1, 3))
            assert step != 4 or told[0] == told[2]
            assert told[0] != told[2] or step == 4 or optimizer.global_skip in (0, 1) or step % 4 == 0
        optimizer.epoch_loss_logic(1.0)
    assert seen == {0, 1, 2}
    assert net.optimizer is optimizer


@on_ranks(4, mpi=True)
def test_container_with_what_one_rank_freezes(world: dl.Partition) -> None:
    """It stays as it is there; the others go on to train it, by the mean in which that rank counts as zeros."""
    for frozen_before, epochs in ((0, 1), (1, 9)):  # in warm-up; where ranks step alone for some epochs, too
        model = torch.nn.Linear(2, 1, bias=True).double()
        optimizer = dl.DASO(momentum_sgd(model.parameters()), epochs, world, 1, 1, ranks_per_node=2, steps_per_epoch=4)
        net = dl.DataParallelMultiGPU(model, optimizer)
        for step in range(4 * epochs):
            optimizer.zero_grad()
            if world.rank == 1 and step == 4 * frozen_before + 1:
                model.weight.requires_grad_(False)
                kept = model.weight.detach().clone()
            before = model.weight.detach().clone()
            net(torch.full((3, 2), 1.0 + world.rank).double()).square().mean().backward()
            optimizer.step()
            if not model.weight.requires_grad:
                assert torch.equal(model.weight, kept)
                assert model.weight.grad is None
            else:
                assert not torch.equal(model.weight, before)
        told = world.allgather_data([model.weight.tolist(), model.bias.tolist()])
        assert told[0] == told[2] == told[3] != told[1]
        assert told[0][1] == told[1][1]


@on_ranks(2)
def test_a_nodes_average_leaves_what_a_rank_has_frozen(world: dl.Partition) -> None:
    a, b = (torch.nn.Parameter(torch.full((2,), 2.0 * world.rank)) for _ in range(2))
    inner = torch.optim.SGD([a, b], lr=1.0)
    optimizer = dl.LocalSGD(inner, lambda epoch, batch, losses: (4, 1, 0), ranks_per_node=2)
    b.requires_grad_(world.rank == 1)
    optimizer.step()
    assert a.tolist() == [1.0, 1.0]
    assert b.tolist() == [1.0 * world.rank] * 2


@on_ranks(2)
def test_container_copies(world: dl.Partition) -> None:
    model = model_of(0)
    net = dl.DataParallelMultiGPU(model, daso(world, adam(model.parameters()), ranks_per_node=2, steps_per_epoch=3))

    def trained(net: dl.DataParallelMultiGPU) -> list[torch.Tensor]:
        for step in range(4):
            net.optimizer.zero_grad()
            net(batch_of(world.rank, step)).square().mean().backward()
            net.optimizer.step()
        return list(net.parameters())

    assert_near(trained(copy.deepcopy(net)), trained(pickle.loads(pickle.dumps(net))), 0)
    assert_near(model.parameters(), model_of(0).parameters(), 0)
    assert_near(trained(copy.deepcopy(net)), trained(net), 0)


def make(**options: Any) -> dl.DASO:
    model = torch.nn.Linear(2, 2)
    optimizer = options.pop("local_optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return dl.DASO(optimizer, options.pop("total_epochs", 5), **options)


ARGUMENTS = [
    ({"local_optimizer": "SGD"}, TypeError, "local_optimizer must be a torch.optim.Optimizer, not 'SGD'"),
    ({"total_epochs": 5.0}, TypeError, "total_epochs must be an int, not 5.0"),
    ({"total_epochs": 0}, ValueError, "total_epochs must be at least 1, not 0"),
    ({"comm": "world"}, TypeError, "a Partition or a communicator is needed, not 'world'"),
    ({"warmup_epochs": "1"}, TypeError, "warmup_epochs must be an int, not '1'"),
    ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be at least 0, not -1"),
    ({"cooldown_epochs": None}, TypeError, "cooldown_epochs must be an int, not None"),
    ({"cooldown_epochs": -1}, ValueError, "cooldown_epochs must be at least 0, not -1"),
    ({"scheduler": 3}, TypeError, "scheduler must be an LRScheduler that needs no metric, or a class of them, not 3"),
    ({"scheduler": torch.optim.SGD}, TypeError, "scheduler must be an LRScheduler"),
    ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, TypeError, "scheduler must be an LRScheduler"),
    ({"stability_level": 1}, TypeError, "stability_level must be a float, not 1"),
    ({"max_global_skips": 2.0}, TypeError, "max_global_skips must be an int, not 2.0"),
    ({"max_global_skips": -1}, ValueError, "max_global_skips must be at least 0, not -1"),
    ({"sending_chunk_size": 2.0}, TypeError, "sending_chunk_size must be an int, not 2.0"),
    ({"sending_chunk_size": 0}, ValueError, "sending_chunk_size must be at least 1, not 0"),
    ({"downcast_type": "bf16"}, TypeError, "downcast_type must be a torch.dtype, not 'bf16'"),
    ({"downcast_type": torch.float64}, ValueError, "downcast_type must be one of .*, not torch.float64"),
    ({"use_mpi_groups": 1}, TypeError, "use_mpi_groups must be a bool, not 1"),
    ({"skip_reduction_factor": 2.0}, TypeError, "skip_reduction_factor must be an int, not 2.0"),
    ({"skip_reduction_factor": 0}, ValueError, "skip_reduction_factor must be at least 1, not 0"),
    ({"local_skip_factor": "4"}, TypeError, "local_skip_factor must be an int, not '4'"),
    ({"local_skip_factor": 0}, ValueError, "local_skip_factor must be at least 1, not 0"),
    ({"verbose": "no"}, TypeError, "verbose must be a bool, not 'no'"),
    ({"ranks_per_node": 0}, ValueError, "ranks_per_node must be at least 1, not 0"),
    ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1, not 0"),
    ({"steps_per_epoch": 1.5}, TypeError, "steps_per_epoch must be an int, not 1.5"),
    ({"merge": "delta"}, TypeError, r"DASO has no arguments \['merge'\]"),
]


@pytest.mark.parametrize(("options", "kind", "text"), ARGUMENTS)
def test_arguments(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    def body(world: dl.Partition) -> None:
        with pytest.raises(kind, match=text):
            make(**options)

    spmd(2, body)


@on_ranks(2, mpi=True)
def test_arguments_of_one_rank_are_refused_together(world: dl.Partition) -> None:
    for options, kind, text in ARGUMENTS:
        if "comm" in options:
            continue
        with pytest.raises(kind, match=text) as raised:
            make(**(options if world.rank else {}), comm=world)
        message = str(raised.value)
        assert set(world.allgather_data(message)) == {message}
    optimizer = make(steps_per_epoch=2, comm=world)
    calls = (lambda other: dl.DataParallelMultiGPU(other, optimizer), optimizer.set_model, optimizer.epoch_loss_logic)
    for call, good in zip(calls, (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), 1.0), strict=True):
        with pytest.raises(TypeError):
            call(None if world.rank else good)
        world.allgather_data(None)


@on_ranks(2, mpi=True)
def test_epochs_of_other_lengths_are_refused(world: dl.Partition) -> None:
    """They would make ranks average at different steps."""
    with pytest.raises(ValueError, match="DASO: the ranks disagree: last_batch is 2 on rank 1, 1 on rank 0"):
        make(steps_per_epoch=2 + world.rank, comm=world)
    optimizer = make(comm=world)
    for last_batch in (None, 3):
        optimizer.last_batch = last_batch if world.rank else 2
        with pytest.raises(ValueError, match=f"last_batch is {last_batch} on rank 1, 2 on rank 0"):
            optimizer.step()
    optimizer.last_batch = 0
    optimizer.step()
    optimizer.last_batch += world.rank
    with pytest.raises(ValueError, match="last_batch is 1 on rank 1, 0 on rank 0"):
        optimizer.step()


@on_ranks(2)
def test_other_refusals(world: dl.Partition) -> None:
    model, optimizer = torch.nn.Linear(2, 2), make(steps_per_epoch=2)
    of_another = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: make(scheduler=of_another), ValueError, "scheduler must have been made for local_optimizer"),
        (lambda: dl.DataParallelMultiGPU(3, optimizer), TypeError, "module must be a torch.nn.Module, not 3"),
        (
            lambda: dl.DataParallelMultiGPU(model, optimizer.optimizer),
            TypeError,
            "optimizer must be a DASO, not SGD",
        ),
        (
            lambda: dl.DataParallelMultiGPU(model, optimizer, world.create_partition_inclusive([0])),
            ValueError,
            r"comm has the ranks \[0\], the optimizer \[0, 1\]",
        ),
        (
            lambda: dl.DataParallelMultiGPU(torch.nn.Linear(2 + world.rank, 2), optimizer),
            ValueError,
            r"DataParallelMultiGPU: the modules of ranks 0 and 1 differ in \['weight'\]",
        ),
        (lambda: optimizer.set_model(3), TypeError, "model must be a torch.nn.Module, not 3"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            call()
    net = dl.DataParallelMultiGPU(model, make(local_optimizer=of_another.optimizer, steps_per_epoch=2))
    with pytest.raises(
        RuntimeError, match="with DataParallelMultiGPU there is no closure, and a GradScaler is given to"
    ):
        net.optimizer.step(lambda: None)
