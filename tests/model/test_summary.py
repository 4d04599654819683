"""Summaries of networks of layers say, without data, what ranks then send, compute and hold."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
import torch
from families import FAMILIES
from generated import COPIED, SIZE, Draw
from networks import held_in_a_step
from ranks import on_ranks
from torch.utils import _pytree as pytree

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.model import summary as of_layers
from distdl_lite.model.dry_layers import Seen, seen
from distdl_lite.model.report import Traffic
from distdl_lite.nn.conv import overlap
from distdl_lite.testing import count, spmd

Numbers = tuple[int, int, int, int]  # messages and bytes, forward and backward


def counted(net: torch.nn.Module, args: Sequence[torch.Tensor], steps: int = 2) -> Numbers:
    """What this rank counts in the last step."""
    for _ in range(steps):
        net.zero_grad()
        with torch.set_grad_enabled(net.training):
            with count() as forward:
                made = [y for y in pytree.tree_leaves(net(*args)) if y.requires_grad]
            with count() as backward:
                if made:
                    torch.autograd.backward(made, [torch.ones_like(y) for y in made])
    return forward.messages, forward.bytes, backward.messages, backward.bytes


def told(rank: Seen) -> Numbers:
    """The same of a rank without data."""
    forward, backward = (sum((both[side] for both in rank.sent.values()), Traffic()) for side in (0, 1))
    return forward.messages, forward.bytes, backward.messages, backward.bytes


def drawn(world: dl.Partition, family: str, number: int) -> tuple[Any, list[torch.Tensor], bool]:
    """A layer's constructor, this rank's blocks, and whether it trains."""
    d = Draw(world, family, number)
    overlap.LEAST_BYTES = d.choice((0, 0, COPIED))
    twins = FAMILIES[family](d)
    blocks, trains = [], d.chance(0.8) or True not in twins.modes
    for x, take in zip(twins.inputs, twins.take, strict=True):
        slices = take(x.shape)
        block = dl.zero_volume_tensor(dtype=x.dtype) if slices is None else x[slices].clone()
        blocks.append(block.requires_grad_((x.is_floating_point() or x.is_complex()) and d.chance(0.9)))
    return twins.layer, blocks, trains


def both_ways(family: str, number: int) -> tuple[Any, Any]:
    """What the ranks count, and what they are said to; or their errors."""

    def run(world: dl.Partition) -> Numbers:
        make, blocks, trains = drawn(world, family, number)
        return counted(make().train(trains), blocks)

    def look() -> Seen:
        make, blocks, trains = drawn(dl.Partition(), family, number)
        return seen(lambda: (make().train(trains), blocks), dl.Partition().team)

    found: list[Any] = []
    for attempt in (lambda: spmd(SIZE, run), lambda: [told(rank) for rank in of_layers.run(SIZE, None, look).values()]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(attempt())
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                found.append(f"{type(error).__name__}: {error}")
            finally:
                overlap.LEAST_BYTES = COPIED
    return found[0], found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_sends_what_is_counted(family: str) -> None:
    """On every rank."""
    first, equal = date.today().toordinal() * 1000, 0
    for number in range(first, first + 8):
        real, dry = both_ways(family, number)
        assert real == dry, f"{family} {number}"
        equal += isinstance(real, list)
    assert equal >= 3


class Own(dnn.Module):
    """A network of one's own: a Fourier transform and a padded sum beside a convolution, and weights of its own."""

    def __init__(self, P: dl.CartesianPartition) -> None:
        super().__init__()
        self.conv = dnn.DistributedConv2d(P, 2, 4, 3, stride=2, padding=1)
        self.fft = dnn.DistributedFFT(P, dim=(2, 3))
        self.rest = torch.nn.Sequential(dnn.DistributedBatchNorm(P, 4), torch.nn.ReLU(), dnn.DistributedDropout(P, 0.5))
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.square = lambda x: x * x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.rest(y + self.fft(y).real) * self.square(self.scale)


