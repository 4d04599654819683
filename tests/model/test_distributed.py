"""Models that are distributed as they are: their life beside the same model on one device."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
from distdl_lite.testing import spmd


class Net(nn.Module):
    """A convolution, a norm if wanted, a strided convolution, a mean and a head."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.second = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class Tokens(nn.Module):
    """An embedding that is tied to the head, and a two-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(11, 8, padding_idx=3), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.embedding(index)
        return self.head(x + self.down(F.gelu(self.up(x))))


def pair(world: dl.Partition, norm: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Any, Any]:
    """A grid, a model and its distributed twin, a whole input and this rank's block."""
    P = world.grid((1, 1, 2, 2))
    torch.manual_seed(0)
    model = Net(norm).to(dtype)
    x = torch.randn(2, 4, 13, 9, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return P, model, dl.distribute(copy.deepcopy(model), P), x, P.cut(x)


def assert_same_gradients(net: nn.Module, model: nn.Module, tolerance: float = 1e-12) -> None:
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), net.parameters(), strict=True):
        assert float((p.grad - q.grad).abs().max()) <= tolerance * scale, name


@on_ranks(4, mpi=True)
def test_training(world: dl.Partition) -> None:
    """Steps of an optimizer made before the first call, gradients that accumulate, evaluation, other shapes and no gradients."""
    P, model, net, x, mine = pair(world, norm=True)
    measure, target = dl.distribute(nn.MSELoss(), P), torch.ones(2, 3, dtype=x.dtype)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, net)]
    for step in range(3):
        whole, block = (t.clone().requires_grad_() for t in (x, mine))
        for _ in range(1 + step % 2):
            loss = F.mse_loss(model(whole), target)
            shown = measure(net(block), target)
            loss.backward()
            shown.backward()
            torch.testing.assert_close(shown, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(block.grad, whole.grad[P.block(x.shape)], rtol=1e-9, atol=1e-12)
        assert_same_gradients(net, model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.allclose(b, c) for b, c in zip(model.buffers(), net.buffers(), strict=True))
    model.eval(), net.eval()
    for shape in ((2, 4, 13, 9), (1, 4, 8, 10)):
        y = torch.ones(shape, dtype=x.dtype)
        with torch.no_grad():
            torch.testing.assert_close(net(y[P.block(shape)]), model(y))


@on_ranks(4)
def test_graphs(world: dl.Partition) -> None:
    """Checkpoints around the net, second gradients, functional calls, and a loss that is a function."""
    P, model, net, x, mine = pair(world)
    whole, block = x.requires_grad_(), mine.requires_grad_()
    model(whole).square().sum().backward()
    checkpoint(net, block, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(block.grad, whole.grad[P.block(x.shape)], rtol=1e-9, atol=1e-12)
    assert_same_gradients(net, model)
    model.zero_grad(), net.zero_grad()
    (g,) = torch.autograd.grad(model(whole).square().sum(), whole, create_graph=True)
    g.square().sum().backward()
    (h,) = torch.autograd.grad(net(block).square().sum(), block, create_graph=True)
    h.square().sum().backward()
    torch.testing.assert_close(h, g[P.block(x.shape)], rtol=1e-9, atol=1e-12)
    doubled = [{n: 2 * p for n, p in m.named_parameters()} for m in (model, net)]
    found = torch.func.functional_call(net, doubled[1], (block,))
    torch.testing.assert_close(found, torch.func.functional_call(model, doubled[0], (whole,)))
    mean = dl.distribute(lambda u, v: (u - v).abs().mean(), P)
    torch.testing.assert_close(mean(block, 2 * block), x.abs().mean())


@on_ranks(4)
def test_autocast(world: dl.Partition) -> None:
    """Under autocast the dtypes are the serial model's, and the numbers to the rounding of bfloat16."""
    _, model, net, x, mine = pair(world, norm=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = net(mine), model(x)
    assert y.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    wanted.float().square().sum().backward()
    assert_same_gradients(net, model, 2e-2)


class Affine(nn.Module):
    """A function of x and weights."""

    def __init__(
        self, function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.w, self.b, self.m = (nn.Parameter(torch.ones(*shape)) for shape in ((4, 3), (3,), (4,)))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w, self.b, self.m)


PENALISED: list[tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = [
    (lambda: nn.Linear(4, 3), (1, 4), (2, 1)),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), (1, 4), (2, 1)),
    (lambda: nn.GRUCell(4, 3), (1, 4), (2, 1)),
    (lambda: nn.Conv2d(2, 3, 1), (1, 2, 5, 1), (1, 1, 1, 2)),
    (lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 5, 1), (1, 1, 1, 2)),
    (lambda: nn.ConvTranspose2d(2, 3, 2), (1, 2, 1, 5), (1, 1, 2, 1)),
    *((lambda f=f: Affine(f), (1, 4), (2, 1)) for f in (
        lambda x, w, b, m: torch.addmm(b, x, w),
        lambda x, w, b, m: (x * m) @ w - b * 2,
        lambda x, w, b, m: torch.stack([x * x, m + 0 * x]),
        lambda x, w, b, m: torch.maximum(x * x, m),
        lambda x, w, b, m: torch.where(x > 0, x * x * m, m),
        lambda x, w, b, m: (x * m).cumprod(1),
        lambda x, w, b, m: (x * m).tanh().cummax(1).values,
        lambda x, w, b, m: (x * m).tanh().unfold(1, 2, 1),
        lambda x, w, b, m: F.scaled_dot_product_attention(x[:, None], m[None, None], x[:, None] * m, b[None, None, :1]),
    )),
]  # fmt: skip


@on_ranks(2)
def test_second_gradients_on_a_rank_without_points(world: dl.Partition) -> None:
    """They reach the same weights there as elsewhere."""
    for make, shape, grid in PENALISED:
        model, P, whole = make(), world.grid(grid), torch.ones(shape)
        net = dl.distribute(copy.deepcopy(model), P)
        for of, x in ((net, P.cut(whole)), (model, whole)):
            (gradient,) = torch.autograd.grad(of(x.requires_grad_()).sum(), x, create_graph=True)
            gradient.square().sum().backward()
        for mine, wanted in zip(net.parameters(), model.parameters(), strict=True):
            assert (mine.grad is None) == (wanted.grad is None)
            torch.testing.assert_close(mine.grad, wanted.grad)


@on_ranks(4)
def test_axes_by_name(world: dl.Partition) -> None:
    P = world.grid(h=2, w=2, of="n c h w")
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(2)), torch.rand(1, 1, 4, 6)
    for up, across in (("h", "w"), (2, 3)):
        net = dl.distribute(model, P, in_axes=[(None, None, up, across)], cut={"0": [None, None, across, up]},
                            out_axes=[(None, None, across)])  # fmt: skip
        y = net(P.cut(x, (None, None, up, across)))
        torch.testing.assert_close(y, P.cut(model(x), (None, None, across)))
        assert net.report().rows[1].movements  # to the axes the other way round
    with pytest.raises(ValueError, match="has no axis 'z'"):
        dl.distribute(model, P, in_axes=[("z", None)])
    with pytest.raises(ValueError, match="for which no tensor was passed"):
        dl.distribute(model, P, in_axes=[None, (9, 9)])(x)


