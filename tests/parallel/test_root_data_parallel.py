"""`torch.nn.DataParallel`'s semantics over ranks, against the plain module."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
from distdl_lite.parallel.rows import Team, cut_rows
from distdl_lite.testing import adjoint_test, count
from distdl_lite.transport.threads import spmd

F64 = torch.float64
Pair = namedtuple("Pair", "left right")


class Nested(nn.Module):
    """Arguments and outputs of every kind; tied, frozen, unused and root-level weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(()))
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.single = nn.Parameter(torch.rand(3, dtype=torch.float32))
        self.phase = nn.Parameter(torch.rand(3, dtype=torch.complex128))

    def forward(self, x: Any, extra: Any = None, *, scale: Any = 1.0, mask: Any = None, name: str = "") -> Any:
        h = self.second(torch.tanh(self.first(x))) * self.gain * scale
        h = h if mask is None else h * mask
        if isinstance(extra, dict):
            h = h + extra["deep"][0].left * extra["times"]
        polar = (h * self.phase).abs()
        return {
            "h": h,
            "pair": Pair(h * self.single, None),
            "rest": [polar, (len(name), name)],
            "rows": h.sum(1).long(),
        }


class Cells(nn.Module):
    """A recurrent net, whose weights torch keeps in a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cells = nn.Embedding(5, 4), nn.LSTM(4, 3, batch_first=True)

    def forward(self, words: torch.Tensor) -> Any:
        y, (h, c) = self.cells(self.words(words))
        return y, h.transpose(0, 1) + c.transpose(0, 1)


def mlp(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 2))


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


def real(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, requires_grad=grad)


Case = tuple[Callable[[], nn.Module], int, Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]
CASES: dict[str, Case] = {
    "one": (lambda: mlp().eval(), 0, lambda n: ((real(n, 3),), {})),
    "keyword": (normed, 0, lambda n: ((), {"input": real(n, 3)})),
    "nested": (
        Nested,
        0,
        lambda n: (
            (real(n, 3), {"deep": [Pair(real(n, 3), None)], "times": 2}),
            {"scale": real(), "mask": torch.rand(n, 1) > 0.3, "name": "abc"},
        ),
    ),
    "one positional, one keyword": (Nested, 0, lambda n: ((real(n, 3, grad=False),), {"mask": real(n, 3)})),
    "dim 1": (lambda: nn.Linear(3, 2), 1, lambda n: ((real(4, n, 3),), {})),
    "dim -1": (lambda: nn.Softmax(0), -1, lambda n: ((real(3, 2, n),), {})),
    "words": (Cells, 0, lambda n: ((torch.randint(5, (n, 4)),), {})),
    "in place": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1)), 0, lambda n: ((real(n, 3),), {})),
}


def tensors_in(nested: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(nested) if isinstance(value, torch.Tensor)]


def loss_of(result: Any) -> torch.Tensor:
    """A number that depends on every element in its own way."""
    total = torch.zeros((), dtype=F64)
    for y in tensors_in(result):
        if y.requires_grad:
            total = total + (y.abs() * torch.linspace(-1, 2, y.numel(), dtype=F64).reshape(y.shape)).sum()
    return total


def build(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def cloned(nested: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), nested)


def used(nested: Any) -> Any:
    """No leaves of the graph, so that a module may change them in place."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t * 1 if t.requires_grad else t, nested)


def assert_same(left: Any, right: Any) -> None:
    (a, nesting), (b, other) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert nesting == other
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12) if x.dtype != torch.float32 else close(x, y)
        else:
            assert x == y


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def gradients(nested: Any) -> list[Any]:
    return [t.grad for t in tensors_in(nested)]


def assert_equals_plain(world: dl.Partition, case: Case, rows: int, **options: Any) -> None:
    """Two forwards and backwards, whose gradients accumulate."""
    make, dim, arguments = case
    net = build(make)
    plain = copy.deepcopy(net)
    dp = dl.RootDataParallel(net, world, dim, **options)
    torch.manual_seed(rows)
    for _ in range(2):
        given = arguments(rows)
        twin = cloned(given)
        if world.rank != dp.output_device:
            y = dp()
            assert (y.shape, y.requires_grad) == ((0,), True)
            y.sum().backward()
            continue
        (args, kwargs), (twin_args, twin_kwargs) = used(given), used(twin)
        y, expected = dp(*args, **kwargs), plain(*twin_args, **twin_kwargs)
        assert_same(y, expected)
        loss_of(y).backward()
        loss_of(expected).backward()
        assert_same(gradients(given), gradients(twin))
    if world.rank == dp.output_device:
        assert_same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def every_case(world: dl.Partition) -> None:
    for name, case in CASES.items():
        for rows in (7, 1, 0) if name != "words" else (7, 1):
            assert_equals_plain(world, case, rows)


a27 = pytest.mark.check("A27")
test_equals_the_plain_module_on_1 = a27(on_ranks(1)(every_case))
test_equals_the_plain_module_on_2 = a27(on_ranks(2)(every_case))
test_equals_the_plain_module_on_3 = a27(on_ranks(3)(every_case))
test_equals_the_plain_module_on_4 = a27(on_ranks(4, mpi=True)(every_case))


# ---- what is torch.nn.DataParallel's own -----------------------------------------------------------------------------


