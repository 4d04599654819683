"""Under autocast to bfloat16 every layer's result and gradient have torch's dtype and values, with empty blocks too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn

Cuts = Sequence[Sequence[int]]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """A layer beside torch's. Its result is cut in balanced blocks, as the input without some dims, or is one number.

    `target`: what a loss compares with, which is cut as the input without some dims.
    """

    name: str
    options: dict[str, Any]
    serial: Callable[[torch.Tensor], torch.Tensor]
    balanced: bool = False
    dropped: tuple[int, ...] = ()
    target: Callable[[torch.Tensor], torch.Tensor] | None = None
    rounds: bool = False  # autocast has torch compute in half precision
    make: Callable[..., torch.nn.Module] | None = None  # of the partition and the options

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


def twins(name: str, dims: int = 0, **options: Any) -> Any:
    """torch's layer of the same name and options."""
    return getattr(torch.nn, f"{name}{dims or ''}{'d' if dims else ''}")(**options)


def cases(dims: int, shape: tuple[int, ...]) -> Iterator[Case]:
    """Every layer for a tensor (N, C, *space)."""
    for name, options in spatial(dims):
        yield Case(f"{name}{dims}d", options, partial(twins, name, dims), balanced=True, rounds="Conv" in name)
    lines = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    for mode in ("nearest", "nearest-exact", "area", lines, *(["bicubic"] if dims == 2 else [])):
        for size in ({"scale_factor": 2}, {"size": (4,) * dims}):
            yield Case("Upsample", {"mode": mode, **size}, torch.nn.Upsample, balanced=True)
    yield Case("FFT", {"dim": (1, 2)}, lambda dim: partial(torch.fft.fftn, dim=dim), balanced=True)
    yield Case("Mean", {"dim": (1, 2)}, lambda dim: partial(torch.mean, dim=dim), dropped=(1, 2))
    linear = {"in_features": shape[-1], "out_features": 3}
    yield Case("Linear", linear, partial(twins, "Linear"), balanced=True, rounds=True, make=over_rows)
    yield Case("Flatten", {}, partial(twins, "Flatten"), balanced=True, make=flatten)
    for name, options in alone(shape):
        yield Case(name, options, partial(twins, name))
    yield Case("BatchNorm", {"num_features": 4}, partial(twins, "BatchNorm", dims))
    yield Case("InstanceNorm", {"num_features": 4, "affine": True}, partial(twins, "InstanceNorm", dims))
    yield Case(f"Dropout{dims}d", {"p": 0.0}, partial(twins, "Dropout", dims))
    for reduction in ("mean", "none"):
        for name in ("L1", "MSE", "SmoothL1", "Huber", "BCE", "BCEWithLogits", "KLDiv", "PoissonNLL"):
            yield Case(
                f"{name}Loss", {"reduction": reduction}, partial(twins, f"{name}Loss"), target=partial(flipped, 1)
            )
        for name in ("CrossEntropyLoss", "NLLLoss"):
            yield Case(name, {"reduction": reduction}, partial(twins, name), dropped=(1,), target=classes)


def spatial(dims: int) -> Iterator[tuple[str, dict[str, Any]]]:
    window = {"kernel_size": 3, "stride": 2, "padding": 1}
    yield from (("MaxPool", {**window, "return_indices": places}) for places in (False, True))
    yield from (("AvgPool", {**window, "count_include_pad": counts}) for counts in (False, True))
    yield from (("AdaptiveAvgPool", {"output_size": size}) for size in (1, 3))
    yield from (("AdaptiveMaxPool", {"output_size": 3, "return_indices": places}) for places in (False, True))
    yield from ((f"{mode}Pad", {"padding": 1}) for mode in ("Zero", "Reflection", "Replication", "Circular"))
    yield "ConstantPad", {"padding": 1, "value": 2.5}
    channels = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}
    yield from ((name, channels) for name in ("Conv", "ConvTranspose"))


def alone(shape: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from (("LayerNorm", {"normalized_shape": shape[start:]}) for start in (1, -1))
    yield "RMSNorm", {"normalized_shape": shape[1:]}
    yield "GroupNorm", {"num_groups": 2, "num_channels": 4}
    yield from ((name, {"dim": 1}) for name in ("Softmax", "LogSoftmax"))
    yield "Dropout", {"p": 0.0}


def over_rows(P: dl.CartesianPartition, **options: Any) -> torch.nn.Module:
    """A linear layer for uncut features."""
    return dnn.DistributedLinear(P, None, None, **options)


def flatten(P: dl.CartesianPartition) -> torch.nn.Module:
    return dnn.DistributedFlatten(P, P_y=P.create_cartesian_topology_partition((1, 2)))


def flipped(dim: int, x: torch.Tensor) -> torch.Tensor:
    return x.flip(dim)


def classes(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0] * 4).long()


