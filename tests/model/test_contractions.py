"""Products that are summed over cut dims: against the serial model, and what they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distdl_lite.model.prove import Proof, prove

GRIDS = [(1, 1, 4, 1), (1, 1, 2, 2), (2, 1, 2, 1), (1, 3, 1, 2)]
ROWS = (0, 1, 2, None)


class Function(nn.Module):
    """A function of the inputs and of weights of the given shapes."""

    def __init__(self, function: Callable[..., torch.Tensor], *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList([torch.randn(shape) for shape in weights])

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.weights)


def proved(function: Callable[..., torch.Tensor], grid: Any, *inputs: Any, weights: Any = (), **options: Any) -> Proof:
    return prove(Function(function, *weights), grid, *inputs, steps=0, **options)


def kinds(proof: Proof) -> Counter[str]:
    return Counter(m.kind for m in proof.program.compiler.movements)


CASES: list[tuple[Any, ...]] = [
    (lambda a, b: a @ b, [(2, 3, 8, 9), (2, 3, 9, 11)], []),
    (lambda a, w: a @ w, [(2, 3, 8, 9)], [(9, 12)]),
    (lambda a, w: w @ a, [(2, 3, 8, 9)], [(12, 8)]),
    (lambda a, w: a @ w, [(2, 3, 8, 9)], [(9,)]),
    (lambda a: torch.dot(a.flatten(), a.flatten()), [(2, 3, 8, 9)], []),
    (lambda a, w, u: torch.addmm(w, a.flatten(0, 2), u, beta=2, alpha=3), [(2, 3, 8, 9)], [(5,), (9, 5)]),
    (lambda a, w, u: torch.addmm(w, u, a.flatten(0, 2), beta=0), [(2, 3, 8, 9)], [(9,), (5, 48)]),
    (lambda a, w, u: torch.baddbmm(w, a.flatten(0, 1), u), [(2, 3, 8, 9)], [(1, 8, 5), (6, 9, 5)]),
    (lambda a, w, u: torch.addbmm(w, a.flatten(0, 1), u, alpha=2), [(2, 3, 8, 9)], [(8, 5), (6, 9, 5)]),
    (lambda a, w, u: torch.addmv(w, a.flatten(0, 2), u), [(2, 3, 8, 9)], [(48,), (9,)]),
    (lambda a, b: torch.einsum("...ij,...kj->...ik", a, b), [(2, 3, 8, 9), (3, 7, 9)], []),
    (lambda a, b: torch.einsum("bcij, bcjk", a, b), [(2, 3, 8, 9), (2, 3, 9, 5)], []),
    (lambda a, w: torch.einsum("bchw,cd,d->bd", a, w, w[0]), [(2, 3, 8, 9)], [(3, 4)]),
    (lambda a: torch.einsum("bchw->c", a), [(2, 3, 8, 9)], []),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_products(grid: tuple[int, ...]) -> None:
    for function, inputs, weights in CASES:
        assert not proved(function, grid, *inputs, weights=weights).program.gathered


def test_sums_into_rows_that_change_owner() -> None:
    """Blocks of more parts are not those of fewer parts cut again."""
    for grid, weight, x in (((2, 3), (2, 2), (8, 2)), ((2, 4), (3, 3), (14, 3)), ((2, 2, 2), (6, 6), (14, 6))):
        proved(lambda a, w: a @ w, grid, x, weights=[weight], in_axes=[(0, 1)])


def test_repeated_letters_are_gathered() -> None:
    proof = proved(lambda a: torch.einsum("bcii->bc", a), (1, 1, 2, 2), (2, 3, 8, 8))
    assert [name for _, name, _ in proof.program.gathered] == ["einsum"]


def test_sums_stay_where_factors_are() -> None:
    """What is summed over is not gathered: weights are sliced, and the products are added up."""
    rows = {"in_axes": [(0, 1, None, 3)], "out_axes": [(0, 1, None, None)]}
    for shape in ((2, 3, 8, 32), (2, 3, 9, 23)):
        found = kinds(proved(lambda a, w: a @ w, (1, 1, 1, 4), shape, weights=[(shape[3], 2)], **rows))
        assert found == {"all_reduce": 1}
    state = proved(lambda k, v: k.mT @ v, (1, 1, 4, 1), (2, 2, 29, 3), (2, 2, 29, 3), in_axes=[ROWS] * 2)
    assert "gather" not in kinds(state)
    assert kinds(state)["all_reduce"] == 1


def test_sums_go_to_where_the_result_is_cut() -> None:
    proof = proved(lambda a, b: a @ b, (1, 1, 1, 2), (1, 1, 16, 16), (1, 1, 16, 17),
                   in_axes=[(0, 1, None, 3), (0, 1, 3, None)], out_axes=[(0, 1, None, 3)])  # fmt: skip
    assert kinds(proof) == {"reduce_scatter": 1}


def test_attention_by_hand() -> None:
    """Tokens of both sides along one axis: heads are cut where there are enough, else one side is gathered."""

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT

    grid = (1, 1, 4, 1)
    found = kinds(proved(scores, grid, (2, 4, 7, 4), (2, 4, 9, 4), in_axes=[ROWS] * 2, out_axes=[(0, 2, None, None)]))
    assert found == {"recut": 2}
    large, small = (1, 3, 40, 4), (1, 3, 4, 4)
    found = kinds(proved(scores, grid, large, small, in_axes=[ROWS] * 2, out_axes=[ROWS]))
    assert found == {"gather": 1}
    found = kinds(proved(scores, grid, small, large, in_axes=[ROWS] * 2, out_axes=[(0, 1, None, 2)]))
    assert found == {"gather": 1}
    for by_grid in GRIDS:
        proved(lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v, by_grid, (2, 4, 7, 4), (2, 4, 9, 4), (2, 4, 9, 4))


def test_linear_attention() -> None:
    for grid in GRIDS:
        proved(lambda q, k, v: q.exp() @ (k.mT.exp() @ v), grid, (2, 4, 7, 4), (2, 4, 9, 4), (2, 4, 9, 4))
