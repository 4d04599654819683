"""What stands in a checkpoint, what it is loaded into, and what is refused."""

from __future__ import annotations

import json
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, shared_folder
from safetensors.torch import load_file, save_file

import distdl_lite as dl
from distdl_lite import nn as dnn
from distdl_lite.__main__ import main
from distdl_lite.checkpoint import writing
from distdl_lite.checkpoint.files import faults
from distdl_lite.checkpoint.plain import decoded, encoded
from distdl_lite.testing import spmd


class Net(torch.nn.Module):
    """Weights cut over ranks, some of which hold nothing, replicated ones, plain and tied ones, and buffers of odd kinds."""

    def __init__(self, world: dl.Partition, scale: float = 1.0, ranks: int | None = None) -> None:
        super().__init__()
        n = ranks or world.size
        torch.manual_seed(int(scale))
        root, line = world.grid((1, 1)), world.grid((1, n))
        self.rows = dnn.DistributedLinear(root, line, world.grid((n, 1)), 4, 7)
        self.few = dnn.DistributedLinear(line, root, world.grid((1, n)), 2, 3)
        self.conv = dnn.DistributedConv1d(world.grid((1, 1, n)), 3, 64, 700)
        self.same = torch.nn.Linear(2, 2)
        self.tied = self.same
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("wide", torch.full((2, 3), scale + 1j, dtype=torch.complex128))
        self.register_buffer("halves", torch.full((5,), scale, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(int(scale)))


def whole(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dl.serial_state_dict(net)


def same(a: dict[str, torch.Tensor], b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@on_ranks(4, mpi=True)
def test_any_number_of_ranks(world: dl.Partition) -> None:
    """What 4 ranks have saved 1 to 4 of them load, as one process reads it; each byte is written once."""
    net = Net(world, scale=3.0)
    expected = whole(net)
    with shared_folder(world) as folder:
        saving = dl.save(folder / "step_1", model=net, extra=[1, (2.5, None)])
        assert saving.path == folder / "step_1"
        saving.wait()
        for size in (1, 2, 3, 4):
            team = world.create_partition_inclusive(range(size))
            if not team.active:
                continue
            other = Net(world.create_partition_inclusive(range(4)), 2.0, size)
            found = dl.load(str(folder / "step_1"), model=other, P=team)
            assert found == dl.Loaded(extra=[1, (2.5, None)])
            state = whole(other)
            assert not state or same(state, expected)
        made = dl.read_checkpoint(folder / "step_1")
        if world.rank == 0:
            assert same(expected, {name.removeprefix("model."): made[name] for name in made})
            assert faults(folder / "step_1") == []
            assert {path.suffix for path in (folder / "step_1").iterdir()} == {".json", ".safetensors"}
            files = [sum(t.nbytes for t in load_file(folder / "step_1" / name).values()) for name in made.files]
            once = sum(t.nbytes for name, t in expected.items() if not name.startswith("tied"))
            assert sum(files) - 4 * torch.get_rng_state().nbytes == once
            assert len(made.tensors["model.conv.weight"].pieces) == 4  # each of those that hold it writes a part
            assert max(files) < 1.3 * min(files)


def saved(folder: Path, ranks: int = 2, **more: Any) -> Path:
    """A checkpoint of a net and its optimizer."""

    def body(world: dl.Partition) -> None:
        net = Net(world)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        dl.save(folder / "step_1", model=net, optimizer=optimizer, **more)

    spmd(ranks, body)
    return folder / "step_1"


def test_files_of_others(tmp_path: Path) -> None:
    """A serial state, in memory or in a file, is loaded as a checkpoint is; parts, other names, other dtypes."""
    path = saved(tmp_path)
    made = dl.read_checkpoint(path)
    serial = {name.removeprefix("model."): made[name] for name in made if name.startswith("model.")}
    plain = {name: x for name, x in serial.items() if name != "wide"}
    save_file(plain, tmp_path / "whole.safetensors")

    def body(world: dl.Partition) -> None:
        for source in (serial, path):
            net = Net(world, 2.0)
            assert dl.load(source, model=net) == dl.Loaded()
            state = whole(net)
            assert not state or same(state, serial)
        net = Net(world, 2.0)
        before = whole(net)
        found = dl.load(tmp_path / "whole.safetensors", model=net, strict=False)
        assert (found.missing, found.unexpected) == (("wide",), ())
        state = whole(net)
        assert not state or same(state, {**serial, "wide": before["wide"]})
        renamed = {name.replace("rows.", "lines."): x for name, x in serial.items()}
        for rename in (
            {"lines.weight": "rows.weight", "lines.bias": "rows.bias"},
            lambda n: n.replace("lines", "rows"),
        ):
            dl.load(renamed, model=Net(world, 2.0), rename=rename)
        net = Net(world, 2.0)
        assert dl.load(path, model=net, names=["rows.*", "f*.bias"]).unexpected == ()
        state = whole(net)
        assert not state or {n for n in serial if torch.equal(state[n], serial[n])} == {
            "rows.weight", "rows.bias", "few.bias", "empty"
        }  # fmt: skip
        double = Net(world, 2.0).double()
        optimizer = torch.optim.Adam(double.parameters())
        dl.load(path, model=double, optimizer=optimizer, dtype=torch.float64)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float64}
        assert {group["lr"] for group in optimizer.param_groups} == {0.1}

    spmd(2, body)


def test_refused_on_all_ranks(tmp_path: Path) -> None:
    """Each error is the same on all ranks, also where one of them alone has it; nothing is left behind."""
    path = saved(tmp_path, extra=1)

    def body(world: dl.Partition) -> None:
        net, first = Net(world), world.rank == 0
        optimizer = torch.optim.Adam(net.parameters())

        def refused(text: str, call: Any, kind: Any = (ValueError, TypeError, RuntimeError)) -> None:
            with pytest.raises(kind) as caught:
                call()
            assert text in str(caught.value), caught.value
            texts = world.allgather_data(str(caught.value))
            assert texts is not None
            assert len(set(texts)) == 1, texts

        refused("exists already", lambda: dl.save(path, model=net))
        refused("path", lambda: dl.save(tmp_path / str(world.rank), model=net))
        refused("extra", lambda: dl.save(tmp_path / "a", extra=world.rank))
        refused("extra.0 is a set", lambda: dl.save(tmp_path / "a", extra=[{1}] if first else [1]))
        refused("model must be a torch.nn.Module, not int", lambda: dl.save(tmp_path / "a", model=3 if first else net))
        refused("keep=0", lambda: dl.save(tmp_path / "a", model=net, keep=0))
        refused(
            "data, a DataLoader, has no state_dict",
            lambda: dl.save(tmp_path / "a", data=torch.utils.data.DataLoader([])),
        )
        refused(
            "Muon", lambda: dl.save(tmp_path / "a", optimizer=torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))]))
        )
        refused("none of the model's", lambda: dl.save(tmp_path / "a", model=net.rows, optimizer=optimizer))
        refused("no checkpoint", lambda: dl.load(tmp_path / "b" if first else path, model=net))
        refused(f"but these are: {path}", lambda: dl.load(tmp_path, model=net))
        refused(
            "only the model has empty, wide, halves, count, rows.weight and 9 more; only the checkpoint has nothing",
            lambda: dl.load({}, model=net),
        )
        refused("only the checkpoint has step", lambda: dl.load({"step": torch.ones(1)}, model=torch.nn.ReLU()))
        refused("torch.float32 in the checkpoint, torch.float64 here", lambda: dl.load(path, model=Net(world).double()))
        refused(
            "shape (2, 2) in the checkpoint, (5, 2)",
            lambda: dl.load(path, model=torch.nn.ModuleDict({"same": torch.nn.Linear(2, 5)}), strict=False),
        )
        refused("no tensor of the model is named like", lambda: dl.load(path, model=net, names="encoder.*"))
        refused(
            "optimizer was Adam when it was saved, here it is SGD",
            lambda: dl.load(path, model=net, optimizer=torch.optim.SGD(net.parameters())),
        )
        refused("None is what latest_checkpoint returns", lambda: dl.load(None, model=net))
        two = torch.optim.Adam([{"params": list(net.rows.parameters())}, {"params": list(net.conv.parameters())}])
        refused("2 and 1 groups", lambda: dl.load(path, model=net, optimizer=two))
        refused("no scheduler", lambda: dl.load(path, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1)))
        refused(
            "no optimizer",
            lambda: dl.load(
                {},
                model=torch.nn.ReLU(),
                strict=False,
                optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]),
            ),
        )
        refused("the ranks disagree", lambda: dl.load({} if first else path, model=net))

    spmd(2, body)
    assert [found.name for found in tmp_path.iterdir()] == ["step_1"]


