"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import distdl_lite

ROOT = Path(distdl_lite.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
# Each may import itself and what stands below it.
LEVELS = [
    "text",
    "tagi/states",
    "tagi/layers",
    "tagi/sequential",
    "grid",
    "partition",
    "layout",
    "factors",
    "plan",
    "transport",
    "private",
    "autograd",
    "agreement",
    "buckets",
    "early_sums",
    "operator",
    "reducer",
    "nn/module",
    "nn/inputs",
    "nn/movement",
    "nn",
    "nn/conv",
    "nn/linear",
    "nn/norm",
    "nn/pool",
    "nn/shape",
    "nn/loss",
    "model",
    "model/rules",
    "model/distributed",
    "model/dry_layers",
    "model/summary",
    "model/prove",
    "data",
    "optim",
    "heat",
    "parallel/root/protocol",
    "parallel/root/batch",
    "parallel/root/weights",
    "parallel/root/run",
    "parallel/root/passes",
    "parallel",
]
PURE = ["grid", "partition", "layout", "factors", "plan", "optim/schedule"]
ANYTHING = ["__init__", "__main__", "testing", "pytest_plugin"]
BESIDE_TORCH = ["bench/primitives", "bench/handwritten", "bench/gloo", "bench/data_parallel"]
FRONT = ["bench", "parallel", "optim", "heat", "tagi", "checkpoint", "data", "show", "doctor", "timeline", "compat"]


def imported(path: Path, inside_functions: bool = True) -> set[str]:
    """Full names of all modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name}


def level(name: str) -> int:
    """The longest prefix of the file's name among the levels, the top for what is not listed."""
    found = [number for number, known in enumerate(LEVELS) if name == known or name.startswith(f"{known}/")]
    return max(found, default=len(LEVELS))


def own(path: Path, **options: bool) -> set[str]:
    """The package's files that a file imports."""
    ours = {name for name in imported(path, **options) if name.split(".")[0] == "distdl_lite"}
    names = {name.replace(".", "/").removeprefix("distdl_lite/") for name in ours}
    return {
        name if name in FILES else f"{name}/__init__" for name in names if {name, f"{name}/__init__"} & FILES.keys()
    }


@pytest.mark.parametrize("name", [name for name in FILES if name not in ANYTHING and not name.endswith("__init__")])
def test_arrows(name: str) -> None:
    for other in own(FILES[name]) - {"__init__"}:
        if name == "partition" and level(other) == LEVELS.index("transport"):
            assert other not in own(FILES[name], inside_functions=False), "partition may import transport lazily only"
            continue
        assert level(other) <= level(name), f"{name} imports {other}"
        assert name.split("/")[0] in FRONT or other.split("/")[0] not in FRONT, f"{name} imports {other}"


def test_every_folder_is_a_package() -> None:
    """Else it is left out where the library is installed."""
    assert {str(Path(name).parent) for name in FILES} <= {
        str(Path(name).parent) for name in FILES if name.endswith("__init__")
    }


def test_the_wings_of_layers_stand_apart() -> None:
    wings = {name: name.split("/")[1] for name in FILES if name.startswith("nn/") and name.count("/") == 2}
    pairs = {(wings[name], wings[other]) for name in wings for other in own(FILES[name]) if other in wings}
    assert {(one, other) for one, other in pairs if one != other} == {("loss", "norm")}  # whose softmax it takes


@pytest.mark.parametrize("name", PURE)
def test_pure_files_read_the_standard_library_alone(name: str) -> None:
    outside = {n.split(".")[0] for n in imported(FILES[name])} - set(sys.stdlib_module_names) - {"distdl_lite"}
    assert not outside
    assert own(FILES[name], inside_functions=False) <= set(PURE)


def test_mpi4py_is_imported_by_its_transport_alone() -> None:
    users = {name for name, path in FILES.items() if any(n.split(".")[0] == "mpi4py" for n in imported(path))}
    assert users - set(ANYTHING) <= {"transport/mpi/buffers"}
    at_load = {
        name
        for name, path in FILES.items()
        if any(n.split(".")[0] == "mpi4py" for n in imported(path, inside_functions=False))
    }
    assert at_load <= {"transport/mpi/buffers"}
    loaders = {
        name
        for name, path in FILES.items()
        if any(other.startswith("transport/mpi/") for other in own(path, inside_functions=False))
    }
    assert all(name.startswith("transport/mpi/") for name in loaders)


def test_torch_distributed_is_imported_in_its_place_alone() -> None:
    """The benchmark compares with it, and reads it where it does."""
    at_load = [name for bench in BESIDE_TORCH for name in imported(FILES[bench], inside_functions=False)]
    assert not any(name.startswith("torch.distributed") for name in at_load)
    users = {n for n, path in FILES.items() if any(name.startswith("torch.distributed") for name in imported(path))}
    assert users - set(ANYTHING) <= {"transport/torch_dist", "parallel/process_group", *BESIDE_TORCH}


def test_matplotlib_is_imported_by_pictures_alone_and_when_one_is_drawn() -> None:
    def reads(path: Path, **options: bool) -> bool:
        return any(name.split(".")[0] in ("matplotlib", "mpl_toolkits") for name in imported(path, **options))

    assert all(name.startswith("show/") for name, path in FILES.items() if reads(path))
    assert not any(reads(path, inside_functions=False) for path in FILES.values())


def test_no_star_imports() -> None:
    assert not {name for name, path in FILES.items() if any(n.endswith(".*") for n in imported(path))}