def small(P: dl.CartesianPartition) -> torch.nn.Module:
    """Down to one rank for each image, and on to a linear layer over all."""
    rows = P._derive(P.ranks[:2], (2, 1))
    return torch.nn.Sequential(
        dnn.DistributedConv2d(P, 2, 4, 3, padding=1),
        torch.nn.ReLU(),
        dnn.DistributedMaxPool2d(P, 3, 2),
        dnn.DistributedFlatten(P, P_y=rows),
        dnn.DistributedLinear(rows, rows, None, 4 * 6 * 4, 5),
        dnn.DistributedLogSoftmax(rows, 1),
    )


def wide(P: dl.CartesianPartition) -> torch.nn.Module:
    """So much to sum that it begins before backward ends."""
    return torch.nn.Sequential(*(dnn.DistributedConv2d(P, c, d, 3, padding=1) for c, d in ((2, 400), (400, 400))))


def moved(P: dl.CartesianPartition) -> torch.nn.Module:
    """All primitives in turn."""
    alone, line = P._derive(P.ranks[:1], (1, 1, 1, 1)), P._derive(P.ranks, (1, 1, P.size, 1))
    return torch.nn.Sequential(
        dnn.Repartition(P, alone),
        dnn.Broadcast(alone, P),
        dnn.SumReduce(P, alone),
        dnn.Repartition(alone, line),
        dnn.HaloExchange(line, [0, 0, 1, 0]),
        dnn.AllGather(line, axes_all_gather=(2,)),
        dnn.AllSumReduce(line, axes_reduce=(2,)),
        dnn.ReduceScatter(line, axes_reduce_scatter=(2,)),
    )


@pytest.mark.parametrize("build", [Own, small, wide, moved])
@pytest.mark.parametrize("grid", [(1, 1, 2, 2), (2, 1, 1, 3)])
def test_networks_send_what_is_counted(build: Any, grid: tuple[int, ...]) -> None:
    x = torch.zeros(3, 2, 13, 9, requires_grad=True)

    def body(world: dl.Partition) -> Numbers:
        P = world.grid(grid)
        return counted(build(P), [P.cut(x.detach()).requires_grad_()])

    found = dl.summary(build, x, grid)
    told = found.forward.messages, found.forward.bytes, found.backward.messages, found.backward.bytes
    assert told == tuple(max(column) for column in zip(*spmd(math.prod(grid), body), strict=True))
    assert found.weights == sum(row.weights for row in found.rows)
    assert found.kept == sum(row.kept for row in found.rows)
    assert (found.backward.messages > 2) == (build is not wide or len(found.rows) > 2)


