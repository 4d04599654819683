"""Options that torch refuses, beside torch: every layer refuses them too, on all ranks, and says which."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy
import pytest
import torch
from layers import Case, X, blocks_of, inputs_of, make_layer, outcome
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import spmd

INTEGERS = (0, -1, 1.5, "x", None, (1,), (1, 2), (0, 1), (1, -1), (1.5, 1), (), {}, 99)
NUMBERS = (0.0, -1.0, 2.0, math.nan, None, "x", (1,))
FLAGS = (0, None, "x")
DTYPES = (torch.int64, torch.bool, "float32", 3)
ONES = {n: torch.ones(n) for n in (3, 4, 9)}


def _convolutions() -> Iterator[Case]:
    sizes = dict.fromkeys(("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"), INTEGERS)
    tried = {**sizes, "padding": (*INTEGERS, "same", "most"), "padding_mode": ("odd", None, 3), "dtype": DTYPES}
    base = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    one = ("stride", "padding", "output_padding", "dilation")  # torch takes a sequence of one for all dims
    for d in (1, 2):
        yield Case(f"Conv{d}d", base, tried, X[d], stricter=one)
        yield Case(
            f"ConvTranspose{d}d", {**base, "stride": 3}, {**tried, "output_padding": INTEGERS}, X[d], stricter=one
        )
    yield Case("Conv1d", {**base, "padding_mode": "reflect"}, {"padding": (8, 9)}, X[1])
    yield Case("Conv1d", {**base, "padding": "same"}, {"stride": (2,)}, X[1])


def _pools() -> Iterator[Case]:
    for d in (1, 2):
        tried = {**dict.fromkeys(("kernel_size", "stride", "padding"), INTEGERS), "ceil_mode": FLAGS}
        one = (
            "kernel_size",
            "stride",
            "padding",
            "dilation",
        )  # torch takes a sequence of one for all, and none for None
        yield Case(f"MaxPool{d}d", {"kernel_size": 3}, {**tried, "dilation": INTEGERS}, X[d], stricter=one)
        divisor = {"divisor_override": (0, 1.5, "x", (1,))} if d > 1 else {}
        average = {**tried, "count_include_pad": FLAGS, **divisor}
        yield Case(f"AvgPool{d}d", {"kernel_size": 3}, average, X[d], stricter=one)
        for kind in ("Avg", "Max"):
            sizes = [value for value in INTEGERS if value is not None]  # which keeps the input's, as in a sequence
            yield Case(f"Adaptive{kind}Pool{d}d", {}, {"output_size": sizes}, X[d], stricter=["output_size"])


def _pads() -> Iterator[Case]:
    lengths = (*INTEGERS, (9, 9), (-5, -4), (-5, -5), (-9, 1), (8, 8, 0, 0), (0, 9, 0, 0), (1, 1, 1, 1, 1))
    for d in (1, 2):
        for kind in ("Zero", "Reflection", "Replication", "Circular"):
            # torch takes other numbers of them, which pad other dims than the name says, and circular pads of nothing
            yield Case(f"{kind}Pad{d}d", {}, {"padding": lengths}, X[d], stricter=["padding"])
        yield Case(f"ConstantPad{d}d", {"padding": 1}, {"value": (None, "x", 1j, (1,))}, X[d], stricter=["value"])


def _norms() -> Iterator[Case]:
    tried = {"eps": NUMBERS, "dtype": DTYPES}
    running = {**tried, "num_features": (*INTEGERS, 3), "momentum": ("x", (1,))}
    yield Case("BatchNorm", {"num_features": 4}, running, X[2], "BatchNorm2d")
    # torch reads neither of these where there are no weights, and divides by the root of a negative number
    yield Case("InstanceNorm", {"num_features": 4}, running, X[2], "InstanceNorm2d", ["num_features", "eps", "dtype"])
    group = {**tried, "num_groups": (*INTEGERS, 3, 8), "num_channels": (*INTEGERS, 6)}
    yield Case("GroupNorm", {"num_groups": 2, "num_channels": 4}, group, X[2], stricter=["eps"])
    shapes = {**tried, "normalized_shape": (*INTEGERS, (7, 9), (4, 7), 9)}
    for name in ("LayerNorm", "RMSNorm"):
        yield Case(name, {"normalized_shape": 7}, shapes, X[2], stricter=["eps"])


def _linear() -> Iterator[Case]:
    tried = {"in_features": (*INTEGERS, 8), "out_features": INTEGERS, "dtype": DTYPES}
    for name in ("Linear", "ColumnParallelLinear", "RowParallelLinear"):
        yield Case(name, {"in_features": 9, "out_features": 4}, tried, X[1], "Linear")
    sizes = {"num_embeddings": INTEGERS, "embedding_dim": INTEGERS, "dtype": DTYPES}
    flags = {"scale_grad_by_freq": FLAGS, "sparse": (*FLAGS, True), "max_norm": (1.0,)}
    tried = {**sizes, **flags, "padding_idx": (-5, -6, 5, 1.5, "x", (1,))}
    base = {"num_embeddings": 5, "embedding_dim": 3}
    yield Case("Embedding", base, tried, "indices", stricter=["sparse", "max_norm"])


def _others() -> Iterator[Case]:
    dims = (0, 2, 3, -3, -4, 1.5, "x", (1,))
    for name in ("Softmax", "LogSoftmax"):
        yield Case(name, {}, {"dim": (*dims, None)}, X[1], stricter=["dim"])  # torch guesses where there is none
    yield Case(
        "Flatten", {}, {"start_dim": (*dims, None), "end_dim": (*dims, None)}, X[1], stricter=["start_dim", "end_dim"]
    )
    for name in ("Dropout", "Dropout1d"):
        yield Case(name, {}, {"p": NUMBERS}, X[1])
    size = (0, -1, 1.5, "x", 3, (3, 3), (3,), (3, 3, 3), (0, 3), (3, None), (), None)
    factor = (0, 0.0, -1.0, 0.01, "x", (2, 2), (2,), (2.0, None), math.nan, math.inf)
    for mode in ("nearest", "bilinear"):
        yield Case("Upsample", {"mode": mode}, {"size": size, "scale_factor": factor}, X[2])
    modes = ("odd", None, 3, "linear", "trilinear", "lanczos", "bilinear")
    yield Case("Upsample", {"size": 3}, {"mode": modes, "scale_factor": (2.0,), "align_corners": (True, "x")}, X[2])
    yield Case("Upsample", {"size": 3}, {"mode": (*modes, "bicubic"), "recompute_scale_factor": (True,)}, X[1])


def _losses() -> Iterator[Case]:
    reduction = {"reduction": ("odd", None, "batchmean", 3)}
    weights = (ONES[3], ONES[9], torch.ones(1, 4, 1), torch.ones(2, 2, 4, 9), 3, "x")
    for name, tried, stricter in (
        ("MSELoss", {}, []),
        ("L1Loss", {}, []),
        ("SmoothL1Loss", {"beta": NUMBERS}, []),
        ("HuberLoss", {"delta": NUMBERS}, []),
        ("KLDivLoss", {"log_target": FLAGS}, []),
        ("PoissonNLLLoss", {"log_input": FLAGS, "full": FLAGS, "eps": ("x", None)}, []),
        ("BCELoss", {"weight": weights}, []),
        ("BCEWithLogitsLoss", {"weight": weights, "pos_weight": weights}, []),
    ):
        yield Case(name, {}, {**reduction, **tried}, "values", stricter=stricter)
    tried = {
        **reduction,
        "weight": (ONES[3], ONES[4], torch.ones(4, 1), torch.ones(()), ONES[4].long(), ONES[4].double(), 3),
        "ignore_index": (1.5, "x", None),
    }
    yield Case("NLLLoss", {}, tried, "classes", stricter=["weight"])  # torch takes a column too
    smoothing = {**tried, "label_smoothing": NUMBERS}
    yield Case("CrossEntropyLoss", {}, smoothing, "classes", stricter=["weight", "label_smoothing"])


CASES = [*_convolutions(), *_pools(), *_pads(), *_norms(), *_linear(), *_others(), *_losses()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_is_the_judge(case: Case) -> None:
    """What torch refuses is refused, in the constructor where torch does so, with the same text on all ranks."""
    inputs = inputs_of(case)
    tried = [(option, {**case.base, option: value}) for option, values in case.tried.items() for value in values]
    twin = getattr(torch.nn, case.twin or case.name)
    judged = [(*pair, outcome(lambda options=pair[1]: twin(**options), inputs)[0]) for pair in tried]
    assert any(theirs for _, _, theirs in judged)

    def body(world: dl.Partition) -> None:
        for axis, (option, options, theirs) in product((0, -1), judged):
            make, P = make_layer(case, world, options, axis)
            ours, text = outcome(make, blocks_of(case, inputs, P))
            where = f"{case}, {option}={options[option]!r}, axis {axis}: torch {theirs!r}, we {ours!r} {text}"
            assert world.allgather_data((ours, text)) == 2 * [(ours, text)], where
            assert bool(ours) == bool(theirs) or (ours and option in case.stricter), where
            assert theirs != "constructor" or ours == "constructor", where
            assert text.startswith(f"Distributed{case.name}: ") or not ours, where
            assert option in text or not (theirs and ours == "constructor"), where

    spmd(2, body)


def _in_numpy(value: Any) -> Any:
    """Integers of NumPy, and sequences of them as an array."""
    if type(value) is int:
        return numpy.int64(value)
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        return numpy.array(value)
    return value


def _output(make: Callable[[], Any], inputs: list[torch.Tensor]) -> Any:
    """What a new layer makes of its inputs, or the kind of its refusal."""
    torch.manual_seed(0)
    try:
        return make()(*inputs)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return type(error)


@on_ranks(2)
def test_numbers_of_numpy(world: dl.Partition) -> None:
    """They are taken for Python's own, and so are arrays for sequences."""
    for case in CASES:
        tried = [(option, value) for option, values in case.tried.items() for value in values]
        for option, value in tried:
            options = {**case.base, option: value}
            given = {name: _in_numpy(value) for name, value in options.items()}
            made, P = make_layer(case, world, options, -1)
            inputs = blocks_of(case, inputs_of(case), P)
            expected, found = (_output(make, inputs) for make in (made, make_layer(case, world, given, -1)[0]))
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            else:
                assert found is expected, (case, given)


