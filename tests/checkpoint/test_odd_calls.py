"""Calls in which ranks differ, models on some ranks alone, and tensors that cannot be kept: an error on all, or no mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distdl_lite as dl
from distdl_lite import nn as dnn
from distdl_lite.testing import spmd


def linear(value: float, features: int = 3) -> nn.Module:
    made = nn.Linear(features, features)
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(value)
    return made


def refused(world: dl.Partition, text: str, call: Any) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError, KeyError), match=text) as caught:
        call()
    texts = world.allgather_data(str(caught.value))
    assert texts is not None
    assert len(set(texts)) == 1, texts


def test_arguments_of_one_rank_alone(tmp_path: Path) -> None:
    """What one rank passes, and others do not, is an error on all; the model is as it was."""
    spmd(2, lambda world: dl.save(tmp_path / "a", model=linear(1.0)))

    def body(world: dl.Partition) -> None:
        odd, net = world.rank == 1, linear(2.0)
        sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        alone = {"model": net} if odd else {}
        refused(world, "things to save", lambda: dl.save(tmp_path / "b", extra=1, **alone))
        refused(world, "things to load", lambda: dl.load(tmp_path / "a", **alone))
        refused(world, "things to", lambda: dl.save(tmp_path / "b", model=net, optimizer=sgd if odd else None))
        refused(world, "things to", lambda: dl.load(tmp_path / "a", model=net, optimizer=sgd if odd else None))
        refused(
            world,
            "strict, names and dtype",
            lambda: dl.load(tmp_path / "a", model=net, names="weight" if odd else None),
        )
        refused(world, "strict, names and dtype", lambda: dl.load(tmp_path / "a", model=net, strict=odd))
        refused(world, "new names", lambda: dl.load(tmp_path / "a", model=net, rename={"bias": "b"} if odd else {}))
        refused(world, "wait", lambda: dl.save(tmp_path / "b", model=net, wait=odd))
        refused(
            world,
            "shape and dtype of model.weight",
            lambda: dl.save(tmp_path / "b", model=linear(1.0, 4) if odd else net),
        )
        refused(world, "mine", lambda: dl.save(tmp_path / "b", model={"a": Failing() if odd else net, "b": net}))
        for wrong in ({"dtype": "float32"}, {"dtype": torch.int32}, {"names": 3}, {"names": [3]}, {"rename": 3}):
            refused(world, next(iter(wrong)), lambda: dl.load(tmp_path / "a", model=net, **wrong))  # noqa: B023
        refused(world, "rename makes 'c' of both", lambda: dl.load(tmp_path / "a", model=net, rename=lambda name: "c"))
        assert all((p == 2.0).all() for p in net.parameters())

    spmd(2, body)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Failing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("mine")


class Copying(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value.detach().clone() for name, value in super().state_dict(*args, **kwargs).items()}


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}


def test_tensors_that_cannot_be_kept(tmp_path: Path) -> None:
    """Those that a state_dict has made, or that have no values, or the name of another."""
    sparse = nn.Module()
    sparse.register_buffer("x", torch.eye(3).to_sparse())
    twice = {"a": nn.ModuleDict({"b": linear(1.0)}), "a.b": linear(2.0)}

    def body(world: dl.Partition) -> None:
        for model, text in (
            (Copying(2, 2), "model.weight is in its state_dict, but is none of its parameters"),
            (Extra(2, 2), "model._extra_state is in its state_dict"),
            (sparse, "model.x is no dense tensor"),
            (nn.Linear(2, 2, device="meta"), "model.weight is no dense tensor"),
            (twice, "several tensors have the name model.a.b.weight"),
        ):
            refused(world, text, lambda: dl.save(tmp_path / "a", model=model))  # noqa: B023

    spmd(2, body)
    views = nn.Module()
    values = torch.arange(6.0)
    for name, view in (("a", values), ("b", values[1:]), ("c", values[:2]), ("d", values[4:])):
        views.register_buffer(name, view)
    spmd(1, lambda world: dl.save(tmp_path / "views", model=views))
    made = dl.read_checkpoint(tmp_path / "views")
    assert all(torch.equal(made[f"model.{name}"], view) for name, view in views.named_buffers())


def test_models_of_one_rank_each(tmp_path: Path) -> None:
    """Layers that do not know of each other are not mixed: the first rank's stand, whole."""

    def body(world: dl.Partition) -> Any:
        alone = world.create_partition_inclusive([world.rank]).grid((1, 1))
        net = dnn.DistributedLinear(alone, alone, alone, 300, 300)
        with torch.no_grad():
            net.weight.fill_(world.rank + 1)
        dl.save(tmp_path / "a", model=net)
        dl.load(tmp_path / "a", model=net)
        return net.weight.unique().tolist()

    assert spmd(3, body) == [[1.0]] * 3


