"""This library, with ranks as threads: ``python docs/compared/ours.py [words of a case's name]``."""

from __future__ import annotations

import math
import sys

import torch
from cut_cases import CASES, Case, Tensors, judge, serial, shown, weights_of, worst

import distdl_lite as dl
from distdl_lite.testing import spmd


def run(case: Case) -> str:
    """The worst verdict of the ranks, each of which looks at its blocks."""
    try:
        return worst(spmd(math.prod(case.grid), lambda world: _on_rank(world.grid(case.grid), case)))
    except Exception as error:
        return shown(error)


def _on_rank(P: dl.Partition, case: Case) -> str:
    (model, inputs), expected = case.drawn(), serial(case)
    net = dl.distribute(model, P)
    x, *rest = (P.cut(x, case.axes(x)) for x in inputs)
    y = net(x.requires_grad_(), *rest)
    made: Tensors = {"output": y.detach()} | {n: b.clone() for n, b in net.named_buffers() if b.is_floating_point()}
    if y.requires_grad:
        y.backward(_block(P, weights_of(expected["output"])))
        made["gradient of input"] = x.grad
    for parameter in net.parameters():
        parameter.data = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
    gradients = dl.serial_state_dict(net)  # put together as weights are, on the first rank
    made |= {f"gradient of {n}": gradients[n] for n, _ in net.named_parameters() if n in gradients}
    wanted = {n: e for n, e in expected.items() if n in made or (P.rank == 0 and n != "its mean square")}
    return judge({n: _block(P, e) if n in ("output", "gradient of input") else e for n, e in wanted.items()}, made)


def _block(P: dl.Partition, x: torch.Tensor) -> torch.Tensor:
    """What a rank holds of an output by default: cut as the input is, or where it has other dims, along the batch alone."""
    return P.cut(x, None if x.dim() == P.dim else [0, *[None] * (x.dim() - 1)][: x.dim()])


if __name__ == "__main__":
    for case in CASES:
        if " ".join(sys.argv[1:]) in case.name:
            print(f"{case.name}: {run(case)}", flush=True)