class Statistics(nn.Module):
    """Numbers without dims, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        self.calls += 1
        return self.norm(x), x.square().mean(), self.calls, len(x)


@a27
@on_ranks(4, mpi=True)
def test_numbers_and_buffers(world: dl.Partition) -> None:
    """Per rank that had rows one entry, and the root's statistics, which the others start each forward with."""
    for options in ({}, {"device_ids": [2, 0, 3], "output_device": 3}, {"device_ids": [3, 1]}):
        torch.manual_seed(world.rank)  # only the root's weights are read
        net = Statistics().double()
        dp = dl.RootDataParallel(net, world, **options)
        ranks, place = len(dp.device_ids), dp.device_ids.index(dp.output_device)
        plain = copy.deepcopy(net)
        for rows in (8, 10):
            x = real(rows, 3)
            if world.rank != dp.output_device:
                dp().sum().backward()
                continue
            cuts = cut_rows(rows, ranks, place)
            parts = [x[a:b] for a, b in pairwise(cuts)]
            expected = [copy.deepcopy(plain)(part)[0] for part in parts]
            plain(parts[place])
            y, means, calls, seen = dp(x)
            assert_same(y, torch.cat(expected))
            assert_same(means, torch.stack([part.square().mean() for part in parts]))
            assert (calls, seen) == (plain.calls, len(parts[place]))
            assert_same(list(net.buffers()), list(plain.buffers()))
            (y.sum() + means.sum()).backward()  # the sum of a normalised tensor has no gradient
            assert_same(x.grad, torch.cat([2 * part / part.numel() for part in parts]).detach())
        dp.eval()
        x = real(5, 3)
        y = dp(x)[0] if world.rank == dp.output_device else dp()
        if world.rank == dp.output_device:
            assert_same(y, plain.eval()(x)[0])
        dp.train()


@a27
@on_ranks(3, mpi=True)
def test_between_distributed_layers(world: dl.Partition) -> None:
    """Blocks gathered on the root, through the container, and scattered again."""
    P, x = world.grid((3, 1)), torch.arange(14, dtype=F64).view(7, 2)
    block = x[P.block(x.shape)].requires_grad_()
    dp = dl.RootDataParallel(nn.Linear(2, 3, dtype=F64), P)
    y = dl.scatter(dp(dl.gather(block, P)), P)
    y.square().sum().backward()
    if world.rank == 0:
        plain = copy.deepcopy(dp.module)
        x.requires_grad_()
        plain(x).square().sum().backward()
        assert_same([p.grad for p in dp.module.parameters()], [p.grad for p in plain.parameters()])
    expected = world.broadcast_data(x.grad)
    assert_same(block.grad, expected[P.block(x.shape)])


