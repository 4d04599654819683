"""Losses against torch's on the whole tensors: value and gradient, which is the serial one on any number of ranks."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import block, cuts_of, leaf
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.nn.loss import class_loss, loss
from distdl_lite.partition import Partition

GRIDS = (((4, 1, 1), (0, 1, 2, 3)), ((2, 1, 2), (3, 0, 2, 1)), ((1, 2, 1), (2, 1)), ((3, 1, 1), (1, 2, 3)))
CLASS_GRIDS = (*GRIDS, ((1, 4, 1), (3, 2, 1, 0)), ((2, 2, 1), (0, 1, 2, 3)), ((1, 1, 1), (2,)))
SHAPE = (5, 3, 4)


def distributed(name: str) -> type:
    return getattr(loss, f"Distributed{name}Loss", None) or getattr(class_loss, f"Distributed{name}Loss")


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64)


def elementwise() -> Iterator[tuple[str, dict[str, Any], torch.Tensor, torch.Tensor]]:
    """Name, options, input and target."""
    x, t = draw(*SHAPE) * 4 - 2, draw(*SHAPE)
    yield "MSE", {}, x, t
    yield "L1", {}, x, t
    yield "SmoothL1", {"beta": 0.5}, x, t
    yield "Huber", {"delta": 0.7}, x, t
    yield "BCE", {}, x.sigmoid(), t
    yield "BCE", {"weight": draw(3, 1)}, x.sigmoid(), t
    yield "BCEWithLogits", {"weight": draw(*SHAPE), "pos_weight": draw(3, 4)}, x, t
    yield "KLDiv", {}, x.log_softmax(1), t
    yield "KLDiv", {"log_target": True}, x.log_softmax(1), t.log()
    yield "PoissonNLL", {"full": True}, x, (t * 5).round()
    yield "PoissonNLL", {"log_input": False, "eps": 1e-6}, x.abs(), (t * 5).round()


def over_classes() -> Iterator[tuple[str, dict[str, Any], torch.Tensor, torch.Tensor]]:
    x, t, weight = draw(*SHAPE) * 20 - 10, torch.randint(3, (5, 4)), draw(3)
    some = torch.where(draw(5, 4) < 0.4, -100, t)
    for options in ({}, {"weight": weight}, {"ignore_index": 1}, {"weight": weight, "ignore_index": 2}):
        yield "NLL", options, x.log_softmax(1), t
        yield "CrossEntropy", options, x, t
        yield "CrossEntropy", {**options, "label_smoothing": 0.2}, x, t
    yield "CrossEntropy", {}, x, some
    yield "CrossEntropy", {}, x, torch.full_like(t, -100)
    for smoothing in (0.0, 0.2, 1.0):
        options = {"weight": torch.tensor([0.0, 2, 3], dtype=x.dtype), "label_smoothing": smoothing}
        yield "CrossEntropy", options, x, torch.where(draw(5, 4) < 0.4, -100, 0)  # no target has weight
    yield "CrossEntropy", {}, x, draw(*SHAPE).softmax(1)
    yield "CrossEntropy", {"weight": weight, "label_smoothing": 0.3}, x, draw(*SHAPE).softmax(1)


def serial_loss(name: str, reduction: str, options: dict[str, Any], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():  # torch warns of KLDivLoss's mean
        warnings.simplefilter("ignore")
        return getattr(torch.nn, f"{name}Loss")(reduction=reduction, **options)(x, t)


def check(
    P: Partition, case: tuple[str, dict[str, Any], torch.Tensor, torch.Tensor], reduction: str, cuts: Any
) -> None:
    """Compare a loss squared, whose upstream gradient is not one, and its input's gradient with torch's."""
    name, options, x_global, t_global = case
    x_serial, x = leaf(x_global), leaf(block(x_global, P, cuts))
    dims = (0, 2) if t_global.dim() == 2 else None
    serial = serial_loss(name, reduction, options, x_serial, t_global)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = distributed(name)(P, reduction=reduction, **options)(x, block(t_global, P, cuts, dims))
    (serial**2).sum().backward()
    (value**2).sum().backward()
    if P.active:
        mine = serial if not serial.dim() else block(serial, P, cuts, (0, 2) if serial.dim() == 2 else None)
        torch.testing.assert_close(value, mine, equal_nan=True)
        torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts), equal_nan=True)
    elif reduction != "none":
        assert value.item() == 0
        assert value.dim() == 0


@on_ranks(4, mpi=True)
def test_elementwise_losses(world: Partition) -> None:
    rng = random.Random(0)
    for case in elementwise():
        for number, (grid, ranks) in enumerate(GRIDS):
            P = world.grid(grid, ranks)
            for reduction in (
                "mean",
                *(["batchmean"] if case[0] == "KLDiv" else []),
                *["sum", "none"][number % 2 :][:1],
            ):
                check(P, case, reduction, cuts_of(SHAPE, grid, rng if number % 2 else None))


@on_ranks(4, mpi=True)
def test_losses_over_classes(world: Partition) -> None:
    rng = random.Random(1)
    for case in over_classes():
        for number, (grid, ranks) in enumerate(CLASS_GRIDS):
            P = world.grid(grid, ranks)
            for reduction in (
                "mean",
                *(["none"] if number else []),
                *(["sum"] if number == 5 else []),
            ):
                check(P, case, reduction, cuts_of(SHAPE, grid, rng if number % 2 else None))


@on_ranks(4)
def test_one_sample_without_batch(world: Partition) -> None:
    x, P = draw(7), world.grid((4,))
    for t in (torch.tensor(5), draw(7).softmax(0)):
        mine = t if t.dim() == 0 else block(t, P, P.bounds((7,)))
        for reduction in ("mean", "none"):
            value = class_loss.DistributedCrossEntropyLoss(P, reduction=reduction)(block(x, P, P.bounds((7,))), mine)
            torch.testing.assert_close(value, torch.nn.functional.cross_entropy(x, t))


@on_ranks(4, mpi=True)
def test_double_backward(world: Partition) -> None:
    some = [(case, "mean") for case in (*list(elementwise())[::3], *list(over_classes())[1::4])]
    for (name, options, x_global, t_global), reduction in (*some, *((case, "none") for case, _ in some[-3:])):
        P = world.grid((2, 2, 1), (0, 2, 1, 3))
        cuts = P.bounds(SHAPE)
        x_serial, x = leaf(x_global), leaf(block(x_global, P, cuts))
        t = block(t_global, P, cuts, (0, 2) if t_global.dim() == 2 else None)
        serial = serial_loss(name, reduction, options, x_serial, t_global) ** 2
        value = distributed(name)(P, reduction=reduction, **options)(x, t) ** 2
        for found, leafs in ((serial, x_serial), (value, x)):
            (gradient,) = torch.autograd.grad(found.sum(), leafs, create_graph=True)
            gradient.square().sum().backward()
        torch.testing.assert_close(x.grad, block(x_serial.grad, P, cuts))


@on_ranks(4)
def test_the_target_has_a_gradient_too(world: Partition) -> None:
    P = world.grid((3, 1), (0, 1, 3))
    x, t = draw(5, 2), draw(5, 2)
    cuts = P.bounds(x.shape)
    t_serial, mine = leaf(t), leaf(block(t, P, cuts))
    torch.nn.functional.mse_loss(x, t_serial).backward()
    loss.DistributedMSELoss(P)(block(x, P, cuts), mine).backward()
    if P.active:
        torch.testing.assert_close(mine.grad, block(t_serial.grad, P, cuts))


@on_ranks(4)
def test_backward_is_the_same_line_on_all_ranks(world: Partition) -> None:
    P = world.grid((1, 3), (0, 1, 2))
    for module in (loss.DistributedMSELoss(P), class_loss.DistributedCrossEntropyLoss(P)):
        x = block(draw(4, 5), P, P.bounds((4, 5))).requires_grad_(world.rank == 1)
        t = block(draw(4, 5), P, P.bounds((4, 5)))
        module(x, t).backward()
        assert (x.grad is not None) == (world.rank == 1)
        with torch.no_grad():
            assert not module(x, t).requires_grad
    x = leaf(torch.empty(0))
    zero = loss.DistributedMSELoss(world.grid((1, 1), [0]))
    if world.rank == 3:
        zero(x, x).backward()
        assert x.grad is not None


@on_ranks(2)
def test_low_precision_and_checkpoint(world: Partition) -> None:
    P = world.grid((2, 1))
    x, t = torch.rand(400, 40) * 30, torch.zeros(400, 40)
    cuts = P.bounds(x.shape)
    mine, zeros = block(x, P, cuts), block(t, P, cuts)
    half = loss.DistributedMSELoss(P)(mine.half(), zeros.half())  # its sum is beyond float16
    torch.testing.assert_close(half, torch.nn.functional.mse_loss(x.half(), t.half()))
    classes = world.grid((1, 2))
    target = torch.randint(40, (400,))
    logits = block(x, classes, classes.bounds(x.shape))
    with torch.autocast("cpu", torch.bfloat16):
        value = class_loss.DistributedCrossEntropyLoss(classes)(logits.bfloat16(), target)
        wanted = torch.nn.functional.cross_entropy(x.bfloat16(), target)
    assert value.dtype is wanted.dtype is torch.float32
    torch.testing.assert_close(value, wanted)  # summed in another order: the default float32 tolerance
    for module, first, second in (
        (loss.DistributedMSELoss(P), leaf(mine.double()), zeros.double()),
        (class_loss.DistributedCrossEntropyLoss(classes), leaf(logits.double()), target),
    ):
        module(first, second).backward()
        plain, first.grad = first.grad, None
        checkpoint(lambda x, t, m=module: m(x * 1, t), first, second, use_reentrant=False).backward()
        assert torch.equal(first.grad, plain)


@on_ranks(4, mpi=True)
def test_refusals(world: Partition) -> None:
    P, classes = world.grid((2, 2, 1)), class_loss.DistributedCrossEntropyLoss
    x = torch.rand(3, 2, 4)
    first = world.rank == 0

    def refused(error: type[Exception], text: str, module: torch.nn.Module, *tensors: torch.Tensor) -> None:
        with pytest.raises(error, match=text) as found:
            module(*tensors)
        texts = world.allgather_data(str(found.value))
        assert texts is not None
        assert len(set(texts)) == 1

    refused(ValueError, "rank 0 passed a target of shape", loss.DistributedMSELoss(P), x, x[:, :1] if first else x)
    refused(ValueError, "it must be", classes(P), x, torch.zeros(3, 2, dtype=torch.long))
    refused(ValueError, "for all 4 classes", classes(P, weight=torch.rand(3)), x, x)
    refused(ValueError, "ignore_index", classes(P, ignore_index=0), x, x)
    indices = r"target of shape \(3, 2, 4\), with its input of shape \(3, 2, 4\) it must be \(3, 4\)"
    refused(ValueError, indices, classes(P), x, x.long())
    refused(ValueError, r"it must be \(3, 4\)", classes(P), x, x[:, :1].long())
    refused(ValueError, r"it must be \(3, 2, 4\)", classes(P), x, x[:, :1])
    bad = torch.full((3, 4), 9 if first else 0)
    refused(IndexError, "Target 9 is out of bounds", classes(P), x, bad)
    everywhere, x_all = torch.full((3, 4), 9 * (world.rank in (0, 2))), world.grid((1, 4, 1))
    refused(IndexError, "Target 9 is out of bounds", classes(x_all, reduction="none"), x, everywhere)
    rows = world.grid((4, 1, 1))
    refused(IndexError, "Target 9 is out of bounds", classes(rows), x, bad)
    refused(RuntimeError, "between 0 and 1", loss.DistributedBCELoss(rows), x * (9 if first else 1), x)
    refused(
        ValueError, "rank 0: number of arguments 1, others 2", loss.DistributedMSELoss(P), *([x] if first else [x, x])
    )
    refused(ValueError, "max is not a valid value for reduction", loss.DistributedL1Loss(P, reduction="max"), x, x)
    refused(ValueError, "label_smoothing", classes(P, label_smoothing=2.0), x, x)
    with pytest.raises(ValueError, match="must not require grad"):
        classes(P, weight=leaf(torch.rand(4)))


@on_ranks(2)
def test_copies_and_repr(world: Partition) -> None:
    P = world.grid((2, 1))
    module = class_loss.DistributedCrossEntropyLoss(P, weight=torch.rand(3), label_smoothing=0.1)
    x, t = torch.rand(2, 3), torch.tensor([0, 2])
    value = module(x, t)
    assert torch.equal(copy.deepcopy(module)(x, t), value)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, t), value)
    assert repr(module) == (
        "DistributedCrossEntropyLoss(ignore_index=-100, reduction='mean', label_smoothing=0.1, P_x=(2, 1))"
    )
    assert dl.serial_state_dict(module).keys() == ({"weight"} if world.rank == 0 else set())


@on_ranks(1)
def test_transposed_input_on_one_rank(world: Partition) -> None:
    """In four dims, of which torch's backward takes contiguous memory alone."""
    x, target = torch.rand(2, 3, 5, 4, dtype=torch.float64).log_softmax(1), torch.arange(40).view(2, 5, 4) % 3
    for name in ("NLL", "CrossEntropy"):
        found = []
        for layer, memory in (
            (getattr(dnn, f"Distributed{name}Loss")(world.grid((1, 1, 1, 1))), x.mT.contiguous().mT),
            (getattr(torch.nn, f"{name}Loss")(), x),
        ):
            leaf = memory.detach().requires_grad_()
            layer(leaf, target).backward()
            found.append(leaf.grad)
        torch.testing.assert_close(*found, rtol=1e-12, atol=0)