class Around(dnn.Module):
    """A network whose layer rides on its agreement."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def part(x: torch.Tensor, cuts: Cuts, index: Sequence[int], dropped: Sequence[int] = ()) -> torch.Tensor:
    """A block of a tensor that lacks some of the dims that are cut."""
    if not x.dim():
        return x
    kept = [d for d in range(len(cuts)) if d not in dropped]
    return x[tuple(slice(*cuts[d][index[d] : index[d] + 2]) for d in kept)]


def compare(case: Case, x: torch.Tensor, P: dl.CartesianPartition, cuts: Cuts, where: str) -> None:
    """Check a layer's result and its input's gradient."""
    torch.default_generator.manual_seed(3)
    layer = (case.make or getattr(dnn, f"Distributed{case.name}"))(P, **case.options)
    torch.default_generator.manual_seed(3)
    serial = case.serial(**case.options)
    whole, block = (t.clone().requires_grad_() for t in (x, part(x, cuts, P.index)))
    target = () if case.target is None else (case.target(x),)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = serial(whole, *target)
        y = layer(block, *(part(t, cuts, P.index, case.dropped) for t in target))
    if isinstance(wanted, tuple):
        (wanted, _), (y, _) = wanted, y
    g = torch.randint(-2, 3, wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted.dtype)
    wanted.backward(g)
    P_y = getattr(layer, "P_y", None) or P
    share = [
        t[P_y.block(t.shape)] if case.balanced else part(t, cuts, P.index, case.dropped) for t in (wanted.detach(), g)
    ]
    y.backward(share[1])
    tolerance = max(TOLERANCE[t] for t in (x.dtype, torch.bfloat16 if case.rounds else torch.float32))
    for found, right in ((y.detach(), share[0]), (block.grad, part(whole.grad, cuts, P.index))):
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_layer_gives_what_torch_gives(dims: int) -> None:
    """Whichever dim is cut, and where the second rank's input, or its output, is empty."""

    @on_ranks(2)
    def test(world: dl.Partition) -> None:
        shape = (1, 4, 6, 5, 4)[: 2 + dims]
        values = torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.8 + 0.1
        for case in cases(dims, shape):
            for dtype in (torch.float32, torch.bfloat16):
                for axis in range(len(shape) - (case.make is over_rows)):
                    P = world.grid([2 if a == axis else 1 for a in range(len(shape))])
                    for last in {shape[axis], shape[axis] if case.balanced else shape[axis] // 2}:
                        cuts = [(0, last, n) if a == axis else (0, n) for a, n in enumerate(shape)]
                        compare(case, values.to(dtype), P, cuts, f"{case} of {dtype} cut along {axis} at {last}")

    test("threads")


@on_ranks(2)
def test_calls_of_one_layer_in_turn(world: dl.Partition) -> None:
    """With autocast and without, in a composite and on one rank too: torch's dtype for every layer of space."""
    shape, in_turn = (1, 4, 6, 5, 4), (True, False, True, True)
    x = torch.rand(shape).bfloat16()
    for case in (case for case in cases(3, shape) if case.balanced and case.make is None and case.name != "FFT"):
        serial = case.serial(**case.options)
        for grid in ((1, 1, 2, 1, 1), (1, 1, 1, 1, 1)):
            P = world.grid(grid, range(max(grid)) if max(grid) > 1 else [world.rank])
            layer = getattr(dnn, f"Distributed{case.name}")(P, **case.options)
            for module in (layer, Around(layer)):
                for on in in_turn:
                    with torch.autocast("cpu", torch.bfloat16, enabled=on):
                        found = [dtype_of(call, t) for call, t in ((serial, x), (module, x[P.block(shape)]))]
                    assert found[0] is found[1], (str(case), grid, on, found)


def dtype_of(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.dtype | None:
    """The dtype of a result, None if there is none."""
    try:
        y = call(x)
    except (RuntimeError, TypeError):
        return None
    return (y[0] if isinstance(y, tuple) else y).dtype
