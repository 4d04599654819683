"""Products of tensors that are summed over dims they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite.factors import Dims, Factors, axes_of, uncut
from distdl_lite.nn.broadcasting import fit
from distdl_lite.nn.compiler import Compiler, NoRule, Value, rule


def contract(c: Compiler, values: Sequence[Value], words: Sequence[str], out: str) -> tuple[list[Value], Dims]:
    """The factors of a product with named dims, laid out for it, and the layout of its result.

    What is summed over becomes whole; the rest is cut as the largest factor is, then as others are.
    """
    summed = {letter for word in words for letter in word} - set(out)
    values = [
        c.wholly(v, [d for d, letter in enumerate(w) if letter in summed]) for v, w in zip(values, words, strict=True)
    ]
    chosen = chosen_cuts(values, words)
    sizes = {
        letter: n for v, w in zip(values, words, strict=True) for letter, n in zip(w, v.shape, strict=True) if n != 1
    }
    moved = [c.move(v, wanted(v, w, chosen)) for v, w in zip(values, words, strict=True)]
    return moved, tuple(chosen.get(letter) or (uncut(sizes.get(letter, 1)),) for letter in out)


def chosen_cuts(values: Sequence[Value], words: Sequence[str]) -> dict[str, Factors]:
    """How each named dim is cut, the largest tensor's first; an axis cuts one."""
    chosen: dict[str, Factors] = {}
    used: set[int] = set()
    for number in sorted(range(len(values)), key=lambda i: -math.prod(values[i].shape)):
        for letter, factors in zip(words[number], values[number].dims, strict=True):
            axes = set(axes_of(factors))
            if axes and letter not in chosen and not axes & used:
                chosen[letter] = factors
                used |= axes
    return chosen


def wanted(value: Value, word: str, chosen: dict[str, Factors]) -> Dims:
    """The layout of a factor."""
    pairs = zip(word, value.shape, strict=True)
    return tuple((uncut(n),) if n == 1 or letter not in chosen else chosen[letter] for letter, n in pairs)


@rule("linear")
def linear(c: Compiler, op: Any, x: Value, weight: Value, bias: Value | None = None) -> Value:
    x, weight = c.wholly(x, [-1], "features"), c.whole(weight)
    bias = None if bias is None else c.whole(bias)
    dims = x.with_dims({-1: uncut(weight.shape[0])})
    return c.call(F.linear, x, weight, bias, dims=dims, dtype=op.dtype)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def added(c: Compiler, op: Any, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    if op.name == "addbmm":
        raise NoRule
    words = {"addmm": ("xy", "yz", "xz"), "baddbmm": ("axy", "ayz", "axz"), "addmv": ("xy", "y", "x")}[op.name]
    (a, b), dims = contract(c, [a, b], words[:2], words[2])
    return c.call(op.function, fit(c, bias, dims), a, b, dims=dims, dtype=op.dtype, beta=beta, alpha=alpha)


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(c: Compiler, op: Any, a: Value, b: Value) -> Value:
    batch = "abcdefgh"[: max(a.ndim, b.ndim, 2) - 2]
    left, right = (batch[len(batch) - (v.ndim - 2) :] if v.ndim > 2 else "" for v in (a, b))
    words = [left + "xy" if a.ndim > 1 else "y", right + "yz" if b.ndim > 1 else "y"]
    (a, b), dims = contract(c, [a, b], words, batch + "x" * (a.ndim > 1) + "z" * (b.ndim > 1))
    return c.call(op.function, a, b, dims=dims, dtype=op.dtype)


@rule("einsum")
def einsum(c: Compiler, op: Any, equation: str, values: list[Value], path: Any = None) -> Value:
    left, arrow, out = equation.replace(" ", "").partition("->")
    words = left.split(",")
    if not arrow or "." in equation or any(len(set(word)) < len(word) for word in words):
        raise NoRule
    values, dims = contract(c, values, words, out)
    return c.call(lambda e, t: torch.einsum(e, t), equation, values, dims=dims, dtype=op.dtype)


@rule("scaled_dot_product_attention")
def attention(
    c: Compiler,
    op: Any,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout_p or enable_gqa:
        raise NoRule
    batch = "abcd"[: query.ndim - 2]
    key, value = (c.wholly(t, [-2, -1], "keys") for t in (key, value))
    query = c.wholly(query, [-1, *([-2] if is_causal else [])], "queries")
    values, words = [query, key, value], [batch + "le", batch + "me", batch + "mf"]
    chosen = chosen_cuts(values, words)
    query, key, value = (c.move(t, wanted(t, w, chosen)) for t, w in zip(values, words, strict=True))
    dims = (*query.dims[:-1], value.dims[-1])
    if mask is not None:
        mask = fit(c, mask, (*query.dims[:-1], (uncut(key.shape[-2]),)))
    return c.call(
        F.scaled_dot_product_attention, query, key, value, mask, 0.0, is_causal, dims=dims, dtype=op.dtype, scale=scale
    )