def test_torn_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is missing, short or changed is named; so is an index that is none."""
    path = saved(tmp_path)
    file = path / "1.safetensors"
    right = file.read_bytes()

    def verdict() -> str:
        try:
            main(["checkpoint", "verify", str(path)])
        except SystemExit as ended:
            return str(ended.code)
        return "right"

    assert verdict() == "right"
    file.write_bytes(right[:-1] + b"x")
    assert verdict() == f"{file} has changed"
    for text, damage in (
        (f"{len(right) - 1} bytes, the checkpoint's index says {len(right)}", lambda: file.write_bytes(right[:-1])),
        (f"{file} is missing", file.unlink),
        ("is not of a distdl_lite checkpoint of version 1", lambda: (path / "index.json").write_text('{"version": 2}')),
        ("its index.json cannot be read", lambda: (path / "index.json").write_text("{")),
    ):
        damage()
        assert text in verdict()
        with pytest.raises(ValueError, match="load: "):
            spmd(2, lambda world: dl.load(path, model=Net(world)))


def fails_on_one(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    real = writing.save_file

    def save(tensors: Any, path: Path) -> None:
        if path.name == file:
            path.write_bytes(b"halves")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(writing, "save_file", save)


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool) -> None:
    """All ranks raise the same, at once or when the next is saved; the last good one stays, alone."""
    path = saved(tmp_path)

    def body(world: dl.Partition) -> None:
        saving = dl.save(tmp_path / "step_2", model=Net(world), wait=wait)
        for _ in range(2):  # an error stays one
            with pytest.raises(RuntimeError, match="rank 1 cannot write") if fails else nullcontext():
                saving.wait()
        if fails:
            saving.wait()

    fails = True
    with monkeypatch.context() as patch:
        fails_on_one(patch, "1.safetensors")
        with pytest.raises(RuntimeError, match=r"save: rank 1 cannot write .*1.safetensors: .*No space left on device"):
            spmd(3, body)
    assert [found.name for found in tmp_path.iterdir()] == ["step_1"]
    assert dl.latest_checkpoint(tmp_path) == path
    fails = False
    spmd(3, body)
    assert dl.latest_checkpoint(tmp_path) == tmp_path / "step_2"
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="rank 0 cannot make"):
        spmd(2, lambda world: dl.save(tmp_path / "file" / "step_3", extra=1))


def test_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is written; the next save waits for it; as many as asked for are kept, others' left alone."""
    (tmp_path / "best_1").mkdir()

    def body(world: dl.Partition) -> list[float]:
        net, values = Net(world), []
        for step in range(5):
            with torch.no_grad():
                for tensor in net.state_dict().values():
                    tensor.fill_(step)
            saving = dl.save(tmp_path / f"step_{8 + step}", model=net, wait=False, keep=2)
            with torch.no_grad():
                for tensor in net.state_dict().values():
                    tensor.fill_(-1)
        saving.wait()
        for step in (3, 4):
            dl.load(tmp_path / f"step_{8 + step}", model=net)
            values += [tensor.real.double().mean().item() for tensor in net.state_dict().values() if tensor.numel()]
        return values

    for values in spmd(3, body):
        assert values == [3.0] * (len(values) // 2) + [4.0] * (len(values) // 2)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["best_1", "step_11", "step_12"]


def test_the_new_one_is_kept_whatever_the_clock_says(tmp_path: Path) -> None:
    """One that was saved by a clock that is ahead is not newer than the one that is being saved."""
    index = saved(tmp_path) / "index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "saved": told["saved"] + 3600}))
    (tmp_path / "step_0").mkdir()
    (tmp_path / "step_0/index.json").write_text("[1]")  # of something else
    (tmp_path / ".step_1.9.removed").mkdir()
    spmd(2, lambda world: dl.save(tmp_path / "step_2", model=Net(world), keep=2))
    assert dl.latest_checkpoint(tmp_path) == tmp_path / "step_2"
    spmd(2, lambda world: dl.save(tmp_path / "step_3", model=Net(world), keep=1))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["step_0", "step_3"]


def test_files_get_their_names_while_the_first_rank_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, listed = writing.save_file, Path.iterdir

    def later(tensors: Any, path: Path) -> None:
        time.sleep(0.1 * (path.name != "0.safetensors"))
        real(tensors, path)

    monkeypatch.setattr(writing, "save_file", later)
    monkeypatch.setattr(writing, "_PATIENCE", 0.0)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([*listed(self), self / str(random.random())]))
    monkeypatch.setattr(writing, "_bytes_in", lambda folder, real=writing._bytes_in: real(folder) + random.random())
    spmd(2, lambda world: dl.save(tmp_path / "step_1", model=Net(world)))
    assert dl.latest_checkpoint(tmp_path) == tmp_path / "step_1"