class Constant(nn.Module):
    """A graph of its own, that leads to nothing of the root's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones(1, requires_grad=True)


@on_ranks(2)
def test_a_graph_that_leads_nowhere(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Constant(), world)
    call(dp, world, torch.ones(3)).sum().backward()
    with dp.serve() as at_root:
        if at_root:
            dp(torch.ones(3)).sum().backward()


@on_ranks(1)
def test_shares_of_rows(world: dl.Partition) -> None:
    for rows in range(12):
        for parts in range(1, 6):
            for root in range(parts):
                cuts = cut_rows(rows, parts, root)
                sizes = [b - a for a, b in pairwise(cuts)]
                assert (sum(sizes), len(sizes), max(sizes) - min(sizes) <= 1) == (rows, parts, True)
                assert sizes[root] or not rows


@on_ranks(3)
def test_subsets(world: dl.Partition) -> None:
    """Ranks outside device_ids take no part, those inside get rows in their order."""
    dp = dl.RootDataParallel(Where(world.rank), world, device_ids=[2, 0])
    with count() as counted:
        y = dp(torch.zeros(5)) if world.rank == 2 else dp()
    if world.rank == 2:
        assert y.tolist() == [2, 2, 2, 0, 0]
    if world.rank == 1:
        assert (counted.messages, counted.seconds, y.shape) == (0, 0, (0,))
        dp().sum().backward()
        with pytest.raises(ValueError, match="rank 1 passed tensors of shapes \\(2,\\), but is not the root"):
            dp(torch.zeros(2))
    with dp.serve() as at_root:
        assert at_root == (world.rank == 2)
    alone = dl.RootDataParallel(nn.Linear(2, 2), world, device_ids=[1])
    with alone.serve() as at_root:
        if at_root:
            x = torch.ones(3, 2)
            assert torch.equal(alone(x), alone.module(x))
    assert (dp.device_ids, dp.output_device, dp.dim) == ([2, 0], 2, 0)


class Where(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: torch.Tensor, fails: Any = ()) -> torch.Tensor:
        if self.rank in fails:
            raise fails[self.rank]
        return x + self.rank


@on_ranks(2)
def test_state_and_life(world: dl.Partition) -> None:
    net = build(mlp) if world.rank == 0 else build(mlp).to("meta")
    dp = dl.RootDataParallel(net, world)
    twin = torch.nn.DataParallel(copy.deepcopy(net))
    assert list(dp.state_dict()) == list(twin.state_dict())
    assert repr(dp).startswith(
        "RootDataParallel(\n  dim=0, device_ids=[0, 1], output_device=0\n  (module): Sequential("
    )
    x = real(6, 3)
    first = call(dp.eval(), world, x)
    for other in (copy.deepcopy(dp), pickle.loads(pickle.dumps(dp))):
        found = call(other, world, x)
        if world.rank == 0:
            assert_same(found, first)
            assert_same(found, net(x))
    assert all(not p.is_meta for p in net.parameters())  # the copy of the root's
    assert list(dp.state_dict()) == list(twin.state_dict())


def call(dp: dl.RootDataParallel, world: dl.Partition, *args: Any, **kwargs: Any) -> Any:
    return dp(*args, **kwargs) if world.rank == dp.output_device else dp()


# ---- what travels ----------------------------------------------------------------------------------------------------


WEIGHTS, ROWS = "RootDataParallel weights", "RootDataParallel rows"


@on_ranks(2, mpi=True)
def test_weights_travel_when_they_change(world: dl.Partition) -> None:
    net = build(mlp)  # parameters, statistics, and a counter of batches
    dp = dl.RootDataParallel(net, world)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    x = real(6, 3, grad=False)

    def sent(backward: bool = False) -> int:
        with count() as counted:
            y = call(dp, world, x)
            if backward:
                y.sum().backward()
        return counted.by_label.get(WEIGHTS, counted.__class__()).messages

    assert sent(backward=True) == 3 + 1  # three groups, and one sum
    assert sent(backward=True) == 2 + 1  # statistics have changed, in a forward that was for training
    dp.eval()
    assert sent() == 2
    with torch.no_grad():
        assert [sent(), sent(), sent()] == [0, 0, 0]
    dp.train(world.rank == 1)  # the root's mode counts
    assert sent() == 0
    changes = [
        optimizer.step,  # which leaves the version counters as they are
        lambda: net[0].weight.data.add_(1),
        lambda: setattr(net[0], "bias", nn.Parameter(torch.ones(5, dtype=F64))),
        lambda: net[0].weight.data[0, 0].fill_(torch.nan),
        lambda: net[2].running_mean.fill_(-0.0),
        lambda: net[2].running_mean.fill_(0.0),
    ]
    for change in changes:
        if world.rank == 0:
            change()
        assert sent() == 1
        assert sent() == 0
        if world.rank == 0:
            expected = copy.deepcopy(net).eval()(x)
            assert torch.equal(call(dp, world, x).isnan(), expected.isnan())
        else:
            call(dp, world)
    if world.rank == 0:
        net[0].requires_grad_(False)
    assert sent() == 3
    if world.rank == 0:
        net.float()
        x = x.float()
    assert sent() == 3
    if world.rank == 1:
        assert all(not p.is_floating_point() or p.dtype == torch.float32 for p in net.state_dict().values())


@on_ranks(3, mpi=True)
def test_unused(world: dl.Partition) -> None:
    """Weights that no rank used get no gradient, those that some did the whole one."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.ones((), dtype=F64)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            return x * (self.b if x[0] > 1 else self.c), x.detach(), x * self.c

    net = Some()
    dp = dl.RootDataParallel(net, world)
    if world.rank == 0:
        x = torch.arange(3, dtype=F64).requires_grad_()
        y, detached, other = dp(x)
        assert (y.requires_grad, detached.requires_grad) == (True, False)
        y.sum().backward()
        assert (net.a.grad, net.b.grad.item(), net.c.grad.item(), x.grad.tolist()) == (None, 2, 1, [1, 1, 1])
        y, _, other = dp(x)
        assert torch.autograd.grad(other.sum(), [net.c, net.a, net.b], allow_unused=True) == (3, None, None)
        y, _, other = dp(x)  # to no weight that a rank elsewhere holds
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 1]
        y, _, other = dp(x)
        y.sum().backward(retain_graph=True)
        other.sum().backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            y.sum().backward()
        y, _, other = dp(x.double())
        (g,) = torch.autograd.grad((y * y).sum(), net.c, create_graph=True)
        with pytest.raises(RuntimeError, match="a gradient of a gradient is not supported"):
            g.backward()
    else:
        for _ in range(3):
            dp().sum().backward()
        y = dp()
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            y.sum().backward()
        y = dp()
        y.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a gradient of a gradient is not supported"):
            y.sum().backward()


@a27
@on_ranks(2, mpi=True)
def test_a_gradient_of_a_gradient_is_refused(world: dl.Partition) -> None:
    """Also where what comes back from the loss requires no gradient, so that torch sees nothing to differentiate."""
    dp, x = dl.RootDataParallel(build(mlp), world), real(5, 3)

    def refused(y: torch.Tensor, of: torch.Tensor) -> tuple[type, str]:
        (g,) = torch.autograd.grad(y.sum(), of, create_graph=True)
        return told(world, (y.square().mean() + g.square().mean()).backward)

    expected = (
        RuntimeError,
        "RootDataParallel: a gradient of a gradient is not supported: its graph is on several ranks",
    )
    of = x if world.rank == 0 else real(0)
    assert refused(dp(of), of) == expected
    with dp.serve() as at_root:
        if at_root:
            y = dp(x)
            with pytest.raises(RuntimeError, match="a gradient of a gradient is not supported"):
                torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()
            z = dp(x) * (scale := real())
            (g,) = torch.autograd.grad(z.square().sum(), scale, create_graph=True)  # not through the container
            (expected,) = torch.autograd.grad(4 * (dp(x) ** 2).sum() * scale.detach(), x)
            assert_same(torch.autograd.grad(2 * g, x)[0], expected)


