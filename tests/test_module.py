"""The base Module: when it agrees, when it sets up, and what it does when something goes wrong."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import integers
from ranks import on_ranks
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.grid import Grid
from distdl_lite.layout import whole
from distdl_lite.nn.draws import constant
from distdl_lite.nn.parameter import Layer
from distdl_lite.partition import Partition


class Recorder(dnn.Module):
    """A layer that keeps a list of its set-ups."""

    def __init__(self, P: Partition, keeps: bool = True) -> None:
        super().__init__(P)
        self.keeps, self.log = keeps, []

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Any:
        told = self._distdl_structure
        passed = {} if told.passed is None else {rank: tensors[0].shape for rank, tensors in told.passed.items()}
        shapes = [*(passed or told.shapes).values()]
        self.log.append(("setup", shapes))
        return len(self.log) if self.keeps else None

    def _distdl_module_teardown(self, input: tuple[Any, ...]) -> None:
        self.log.append(("teardown", None))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale

    @property
    def set_ups(self) -> int:
        return sum(kind == "setup" for kind, _ in self.log)


@contextmanager
def spied(P: Partition) -> Iterator[Counter[str]]:
    """Count the calls of this rank's transport that its layers agree and set up with."""
    transport, calls = P.world_transport, Counter()

    def spy(name: str) -> Any:
        original = getattr(transport, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return original(*args)

        return call

    names = "start_agreeing", "maxima", "gather_objects", "bind"
    for name in names:
        setattr(transport, name, spy(name))
    try:
        yield calls
    finally:
        for name in names:
            delattr(transport, name)


@on_ranks(4)
def test_an_unchanged_forward_agrees_once_and_does_nothing_else(world: Partition) -> None:
    P = world.grid((2, 2))
    layer, x = dnn.HaloExchange(P, [1, 1]), integers((3, 3))
    layer(x)
    with spied(P) as calls:
        layer(x)
        assert calls == {"start_agreeing": 1}
        layer(integers((2, 2)))
        # Where all are, whether they call the same, what they pass, and whether set-up went well.
        assert calls == {"start_agreeing": 5, "maxima": 1, "bind": 1}
        layer(x)
        layer(integers((2, 2)))
        assert calls == {"start_agreeing": 7, "maxima": 1, "bind": 1}


@on_ranks(4)
def test_a_structure_seen_before_is_not_set_up_again(world: Partition) -> None:
    P = world.grid((2, 2))
    layer, x = Recorder(P), integers((3, 3))
    layer(x)
    for change in (
        lambda: layer(integers((2, 3))),
        lambda: layer(x.float()),
        lambda: layer(x.clone().requires_grad_()),
        lambda: layer(x.clone().requires_grad_(world.rank == 2)),
        lambda: layer(x if world.rank else integers((4, 3))),
        lambda: layer(x, 2.0),
        lambda: layer.eval()(x),
        lambda: layer.train()(x, scale=3.0),
    ):
        before = layer.set_ups
        change()
        assert layer.set_ups == before + 1
        change()
        layer(x)
        change()
        assert layer.set_ups == before + 1
    with torch.no_grad():
        before = layer.set_ups
        layer(x)
        assert layer.set_ups == before + 1
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        assert layer.set_ups == before + 2
    layer(x=x)
    layer(x)
    assert layer.set_ups == before + 2
    assert layer.log[0] == ("setup", [(3, 3)] * 4)


@on_ranks(2)
def test_structures_kept_are_bounded(world: Partition) -> None:
    layer = Recorder(world)
    for n in range(100):
        layer(integers((n,)))
    assert layer.set_ups == 100
    layer(integers((99,)))
    layer(integers((90,)))
    assert layer.set_ups == 100
    layer(integers((0,)))
    assert layer.set_ups == 101


@on_ranks(2)
def test_frozen_parameters_are_part_of_the_structure(world: Partition) -> None:
    class Weighted(Recorder):
        def __init__(self, P: Partition) -> None:
            super().__init__(P)
            self.weight = torch.nn.Parameter(torch.ones(1))

    layer = Weighted(world)
    layer(integers((3,)))
    layer.weight.requires_grad_(False)
    layer(integers((3,)))
    assert layer.set_ups == 2
    layer.weight.requires_grad_(True)
    layer(integers((3,)))
    assert layer.set_ups == 2


@on_ranks(2)
def test_set_up_that_returns_nothing_is_torn_down_at_every_change(world: Partition) -> None:
    layer = Recorder(world, keeps=False)
    for n in (3, 3, 4, 3):
        layer(integers((n,)))
    assert [kind for kind, _ in layer.log] == ["setup", "teardown", "setup", "teardown", "setup"]


@on_ranks(4, mpi=True)
def test_an_error_in_set_up_on_one_rank_is_raised_on_all(world: Partition) -> None:
    class Fragile(Recorder):
        def _distdl_module_setup(self, input: tuple[Any, ...]) -> Any:
            if world.rank == 2 and input[0].shape[0] == 5:
                raise ValueError(f"rank 2 dislikes {tuple(input[0].shape)}")
            return super()._distdl_module_setup(input)

    layer = Fragile(world)
    layer(integers((3,)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rank 2 dislikes .5,."):
            layer(integers((5,)))
    layer(integers((3,)))
    layer(integers((4,)))
    assert layer.log[-1] == ("setup", [(4,)] * 4)


# ---- modules in modules ----------------------------------------------------------------------------------------------


class Network(dnn.Module):
    """Layers inside a plain torch module inside a distributed one; the middle layer is called twice."""

    def __init__(self, P: Partition, *partitions: Partition) -> None:
        super().__init__(*partitions)
        self.body = torch.nn.Sequential(dnn.HaloExchange(P, [1], "zeros"), torch.nn.Tanh(), dnn.AllSumReduce(P, [0]))
        self.twice = dnn.HaloExchange(P, [1], "zeros")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.twice(self.twice(x))[1:4])


@on_ranks(4)
def test_layers_inside_ride_on_one_agreement(world: Partition) -> None:
    P, x = world.grid((4,)), integers((3,))
    for net in (Network(P), Network(P, P)):
        net(x)
        with spied(P) as calls:
            net(x)
            assert calls == {"start_agreeing": 1}
            net(integers((4,)))
        with spied(P) as calls:
            net(x)
            net(integers((4,)))
            net.eval()(x)
            net.train()(x)
        assert calls["start_agreeing"] == 4 + 4 + 3 * 5  # eval is new: each call agrees once, and each of five sets up


class Around(dnn.Module):
    """A module that calls one layer."""

    def __init__(self, layer: torch.nn.Module, doubles: bool = False) -> None:
        super().__init__()
        self.layer, self.doubles = layer, doubles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat([x, x], 1) if self.doubles else x)


@on_ranks(2)
def test_modes_of_layers_inside_are_part_of_the_structure(world: Partition) -> None:
    P = world.create_cartesian_topology_partition((2, 1))
    net, serial = Around(dnn.DistributedBatchNorm(P, 3)), torch.nn.BatchNorm1d(3)
    x = integers((6, 3)).float()
    for training, keeps_statistics in ((True, True), (False, True), (True, True), (False, False)):
        for norm in (net.layer, serial):
            norm.train(training)
            if not keeps_statistics:
                norm.running_mean = norm.running_var = None
        torch.testing.assert_close(net(x[P.block(x.shape)]), serial(x)[P.block(x.shape)])


@on_ranks(2)
def test_alike_modules_share_a_layer(world: Partition) -> None:
    P = world.create_cartesian_topology_partition((1, 2))
    layer = dnn.HaloExchange(P, (0, 1))
    plain, doubled = Around(layer), Around(layer, doubles=True)
    block = torch.zeros(1, 2)
    for _ in range(2):
        assert plain(block).shape == (1, 3)
        assert doubled(block).shape == (1, 5)


@on_ranks(4)
def test_a_ride_ends_with_its_forward(world: Partition) -> None:
    P, x = world.grid((4,)), integers((3,))
    net = Network(P)
    net(x)
    assert world.world_transport.local["ride"] is None
    net.body.append(torch.nn.Linear(1, 1))
    with pytest.raises(RuntimeError):
        net(x)
    assert world.world_transport.local["ride"] is None
    with spied(P) as calls:
        net.twice(x)
    assert calls["start_agreeing"] == 1


@on_ranks(4)
def test_data_dependent_shapes_agree_each_layer(world: Partition) -> None:
    """One rank alone sees that the inner shape differs from the last call's."""

    class Cut(dnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.move = dnn.AllGather(world.grid((4,)), [0])
            self.kept = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.move(x[: self.kept])

    net = Cut().agree_each_layer()
    for kept in (1, 3, 2, 1):
        net.kept = kept if world.rank == 1 else 1
        assert net(integers((3,))).shape == (3 + kept,)


def given(kind: type[dnn.Module], change: Callable[[torch.Tensor], torch.Tensor]) -> type[dnn.Module]:
    """A class whose forward gives the layer another tensor than it got."""

    class Given(kind):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(change(x))

    return Given


OVERRIDDEN: list[tuple[type[dnn.Module], tuple[Any, ...]]] = [
    (dnn.DistributedConv1d, (2, 3, 3, 1, 1)),
    (dnn.DistributedMaxPool1d, (2,)),
    (dnn.DistributedAdaptiveAvgPool1d, (3,)),
    (dnn.DistributedBatchNorm, (2,)),
    (dnn.DistributedGroupNorm, (1, 2)),
    (dnn.DistributedSoftmax, (2,)),
    (dnn.DistributedMean, ((0, 2),)),
    (dnn.HaloExchange, (((0, 0), (0, 0), (1, 1)),)),
]


@on_ranks(4, mpi=True)
def test_a_class_gives_its_layer_other_tensors(world: Partition) -> None:
    """Which the call's plan does not fit, on all ranks or on one alone; the layer equals one that is called with them."""
    changes = [
        lambda x: x[..., :2],
        lambda x: torch.cat([x, x]),
        lambda x: x[:2],
        lambda x: x.detach(),
        lambda x: x[:0],
    ]
    scale = torch.ones(1, requires_grad=True)
    for change in (*changes, lambda x: x.detach() * scale):
        for kind, options in OVERRIDDEN:
            for grid in ((1, 1, 4), (1, 1, 1)):
                P = world.grid(grid)
                if P.index is None:
                    continue
                layer, plain = given(kind, change)(P, *options), kind(P, *options)
                dl.load_serial_state_dict(layer, dl.serial_state_dict(plain))
                x = integers((3, 2, 17), 0)[P.block((3, 2, 17))].float().requires_grad_()
                for _ in range(2):  # the call's structure and the layer's take turns
                    y, wanted = layer(x), plain(change(x))
                    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
                    assert y.requires_grad == wanted.requires_grad
                if y.requires_grad:
                    # Zeros where what is given hangs on no input.
                    found = [torch.autograd.grad(t.sum(), x, materialize_grads=True)[0] for t in (y, wanted)]
                    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@on_ranks(2)
def test_what_a_class_gives_its_layer_is_refused_together(world: Partition) -> None:
    """Where the layer does not take it; also by name, and outside the partition."""
    P, first = world.grid((1, 1, 2)), world.grid((1, 1, 1))
    layer = given(dnn.DistributedConv1d, lambda x: x[..., : 3 - world.rank].to(torch.float64))(P, 2, 3, 3)
    with pytest.raises(TypeError, match=r"the input has dtype torch.float64, the weight torch.float32"):
        layer(torch.ones(1, 2, 4))

    class Named(dnn.DistributedMaxPool1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x=torch.ones(1, 2, 6))

    pool, nothing = Named(first, 2), dl.zero_volume_tensor()
    if world.rank == 0:
        assert pool(torch.ones(1, 2, 4)).shape == (1, 2, 3)
    else:
        with pytest.raises(ValueError, match="rank 1 passed a tensor of shape"):
            pool(nothing)


@on_ranks(4, mpi=True)
def test_disjoint_teams_run_different_models(world: Partition) -> None:
    """No call synchronises ranks outside the partitions it was given."""
    left, right = world.grid((2,), [0, 1]), world.grid((2,), [3, 2])
    x = integers((3,))
    if left.active:
        for _ in range(5):
            assert torch.equal(dnn.AllSumReduce(left, [0])(x), 2 * x)
    else:
        assert torch.equal(dnn.AllGather(right, [0])(x), torch.cat([x, x]))


@on_ranks(4)
def test_modules_of_ranks_outside_are_skipped(world: Partition) -> None:
    P = world.grid((2,), [1, 2])
    layer = Recorder(P)
    layer(integers((3,)) if P.active else torch.empty(0))
    assert layer.set_ups == P.active
    if not P.active:
        with pytest.raises(ValueError, match=f"Recorder: rank {world.rank} passed a tensor of shape"):
            layer(integers((3,)))


@on_ranks(2)
def test_copies_start_unbuilt(world: Partition) -> None:
    layer = dnn.AllSumReduce(world.grid((2,)), [0])
    layer(integers((3,)))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._distdl_plan is None
        assert not vars(twin).get("_distdl_kept")
        assert torch.equal(twin(integers((3,))), 2 * integers((3,)))


@on_ranks(1)
def test_hooks_of_torch_are_called(world: Partition) -> None:
    seen: list[str] = []
    kinds: dict[str, Callable[[torch.nn.Module], Any]] = {
        "pre": lambda layer: layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        "forward": lambda layer: layer.register_forward_hook(lambda *_: seen.append("forward")),
        "backward": lambda layer: layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        "backward pre": lambda layer: layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
        "global": lambda _: register_module_forward_hook(lambda *_: seen.append("global")),
    }
    layer, x = dnn.AllSumReduce(world, [0]), integers((3,)).requires_grad_()
    with spied(world) as calls:
        layer(x)
        for kind, register in kinds.items():
            handle = register(layer)
            layer(x).sum().backward()
            handle.remove()
            assert seen == [kind]
            seen.clear()
    assert calls == {"maxima": 1, "bind": 2}


@on_ranks(2)
def test_hooks_that_change_the_input(world: Partition) -> None:
    P = world.create_cartesian_topology_partition((1, 2))
    layer, x = dnn.HaloExchange(P, (0, 1)), torch.ones(1, 3)
    for change in (lambda x: x[:, :2], lambda x: x.repeat(1, 2), torch.Tensor.double):
        expected = torch.ones(1, change(x).shape[1] + 1, dtype=change(x).dtype)
        handle = layer.register_forward_pre_hook(lambda _, args: (change(*args),))  # noqa: B023
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=0, atol=0)
        handle.remove()
        assert layer(x).shape == (1, 4)


@on_ranks(1)
def test_partitions_of_different_worlds_are_refused(world: Partition) -> None:
    other = copy.copy(world._derive([0]))
    other.world_transport = object()
    with pytest.raises(ValueError, match="partitions of different communicators cannot work together"):
        dnn.Module(world, other)


@on_ranks(2)
def test_users_movement(world: Partition) -> None:
    """A movement of one's own is its two layouts."""

    class Swap(dnn.Movement):
        def layouts(self, shapes: dict[int, tuple[int, ...]]) -> tuple[dl.Layout, dl.Layout]:
            X = dl.layout.balanced_blocks(self.P_x.grid_of_ranks, (sum(shape[0] for shape in shapes.values()),))
            return X, dl.Layout(dl.grid.Grid((2,), (1, 0)), X.dims)

    P = world.grid((2,))
    y = Swap(P, P)(torch.full((3,), float(world.rank)))
    assert torch.equal(y, torch.full((3,), 1.0 - world.rank))
    with pytest.raises(ValueError, match=r"Swap: rank 0 holds shape \(1,\), layouts\(\) says \(2,\)"):
        Swap(P, P)(torch.ones(1 + 2 * world.rank))
    with pytest.raises(NotImplementedError, match=r"Movement: a Movement has a method layouts\(shapes\)"):
        dnn.Movement(P, P)(torch.ones(1))


@on_ranks(2)
def test_ranks_must_be_in_the_same_mode(world: Partition) -> None:
    layer, x = dnn.DistributedBatchNorm(world.grid((2, 1)), 3), integers((4, 3)).float()
    layer(x)
    layer.train(world.rank == 1)
    with pytest.raises(ValueError, match="BatchNorm: the ranks disagree: rank 1: mode training, others evaluation"):
        layer(x)
    layer.eval()
    with torch.set_grad_enabled(world.rank == 1), pytest.raises(ValueError, match="others evaluation, no grad"):
        layer(x)
    with torch.autocast("cpu", enabled=world.rank == 1), pytest.raises(ValueError, match="autocast on cpu, others"):
        layer(x)
    layer(x)
    layer.bias.requires_grad_(world.rank == 0)
    with pytest.raises(ValueError, match="rank 1: mode evaluation, bias frozen, others evaluation"):
        layer(x)


@on_ranks(2)
def test_ranks_must_pass_the_same_arguments(world: Partition) -> None:
    layer, x = dnn.AllSumReduce(world, [0]), integers((4, 3))
    odd = world.rank == 1
    wrong: dict[str, Callable[[], Any]] = {
        "rank 1: number of arguments 2, others 1": lambda: layer(x, x) if odd else layer(x),
        "rank 1: keywords ['scale'], others []": lambda: layer(x, scale=2) if odd else layer(x),
        "rank 1 passed a tensor of torch.sparse_coo": lambda: layer(x.to_sparse() if odd else x),
        "rank 1 passed a nested tensor": lambda: layer(
            torch.nested.nested_tensor([x], layout=torch.jagged) if odd else x
        ),
        "tensors of torch.float32 on device meta cannot be moved": lambda: layer(torch.ones(3, device="meta")),
        "tensors of torch.float8_e5m2 on device cpu": lambda: layer(torch.ones(3).to(torch.float8_e5m2)),
    }
    for text, call in wrong.items():
        with pytest.raises((ValueError, TypeError), match=re.escape(text)):
            call()
    assert torch.equal(layer(x), 2 * x)


@on_ranks(2)
def test_errors_that_are_more_than_a_text(world: Partition) -> None:
    class Failing(dnn.Module):
        def _distdl_module_setup(self, input: tuple[Any, ...]) -> None:
            if world.rank == 1:
                raise KeyError("no such key") if input[0].dim() else UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")

    with pytest.raises(KeyError, match="Failing: no such key"):
        Failing(world)(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"Failing: UnicodeDecodeError: .* bad"):
        Failing(world)(torch.ones(()))
    with pytest.raises(TypeError, match="DistributedConv2d: a Partition is needed, not 3"):
        dnn.DistributedConv2d(3, 4, 3, 1)


@on_ranks(2)
def test_ranks_that_swap_shapes_set_up_anew(world: dl.Partition) -> None:
    """The ranks agree by a sum; it must tell (a, b) from (b, a), whatever a and b."""
    layer = Recorder(world.grid((2,)))
    for a in range(24):
        for b in range(a):
            pair = (a, b) if world.rank else (b, a)
            layer(torch.empty(pair[0]))
            key = layer._distdl_key
            layer(torch.empty(pair[1]))
            assert layer._distdl_key != key, pair


@on_ranks(4, mpi=True)
def test_a_structure_that_changes_on_one_rank(world: Partition) -> None:
    """The others set up anew as well, also those with hooks."""
    P = world.grid((2, 2))
    serial = torch.nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    convolution = dnn.DistributedConv2d(world.grid((1, 1, 4, 1)), 2, 2, 3, padding=1, dtype=torch.float64)
    dl.load_serial_state_dict(convolution, serial.state_dict())
    halo, pool = dnn.HaloExchange(P, [1, 1]), dnn.DistributedMaxPool1d(world.grid((1, 1, 4)), 3, stride=1)
    seen: list[int] = []
    if world.rank == 3:
        for layer in (halo, convolution):
            layer.register_forward_hook(lambda *_: seen.append(1))
    for step in range(12):
        rows = [2, 2, 3, 2 + step % 3]
        whole, last = integers((sum(rows[::2]), 5), seed=step), integers((1, 2, sum(rows), 3), seed=step)
        cut = [(0, rows[0]), (rows[0], sum(rows[::2]))][world.rank // 2]
        columns = [(0, 3), (3, 5)][world.rank % 2]
        grown = whole[max(cut[0] - 1, 0) : cut[1] + 1, max(columns[0] - 1, 0) : columns[1] + 1]
        assert torch.equal(halo(whole[slice(*cut), slice(*columns)]), grown)
        mine = slice(sum(rows[: world.rank]), sum(rows[: world.rank + 1]))
        x = last[:, :, mine].clone().requires_grad_()
        leaf = last.clone().requires_grad_()
        y, wanted = convolution(x), serial(leaf)
        torch.testing.assert_close(y, wanted[convolution.P_x.block(wanted.shape)], rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), leaf)[0][:, :, mine])
        line = last[:, :, :, 0]
        pooled = torch.nn.functional.max_pool1d(line, 3, stride=1)
        assert torch.equal(pool(line[:, :, mine]), pooled[pool.P_x.block(pooled.shape)])
    assert len(seen) == 24 * (world.rank == 3)