def test_a_job_that_ended_in_the_middle(tmp_path: Path) -> None:
    """What it has left is no checkpoint, and is replaced by the next of that name."""
    left = tmp_path / ".step_1.0123.partial"
    left.mkdir()
    (left / "0.json").write_text("{}")
    (left / "index.json").write_text("{}")
    assert dl.latest_checkpoint(tmp_path) is None
    assert dl.latest_checkpoint(saved(tmp_path).parent) == tmp_path / "step_1"
    assert not left.exists()


VALUES: list[Any] = [
    None,
    True,
    -3,
    1.5,
    float("inf"),
    "~",
    [],
    (),
    {},
    {"a": (1, [2.0])},
    {1: 2, (1, 2): "x"},
    {"~a": 1},
]


def test_plain_values() -> None:
    """They come back from JSON as they were; what JSON has no word for is refused by its place."""
    for value in (*VALUES, torch.nn.Parameter(torch.ones(())).detach(), torch.tensor(3, dtype=torch.int16)):
        back = decoded(json.loads(json.dumps(encoded(value, "x"))))
        assert type(back) is type(value)
        assert back == value
    assert decoded(encoded(torch.tensor(0.1), "x")).dtype is torch.float32
    for wrong, kind in (
        ({"a": [1, b""]}, "x.a.1 is a bytes"),
        ((torch.ones(2),), "x.0 is a Tensor"),
        (1j, "x is a complex"),
    ):
        with pytest.raises(TypeError, match=kind):
            encoded(wrong, "x")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, extra={"epoch": 3, "loss": float("nan")})
    main(["checkpoint", "ls", str(path)])
    out = capsys.readouterr().out
    for text in (
        "model.conv.weight",
        "float32 64x3x700",
        "pieces: 2",
        "optimizer.state.rows.bias.exp_avg",
        "'epoch': 3",
    ):
        assert text in out
    main(["checkpoint", "diff", str(path), str(path)])
    assert "tensors are equal" in capsys.readouterr().out
    state = dict(dl.read_checkpoint(path).of_model())
    state["halves"] = state["halves"] + 1
    save_file({name: x.clone() for name, x in state.items() if name != "wide"}, tmp_path / "other")
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "diff", str(path), str(tmp_path / "other")])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "largest difference 1\n" in out
    assert "wide" in out
    assert len(out.splitlines()) == 2
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "export", str(path), str(tmp_path / "whole.safetensors")])
    assert "no complex128, which wide is" in capsys.readouterr().err
    net = torch.nn.Linear(3, 2)
    spmd(1, lambda world: dl.save(tmp_path / "small", model=net))
    main(["checkpoint", "export", str(tmp_path / "small"), str(tmp_path / "whole.safetensors")])
    torch.nn.Linear(3, 2).load_state_dict(load_file(tmp_path / "whole.safetensors"))
    assert torch.equal(load_file(tmp_path / "whole.safetensors")["weight"], net.weight)
