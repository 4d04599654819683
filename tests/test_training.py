"""The proof by training: whole networks, cut over ranks, learn as torch's serial network does from the same seed."""

from __future__ import annotations

import io
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from networks import TASKS, Grid, SpectralConv, Tensors
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import distdl_lite as dl
from distdl_lite.model.capture import capture
from distdl_lite.testing import spmd

Batches = Sequence[Sequence[Tensors]]  # per step, its micro-batches
STATES = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}  # as weights are


@dataclass(frozen=True)
class Recipe:
    """How to train: an optimizer, and what a training loop may do besides."""

    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[..., Any] | None = None
    max_norm: float = math.inf
    micro_batches: int = 1


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=5e-3)
PLATEAU = partial(ReduceLROnPlateau, factor=0.7, patience=0)
RECIPES = {
    "SGD": Recipe(SGD),
    "AdamW": Recipe(ADAMW),
    "SGD and more": Recipe(partial(SGD, weight_decay=0.02, nesterov=True), PLATEAU, 0.5, 2),
    "AdamW and more": Recipe(partial(ADAMW, weight_decay=0.2), PLATEAU, 0.5, 2),
}


@dataclass
class Training:
    """A network on its way."""

    task: str
    recipe: Recipe
    P: dl.CartesianPartition | None
    net: nn.Module
    measure: nn.Module
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self.recipe.optimizer(self.net.parameters())
        self.schedule = self.recipe.schedule(self.optimizer) if self.recipe.schedule else None
        dl.check_optimizer(self.optimizer)

    def run(self, batches: Batches) -> Training:
        """Train on; the lines are the same for both networks, but for that which clips."""
        for micro_batches in batches:
            self.optimizer.zero_grad()
            self.losses.append(0.0)
            for batch in micro_batches:
                *inputs, target = TASKS[self.task].blocks(batch, self.P)
                loss = self.measure(self.net(*inputs), target) / len(micro_batches)
                loss.backward()
                self.losses[-1] += loss.item()
            if math.isfinite(self.recipe.max_norm):
                self.norms.append(self.clip().item())
            self.optimizer.step()
            if self.schedule:
                self.schedule.step(self.losses[-1])
        return self

    def clip(self) -> torch.Tensor:
        if self.P is not None:
            return dl.clip_grad_norm_(self.net, self.recipe.max_norm)
        return nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.max_norm)

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]


def started(task: str, recipe: str, P: dl.CartesianPartition | None, dtype: torch.dtype) -> Training:
    """A new network, from the seed that all have in common."""
    torch.manual_seed(1)
    return Training(task, RECIPES[recipe], P, *TASKS[task].made(P, dtype))


@pytest.fixture(autouse=True)
def _captured_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and tests share what is captured of a task: the same for all grids."""
    task = getattr(request.node, "callspec", None) and request.node.callspec.params.get("task")
    if task and not request.node.get_closest_marker("mpi"):
        captured = partial(_captured, task)
        monkeypatch.setattr(dl.model.distributed.Distributed, "_capture", staticmethod(captured))


_CAPTURED: dict[Any, Any] = {}


def _captured(task: str, model: nn.Module, args: Any, kwargs: Any, whole: Any, device: str) -> Any:
    key = task, type(model), str((args, kwargs, model.training))
    if key not in _CAPTURED:
        _CAPTURED[key] = capture(model, args, kwargs, whole, device)
    return _CAPTURED[key]


@lru_cache
def batches_of(task: str, recipe: str, dtype: torch.dtype, steps: int) -> Batches:
    """Batches of three and two samples by turns, which do not change the generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        numbers = [[3 - (i + j) % 2 for j in range(RECIPES[recipe].micro_batches)] for i in range(steps)]
        return [[TASKS[task].draw(dtype, n) for n in micro] for micro in numbers]


@lru_cache
def serial_training(task: str, recipe: str, dtype: torch.dtype, steps: int) -> Training:
    """Trained in plain torch; not to be changed."""
    return started(task, recipe, None, dtype).run(batches_of(task, recipe, dtype, steps))