@on_ranks(2)
def test_cut_weights(world: dl.Partition) -> None:
    """Weights that are cut along features go in and out as those of layers do; copies and pickles of the net go on."""
    P = world.grid((1, 2))
    torch.manual_seed(0)
    model = Tokens().double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = dl.distribute(model, P, in_axes=[(0, None)])
    index = torch.arange(8).view(2, 4)
    wanted = model(index)
    for twin in (net, net.eval(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin(index), wanted)
    assert sum(p.numel() for p in net.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    state = dl.serial_state_dict(net)
    assert world.rank or all(torch.equal(state[name], tensor) for name, tensor in start.items())
    net.train()(index).square().sum().backward()
    wanted.square().sum().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(dl.grad_norm(net), norm)


@pytest.mark.parametrize("grid", [(1, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1)])
def test_lenet_cut_in_channels_and_features(grid: tuple[int, ...]) -> None:
    """`cut` makes whole maps of some channels of the last pool's output, so that linear layers are cut in features."""
    images = (0, None, 2, 3)  # whose one channel is whole on every rank
    torch.manual_seed(0)
    whole, labels = torch.randn(6, 1, 32, 32).double(), torch.arange(6)

    def lenet() -> nn.Sequential:
        torch.manual_seed(0)
        features = nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)
        head = nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)
        return nn.Sequential(*features, *head).double()

    def losses(net: nn.Module, measure: nn.Module, x: torch.Tensor) -> list[float]:
        optimizer, found = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9), []
        for _ in range(9):
            loss = measure(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    def body(world: dl.Partition) -> tuple[list[float], dict[str, torch.Size]]:
        P = world.grid(grid)
        net = dl.distribute(lenet(), P, in_axes=[images], cut={"5": (0, 1, None, None)}, strict=True)
        found = losses(net, dl.distribute(nn.CrossEntropyLoss(), P), P.cut(whole, images))
        return found, {name: p.shape for name, p in net.named_parameters()}

    serial = lenet()
    wanted = losses(serial, nn.CrossEntropyLoss(), whole)
    assert wanted[-1] < 0.5 * wanted[0]
    for found, held in spmd(ranks := math.prod(grid), body):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
        cut = {name for name, p in serial.named_parameters() if held[name] != p.shape}
        assert cut >= ({"0.weight", "3.weight", "7.weight", "9.weight"} if ranks > 1 else set())


class Refused(nn.Module):
    """A model that does one thing that a record would lose or cannot hold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.Conv2d(2, 2, 3, padding=1)
        if kind == "hook":
            self.inner.register_forward_hook(lambda module, args, y: 2 * y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.kind == "control flow":
            return y if y.sum() > 0 else 2 * y
        if self.kind == "inference":
            with torch.inference_mode():
                return 2 * y
        if self.kind == "nonzero":
            return y[y > 0]
        return {"custom": Tripled.apply, "item": lambda t: t * t.sum().item()}.get(self.kind, nn.Identity())(y)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 3 * gradient


def test_what_is_inside_a_model_is_refused_by_its_path() -> None:
    """A container that sends messages would leave torch's export half done on ranks that are threads."""

    def body(world: dl.Partition) -> None:
        P = world.grid((1, 1, 2, 1))
        inside = {
            r"module 0, DataParallel, sends messages of its own": dl.DataParallel(nn.Conv2d(2, 2, 1), world),
            r"module 0, distribute\(Conv2d\), is distributed already": dl.distribute(nn.Conv2d(2, 2, 1), P),
            r"module 0 has momentum=None": nn.BatchNorm2d(2, momentum=None),
        }
        for text, module in inside.items():
            with pytest.raises(RuntimeError, match=text):
                dl.distribute(nn.Sequential(module), P)(torch.ones(1, 2, 4, 4))
        with pytest.raises(TypeError, match=r"not its class: ReLU\(...\)"):
            dl.distribute(nn.ReLU, P)
        y = dl.distribute(nn.BatchNorm2d(2, momentum=None).eval(), P)(torch.ones(1, 2, 4, 4))
        assert y.shape == (1, 2, 4, 4)

    spmd(2, body)


def test_a_failed_capture_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """torch logs the graph and its own trace, on each rank, before the error that says what they mean."""

    def body(world: dl.Partition) -> None:
        for model in (Refused("control flow"), nn.Conv2d(2, 2, 7, padding=6, padding_mode="reflect")):
            with pytest.raises(RuntimeError, match="cannot be captured"):
                dl.distribute(model, world.grid((1, 1, 2, 1)))(torch.ones(1, 2, 2, 4))

    spmd(2, body)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hook", "module inner has forward_hooks"),
        ("control flow", "cannot be captured at .*return y if y.sum"),
        ("inference", "inference_mode"),
        ("nonzero", "depends on data"),
        ("custom", "custom gradient of Tripled"),
        ("item", "item depends on data"),
    ],
)
def test_refusals(kind: str, text: str) -> None:
    """What cannot be captured is refused by name on all ranks."""

    def body(world: dl.Partition) -> None:
        P = world.grid((1, 1, 2, 1))
        net = dl.distribute(Refused(kind), P)
        with pytest.raises(RuntimeError, match=text):
            net(torch.ones(1, 2, 8, 8)[P.block((1, 2, 8, 8))])

    spmd(2, body)
