"""The examples, small, on ranks that are threads."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jobs import run

import distdl_lite as dl
from distdl_lite.testing import spmd

_EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_denoise_has_one_loss_curve_on_every_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoise = example("denoise")
    picture = tmp_path / "denoise.png"
    options = denoise.parse(["--size", "40x56", "--steps", "4", "--out", str(picture)])

    def losses(world: dl.Partition, grid: tuple[int, int]) -> list[float]:
        return denoise.run(world.grid((1, 1, *grid)), options)

    serial = spmd(1, lambda world: losses(world, (1, 1)))[0]
    assert serial[-1] < serial[0]
    for grid in [(1, 2), (2, 2), (4, 1)]:
        picture.unlink()
        capsys.readouterr()
        for curve in spmd(grid[0] * grid[1], lambda world, grid=grid: losses(world, grid)):
            torch.testing.assert_close(torch.tensor(curve), torch.tensor(serial), rtol=1e-3, atol=0)
        assert picture.stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert "rank 1:" in printed
        assert float(printed.split("serial network's output: ")[1]) < 1e-5


def test_denoise_goes_on_on_another_grid(tmp_path: Path) -> None:
    denoise = example("denoise")
    words = ["--size", "16x24", "--levels", "1", "--steps", "5", "--out", str(tmp_path / "denoise.png")]
    saved = [*words, "--save", str(tmp_path / "run"), "--every", "2"]

    def losses(ranks: int, words: list[str]) -> list[float]:
        return spmd(ranks, lambda world: denoise.run(world.grid((1, 1, 1, ranks)), denoise.parse(words)))[0]

    unbroken = losses(2, saved)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_2", "step_4"]
    shutil.rmtree(tmp_path / "run/step_4")
    resumed = losses(3, [*saved, "--resume"])
    assert resumed[:2] == unbroken[:2]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(unbroken), rtol=1e-4, atol=0)


def test_denoise_takes_only_sizes_that_can_be_halved(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("denoise").parse(["--size", "60x72"])
    assert "must be divisible by 8" in capsys.readouterr().err


def test_objects_are_found_in_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_blocks, found = example("in_blocks"), []
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        grid = (1, 1, *in_blocks.GRIDS[ranks])
        result, *others = spmd(ranks, lambda world, grid=grid, folder=folder: in_blocks.run(world.grid(grid), folder))
        assert not any(others)
        assert result[1] < 1e-4
        found.append(result[0])
    assert 300 < found[0] == found[1] < 3000
    assert "blocks end at ((0, 384, 872), (0, 512, 1000)); read for each byte needed: 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_lenet_learns_as_the_serial_network(ranks: int) -> None:
    lenet = example("lenet")
    result, *others = spmd(ranks, lambda world: lenet.run(world, epochs=2, batch=128, seed=1))
    assert others == [None] * (ranks - 1)
    ours, serial = torch.tensor(result.losses).T
    torch.testing.assert_close(ours, serial, rtol=1e-3, atol=0)
    assert ours[-1] < 0.5 * ours[0]
    assert result.accuracies[0] == pytest.approx(result.accuracies[1], abs=0.01)
    cut = {name for name, (mine, whole) in result.held.items() if mine != whole}
    assert cut >= ({"0.weight", "3.weight", "7.weight", "9.weight"} if ranks > 1 else set())


SAME = ("now", "deferred", "root", "ddp")  # as one process, for any number of rows


def check_data_parallel(world: dl.Partition, *arguments: str) -> None:
    """The curves are those of one process; that of local SGD is where it averages after each step."""
    digits = example("digits_data_parallel")
    options = digits.parse(world.size, ["--epochs", "2", "--batch", "288", *arguments])
    options.faces = [face for face in options.faces if face != "ddp" or options.face == "ddp"]
    for name, (ours, serial) in digits.run(world, options).items():
        assert len(ours) == 2 * (1439 // options.batch + (name not in digits.EVEN))
        difference = max(abs(a - b) for a, b in zip(ours, serial, strict=True))
        equal = name in SAME or options.period == 1 or world.size == 1
        assert difference < 1e-12 if equal else 1e-6 < difference < 1
        assert min(serial) < serial[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_data_parallelism_has_the_curve_of_one_process(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curves.png"
    spmd(ranks, lambda world: check_data_parallel(world, "--out", str(picture)))
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.count("largest difference to one process") == 4
    spmd(ranks, lambda world: check_data_parallel(world, "--face", "local_sgd", "--period", "1"))


def test_data_parallelism_with_no_rows_on_a_rank() -> None:
    for face in ("now", "deferred", "root"):
        spmd(2, lambda world, face=face: check_data_parallel(world, "--face", face, "--batch", "1438"))


def test_data_parallelism_takes_only_batches_that_divide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("digits_data_parallel").parse(5, [])
    assert "--batch 96 must be divisible by 5, the number of ranks" in capsys.readouterr().err


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore")  # torch's modules warn of each other
def test_data_parallelism_by_ddp() -> None:
    pair = dl.Partition().create_partition_inclusive([0, 1])
    if pair.active:
        check_data_parallel(pair, "--face", "ddp")


def test_error_bars_are_those_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    regression = example("tagi_regression")
    picture = tmp_path / "band.png"
    options = regression.parse(["--epochs", "3", "--out", str(picture)])
    scores = {}
    for ranks in (1, 3):
        scores[ranks], *others = spmd(ranks, lambda world: regression.run(world, options))
        assert not any(others)
        assert all(difference < 1e-12 for _, _, difference in scores[ranks].values())
        assert picture.stat().st_size > 10_000
        picture.unlink()
    assert scores[1]["curve"] == pytest.approx(scores[3]["curve"], abs=1e-12)
    assert scores[3]["curve"][0] < 0.45
    assert scores[3]["diabetes"][0] < 55
    assert capsys.readouterr().out.count("largest difference to one process") == 4


@pytest.mark.jobs
@pytest.mark.parametrize("over", ["ddp", "fsdp2"])
def test_torchs_containers_over_groups_train_as_one_device(over: str) -> None:
    words = "-m", "torch.distributed.run", "--nproc-per-node", "4", str(_EXAMPLES / "beside_torch.py"), "--over", over
    done = run(sys.executable, *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(steps) == 4
    assert all(abs(float(words[3].strip(",")) - float(words[-1])) < 2e-6 for words in steps)
    assert "computes the same: True" in done.stdout


def test_first_program_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    program = _EXAMPLES.parent / "first.py"
    spmd(4, lambda world: runpy.run_path(str(program)))
    printed, readme = capsys.readouterr().out, (_EXAMPLES.parents[1] / "README.md").read_text()
    assert printed == program.with_suffix(".txt").read_text()
    assert f"```python\n{program.read_text()}```" in readme
    assert textwrap.indent(printed, "    ") in readme