def test_teams_that_save_under_one_name(tmp_path: Path) -> None:
    """One of them may succeed; what stands under the name is of one team."""

    def body(world: dl.Partition) -> bool:
        P = world.create_partition_inclusive([0, 1] if world.rank < 2 else [2, 3])
        try:
            dl.save(tmp_path / "a", model=linear(float(world.rank // 2), 300), P=P)
        except (ValueError, RuntimeError):
            return False
        return True

    succeeded = spmd(4, body)
    assert succeeded[0] == succeeded[1]
    assert succeeded[2] == succeeded[3]
    latest = dl.latest_checkpoint(tmp_path)
    assert (latest is None) == (not any(succeeded))
    if latest is not None:
        assert len(dl.read_checkpoint(latest)["model.weight"].unique()) == 1


def test_models_on_some_of_the_ranks(tmp_path: Path) -> None:
    """All ranks call; a rank that holds nothing of a model takes part, and saves of other teams do not meet."""

    def nets(world: dl.Partition, value: float) -> dict[str, nn.Module]:
        line, root = world.grid((1, 2)), world.grid((1, 1))
        rows = world.grid((2, 1))
        three = world.grid((1, 3)), world.grid((3, 1))
        made = {
            "G": dnn.DistributedLinear(root, line, rows, 4, 5),
            "D": dnn.DistributedLinear(root, three[0], three[1], 2, 7),
        }
        with torch.no_grad():
            for net in made.values():
                for p in net.parameters():
                    p.fill_(value)
        return made

    def body(world: dl.Partition) -> None:
        saved, other = nets(world, 3.0), nets(world, 4.0)
        optimizers = [
            {name: torch.optim.Adam(net.parameters()) for name, net in models.items()} for models in (saved, other)
        ]
        for net in saved.values():
            for p in net.parameters():
                p.grad = torch.ones_like(p)
        for optimizer in optimizers[0].values():
            optimizer.step()
        dl.save(tmp_path / "all", model=saved, optimizer=optimizers[0])
        dl.load(tmp_path / "all", model=other, optimizer=optimizers[1])
        for name, net in other.items():
            for p, q in zip(net.parameters(), saved[name].parameters(), strict=True):
                assert torch.equal(p, q)
                if p.numel():
                    state = optimizers[1][name].state[p]
                    assert (state["step"].item(), state["exp_avg"].shape) == (1.0, p.shape)
        dl.load(tmp_path / "all", model={"D": other["D"]}, strict=False)
        first, second = world.create_partition_inclusive([0, 1]), world.create_partition_inclusive([1, 2])
        savings = []
        for number, P in enumerate((first, second)):
            if P.active:
                savings.append(dl.save(tmp_path / f"pair_{number}", model=linear(1.0), P=P, wait=False))
        for saving in savings:
            saving.wait()

    spmd(4, body)


def test_a_save_that_nobody_waits_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rank fails the first one gives up at once, and both say so."""
    from distdl_lite.checkpoint import writing

    real = writing.save_file

    def save(tensors: Any, path: Path) -> None:
        if path.name == "1.safetensors":
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(writing, "save_file", save)

    def body(world: dl.Partition) -> Any:
        return dl.save(tmp_path / "a", model=linear(1.0), wait=False)

    savings = spmd(2, body)
    writing.wait([work for saving in savings for work in saving._work])
    said = capfd.readouterr().err
    assert "distdl_lite.save: rank 1 cannot write" in said
    assert "distdl_lite.save: rank 0 cannot complete" in said
    assert list(tmp_path.iterdir()) == []
