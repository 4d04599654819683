"""Inputs that do not fit, for every layer: on all ranks, beside torch, and on one rank alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from layers import Case, X, blocks_of, inputs_of, make_layer, outcome
from ranks import on_ranks
from twins import assert_refused

from distdl_lite.partition import Partition
from distdl_lite.testing import spmd

CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
LAYERS = [
    *(Case(f"{kind}{d}d", CONV, {}, X[d]) for kind in ("Conv", "ConvTranspose") for d in (1, 2)),
    *(Case(f"{kind}Pool{d}d", {"kernel_size": 3}, {}, X[d]) for kind in ("Max", "Avg") for d in (1, 2)),
    *(Case(f"Adaptive{kind}Pool{d}d", {"output_size": 3}, {}, X[d]) for kind in ("Max", "Avg") for d in (1, 2)),
    *(Case(f"{kind}Pad1d", {"padding": 1}, {}, X[1]) for kind in ("Zero", "Reflection", "Replication", "Circular")),
    Case("ConstantPad1d", {"padding": 1, "value": 2.0}, {}, X[1]),
    Case("BatchNorm", {"num_features": 4}, {}, X[2], "BatchNorm2d"),
    Case("InstanceNorm", {"num_features": 4, "affine": True}, {}, X[2], "InstanceNorm2d"),
    Case("GroupNorm", {"num_groups": 2, "num_channels": 4}, {}, X[2]),
    Case("LayerNorm", {"normalized_shape": 9}, {}, X[1]),
    Case("RMSNorm", {"normalized_shape": 9}, {}, X[1]),
    *(Case(name, {"in_features": 9, "out_features": 4}, {}, X[1], "Linear")
      for name in ("Linear", "ColumnParallelLinear", "RowParallelLinear")),
    Case("Embedding", {"num_embeddings": 5, "embedding_dim": 3}, {}, "indices"),
    Case("Softmax", {"dim": 1}, {}, X[1]),
    Case("LogSoftmax", {"dim": 2}, {}, X[1]),
    Case("Flatten", {"end_dim": 0, "start_dim": 0}, {}, X[1]),
    Case("Dropout", {}, {}, X[1]),
    Case("Dropout1d", {}, {}, X[1]),
    Case("Upsample", {"scale_factor": 2.0}, {}, X[1]),
    Case("Upsample", {"size": 5, "mode": "bilinear"}, {}, X[2]),
    *(Case(f"{name}Loss", {}, {}, "values")
      for name in ("MSE", "L1", "SmoothL1", "Huber", "KLDiv", "PoissonNLL", "BCE", "BCEWithLogits")),
    Case("NLLLoss", {}, {}, "classes"),
    Case("CrossEntropyLoss", {}, {}, "classes"),
]  # fmt: skip

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{str(t).split(".")[1]: lambda x, t=t: x.to(t) for t in (
        torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64,
    )},
    "one dim more": lambda x: x.unsqueeze(0),
    "one dim less": lambda x: x[0],
    "no dims": lambda x: x.flatten()[0],
    "fewer channels": lambda x: x[:, :3],
    "fewer features": lambda x: x[..., :3],
    "no batch": lambda x: x[:0],
    "no channels": lambda x: x[:, :0],
    "no features": lambda x: x[..., :0],
}  # fmt: skip

# What torch refuses for no reason of ours, or because it has not written the code.
WIDER = {
    *((kind, "no channels") for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "Upsample")),
    ("InstanceNorm", "no batch"),
    ("GroupNorm", "no features"),  # since torch 2.14
    ("Dropout", "complex64"),
}
# What torch takes and we do not: promotion, averages of integers, other dims than the partition has axes, targets that
# are broadcast.
NARROWER = {
    *(("", change) for change in ("one dim more", "one dim less", "no dims")),
    ("AvgPool", "int64"),
    ("RMSNorm", "float64"),
    ("RMSNorm", "complex64"),
    ("Upsample", "uint8"),
    ("BatchNorm", "no channels"),
}


def listed(table: set[tuple[str, str]], case: Case, change: str) -> bool:
    return any(case.name.startswith(kind) and change == known for kind, known in table)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_torch_is_the_judge(case: Case) -> None:
    """What torch refuses is refused with the same text on all ranks, and nothing else but what is listed."""
    twin, judged = getattr(torch.nn, case.twin or case.name), []
    for name, number in product(CHANGES, range(len(inputs_of(case)))):
        inputs = inputs_of(case)
        if inputs[number].dim() == 2 and name == "no features":
            continue
        inputs[number] = CHANGES[name](inputs[number])
        judged.append((name, number, outcome(lambda: twin(**case.base), inputs)[0]))

    def body(world: Partition) -> None:
        for axis, (name, number, theirs) in product((0, -1), judged):
            make, P = make_layer(case, world, case.base, axis)
            blocks = blocks_of(case, inputs_of(case), P)
            blocks[number] = CHANGES[name](blocks[number])
            ours, text = outcome(make, blocks)
            where = f"{case}, {name}, argument {number}, axis {axis}: torch {theirs!r}, we {ours!r} {text}"
            assert world.allgather_data((ours, text)) == 2 * [(ours, text)], where
            assert ours or not theirs or listed(WIDER, case, name), where
            assert theirs or not ours or listed(NARROWER, case, name), where
            assert text.startswith(f"Distributed{case.name}: ") or not ours, where

    spmd(2, body)


# ---- on one rank alone -----------------------------------------------------------------------------------------------

Call = Callable[[torch.nn.Module, list[torch.Tensor]], Any]


def whole(layer: torch.nn.Module, blocks: list[torch.Tensor]) -> torch.Tensor:
    """The call as it should be."""
    return layer(*blocks)


def changed(change: Callable[[torch.Tensor], Any]) -> Call:
    return lambda layer, blocks: layer(change(blocks[0]), *blocks[1:])


FAULTS: dict[str, tuple[Call, str]] = {
    "dtype": (changed(lambda x: x.to(torch.complex128)), "the ranks disagree: rank 1: dtype torch.complex128, others torch."),
    "dims": (changed(lambda x: x[0]), "the ranks disagree: rank 1: number of dims "),
    "nothing": (changed(lambda x: None), "rank 1 passed NoneType, a tensor is needed (dl.zero_volume_tensor() for none)"),
    "text": (changed(lambda x: "x"), "rank 1 passed str, a tensor is needed"),
    "array": (changed(lambda x: x.numpy()), "rank 1 passed ndarray, a tensor is needed"),
    "sparse": (changed(lambda x: x.to_sparse()), "rank 1 passed a tensor of torch.sparse_coo, a tensor is needed"),
    "no data": (changed(lambda x: x.to("meta")), "the ranks disagree: rank 1: device meta, others cpu"),
    "missing argument": (lambda layer, blocks: layer(*blocks[:-1]), "the ranks disagree: rank 1: number of arguments "),
    "one more": (lambda layer, blocks: layer(*blocks, 3), "the ranks disagree: rank 1: number of arguments "),
    "keyword": (lambda layer, blocks: layer(*blocks, scale=3), "the ranks disagree: rank 1: keywords ['scale'], others []"),
    "evaluation": (lambda layer, blocks: layer.eval()(*blocks), "the ranks disagree: rank 1: mode evaluation, others training"),
    "frozen": (
        lambda layer, blocks: torch.no_grad()(layer)(*blocks),
        "the ranks disagree: rank 1: mode training, no grad, others training",
    ),
    "block": (changed(lambda x: x.narrow(-1, 0, x.shape[-1] - 1)), ""),
}  # fmt: skip


@on_ranks(2, mpi=True)
def test_one_rank_passes_something_else(world: Partition) -> None:
    """Both raise the same error, neither waits, and then the layer works as if nothing had been."""
    for case in LAYERS:
        make, P = make_layer(case, world, case.base, 0)
        layer, good = make(), blocks_of(case, inputs_of(case), P)
        torch.manual_seed(1)
        wanted = layer(*good)
        for name, (call, text) in FAULTS.items():
            if name == "block" and case.input == "indices":  # lines of ranks may have any number of them
                continue
            attempt = partial(call if world.rank == 1 else whole, layer, good)
            assert_refused(world, P, attempt, f"Distributed{case.name}: {text}", (ValueError, TypeError))
            layer.train()
        torch.manual_seed(1)
        assert torch.equal(layer(*good), wanted)