@on_ranks(2)
def test_options_changed_later_are_refused_or_followed(world: dl.Partition) -> None:
    """Plans follow from most: they would be ignored from the first call on, those that others follow from before it."""
    P, Q = world.grid((1, 1, 2)), world.grid((1, 2, 1))
    kept = (
        (
            dnn.DistributedConv1d(P, 1, 1, 3, padding=(1,)),
            {"padding": (2,), "stride": (2,), "padding_mode": "circular"},
        ),
        (dnn.DistributedMaxPool1d(P, 2), {"ceil_mode": True, "return_indices": True}),
        (dnn.DistributedUpsample(P, scale_factor=2), {"scale_factor": 3}),
        (dnn.DistributedInstanceNorm(P, 1), {"track_running_stats": True}),
        (dnn.DistributedConstantPad1d(P, 1, 0.0), {"value": 1.0}),
        (dnn.HaloExchange(P, (0, 0, 1)), {"boundary": "circular", "P_x": Q}),
    )
    for layer, options in kept:
        layer(torch.ones(1, 1, 4))
        for made, (name, value) in product((layer, copy.deepcopy(layer)), options.items()):
            text = f"{type(layer).__name__}: {name} is fixed by the constructor; make a new layer with {name}={value!r}"
            with pytest.raises(AttributeError, match=re.escape(text)):
                setattr(made, name, value)
            setattr(made, name, getattr(made, name))
    x = torch.arange(12.0).view(1, 2, 6) ** 2
    for layer, serial, name, value in (
        (dnn.DistributedBatchNorm(P, 2), torch.nn.BatchNorm1d(2), "eps", 9.0),
        (dnn.DistributedGroupNorm(P, 1, 2), torch.nn.GroupNorm(1, 2), "eps", 9.0),
        (dl.SyncBatchNorm(2, P=P), torch.nn.BatchNorm1d(2), "momentum", 0.7),
        (dnn.DistributedDropout(P), torch.nn.Dropout(), "p", 1.0),
    ):
        layer(x[P.block(x.shape)])
        for norm in (layer, serial):
            setattr(norm, name, value)
        torch.testing.assert_close(layer(x[P.block(x.shape)]), serial(x)[P.block(x.shape)])


@on_ranks(2)
def test_names_of_users_layers_are_free(world: dl.Partition) -> None:
    class Own(dnn.Module):
        def __init__(self, *partitions: dl.Partition, stride: int) -> None:
            super().__init__(*partitions)
            self.partitions, self.stride = partitions, stride

    layer = Own(world.grid((2,)), stride=1)
    layer.partitions = layer.stride = None
    assert layer.stride is None
