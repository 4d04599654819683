"""Programs whose ranks have states of their own, weights that are cut late, or lines of a grid with a model each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import distdl_lite as dl
from distdl_lite import nn as dnn
from distdl_lite.testing import spmd

X = torch.linspace(-9, 9, 24 * 4, dtype=torch.float64).sin().view(24, 4)


def mlp() -> torch.nn.Module:
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def local_sgd(net: torch.nn.Module, world: dl.Partition, **more: Any) -> Any:
    return dl.LocalSGD(sgd(net.parameters()), 3, P=world, **more)


def daso(net: torch.nn.Module, world: dl.Partition) -> Any:
    optimizer = dl.DASO(
        sgd(net.parameters()), total_epochs=9, comm=world, warmup_epochs=1, cooldown_epochs=1, verbose=False
    )
    optimizer.last_batch = 4
    return optimizer


def outer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=0.7, momentum=0.9, nesterov=True)


AVERAGING: dict[str, Callable[..., Any]] = {
    "LocalSGD": local_sgd,
    "DiLoCo": partial(local_sgd, outer=outer),
    "late": partial(local_sgd, delay=1),
}


@pytest.mark.parametrize("name", AVERAGING)
def test_averaged_weights(name: str, tmp_path: Path) -> None:
    """A run that was saved goes on as if it had not ended, on as many ranks; on fewer each takes a state that there is."""

    def body(world: dl.Partition, first: int, last: int, at: Path | None) -> list[list[torch.Tensor]]:
        net = mlp()
        optimizer = AVERAGING[name](net, world)
        if first:
            assert dl.load(tmp_path / f"step_{first}", model=net, optimizer=optimizer).extra is None
        seen = []
        for step in range(first, last):
            rows = X[(step + world.rank) % 6 :: 6]
            optimizer.zero_grad()
            net(rows).square().sum().backward()
            optimizer.step()
            if at and step + 1 in (4, 6):
                dl.save(at / f"step_{step + 1}", model=net, optimizer=optimizer)
            seen.append([p.detach().clone() for p in net.parameters()])
        return seen

    unbroken = spmd(3, lambda world: body(world, 0, 10, tmp_path))
    for first in (4, 6):
        broken = spmd(3, lambda world: body(world, first, 10, tmp_path / str(first)))  # noqa: B023
        for a, b in zip(unbroken, broken, strict=True):
            assert all(torch.equal(x, y) for p, q in zip(a[first:], b, strict=True) for x, y in zip(p, q, strict=True))
    spmd(2, lambda world: body(world, 6, 10, None))


def test_deferred_updates_and_scalers(tmp_path: Path) -> None:
    """The last update of a container that defers is in the checkpoint; several models and optimizers have names."""

    def body(world: dl.Partition, path: Path | None, steps: int = 3) -> Any:
        net, other = mlp(), mlp()
        optimizer = dl.DataParallelOptimizer(torch.optim.Adam(net.parameters(), lr=0.1), blocking=False)
        model = dl.DataParallel(net, world, optimizer, blocking_parameter_updates=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        parts = {
            "model": {"net": model, "other": other},
            "optimizer": {"net": optimizer, "other": sgd(other.parameters())},
            "scheduler": {"net": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer.torch_optimizer)},
            "scaler": scaler,
        }
        if path is not None:
            dl.load(path, **parts)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(X[world.rank :: world.size]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if path is None and steps == 3:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 32.0})
            dl.save(tmp_path / "step_3", **parts)
        return losses, scaler.get_scale()

    def losses(*steps: list[Any]) -> list[float]:
        return [sum(each) / len(each) for each in zip(*steps, strict=True)]

    unbroken = spmd(2, lambda world: body(world, None, 6))
    spmd(2, lambda world: body(world, None))
    names = set(dl.read_checkpoint(tmp_path / "step_3"))
    assert {"model.net.0.weight", "model.other.2.bias", "optimizer.net.state.net.0.weight.exp_avg"} < names
    assert not any("optimizer.other" in name for name in names)  # it has made no step
    two, three = (spmd(n, lambda world: body(world, tmp_path / "step_3")) for n in (2, 3))
    assert {scale for _, scale in (*two, *three)} == {32.0}
    assert losses(*(part for part, _ in two)) == pytest.approx(losses(*(part for part, _ in three)), rel=1e-12)
    assert [part for part, _ in two] == [part[3:] for part, _ in unbroken]


def test_weights_that_are_cut_at_the_first_call(tmp_path: Path) -> None:
    """Along channels: blocks are saved; the state of an optimizer is loaded after the first call, else refused."""

    def model() -> torch.nn.Module:
        torch.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Conv1d(4, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv1d(6, 4, 1)
        ).double()

    x = X.view(4, 4, 6)

    def body(world: dl.Partition, grid: tuple[int, ...], path: Path | None) -> list[float]:
        P = world.grid(grid)
        net, measure = dl.distribute(model(), P), dl.distribute(torch.nn.MSELoss(), P)
        block = P.block(x.shape)
        local = x[block]
        if path is not None:
            early = torch.optim.Adam(net.parameters())
            if grid[1] > 1:
                with pytest.raises(
                    ValueError, match="call the network once before the state of its optimizer is loaded"
                ):
                    dl.load(path, model=net, optimizer=early)
            dl.load(path, model=net)
        net(local)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        if path is not None:
            dl.load(path, model=net, optimizer=optimizer)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = measure(net(local), local.flip(2) * 0 + 0.5)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if path is None and grid != (1, 1, 1):
            dl.save(tmp_path / "step_3", model=net, optimizer=optimizer)
            losses += body(world, grid, tmp_path / "step_3")
        return losses

    whole = spmd(4, lambda world: body(world, (1, 2, 2), None))[0]
    assert len(dl.read_checkpoint(tmp_path / "step_3").tensors["model.0.weight"].pieces) == 2
    for grid in ((1, 3, 1), (1, 1, 1)):
        for losses in spmd(max(grid), lambda world: body(world, grid, tmp_path / "step_3")):  # noqa: B023
            assert losses == pytest.approx(whole[3:], rel=1e-9)


def test_lines_with_a_model_each(tmp_path: Path) -> None:
    """Replicas of a cut model: blocks that are the same on all lines are shared, of others the first line's stand."""

    def net(world: dl.Partition) -> torch.nn.Module:
        line = world.grid((2, 2)).create_cartesian_subtopology_partition((False, True))
        return dnn.DistributedLinear(line.grid((1, 1)), line.grid((1, 2)), line.grid((2, 1)), 3, 5)

    def body(world: dl.Partition) -> None:
        made = net(world)
        with torch.no_grad():
            made.bias.fill_(world.rank)
        dl.save(tmp_path / "step_1", model=made)
        with torch.no_grad():
            made.bias.fill_(-1)
        dl.load(tmp_path / "step_1", model=made)
        assert made.bias.tolist() == [float(world.rank % 2)] * len(made.bias)

    spmd(4, body)
    assert dl.read_checkpoint(tmp_path / "step_1")["model.bias"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_generators(tmp_path: Path) -> None:
    """Each rank's goes on, and it is said where it cannot; without an optimizer they are left alone."""
    net = torch.nn.Linear(2, 2)

    def drawn(world: dl.Partition) -> float:
        torch.manual_seed(world.rank)
        dl.save(tmp_path / "own", model=net, optimizer=sgd(net.parameters()))
        return torch.rand(()).item()

    def resumed(world: dl.Partition, trains: bool) -> tuple[float, Any]:
        torch.manual_seed(9)
        optimizer = {"optimizer": sgd(net.parameters())} if trains else {}
        found = dl.load(tmp_path / "own", model=net, **optimizer)
        return torch.rand(()).item(), found.notes

    own = spmd(2, drawn)
    assert spmd(2, lambda world: resumed(world, True)) == [(value, ()) for value in own]
    assert {value for value, _ in spmd(2, lambda world: resumed(world, False))}.isdisjoint(own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = spmd(3, lambda world: resumed(world, True))
    assert [value for value, _ in found] == [*own, own[0]]
    text = "2 ranks had torch's generators in different states, 3 ranks go on: rank r with the state of rank r % 2"
    assert {notes for _, notes in found} == {(f"load: {text}",)}
    assert [str(one.message) for one in caught] == [f"load: {text}"]