@on_ranks(2)
def test_checkpoints_around_structures_that_change(world: Partition) -> None:
    """Checkpoints pair the tensors that a forward saves with those of its second run."""

    class Twice(dnn.HaloExchange):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + super().forward(x)

    P = world.grid((2,))
    for layer in (dnn.HaloExchange(P, [1]), Twice(P, [1])):
        for length in (3, 3, 3 + world.rank, 3, 3 + world.rank):
            x = integers((length,), seed=world.rank).requires_grad_()
            y = checkpoint(layer, x, use_reentrant=False)
            (2 * y.sum()).backward()
            once = 2.0 * (1 + isinstance(layer, Twice))
            ends = torch.full((length,), once, dtype=torch.float64)
            ends[0 if world.rank else -1] *= 2
            assert torch.equal(x.grad, ends)


@on_ranks(1)
def test_a_layer_alone_counts_its_calls_in_a_composite(world: Partition) -> None:
    """One layer at two sizes: what it does outside leaves no trace in the composite's order of calls."""

    class Pair(dnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halo = dnn.HaloExchange(world.grid((1,)), [1], "zeros")

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.halo(x), self.halo(y)

    pair, x, y = Pair(), integers((2,)), integers((4,))
    for _ in range(2):
        assert [z.shape for z in pair(x, y)] == [(4,), (6,)]
        assert pair.halo(x).shape == (4,)


@on_ranks(2)
def test_equal_numbers_are_not_one_structure(world: Partition) -> None:
    layer = Recorder(world.grid((2,)))
    for number, scale in enumerate((-1, -2, 1, True, 1.0, 1 + 0j)):  # hash(-1) is hash(-2)
        layer(integers((3,)), scale)
        assert layer.set_ups == number + 1


@on_ranks(2, mpi=True)
def test_errors_of_ranks_that_run_ahead(world: Partition) -> None:
    """A forward put in place on one rank, and a call that is wrong on all while one rank's block changes."""
    P = world.grid((1, 1, 2))
    layer = dnn.DistributedConv1d(P, 1, 1, 3, padding=1)
    if world.rank == 0:
        inner = layer.forward
        layer.forward = lambda x: inner(x)
    for length in (4, 4, 5, 4):
        assert layer(torch.ones(1, 1, length if world.rank == 0 else 4)).shape[:2] == (1, 1)
    layer.double()
    with pytest.raises(TypeError, match=r"the input has dtype torch.float32, the weight torch.float64"):
        layer(torch.ones(1, 1, 5 if world.rank == 0 else 4))
    layer.float()
    assert layer(torch.ones(1, 1, 4)).shape == (1, 1, 4)
    wider = dnn.DistributedConv1d(world.grid((1, 1, 1)), 1, 1, 3, padding=1, P_y=P)
    x = (
        torch.ones(1, 1, 7) if world.rank == 0 else dl.zero_volume_tensor()
    )  # whose dtype the second rank leaves as it is
    wider(x)
    wider(x)
    assert wider.double()(x.double() if world.rank == 0 else x).dtype is torch.float64


@on_ranks(2)
def test_buffers_made_in_inference_mode_serve_outside(world: Partition) -> None:
    P = world.grid((1, 1, 2))
    for layer in (
        dnn.DistributedConv1d(P, 1, 1, 3, padding=1),
        dnn.DistributedAvgPool1d(P, 3, 1, 1),
        dnn.HaloExchange(P, [0, 0, 1]),
    ):
        x = torch.ones(1, 1, 4, requires_grad=True)
        with torch.inference_mode():
            y = layer(x)
        z = layer(x)
        assert torch.equal(y, z)
        z.sum().backward()
        assert x.grad is not None


@on_ranks(3)
def test_data_outside_the_partition_is_refused(world: Partition) -> None:
    P = world.grid((1, 1, 2), range(2))
    layer, x = dnn.DistributedAvgPool1d(P, 2), torch.ones(1, 1, 4)
    if P.active:
        layer(x)
    else:
        with pytest.raises(ValueError, match=r"rank 2 passed .* but is outside .* dl\.zero_volume_tensor") as told:
            layer(x[P.block((1, 1, 8))])
        assert str(told.value).count("CartesianPartition") == 1


def test_a_layer_without_a_partition_is_refused() -> None:
    class Scale(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.place("weight", whole(Grid((1,), (0,)), (2,)), constant(1.0))

    with pytest.raises(TypeError, match=r"Scale: a Layer needs a Partition: super\(\).__init__\(P_x\)"):
        Scale()
