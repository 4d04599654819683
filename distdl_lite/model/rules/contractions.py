"""Products of tensors that are summed over dims they share."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distdl_lite.factors import Dims, Factors, all_axes, axes_of, cut, size_of, uncut
from distdl_lite.nn.broadcasting import fit
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import NoRule, Value, rule

Cuts = dict[str, Factors]  # of named dims


def product(
    c: Compiler, op: Any, function: Callable[..., torch.Tensor], values: Sequence[Value], words: Sequence[str], out: str
) -> Value:
    """The product of tensors with named dims, summed over those that are not in `out`."""
    values, dims, axes, result = arranged(c, op, values, words, out)
    return c.sum_over(c.call(function, *values, dims=dims, dtype=op.dtype), axes, result)


def arranged(
    c: Compiler, op: Any, values: Sequence[Value], words: Sequence[str], out: str
) -> tuple[list[Value], Dims, tuple[int, ...], Dims]:
    """The factors of a product laid out for it, and how it lies, see `laid_out`.

    Dims keep their cuts, also those summed over: the ranks' products are then parts, which are added up. Where an axis cuts
    different dims of the factors, or it costs fewer bytes, a factor is moved.
    """
    cuts = cheapest(c, values, words, out, op.dtype)
    sizes = sizes_of(values, words)
    moved = [c.move(v, wanted(v, w, cuts, sizes)) for v, w in zip(values, words, strict=True)]
    return moved, *laid_out(c, values, words, out, cuts)


def cheapest(c: Compiler, values: Sequence[Value], words: Sequence[str], out: str, dtype: torch.dtype) -> Cuts:
    """The cuts of named dims by which the fewest bytes move forward and backward."""
    sizes = sizes_of(values, words)
    held: list[tuple[str, Factors]] = []  # the cuts of the largest factor first
    for number in sorted(range(len(values)), key=lambda i: -math.prod(values[i].shape)):
        for letter, factors in zip(words[number], values[number].dims, strict=True):
            if axes_of(factors) and size_of(factors) == sizes[letter] and (letter, factors) not in held:
                held.append((letter, factors))
    axes = [a for _, factors in held for a in axes_of(factors)]
    if len(set(axes)) == len(axes) and all(letter in out for letter, _ in held):
        return dict(held)  # so nothing moves
    grad = any(v.grad for v in values)

    def cost(cuts: Cuts) -> tuple[float, int]:
        moved = sum((1 + v.grad) * c.received(v, wanted(v, w, cuts, sizes)) for v, w in zip(values, words, strict=True))
        dims, summed, result = laid_out(c, values, words, out, cuts)
        block = math.prod(sizes.get(x, 1) for x in out) * dtype.itemsize / c.parts(all_axes(dims))
        parts, times = c.parts(summed), 2 if result == dims else 1  # an all-reduce, or a reduce-scatter
        return moved + (1 + grad) * times * block * (parts - 1) / parts, -len(all_axes((*dims, *cuts.values())))

    return min(choices(c, held, sizes, out), key=cost)


def choices(c: Compiler, held: Sequence[tuple[str, Factors]], sizes: dict[str, int], out: str) -> Iterator[Cuts]:
    """The ways to let the axes that cut something cut one dim of the product each, or none."""
    if not held:
        yield {}
        return
    (letter, factors), axes = held[-1], axes_of(held[-1][1])
    for cuts in choices(c, held[:-1], sizes, out):
        if not all_axes(tuple(cuts.values())) & set(axes):
            if letter not in cuts:
                yield {**cuts, letter: factors}
            for other in out:
                if other not in cuts and sizes.get(other, 1) >= c.parts(axes) and other not in dict(held):
                    yield {**cuts, other: (cut(sizes[other], axes, c.grid),)}
        yield cuts


def laid_out(
    c: Compiler, values: Sequence[Value], words: Sequence[str], out: str, cuts: Cuts
) -> tuple[Dims, tuple[int, ...], Dims]:
    """The layout of each rank's product, the axes along which it is a part, and the layout of their sum."""
    sizes = sizes_of(values, words)
    dims = tuple(cuts.get(letter) or (uncut(sizes.get(letter, 1)),) for letter in out)
    axes, result = tuple(a for letter, f in cuts.items() if letter not in out for a in axes_of(f)), dims
    # A product smaller than its factors, such as weights or the state of linear attention, is used along their cuts again.
    if math.prod(sizes.get(letter, 1) for letter in out) >= max(math.prod(v.shape) for v in values):
        for axis in axes:
            result = c.placed(result, axis)
    return dims, axes, result