@on_ranks(2)
def test_hooks_see_the_whole_gradient_once(world: dl.Partition) -> None:
    net = build(lambda: nn.Linear(2, 1))
    dp, seen = dl.RootDataParallel(net, world), []
    net.weight.register_hook(lambda g: seen.append(g.clone()))
    y = call(dp, world, torch.ones(5, 2, dtype=F64))
    y.sum().backward()
    if world.rank == 0:
        assert [g.tolist() for g in seen] == [[[5, 5]]]
        with torch.no_grad():
            y = dp(torch.ones(4, 2, dtype=F64))
            net.weight += 1
            assert not y.requires_grad
        y = dp(torch.ones(4, 2, dtype=F64, requires_grad=True))
        with torch.no_grad():
            net.weight += 1
        with pytest.raises(RuntimeError, match=r"replica 0, on rank 0: one of the variables .* modified by an inplace"):
            y.sum().backward()
    else:
        assert not dp().requires_grad
        with pytest.raises(RuntimeError, match=r"replica 0, on rank 0: one of the variables .* modified by an inplace"):
            dp().sum().backward()


# ---- modes -----------------------------------------------------------------------------------------------------------


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        modes = [self.training, self.drop.training, torch.is_grad_enabled(), y.dtype == torch.bfloat16]
        return y, torch.tensor(modes).float().expand(len(x), 4)


@on_ranks(2)
def test_modes_of_the_root(world: dl.Partition) -> None:
    net = Modes()
    dp = dl.RootDataParallel(net, world)
    x = torch.rand(4, 2)

    def check(*expected: bool) -> None:
        found = call(dp, world, x)
        if world.rank == 0:
            assert found[1].bool().tolist() == [list(expected)] * 4

    check(True, True, True, False)
    if world.rank == 0:
        net.drop.eval()
    check(True, False, True, False)
    if world.rank == 1:
        net.eval()
    with torch.autocast("cpu", enabled=world.rank == 0):
        check(True, False, True, True)
    with torch.autocast("cpu", enabled=world.rank == 1):
        check(True, False, True, False)
    with torch.set_grad_enabled(world.rank == 1):
        check(True, False, False, False)
    with torch.inference_mode():
        dp.eval()
        if world.rank == 0:
            net.linear.weight.mul_(2)
        check(False, False, False, False)
    y = call(dp, world, x)
    (y[0] if world.rank == 0 else y).sum().backward()  # the weights came in inference mode
    if world.rank == 0:
        assert_same(net.linear.weight.grad.double(), x.sum(0).expand(2, 2).double())
    with torch.set_grad_enabled(world.rank == 0):
        y = call(dp, world, x)
    (y[0] if world.rank == 0 else y).sum().backward()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@on_ranks(2, mpi=True)