@pytest.mark.parametrize("build", [Own, moved, wide])
def test_of_many_ranks_some_are_enough(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that are nearly even; where they are not, one that sends a message more may be among the others."""
    x, grid = torch.zeros(2, 2, 40, 33, requires_grad=True), (1, 1, 5, 4)
    whole = dl.summary(build, x, grid)
    monkeypatch.setattr(of_layers, "ALL_UP_TO", 3)
    assert dl.summary(build, x, grid).to_dict() == whole.to_dict()


def test_a_large_grid() -> None:
    few, many = (dl.summary(Own, (1, 2, 4096, 4096), (1, 1, n, n)) for n in (4, 12))
    assert many.ranks == 144
    assert many.forward.messages > few.forward.messages  # of the Fourier transform
    assert many.peak < few.peak / 7
    assert many.rows[1].output == "(1, 4, 2048/12, 2048/12)"


def test_a_network_of_ranks_that_run_says_the_same() -> None:
    """Of which it changes nothing, whatever its attributes are."""
    wanted = dl.summary(Own, (2, 2, 13, 9), (1, 1, 2, 2)).to_dict()

    def body(world: dl.Partition) -> None:
        class Local(Own):
            pass

        P = world.grid((1, 1, 2, 2))
        net = Local(P)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for _ in range(2):
            found = dl.summary(net, (2, 2, 13, 9), P).to_dict()
            rows = [row | {"operations": ()} for row in found.pop("rows")]
            assert rows == [row | {"operations": ()} for row in wanted["rows"]]
            assert found == {key: value for key, value in wanted.items() if key != "rows"}
            net(P.cut(torch.zeros(2, 2, 13, 9))).sum().backward()
        assert before.keys() == net.state_dict().keys()
        assert torch.equal(before["conv.weight"], net.conv.weight)
        assert not net._forward_hooks

    spmd(4, body)


@on_ranks(4, mpi=True)
def test_on_processes(world: dl.Partition) -> None:
    P = world.grid((1, 1, 2, 2))
    found = dl.summary(Own(P), (2, 2, 13, 9), P)
    assert found.to_dict() == dl.summary(Own, (2, 2, 13, 9), (1, 1, 2, 2)).to_dict()


def test_memory_is_what_a_step_holds() -> None:
    """Beside the buffers of movements, which a first step makes."""

    def body(world: dl.Partition) -> tuple[int, int]:
        P = world.grid((1, 1, 2, 1))
        return held_in_a_step(Own(P), P, (2, 2, 128, 96))

    found = dl.summary(Own, (2, 2, 128, 96), (1, 1, 2, 1))
    for kept, peak in spmd(2, body):
        assert found.kept == pytest.approx(kept, rel=0.02)
        assert found.peak - found.weights - found.optimizer == pytest.approx(peak, rel=0.15)


def test_the_table_says_module_by_module_what_happens() -> None:
    found = dl.summary(Own, (1, 2, 36, 26), (1, 1, 2, 2))
    rows = {row.path: row for row in found.rows}
    assert list(rows) == ["inputs", "conv", "fft", "rest.0", "rest.1", "rest.2", "", "gradients"]
    assert rows["conv"].operations == ("DistributedConv2d",)
    assert rows["conv"].output == rows[""].output == "(1, 4, 18/2, 13/2)"
    assert rows["conv"].multiply_adds == 9 * 7 * 4 * 18
    assert rows["conv"].movements == {"exchange": 1}
    assert rows[""].weights == 4
    assert rows["gradients"].backward.bytes == 4 * (4 * 18 + 4)  # a norm sums those of its weights itself
    assert found.gradients == 4 * (4 * 18 + 4 + 8 + 1)
    evaluated = dl.summary(lambda P: Own(P).eval(), (1, 2, 36, 26), (1, 1, 2, 2))
    assert (evaluated.backward, evaluated.gradients) == (Traffic(), 0)
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["path"] == "conv"
    assert "| conv | DistributedConv2d |" in found.to_markdown()


def test_models_of_plain_torch_are_reported() -> None:
    model, shape, grid = torch.nn.Conv2d(2, 3, 3), (2, 2, 9, 7), (1, 1, 2, 1)
    wanted = dl.report(model, grid, shape).to_dict()
    assert dl.summary(model, shape, grid).to_dict() == wanted
    assert dl.summary(lambda P: model, shape, grid).to_dict() == wanted
    assert dl.summary(lambda P: dl.distribute(model, P), shape, grid).to_dict() == wanted
    net = spmd(2, lambda world: dl.distribute(model, world.grid(grid)))[0]
    assert dl.summary(net, shape, grid).to_dict() == wanted
    with pytest.raises(ValueError, match="compiled for a grid of shape"):
        dl.summary(net, shape, (1, 1, 1, 2))


def test_compiled_ones_among_layers() -> None:
    """Of few ranks; of many, nobody could say what the others tell."""

    def build(P: dl.CartesianPartition) -> torch.nn.Module:
        return torch.nn.Sequential(dnn.DistributedConv2d(P, 2, 3, 3), dl.distribute(torch.nn.Conv2d(3, 2, 3), P))

    x = torch.zeros(1, 2, 12, 9)
    counts = spmd(2, lambda world: counted(build(P := world.grid((1, 1, 2, 1))), [P.cut(x)]))
    found = dl.summary(build, x, (1, 1, 2, 1))
    assert counts[0][1] == found.forward.bytes > 0
    assert found.rows[2].output == "(1, 2, 8/2, 5)"
    with pytest.raises(RuntimeError, match="ask for fewer ranks"):
        dl.summary(build, (1, 2, 100, 100), (1, 1, 9, 9))


def test_refusals() -> None:
    def wrong(P: dl.CartesianPartition) -> torch.nn.Module:
        return dnn.DistributedConv2d(P, 3, 2, 3)

    attempts: list[tuple[Any, Any, type[Exception], str]] = [
        (3, (1, 1), TypeError, "a network, or a function that builds one, is needed"),
        (lambda P: 3, (1, 1), TypeError, "it returns 3"),
        (wrong, (1, 1, 2, 1), ValueError, "input has 2 channels"),
        (wrong, (1, 1, 9, 9), ValueError, "input has 2 channels"),
        (wrong, 4, TypeError, "P=4 is no sequence of integers"),
        (wrong, (1, 3, 40, 50), ValueError, r"the grid was .* is it report\(model, grid, shape\)"),
        (torch.nn.ReLU, (1, 1), TypeError, r"ReLU is of plain torch: pass ReLU\(...\)"),
        (torch.nn.Linear, (1, 1), TypeError, r"Linear\(P\) cannot be built: .* is passed itself, Linear\(...\)"),
        (lambda P: dnn.DistributedConv2d(P.grid((1, 1, 3, 1)), 2, 2, 3), (1, 1, 2, 1), ValueError, "needs 3 ranks"),
    ]
    for net, grid, kind, text in attempts:
        with pytest.raises(kind, match=text):
            dl.summary(net, (1, 2, 40, 30), grid)

    def body(world: dl.Partition) -> None:
        with pytest.raises(TypeError, match="needs the partition"):
            dl.summary(Own(world.grid((1, 1, 2, 1))), (1, 2, 8, 8), (1, 1, 2, 1))

    spmd(2, body)


def test_a_layer_for_each_line_of_a_grid() -> None:
    """Of many ranks, some would not know of all others in their line."""

    def build(P: dl.CartesianPartition) -> torch.nn.Module:
        return dnn.DistributedConv1d(P.create_cartesian_subtopology_partition([True, True, False, True]), 2, 3, 3)

    x, axes = torch.zeros(1, 2, 40, requires_grad=True), [(0, 1, 3)]

    def body(world: dl.Partition) -> Numbers:
        P = world.grid((1, 1, 2, 3))
        return counted(build(P), [P.cut(x.detach(), axes[0]).requires_grad_()])

    found = dl.summary(build, x, (1, 1, 2, 3), in_axes=axes)
    told = found.forward.messages, found.forward.bytes, found.backward.messages, found.backward.bytes
    assert told == max(spmd(6, body))
    with pytest.raises(RuntimeError, match="ask for fewer"):
        dl.summary(build, x, (1, 1, 9, 9), in_axes=axes)


def test_several_inputs_and_named_axes() -> None:
    """Also where ranks run of which a function needs none."""

    class Loss(dnn.Module):
        def __init__(self, P: dl.CartesianPartition) -> None:
            super().__init__()
            self.conv, self.loss = dnn.DistributedConv2d(P, 2, 5, 3), dnn.DistributedCrossEntropyLoss(P)
            self.line = P.line("h")

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.loss(self.conv(x), target)

    args = [torch.zeros(2, 2, 14, 9), torch.zeros(2, 12, 7, dtype=torch.long)]

    def body(world: dl.Partition) -> None:
        P = world.grid(h=3, of="n c h w")
        counts = counted(Loss(P), [P.cut(args[0]), P.cut(args[1], (0, 2, 3))])
        for net in (Loss, Loss(P)):
            found = dl.summary(net, args, P)
            told = found.forward.messages, found.forward.bytes, found.backward.messages, found.backward.bytes
            assert told == tuple(max(column) for column in zip(*(P.allgather_data(counts) or ()), strict=True))

    spmd(3, body)


def test_colours_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    found = dl.report(torch.nn.ReLU(), (2,), (4,))
    plain, coloured = io.StringIO(), Terminal()
    for file in (plain, coloured):
        found.print(file)
    assert plain.getvalue() == f"{found}\n"
    assert "\033[1mtotal " in coloured.getvalue()
    assert re.sub("\033[^m]*m", "", coloured.getvalue()) == plain.getvalue()