def assert_same(ours: Training, wanted: Training, rank: int) -> None:
    """Check parameters, buffers and optimizer state of this rank: within 1e-6 of each tensor's largest element."""
    layers, left = dict(ours.net.named_modules()), set(ours.net.state_dict())
    for name, theirs in wanted.net.state_dict(keep_vars=True).items():
        left.remove(name)
        prefix, _, own_name = name.rpartition(".")
        place = vars(layers[prefix]).get("_distdl_places", {}).get(own_name)
        box = place and place.layout.box(rank)
        part_of = operator.itemgetter(... if place is None else tuple(slice(*r) for r in box))
        mine = getattr(layers[prefix], own_name)
        states, serial_states = ours.optimizer.state.get(mine, {}), wanted.optimizer.state.get(theirs, {})
        assert states.keys() == serial_states.keys(), name
        assert bool(states) == isinstance(theirs, nn.Parameter), name
        assert_close(name, mine, part_of(theirs), theirs)
        for key, whole in serial_states.items():
            is_cut = key in STATES[type(ours.optimizer)]
            assert_close(f"{key} of {name}", states[key], part_of(whole) if is_cut else whole, whole)
    assert not left


def assert_close(name: str, mine: torch.Tensor, part: torch.Tensor, whole: torch.Tensor) -> None:
    scale = whole.detach().abs().max().item()
    torch.testing.assert_close(mine, part, rtol=0, atol=1e-6 * scale, msg=lambda text: f"{name}: {text}")


def check(world: dl.Partition, task: str, recipe: str, grid: Grid, dtype: torch.dtype, steps: int) -> None:
    """In float64 everything, in float32 the loss of each step, equals the serial training's."""
    wanted, P = serial_training(task, recipe, dtype, steps), TASKS[task].partition(world, grid)
    ours = started(task, recipe, P, dtype).run(batches_of(task, recipe, dtype, steps))
    pairs = zip(ours.net.parameters(), wanted.net.parameters(), strict=True)
    assert any(mine.shape != theirs.shape for mine, theirs in pairs) == (P.shape[1] > 1)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}[dtype]
    for mine, theirs in ((ours.losses, wanted.losses), (ours.norms, wanted.norms), ([ours.rate], [wanted.rate])):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=0)
    if dtype is torch.float64:
        assert_same(ours, wanted, world.rank)


def on_threads(grid: Grid, body: Callable[..., Any], *arguments: Any) -> Any:
    """What rank 0 returns of ``body(world, *arguments)``, on as many threads as the grid has ranks."""
    return spmd(math.prod(grid), lambda world: body(world, *arguments))[0]


def check_on_threads(task: str, recipe: str, grid: Grid, dtype: torch.dtype, steps: int) -> None:
    serial_training(task, recipe, dtype, steps)  # once, before all ranks find it
    on_threads(grid, check, task, recipe, grid, dtype, steps)


# ---- 20 steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "recipe"),
    [((1, 1), "SGD"), ((1, 1), "AdamW"), ((1, 2), "SGD"), ((2, 2), "AdamW"), ((4, 1), "SGD")],
    ids=str,
)
@pytest.mark.parametrize("task", TASKS)
def test_everything_in_float64(task: str, grid: Grid, recipe: str) -> None:
    check_on_threads(task, recipe, grid, torch.float64, steps=20)


@pytest.mark.parametrize(
    ("task", "grid", "recipe"),
    [
        ("unet", (1, 2), "AdamW"),
        ("by hand", (1, 2), "AdamW"),
        ("resnet", (1, 2), "SGD"),
        ("channels", (2, 2), "SGD"),
        ("fno", (2, 2), "AdamW"),
        ("heads", (2, 2), "SGD"),
        ("positions", (4, 1), "AdamW"),
    ],
    ids=str,
)
def test_losses_in_float32(task: str, grid: Grid, recipe: str) -> None:
    check_on_threads(task, recipe, grid, torch.float32, steps=20)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("task", TASKS)
def test_under_mpi(task: str) -> None:
    world = dl.Partition.world().create_partition_inclusive(range(4))
    if world.active:
        check(world, task, "AdamW", (2, 2), torch.float64, steps=6)


@pytest.mark.parametrize("grid", [(2, 1, 2, 1), (2, 1, 1, 2), (4, 1, 1, 1)], ids=str)
def test_spectral_weights_where_the_batch_is_cut(grid: Sequence[int]) -> None:
    """Complex weights, and blocks of two and of one sample."""
    dl.prove(SpectralConv(2, (3, 2)), grid, (3, 2, 7, 6), tolerance=1e-12)