def test_checkpoints(world: dl.Partition) -> None:
    net = build(partial(Checkpointed, False))
    plain = copy.deepcopy(net)
    dp = dl.RootDataParallel(net, world)
    for rows in (5, 1):  # with one, the other rank has none to go through again
        x = real(rows, 3)
        y = checkpoint(dp, x if world.rank == 0 else real(0), use_reentrant=False)
        (y.square() if world.rank == 0 else y).sum().backward()
        if world.rank == 0:
            plain(x).square().sum().backward()
            assert_same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    x = real(5, 3)
    with dp.serve() as at_root:
        if at_root:
            for reentrant in (False, True):
                y = checkpoint(dp, x, use_reentrant=reentrant)
                with pytest.raises(
                    RuntimeError, match="RootDataParallel: called again in a backward, as by a checkpoint"
                ):
                    y.square().sum().backward()
            for transform in (torch.func.vmap(dp), torch.func.grad(lambda x: dp(x).sum())):
                with pytest.raises(
                    RuntimeError, match=r"RootDataParallel: torch.func's transforms \(grad, vmap, ...\) see"
                ):
                    transform(x)
            with torch.autograd.graph.save_on_cpu():
                assert_same(dp(x), plain(x))
    dp = dl.RootDataParallel(build(partial(Checkpointed, True)), world)
    y = call(dp, world, x)
    with pytest.raises(RuntimeError, match="replica 0, on rank 0: When use_reentrant=True"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@on_ranks(2, mpi=True)
def test_compiled(world: dl.Partition) -> None:
    """What is around the container is compiled, and calls it as it is."""
    dp, x = dl.RootDataParallel(build(mlp), world), real(5, 3)
    with dp.serve() as at_root:
        if at_root:
            inside = torch.compile(lambda x: dp(x * 2).sin(), backend="eager")
            for rows in range(4, 16):  # more than dynamo recompiles for
                y = real(rows, 3)
                assert_same(torch.compile(dp, backend="eager")(y), dp(y))
                assert_same(inside(y), dp(y * 2).sin())
            inside(x).sum().backward()
            (expected,) = torch.autograd.grad(dp(2 * x).sin().sum(), x)
            assert_same(x.grad, expected)


# ---- errors ----------------------------------------------------------------------------------------------------------


class Odd(Exception):
    """An exception of a user's own."""


class Odder(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)


def told(world: dl.Partition, body: Callable[[], Any]) -> tuple[type, str]:
    """The error, the same on all ranks."""
    try:
        body()
    except Exception as error:
        found = type(error), str(error)
    else:
        found = type(None), ""
    everywhere = world.allgather_data(found)
    assert set(everywhere) == {found}
    return found


@pytest.mark.check("A28")
@on_ranks(3, mpi=True)
def test_errors_are_the_same_on_all_ranks(world: dl.Partition) -> None:
    net = build(lambda: nn.Linear(2, 2))
    dp = dl.RootDataParallel(net, world)
    good = real(4, 2)
    holder = Where(0)
    holder.inside = nn.Parameter(torch.ones(2))
    cases: list[tuple[tuple[Any, ...], type, str]] = [
        ((good, good[:2]), ValueError, "RootDataParallel: the tensors among the arguments, of shapes (4, 2), (2, 2)"),
        (
            (good.float(),),
            RuntimeError,
            "RootDataParallel: replica 0, on rank 0: mat1 and mat2 must have the same dtype",
        ),
        ((good, lambda: 0), AttributeError, "pickle local object"),
        ((good, good), TypeError, "RootDataParallel: replica 0, on rank 0: Linear.forward() takes 2 positional"),
        ((good.to_sparse(),), TypeError, "RootDataParallel: tensor 0 of the arguments is a tensor of torch.sparse_coo"),
        ((good.to("meta"),), TypeError, "RootDataParallel: tensor 0 of the arguments, of torch.float64 on device meta"),
        ((holder,), TypeError, "RootDataParallel: a tensor that requires grad is inside an object"),
        ((), TypeError, "RootDataParallel: replica 0, on rank 0: Linear.forward() missing 1 required"),
    ]
    for args, kind, text in cases:
        found = told(world, lambda: call(dp, world, *args))  # noqa: B023
        assert (found[0], text in found[1]) == (kind, True), found
        assert_same(*(call(dp, world, good), net(good)) if world.rank == 0 else (call(dp, world), torch.empty(0)))
    found = told(world, lambda: dp(good))
    assert found == (ValueError, "RootDataParallel: rank 1 passed tensors of shapes (4, 2), but is not the root")
    with pytest.raises(ValueError, match="has no dim 1 to be cut along"):
        call(dl.RootDataParallel(net, world, 1), world, good, good[0])


@pytest.mark.check("A28")
@on_ranks(3, mpi=True)
def test_errors_of_one_replica(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Where(world.rank), world)
    for error, kind, text in [
        (Odd("no"), Odd, "no"),
        (KeyError("a"), KeyError, "a"),
        (Odder(1, 2), RuntimeError, "Odder: (1, 2)"),
    ]:
        found = told(world, lambda: call(dp, world, torch.zeros(7), {2: error}))  # noqa: B023
        expected = f"RootDataParallel: replica 2, on rank 2: {text}"
        assert found == (kind, repr(expected) if kind is KeyError else expected)
    with pytest.raises(ValueError, match="replica 1, on rank 1: first") as raised:
        call(dp, world, torch.zeros(7), {1: ValueError("first"), 2: ValueError("second")})
    assert "in forward" in str(raised.value.__cause__)  # where it was raised there
    call(dp, world, torch.zeros(7, requires_grad=True)).sum().backward()


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        if g.max() > 4:
            raise Odd("steep")
        return g


class Steep(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FailsBackward.apply(x)


class Stops(nn.Module):
    """Ends the program on one rank, in forward or backward."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: torch.Tensor, which: int, error: BaseException, phase: str) -> torch.Tensor:
        return StopsBackward.apply(x, self.stop(which, error) if phase == "forward" else self.stop, which, error)

    def stop(self, which: int, error: BaseException) -> None:
        if self.rank == which:
            raise error


class StopsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stop: Any, *arguments: Any) -> torch.Tensor:
        ctx.stop, ctx.arguments = stop, arguments
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        ctx.stop(*ctx.arguments)
        return g, None, None, None


@on_ranks(3, mpi=True)
def test_ends_of_the_program_inside_a_call(world: dl.Partition) -> None:
    """Stay what they are on the root, and are errors on the others; serve is left as by an error of the script."""
    dp, x = dl.RootDataParallel(Stops(world.rank), world), real(5, 2)
    for which in (0, 2):
        for error in (SystemExit(3), KeyboardInterrupt()):
            for phase in ("forward", "backward"):
                kind = type(error) if which == world.rank == 0 else RuntimeError
                text = f"RootDataParallel: replica {which}, on rank {which}: {type(error).__name__}: {error}"
                text = str(error) if kind is not RuntimeError else text
                with pytest.raises(kind) as raised:
                    call(dp, world, x, which, error, phase).sum().backward()
                assert str(raised.value) == text
                if world.rank:
                    with dp.serve() as at_root:
                        assert not at_root
                    continue
                with pytest.raises(kind) as raised, dp.serve():
                    dp(x, which, error, phase).sum().backward()
                assert str(raised.value) == text


@on_ranks(2, mpi=True)
def test_a_call_that_the_root_alone_has_left(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Where(world.rank), world)
    with dp.serve() as at_root:
        if at_root:
            dp._block = None
            with pytest.raises(TypeError, match="NoneType"):
                dp(torch.ones(()))
            del dp._block
            with pytest.raises(
                RuntimeError, match=r"rank 0, is at forward of container \d+, but rank 1 is at outputs of forward 1 of"
            ):
                dp(torch.ones(()))
            assert dp(torch.ones(())).shape == (1,)


class Answers(nn.Module):
    """Returns what it is told to, on the ranks after the first something else."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor, kind: str) -> Any:
        if kind == "keys":
            return {"a": x} if self.first else {"a": x, "b": x}
        if kind == "lists":
            return [x] * (2 if self.first else 1)
        if kind == "none":
            return x, None if self.first else x
        if kind == "dtype":
            return x if self.first else x.float()
        if kind == "shape":
            return x if self.first else x[:, :1]
        if kind == "dims":
            return x if self.first else x.sum()
        if kind == "object":
            return Pair, Holder(x)
        return (x if self.first else x.to_sparse()) if kind == "sparse" else x


class Holder:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


@pytest.mark.check("A28")
@on_ranks(3, mpi=True)
def test_errors_of_outputs_and_backwards(world: dl.Partition) -> None:
    dp = dl.RootDataParallel(Answers(world.rank == 0), world)
    x = real(5, 2)
    for kind, text in [
        (
            "keys",
            "the outputs differ: replica 0 returned TreeSpec(dict, ['a'], [*]) of tensor, replica 1 TreeSpec(dict, ",
        ),
        ("lists", "the outputs differ: replica 0 returned TreeSpec(list, None, [*, *]) of tensor, tensor, replica 1"),
        ("none", "of tensor, None, replica 1"),
        (
            "dtype",
            "output 0 cannot be put together along dim 0: replica 0 returned torch.float64 of shape (2, 2) on cpu, ",
        ),
        ("shape", "replica 1 torch.float64 of shape (2, 1)"),
        ("dims", "replica 1 torch.float64 of shape ()"),
        ("sparse", "output 0 of replica 1 is a tensor of torch.sparse_coo, which cannot be moved"),
        ("object", "replica 0, on rank 0: the module returned a Holder with tensors"),
    ]:
        kind_of, found = told(world, lambda: call(dp, world, x, kind))  # noqa: B023
        assert kind_of in (ValueError, TypeError), found
        assert text in found, found
    dp = dl.RootDataParallel(Steep(), world)
    y = call(dp, world, x)
    g = torch.tensor([1, 1, 1, 1, 5.0], dtype=F64).view(5, 1).expand(5, 2) if world.rank == 0 else torch.ones(0)
    assert told(world, lambda: y.backward(g)) == (Odd, "RootDataParallel: replica 2, on rank 2: steep")
    call(dp, world, x).sum().backward()
    dp = dl.RootDataParallel(nn.Embedding(4, 2, sparse=True), world)
    y = call(dp, world, torch.arange(4))
    assert told(world, y.sum().backward) == (
        TypeError,
        "RootDataParallel: replica 0, on rank 0: sparse gradients (of weights of shapes (4, 2)) cannot be added up over ranks",
    )


@on_ranks(3)
def test_modules_that_differ(world: dl.Partition) -> None:
    for other, text in [
        (nn.Linear(2, 3), "the module is not the root's: bias (3,), not (2,); weight (3, 2), not (2, 2)"),
        (nn.Linear(2, 2, bias=False), "bias missing, not (2,)"),
        (Tied(), "a.weight (2, 2), not missing; b.weight (2, 2), not missing; bias missing, not (2,)"),
    ]:
        dp = dl.RootDataParallel(other if world.rank == 1 else nn.Linear(2, 2), world)
        for rows in (4, 1):  # also where it has nothing to do
            kind, found = told(world, lambda: call(dp, world, torch.ones(rows, 2)))  # noqa: B023
            assert (kind, text in found, "replica 1, on rank 1" in found) == (ValueError, True, True), found
    tied = Tied()
    if world.rank == 1:
        tied.to("meta")
        tied.b.weight = nn.Parameter(torch.empty(2, 2))
    dp = dl.RootDataParallel(tied, world)
    call(dp, world, torch.ones(4, 2)).sum().backward()
    assert tied.b.weight is tied.a.weight
    lazy = dl.RootDataParallel(nn.LazyLinear(2), world)
    assert told(world, lambda: call(lazy, world, torch.ones(4, 2)))[0] in (ValueError, RuntimeError, TypeError)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


@on_ranks(2)
def test_refusals(world: dl.Partition) -> None:
    net = nn.Linear(2, 2)
    for options, text in [
        ({"device_ids": []}, "RootDataParallel: device_ids is empty"),
        ({"device_ids": [0, 2]}, "RootDataParallel: ranks [2] are not in a partition of 2 ranks"),
        ({"device_ids": [0, 0]}, "RootDataParallel: ranks [0, 0] name a rank twice"),
        ({"device_ids": [1], "output_device": 0}, "RootDataParallel: output_device=0 is not among device_ids=[1]"),
        ({"dim": "x"}, "RootDataParallel: dim='x' is no integer"),
        ({"dim": world.rank}, "RootDataParallel: the ranks disagree: rank 1: dim 1, others 0"),
        ({"device_ids": [world.rank]}, "RootDataParallel: the ranks disagree: rank 1: device_ids [1], others [0]"),
    ]:
        assert told(world, lambda: dl.RootDataParallel(net, world, **options))[1] == text  # noqa: B023
    assert (
        told(world, lambda: dl.RootDataParallel(None, world))[1]
        == "RootDataParallel: module=None is no torch.nn.Module"
    )
    cut = nn.Sequential(dl.nn.DistributedSoftmax(world.grid((2,)), 0))
    assert "the module holds distributed layers (0)" in told(world, lambda: dl.RootDataParallel(cut, world))[1]


@on_ranks(3, mpi=True)
def test_calls_that_do_not_fit(world: dl.Partition) -> None:
    net = nn.Linear(2, 2)
    one, two = dl.RootDataParallel(net, world), dl.RootDataParallel(net, world)
    x = torch.ones(4, 2)
    y = call(one, world, x)
    kind, text = told(world, lambda: call(one, world, x) if world.rank == 1 else y.sum().backward())
    assert kind is RuntimeError
    assert text.endswith("but rank 1 is at forward of container " + text.rsplit(" ", 1)[1])
    kind, text = told(world, lambda: call(two if world.rank else one, world, x))
    assert kind is RuntimeError
    assert "the root, rank 0, is at forward of container" in text
    copied = copy.deepcopy(one) if world.rank == 0 else one
    assert told(world, lambda: call(copied, world, x))[0] is RuntimeError


# ---- serving ---------------------------------------------------------------------------------------------------------


def script(net: nn.Module, model: nn.Module, steps: int = 4) -> list[float]:
    """Written for one process."""
    torch.manual_seed(5)
    x, target = torch.randn(10, 3, dtype=F64), torch.randn(10, 2, dtype=F64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    losses = []
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        for rows in (slice(0, 6), slice(6, 10 - step)):
            nn.functional.mse_loss(model(x[rows]), target[rows]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(x), target).item())
    return losses


@a27
@on_ranks(3, mpi=True)
def test_a_script_for_one_process(world: dl.Partition) -> None:
    net = build(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)))
    plain = copy.deepcopy(net)
    dp = dl.RootDataParallel(net, world)
    with dp.serve() as at_root:
        if at_root:
            losses = script(net, dp)
    if world.rank == 0:
        torch.testing.assert_close(losses, script(plain, plain), rtol=1e-11, atol=0)
        assert losses[-1] < losses[0]


