"""The cases of the comparison: models of plain torch, the shapes of their inputs, and the grid that cuts these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensors = dict[str, torch.Tensor]


class Function(nn.Module):
    """A function of tensors as a module, with weights if shapes of them are given."""

    def __init__(self, function: Callable[..., Any], *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(torch.randn(shape) for shape in weights)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.weights)


@dataclass
class Case:
    """A model, the grid with an axis for each dim of its first input, and the inputs, or a function that draws them."""

    name: str
    make: Callable[[], nn.Module]
    grid: tuple[int, ...]
    shape: tuple[int, ...]
    target: Callable[[], torch.Tensor] | None = None

    def drawn(self) -> tuple[nn.Module, list[torch.Tensor]]:
        """The model and its whole inputs, the same at each call."""
        torch.manual_seed(0)
        model = self.make().double()
        return model, [torch.randn(self.shape, dtype=torch.float64), *([self.target()] if self.target else [])]

    def axes(self, x: torch.Tensor) -> list[int | None]:
        """The axis of the grid that cuts each dim; class indices are cut as the input is, without the dim of classes."""
        every: list[int | None] = list(range(len(self.grid)))
        return every if x.dim() == len(every) else [every[0], *every[2:]]


def serial(case: Case) -> Tensors:
    """What one process computes."""
    return _computed(*case.drawn(), lambda t: t)[0]


def compare(
    case: Case, cut: Callable[[torch.Tensor], Any], whole: Callable[[Any], torch.Tensor], prepare: Callable[..., Any]
) -> str:
    """A verdict on a library: `cut` makes its tensor of a whole one, `whole` the whole one of it, `prepare` readies a model."""
    model, inputs = case.drawn()
    prepare(model)
    made, error = _computed(model, [cut(x) for x in inputs], whole)
    expected = serial(case)
    if error is None:
        return judge(expected, made)
    return f"{judge({n: expected[n] for n in made}, made)}; then in backward {shown(error)}"


def _computed(
    model: nn.Module, inputs: list[Any], whole: Callable[[Any], torch.Tensor]
) -> tuple[Tensors, Exception | None]:
    """Outputs, statistics and gradients by name, and the error of backward if it fails."""
    inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    y = model(*inputs)
    output = whole(y)
    made = {"output": output.detach().clone(), "its mean square": whole(y.square().mean()).detach()}
    made |= {n: whole(b).clone() for n, b in model.named_buffers() if b.is_floating_point()}
    try:
        if output.requires_grad:
            output.backward(weights_of(output))
            named = [("input", inputs[0]), *model.named_parameters()]
            made |= {f"gradient of {n}": whole(t.grad) for n, t in named if t.grad is not None}
    except Exception as error:
        return made, error
    return made, None


def weights_of(output: torch.Tensor) -> torch.Tensor:
    """The gradient of the output that every library gets."""
    return torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)


def judge(expected: Tensors, made: Tensors) -> str:
    """A verdict by the largest differences, relative to the largest number of their kind; all are in float64."""
    worst = {n: difference(e, made.get(n)) for n, e in expected.items()}
    if all(d < 1e-9 for d in worst.values()):
        return "exact"
    if all(d < 1e-5 for d in worst.values()):
        return "rounded to float32"
    return "WRONG: " + ", ".join(
        f"{n} {'of another shape' if math.isinf(d) else f'by {100 * d:.2g}%'}" for n, d in worst.items() if not d < 1e-5
    )


def worst(verdicts: list[str]) -> str:
    """The worst of the verdicts of ranks, and of several such that of the first rank."""
    order = ("exact", "rounded", "WRONG", "error")
    return max(verdicts, key=lambda verdict: next(i for i, word in enumerate(order) if verdict.startswith(word)))


def difference(expected: torch.Tensor, made: torch.Tensor | None) -> float:
    if made is None or made.shape != expected.shape:
        return math.inf
    return float((made - expected).abs().max() / expected.abs().max().clamp(min=1e-3)) if made.numel() else 0.0


def shown(error: Exception) -> str:
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _classes() -> torch.Tensor:
    return torch.randint(0, 5, (2, 4, 7)).index_fill_(-1, torch.tensor([1]), -100)


def _conv(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **options)


def _of(function: Callable[..., Any], *weights: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Function(function, *weights)


def _attention(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def _cross_entropy() -> nn.Module:
    def loss(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, target, weight.detach().abs(), ignore_index=-100)

    return Function(loss, (5,))


QUARTERS, WIDTH, FOUR = (1, 1, 2, 2), (1, 1, 1, 2), (1, 1, 1, 4)
CASES = [
    Case("conv 3x3, padding 1, cut 2 x 2", _conv(2, 3, 3, padding=1), QUARTERS, (2, 2, 8, 8)),
    Case("conv 3x3, padding 1, width 7 over 2", _conv(2, 3, 3, padding=1), WIDTH, (2, 2, 8, 7)),
    Case("conv 3x3, padding 1, 65 x 97 over 2 x 2", _conv(2, 3, 3, padding=1), QUARTERS, (1, 2, 65, 97)),
    Case("conv 3x3, circular padding", _conv(2, 3, 3, padding=1, padding_mode="circular"), WIDTH, (2, 2, 8, 8)),
    Case("conv 3x3, stride 2, padding 1", _conv(2, 3, 3, stride=2, padding=1), WIDTH, (2, 2, 8, 8)),
    Case("conv 3x3, stride 2, padding 1, width 10 over 4", _conv(2, 3, 3, stride=2, padding=1), FOUR, (2, 2, 8, 10)),
    Case("conv 2x2, stride 2, width 8 over 2", _conv(2, 3, 2, stride=2), WIDTH, (2, 2, 8, 8)),
    Case("conv 2x2, stride 2, width 10 over 2", _conv(2, 3, 2, stride=2), WIDTH, (2, 2, 8, 10)),
    Case("conv 3x3, dilation 2, padding 2", _conv(2, 3, 3, dilation=2, padding=2), WIDTH, (2, 2, 8, 8)),
    Case("conv 4x4 (even), padding 'same'", _conv(2, 3, 4, padding="same"), WIDTH, (2, 2, 8, 8)),
    Case("conv 3x3, groups 2, padding 1", _conv(2, 4, 3, padding=1, groups=2), WIDTH, (2, 2, 8, 8)),
    Case("conv 7x7, padding 3, blocks of 2", _conv(2, 3, 7, padding=3), FOUR, (2, 2, 8, 8)),
    Case("conv 3x3, padding 1, width 3 over 4", _conv(2, 3, 3, padding=1), FOUR, (2, 2, 8, 3)),
    Case("conv 3x3, channels cut", _conv(4, 6, 3, padding=1), (1, 2, 1, 1), (2, 4, 8, 8)),
    Case(
        "conv transpose, stride 2, output_padding 1", lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), WIDTH, (2, 2, 8, 8)
    ),
    Case("max pool 2, width 10 over 2", lambda: nn.MaxPool2d(2), WIDTH, (2, 2, 8, 10)),
    Case("max pool 3, stride 2, padding 1", lambda: nn.MaxPool2d(3, 2, 1), WIDTH, (2, 2, 8, 8)),
    Case("avg pool 2, width 10 over 2", lambda: nn.AvgPool2d(2), WIDTH, (2, 2, 8, 10)),
    Case("avg pool 3, stride 2, ceil_mode", lambda: nn.AvgPool2d(3, 2, ceil_mode=True), WIDTH, (2, 2, 8, 8)),
    Case("adaptive avg pool to 1", lambda: nn.AdaptiveAvgPool2d(1), WIDTH, (2, 2, 8, 7)),
    Case("adaptive avg pool to 3", lambda: nn.AdaptiveAvgPool2d(3), WIDTH, (2, 2, 8, 7)),
    Case("bilinear x 2", lambda: nn.Upsample(None, 2, "bilinear"), WIDTH, (2, 2, 8, 8)),
    Case("bilinear x 2, align_corners", lambda: nn.Upsample(None, 2, "bilinear", True), WIDTH, (2, 2, 8, 8)),
    Case("batch norm, training, width 7 over 2", lambda: nn.BatchNorm2d(3), WIDTH, (2, 3, 8, 7)),
    Case("batch norm, training, batch 3 over 2", lambda: nn.BatchNorm2d(3), (2, 1, 1, 1), (3, 3, 8, 8)),
    Case("group norm, space cut", lambda: nn.GroupNorm(2, 4), WIDTH, (2, 4, 8, 7)),
    Case("group norm, channels cut", lambda: nn.GroupNorm(2, 4), (1, 2, 1, 1), (2, 4, 8, 8)),
    Case("instance norm, space cut", lambda: nn.InstanceNorm2d(3, affine=True), WIDTH, (2, 3, 8, 7)),
    Case("layer norm over the cut dim", lambda: nn.LayerNorm(7), (1, 1, 2), (2, 3, 7)),
    Case("fft along the cut dim", _of(lambda x: torch.fft.fft(x).abs()), (1, 1, 2), (2, 3, 7)),
    Case("softmax along the cut dim", _of(lambda x: x.softmax(-1)), (1, 1, 2), (2, 3, 7)),
    Case("cross entropy, weights, ignore_index, space cut", _cross_entropy, WIDTH, (2, 5, 4, 7), _classes),
    Case("cross entropy, classes cut", _cross_entropy, (1, 2, 1, 1), (2, 5, 4, 7), _classes),
    Case("mean squares, width 7 over 2", _of(lambda x: (x * x).mean()), WIDTH, (2, 2, 8, 7)),
    Case("reflect pad 1", _of(lambda x: F.pad(x, (1, 1), mode="reflect")), (1, 1, 2), (2, 3, 8)),
    Case("circular pad 2", _of(lambda x: F.pad(x, (2, 2), mode="circular")), (1, 1, 2), (2, 3, 8)),
    Case("causal attention, 7 tokens over 2", _of(_attention), (1, 1, 2, 1), (2, 2, 7, 4)),
    Case("flatten of a cut dim, linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), (1, 1, 2), (2, 3, 8)),
    Case("view that splits a cut dim", _of(lambda x: x.view(2, 3, 2, 3).transpose(2, 3) * 1), (1, 1, 2), (2, 3, 6)),
    Case("pixel shuffle 2", lambda: nn.PixelShuffle(2), WIDTH, (2, 4, 8, 7)),
    Case("linear, features cut", lambda: nn.Linear(7, 5), (1, 1, 2), (2, 3, 7)),
    Case("roll along the cut dim", _of(lambda x: x.roll(1, -1) * 1), (1, 1, 2), (2, 3, 7)),
    Case("cumsum along the cut dim", _of(lambda x: x.cumsum(-1)), (1, 1, 2), (2, 3, 7)),
    Case("sort along the cut dim", _of(lambda x: x.sort(-1).values), (1, 1, 2), (2, 3, 7)),
    Case("argmax along the cut dim", _of(lambda x: x.argmax(-1).double()), (1, 1, 2), (2, 3, 7)),
    Case("slices: x[..., 1:] - x[..., :-1]", _of(lambda x: x[..., 1:] - x[..., :-1]), (1, 1, 2), (2, 3, 7)),
    Case("index by a list along the cut dim", _of(lambda x: x[..., [5, 0, 2]] * 1), (1, 1, 2), (2, 3, 7)),
    Case("F.unfold 3x3", _of(lambda x: F.unfold(x, 3)), WIDTH, (2, 2, 8, 8)),
]