# ---- what a training loop does besides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "grid", "recipe"),
    [
        ("unet", (2, 2), "SGD and more"),
        ("by hand", (2, 2), "SGD and more"),
        ("resnet", (1, 2), "AdamW and more"),
        ("channels", (2, 2), "AdamW and more"),
        ("fno", (4, 1), "AdamW and more"),
        ("heads", (2, 2), "SGD and more"),
        ("positions", (4, 1), "AdamW and more"),
    ],
    ids=str,
)
def test_schedule_decay_clipping_and_accumulation(task: str, grid: Grid, recipe: str) -> None:
    """A rate that falls where the loss does not, weight decay, clipped norms, two micro-batches of different size."""
    check_on_threads(task, recipe, grid, torch.float64, steps=8)
    wanted, fresh = (serial_training(task, recipe, torch.float64, steps) for steps in (8, 0))
    assert max(wanted.norms) > wanted.recipe.max_norm
    assert wanted.rate < fresh.rate


# ---- from one grid to another ----------------------------------------------------------------------------------------


def saved(training: Training) -> bytes:
    """A checkpoint of rank 0, which the serial network and its optimizer can read."""
    kept: dict[str, Any] = {
        "weights": dl.serial_state_dict(training.net),
        "optimizer": dl.serial_optimizer_state_dict(training.net, training.optimizer),
        "schedule": training.schedule.state_dict() if training.schedule else {},
    }
    torch.save(kept, file := io.BytesIO())
    return file.getvalue()


def resumed(checkpoint: bytes, world: dl.Partition, batch: Tensors, *start: Any) -> Training:
    """A training that goes on from what rank 0 reads; a first call decides how the weights are cut."""
    kept = torch.load(io.BytesIO(checkpoint), weights_only=False) if world.rank == 0 else {}
    training = started(*start)
    if training.P is None:
        training.net.load_state_dict(kept["weights"])
        training.optimizer.load_state_dict(kept["optimizer"])
    else:
        training.net(*TASKS[training.task].blocks(batch, training.P)[:-1])
        dl.load_serial_state_dict(training.net, kept.get("weights"))
        dl.load_serial_optimizer_state_dict(training.net, training.optimizer, kept.get("optimizer"))
    if training.schedule:
        training.schedule.load_state_dict(world.broadcast_data(kept.get("schedule")))
    return training


def first_part(world: dl.Partition, task: str, recipe: str, grid: Grid, batches: Batches) -> bytes:
    return saved(started(task, recipe, TASKS[task].partition(world, grid), torch.float64).run(batches))


def second_part(
    world: dl.Partition, task: str, recipe: str, grid: Grid, batches: Batches, checkpoint: bytes, wanted: Training
) -> None:
    """Go on to where uninterrupted serial training came; in plain torch too."""
    for P in [TASKS[task].partition(world, grid), *([None] if world.size == 1 else [])]:
        ours = resumed(checkpoint, world, batches[0][0], task, recipe, P, torch.float64).run(batches)
        assert ours.losses == pytest.approx(wanted.losses[-len(batches) :], rel=1e-6, abs=0)
        assert ours.rate == wanted.rate
        assert_same(ours, wanted, world.rank)


RESUMED = [
    ("unet", (2, 2), (1, 1), "SGD and more"),
    ("fno", (2, 2), (4, 1), "AdamW and more"),
    ("heads", (4, 1), (2, 2), "AdamW and more"),
    ("positions", (4, 1), (1, 2), "AdamW"),
    ("resnet", (1, 2), (2, 2), "AdamW and more"),
    ("by hand", (2, 2), (4, 1), "AdamW and more"),
    ("channels", (1, 2), (2, 2), "SGD and more"),
]


@pytest.mark.parametrize(("task", "before", "after", "recipe"), RESUMED, ids=str)
def test_resumed_on_another_grid(task: str, before: Grid, after: Grid, recipe: str) -> None:
    batches, wanted = batches_of(task, recipe, torch.float64, 8), serial_training(task, recipe, torch.float64, 8)
    checkpoint = on_threads(before, first_part, task, recipe, before, batches[:4])
    on_threads(after, second_part, task, recipe, after, batches[4:], checkpoint, wanted)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("task", "before", "after", "recipe"), RESUMED[1:2], ids=str)
def test_resumed_under_mpi(task: str, before: Grid, after: Grid, recipe: str) -> None:
    world = dl.Partition.world().create_partition_inclusive(range(4))
    if world.active:
        batches, wanted = batches_of(task, recipe, torch.float64, 4), serial_training(task, recipe, torch.float64, 4)
        checkpoint = first_part(world, task, recipe, before, batches[:2])
        second_part(world, task, recipe, after, batches[2:], checkpoint, wanted)