@on_ranks(2, mpi=True)
def test_serving(world: dl.Partition) -> None:
    """Two containers, errors on the way, graphs kept and let go, blocks inside blocks, and an error that ends it."""
    net = build(lambda: nn.Linear(2, 2))
    one, two, x = dl.RootDataParallel(net, world), dl.RootDataParallel(build(mlp), world), real(4, 2)
    two.module[0] = nn.Linear(2, 5, dtype=F64)
    with one.serve() as at_root:
        if at_root:
            y = one(x)
            twice = two(y)
            with pytest.raises(RuntimeError, match="replica 0"):
                one(x.float())
            with pytest.raises(RuntimeError, match="is at construct of container 0, but rank 1 serves containers"):
                dl.RootDataParallel(net, world)
            twice.sum().backward(retain_graph=True)
            first = x.grad.clone()
            twice.sum().backward()
            assert_same(x.grad, 2 * first)
            with pytest.raises(RuntimeError, match="second time"):
                twice.sum().backward()
            with two.serve():
                one(x).sum().backward()
            kept = [one(x) for _ in range(5)]
            del kept, y, twice
            one(x), two(x)
    assert not one._served
    for _ in range(2):
        with two.serve() as at_root:
            assert at_root == (world.rank == 0)
    y = None

    def fails() -> None:
        nonlocal y
        with one.serve() as at_root:
            if at_root:
                y = one(x)
                raise Odd

    if world.rank == 0:
        with pytest.raises(Odd):
            fails()
    else:
        fails()
    if world.rank == 0:
        with one.serve(), pytest.raises(RuntimeError, match="is at backward of forward"):
            y.sum().backward()
    else:
        with one.serve():
            pass