def sizes_of(values: Sequence[Value], words: Sequence[str]) -> dict[str, int]:
    """The lengths of named dims, to which those of length one are broadcast."""
    pairs = [pair for v, word in zip(values, words, strict=True) for pair in zip(word, v.shape, strict=True)]
    return dict(sorted(pairs, key=lambda pair: pair[1] != 1))


def wanted(value: Value, word: str, cuts: Cuts, sizes: dict[str, int]) -> Dims:
    """The layout of a factor."""
    pairs = zip(word, value.shape, strict=True)
    return tuple((uncut(n),) if n != sizes[letter] or letter not in cuts else cuts[letter] for letter, n in pairs)


_ADDED: dict[str, tuple[str, str, str]] = {
    "addmm": ("xy", "yz", "xz"), "baddbmm": ("axy", "ayz", "axz"), "addmv": ("xy", "y", "x"), "addbmm": ("axy", "ayz", "xz"),
}  # fmt: skip


@rule(*_ADDED)
def added(c: Compiler, op: Any, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    left, right, out = _ADDED[op.name]
    (a, b), dims, axes, result = arranged(c, op, [a, b], [left, right], out)
    if not axes:
        return c.call(op.function, fit(c, bias, dims), a, b, dims=dims, dtype=op.dtype, beta=beta, alpha=alpha)
    y = c.call(_multiplied, f"{left},{right}->{out}", a, b, alpha, dims=dims, dtype=op.dtype)
    y = c.sum_over(y, axes, result)
    return c.call(_plus, y, fit(c, bias, y.dims), beta, dims=y.dims, dtype=op.dtype)


def _multiplied(equation: str, a: torch.Tensor, b: torch.Tensor, alpha: Any) -> torch.Tensor:
    return torch.einsum(equation, a, b) * alpha


def _plus(y: torch.Tensor, bias: torch.Tensor, beta: Any) -> torch.Tensor:
    """As in torch, a bias that is not finite counts for nothing where beta is zero."""
    return y + beta * bias if beta else y + 0 * bias.reshape(-1)[:0].sum()


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(c: Compiler, op: Any, a: Value, b: Value) -> Value:
    batch = string.ascii_uppercase[: max(a.ndim, b.ndim, 2) - 2]
    left, right = (batch[len(batch) - (v.ndim - 2) :] if v.ndim > 2 else "" for v in (a, b))
    words = [left + "xy" if a.ndim > 1 else "y", right + "yz" if b.ndim > 1 else "y"]
    return product(c, op, op.function, [a, b], words, batch + "x" * (a.ndim > 1) + "z" * (b.ndim > 1))


@rule("einsum")
def einsum(c: Compiler, op: Any, equation: str, values: list[Value], path: Any = None) -> Value:
    left, arrow, out = equation.replace(" ", "").partition("->")
    words = left.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [
        v.ndim - len(word.replace("...", "")) if "..." in word else 0 for v, word in zip(values, words, strict=True)
    ]
    if not arrow:
        named = left.replace(",", "").replace("...", "")
        out = "..." * ("..." in left) + "".join(sorted(x for x in set(named) if named.count(x) == 1))
    ellipsis = "".join(spare[: max(counts)])
    words = [w.replace("...", ellipsis[len(ellipsis) - n :]) for w, n in zip(words, counts, strict=True)]
    out = out.replace("...", ellipsis)
    if any(len(set(word)) < len(word) for word in words) or (ellipsis and "..." in left and len(out) != len(op.shape)):
        raise NoRule
    written = f"{','.join(words)}->{out}"
    return product(c, op, lambda *t: torch.einsum(written, *t), values, words, out)
