"""Arguments and outputs of every kind: outputs and gradients are the plain module's, on 1 to 4 ranks."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from roots import assert_same, build, gradients, loss_of, mlp, real
from torch import nn
from torch.utils import _pytree as pytree

import distdl_lite as dl

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


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


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


def cloned(nested: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), nested)


def used(nested: Any) -> Any:
    """No leaves of the graph, so that a module may change them in place."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t * 1 if t.requires_grad else t, nested)


def assert_equals_plain(world: dl.Partition, case: Case, rows: int) -> None:
    """Two forwards and backwards, whose gradients accumulate."""
    make, dim, arguments = case
    net = build(make)
    plain = copy.deepcopy(net)
    dp = dl.RootDataParallel(net, world, dim)
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
        assert_same(gradients(net), gradients(plain))


def every_case(world: dl.Partition) -> None:
    for name, case in CASES.items():
        for rows in (7, 1, 0) if name != "words" else (7, 1):
            assert_equals_plain(world, case, rows)


a27 = pytest.mark.check("A27")
test_equals_the_plain_module_on_1 = a27(on_ranks(1)(every_case))
test_equals_the_plain_module_on_2 = a27(on_ranks(2)(every_case))
test_equals_the_plain_module_on_3 = a27(on_ranks(3)(every_case))
test_equals_the_plain_module_on_4 = a27(on_ranks(4, mpi=True)(every_case))