def doubled(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    return 2 * y


class Changing(nn.Module):
    """Settings of every kind, and some that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.powers, self.calls = 1.0, [1, 2], 0
        self.linear, self.slope, self.drop = nn.Linear(3, 3), nn.LeakyReLU(0.1), nn.Dropout(0.0)
        self.more = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = [x.detach()]
        self.function = lambda: self.calls  # which cannot be pickled, and need not be
        y = self.drop(self.slope(self.linear(x))) * self.times
        return self.more(sum(y**power for power in self.powers))

    def halved(self, module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return args[0] / (2 * self.times)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.inner(x)


class Elsewhere(nn.Tanh):
    """Pickled here, refused by the ranks that get it, at first."""

    refused = True

    def __setstate__(self, state: Any) -> None:
        if Elsewhere.refused:
            raise Odd("no room")
        super().__setstate__(state)


def wrap(net: Any) -> None:
    net.linear = Around(net.linear)
    net.linear.inner.register_forward_hook(doubled)


def recur(net: Any) -> None:
    net.more = nn.LSTM(3, 2, batch_first=True)
    net.more.register_forward_pre_hook(sequences)
    net.more.register_forward_hook(first)


def sequences(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    return args[0][:, None]


CHANGES: list[Callable[[Any], Any]] = [
    lambda net: setattr(net, "times", 3),
    lambda net: setattr(net, "times", -0.5),
    lambda net: setattr(net.slope, "negative_slope", 0.5),
    lambda net: setattr(net.drop, "p", 1.0),
    lambda net: setattr(net.drop, "p", 0.0),
    lambda net: net.powers.append(3),
    lambda net: net.linear.register_forward_hook(doubled),
    lambda net: net.linear._forward_hooks.clear(),
    lambda net: net.more.register_forward_pre_hook(net.halved),
    lambda net: setattr(net, "slope", nn.Sigmoid()),
    lambda net: setattr(net, "slope", net.more[1]),
    lambda net: setattr(net.linear, "__class__", Bent),
    wrap,
    lambda net: setattr(net, "more", nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))),
    lambda net: net.more.append(Around(nn.Linear(2, 2))),
    lambda net: net.more.__delitem__(1),
    recur,
    lambda net: setattr(net, "more", None) or setattr(net, "more", nn.Identity()),
    lambda net: net.__dict__.pop("function"),
]


class Bent(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


def first(module: nn.Module, args: Any, y: Any) -> Any:
    return y[0]


@a27
@on_ranks(3, mpi=True)
def test_what_a_script_changes_about_the_module(world: dl.Partition) -> None:
    """Is what the other ranks compute with, in the block, in the next, and not sent where nothing has changed."""
    net = build(Changing)
    dp, x = dl.RootDataParallel(net, world), real(7, 3)
    twin = copy.deepcopy(net)
    for changes in (CHANGES[: len(CHANGES) // 2], CHANGES[len(CHANGES) // 2 :]):
        if world.rank == 0:
            net.times = twin.times = 2.0
        with dp.serve() as at_root:
            for change in changes if at_root else []:
                for module in (net, twin):
                    build(lambda: change(module))  # noqa: B023
                (y, z), expected = (dp(x), dp(x)), twin(x)
                assert_same((y, z), (expected, expected)) if not has_norm(net) else assert_same(y, z)
                loss_of(y).backward()
                x.grad = None
                assert dp._settings.changes(net) is None
    with dp.serve() as at_root:
        if at_root:
            dp.module = build(lambda: nn.Linear(3, 1))
            assert_same(dp(x), dp.module(x))
            handle = dp.module.register_forward_hook(lambda module, args, y: 2 * y)
            with pytest.raises(
                RuntimeError, match=r"the script has changed _forward_hooks, which .* it on all ranks before serve\(\)"
            ):
                dp(x)
            handle.remove()
            assert_same(dp(x), dp.module(x))
            dp.module.register_state_dict_post_hook(lambda *args: None)  # which no forward runs
            dp.module = build(lambda: nn.Sequential(nn.Linear(3, 1), Elsewhere()))
            for _ in range(2):
                with pytest.raises(Odd, match="replica 1, on rank 1: no room"):
                    dp(x)
            dp.module[1].kind = "room"
            expected = dp.module(x)
            with pytest.raises(Odd, match="replica 1, on rank 1: no room"):
                dp(x)
    Elsewhere.refused = False
    with dp.serve() as at_root:
        if at_root:
            assert_same(dp(x), expected)


def has_norm(net: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm1d) for module in net.modules())


@on_ranks(2)
def test_served_graphs_are_let_go(world: dl.Partition) -> None:
    net = build(lambda: nn.Linear(2, 2))
    dp, x, most = dl.RootDataParallel(net, world), real(4, 2), []
    if world.rank == 1:
        answer = dp._answer
        dp._answer = lambda order: (answer(order), most.append(len(dp._served)))
    with dp.serve() as at_root:
        for _ in range(20 * at_root):
            y = dp(x)
            if len(y) == 3:
                y.sum().backward()
    assert at_root or max(most) <= 2


def test_a_forgotten_call_is_a_deadlock_that_names_it() -> None:
    def body(world: dl.Partition) -> None:
        dp = dl.RootDataParallel(nn.Linear(2, 2), world)
        if world.rank == 0:
            dp(torch.ones(3, 2))

    with pytest.raises(RuntimeError, match=r"deadlock: .* in RootDataParallel; rank 1 has ended"):
        spmd(2, body)


# ---- adjoints --------------------------------------------------------------------------------------------------------


def adjoints(world: dl.Partition) -> None:
    size = world.size
    for ranks, root in ((tuple(range(size)), 0), (tuple(range(size))[::-1], size - 1)):
        team = Team(world.world_transport, ranks, root)
        at_root = world.rank == team.root_rank
        for rows in (7, 1, 0):
            cuts = cut_rows(rows, size, root)
            operators = [
                (team.rows_operator((3, rows, 2), 1, cuts), (3, rows, 2)),
                (team.weights_operator(rows), (rows,)),
            ]
            for operator, shape in operators:
                x = torch.randn(shape if at_root else 0, dtype=F64)
                assert adjoint_test(operator, x, P=world) < 1e-12
                g = torch.randn(operator.plan.returned_shape, dtype=F64)
                assert adjoint_test(operator.adjoint, g, P=world) < 1e-12
    for rows in (7, 1):
        dp = dl.RootDataParallel(build(lambda: nn.Linear(3, 2, bias=False)), world)
        x = torch.randn((rows, 3) if world.rank == 0 else 0, dtype=F64)
        assert adjoint_test(dp, x, P=world) < 1e-12


a29 = pytest.mark.check("A29")
test_adjoints_on_2 = a29(on_ranks(2)(adjoints))
test_adjoints_on_3 = a29(on_ranks(3)(adjoints))
test_adjoints_on_4 = a29(on_ranks(4, mpi=True)(adjoints))
