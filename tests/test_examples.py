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


@pytest.mark.parametrize("ranks", [1, 3])
def test_error_bands_are_those_of_one_process(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the gallery, on other numbers of ranks than its own, predicts what it has not seen."""
    monkeypatch.setattr(
        "distdl_lite.testing.launch", lambda _, body: spmd(ranks, lambda world: body(world, steps=10))[0]
    )
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(_EXAMPLES.parent / "gallery" / "tagi_bands.py"))
    assert found["difference"] < 1e-12
    assert found["rmse_curve"] < 0.3
    assert found["rmse_patients"] < 55


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
