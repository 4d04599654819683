"""Rules against torch: random shapes, grids, layouts, arguments, dtypes and orders of memory; values and gradients."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executed import Case, Recorder, block_of, compared, execute, random_dims, random_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl_lite.factors import all_axes, blocks
from distdl_lite.grid import Grid
from distdl_lite.model.capture import _Function, capture
from distdl_lite.model.compile import compiled
from distdl_lite.model.prove import prove
from distdl_lite.nn.value import RULES, NoRule

ATEN = torch.ops.aten
EACH = 10
CASES: dict[str, Callable[[Random], Any]] = {}
INEXACT: set[str] = set()
Drawn = tuple[Any, ...]  # an overload of torch and its arguments; a dict at the end has those with names


def case(function: Callable[[Random], Drawn]) -> Callable[[Random], Drawn]:
    CASES[function.__name__.strip("_")] = function
    return function


def inexact(function: Callable[[Random], Drawn]) -> Callable[[Random], Drawn]:
    INEXACT.add(function.__name__.strip("_"))
    return case(function)


def shape(rng: Random, least: int = 0, most: int = 4) -> list[int]:
    n = rng.randint(least, most)
    return [
        0 if rng.random() < 0.03 else 1 if rng.random() < 0.15 else rng.randint(2, 9 if n < 4 else 6) for _ in range(n)
    ]


def tensor(rng: Random, of: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Small integers."""
    numbers = torch.randint(-4, 5, list(of), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    if dtype.is_complex:
        return torch.complex(numbers.double(), numbers.flip(-1).double() if numbers.dim() else numbers.double()).to(
            dtype
        )
    return (
        numbers.abs().to(dtype) if dtype is torch.uint8 else numbers > 0 if dtype is torch.bool else numbers.to(dtype)
    )


def places(rng: Random, of: Any, below: int) -> torch.Tensor:
    return torch.randint(max(below, 1), list(of), generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def any_dtype(rng: Random) -> torch.dtype:
    return rng.choice(
        [torch.float64, torch.float64, torch.int64, torch.bool, torch.complex128, torch.float16, torch.bfloat16]
    )


def dim(rng: Random, of: Any) -> int:
    return rng.randrange(-len(of), len(of))


def whole_number_dtype(rng: Random) -> torch.dtype:
    return rng.choice([torch.int64, torch.int32, torch.uint8, torch.bool])


# Elementwise


def broadcast_from(rng: Random, of: list[int]) -> list[int]:
    """A shape that broadcasts to another."""
    return [1 if rng.random() < 0.3 else n for n in of][rng.choice([0, 0, rng.randint(0, len(of))]) :]


@case
def add(rng: Random) -> Drawn:
    of, dtype = shape(rng), any_dtype(rng)
    sides = [tensor(rng, of, dtype), tensor(rng, broadcast_from(rng, of), dtype)]
    rng.shuffle(sides)
    return ATEN.add.Tensor, *sides, *([{"alpha": 2}] if dtype is not torch.bool else [])


@case
def promoted(rng: Random) -> Drawn:
    of = shape(rng)
    sides = [tensor(rng, of, any_dtype(rng)), tensor(rng, broadcast_from(rng, of), any_dtype(rng))]
    return ATEN.mul.Tensor, *sides


@case
def broadcast_both(rng: Random) -> Drawn:
    of = shape(rng)
    full = lambda: [1 if rng.random() < 0.4 else n for n in of]  # noqa: E731
    return ATEN.sub.Tensor, tensor(rng, full()), tensor(rng, full())


@case
def where(rng: Random) -> Drawn:
    of = shape(rng)
    return (
        ATEN.where.self,
        tensor(rng, broadcast_from(rng, of), torch.bool),
        tensor(rng, of),
        tensor(rng, broadcast_from(rng, of)),
    )


@case
def where_numbers(rng: Random) -> Drawn:
    of = shape(rng)
    return rng.choice([
        (ATEN.where.ScalarOther, tensor(rng, of, torch.bool), tensor(rng, of), 2.0),
        (ATEN.where.ScalarSelf, tensor(rng, of, torch.bool), 2.0, tensor(rng, of)),
        (ATEN.where.Scalar, tensor(rng, of, torch.bool), 2, 3),
    ])  # fmt: skip


@case
def clamp(rng: Random) -> Drawn:
    of = shape(rng)
    x = tensor(rng, of)
    low = tensor(rng, broadcast_from(rng, of)) - 0.5
    return rng.choice(
        [(ATEN.clamp.Tensor, x, low), (ATEN.clamp.default, x, -1.5, 2.5), (ATEN.clamp.Tensor, x, low, low + 3)]
    )


@case
def masked_fill(rng: Random) -> Drawn:
    of = shape(rng)
    mask = tensor(rng, broadcast_from(rng, of), torch.bool)
    x = tensor(rng, of)
    return rng.choice([(ATEN.masked_fill.Scalar, x, mask, -2.0), (ATEN.masked_fill.Tensor, x, mask, tensor(rng, ()))])


@inexact
def functions(rng: Random) -> Drawn:
    names = [
        "relu", "silu", "gelu", "hardswish", "hardsigmoid", "mish", "elu", "leaky_relu", "softplus", "hardtanh", "exp", "sigmoid",
        "tanh", "abs", "neg", "sign", "sgn", "floor", "round", "isnan", "isinf", "erf", "sin", "cos", "reciprocal", "square",
        "logical_not", "hardshrink", "softshrink", "trunc", "frac", "nan_to_num", "log1p", "sqrt", "rsqrt",
    ]  # fmt: skip
    return getattr(ATEN, rng.choice(names)).default, tensor(rng, shape(rng)) + 0.25


@inexact
def functions_of_two(rng: Random) -> Drawn:
    of = shape(rng)
    names = ["div", "remainder", "fmod", "pow", "eq", "lt", "ge", "ne"]
    name, x = rng.choice(names), tensor(rng, of).abs() + 1.5
    named = getattr(ATEN, name)
    number = getattr(named, "Tensor_Scalar", None) or named.Scalar
    return rng.choice(
        [(getattr(named, "Tensor_Tensor", None) or named.Tensor, x, tensor(rng, of) + 0.25), (number, x, 2.5)]
    )


@case
def whole_numbers(rng: Random) -> Drawn:
    of, dtype = shape(rng), whole_number_dtype(rng)
    overload = rng.choice(
        [ATEN.bitwise_and.Tensor, ATEN.bitwise_or.Tensor, ATEN.bitwise_xor.Tensor, ATEN.maximum.default]
    )
    return overload, tensor(rng, of, dtype), tensor(rng, broadcast_from(rng, of), dtype)


@case
def extremes(rng: Random) -> Drawn:
    of = shape(rng)
    overload = rng.choice([ATEN.maximum.default, ATEN.minimum.default, ATEN.floor_divide.default])
    return overload, tensor(rng, of), tensor(rng, of) + 0.5, {"grads": overload is not ATEN.floor_divide.default}


@case
def to_dtype(rng: Random) -> Drawn:
    options = {"dtype": rng.choice([torch.float32, torch.float64, torch.int32, torch.complex128, torch.float16])}
    if rng.random() < 0.3:
        options |= {"device": torch.device("cpu"), "layout": torch.strided, "pin_memory": False}
    of = shape(rng, 4, 4) if rng.random() < 0.3 else shape(rng)
    if len(of) == 4:
        options["memory_format"] = torch.channels_last
    return ATEN._to_copy.default, tensor(rng, of), options


@case
def complex_numbers(rng: Random) -> Drawn:
    of = shape(rng)
    return rng.choice([
        (ATEN.complex.default, tensor(rng, of), tensor(rng, of)),
        (ATEN._conj.default, tensor(rng, of, torch.complex128)),
        (ATEN.view_as_real.default, tensor(rng, of, torch.complex128)),
        (ATEN.view_as_complex.default, tensor(rng, [*of, 2])),
        (ATEN.mul.Tensor, tensor(rng, of, torch.complex128), tensor(rng, broadcast_from(rng, of))),
    ])  # fmt: skip


@inexact
def log_sigmoid(rng: Random) -> Drawn:
    return ATEN.log_sigmoid_forward.default, tensor(rng, shape(rng))


@case
def prelu(rng: Random) -> Drawn:
    of = shape(rng, 2)
    return ATEN._prelu_kernel.default, tensor(rng, of), tensor(rng, [rng.choice([1, of[1]]), *[1] * (len(of) - 2)])


@case
def expand(rng: Random) -> Drawn:
    of = shape(rng)
    lead = shape(rng, 0, 2)
    to = [rng.choice([n, -1]) if n != 1 else rng.choice([1, 3, -1]) for n in of]
    return ATEN.expand.default, tensor(rng, of, any_dtype(rng)), [*lead, *to]


@case
def same(rng: Random) -> Drawn:
    return rng.choice([ATEN.alias.default, ATEN.clone.default]), tensor(rng, shape(rng), any_dtype(rng))


@case
def detach(rng: Random) -> Drawn:
    return ATEN.detach.default, tensor(rng, shape(rng))


@case
def copy(rng: Random) -> Drawn:
    of = shape(rng)
    return ATEN.copy.default, tensor(rng, of, any_dtype(rng)), tensor(rng, broadcast_from(rng, of)), {"grads": False}


# Dims


def factorised(rng: Random, n: int) -> list[int]:
    divisors = [m for m in range(2, n) if n % m == 0]
    if not divisors or rng.random() < 0.3:
        return [n]
    m = rng.choice(divisors)
    return [*factorised(rng, m), *factorised(rng, n // m)]


@case
def view(rng: Random) -> Drawn:
    of = [rng.choice([1, 2, 3, 4, 6, 8, 12]) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.05:
        of.append(0)
    parts = [f for n in of for f in factorised(rng, n)] if 0 not in of else of
    to: list[int] = []
    for n in parts:
        if to and rng.random() < 0.4:
            to[-1] *= n
        else:
            to.append(n)
        if rng.random() < 0.1:
            to.append(1)
    return ATEN.view.default, tensor(rng, of, any_dtype(rng)), to


@case
def view_across(rng: Random) -> Drawn:
    """Where the dims have no common factors."""
    return ATEN.view.default, tensor(rng, [2, 6, 4]), rng.choice([[8, 6], [3, 16], [6, 2, 4], [48], [4, 12], [16, 3]])


@case
def squeeze(rng: Random) -> Drawn:
    of = shape(rng, 1)
    return rng.choice([
        (ATEN.squeeze.default, tensor(rng, of)),
        (ATEN.squeeze.dim, tensor(rng, of), dim(rng, of)),
        (ATEN.squeeze.dims, tensor(rng, of), [0]),
        (ATEN.unsqueeze.default, tensor(rng, of), rng.randrange(-len(of) - 1, len(of) + 1)),
    ])  # fmt: skip


@case
def permute(rng: Random) -> Drawn:
    of = shape(rng)
    order = [d - rng.choice([0, len(of)]) for d in rng.sample(range(len(of)), len(of))]
    return ATEN.permute.default, tensor(rng, of, any_dtype(rng)), order


@case
def transpose(rng: Random) -> Drawn:
    of = shape(rng)
    if len(of) < 3 and rng.random() < 0.3:
        return ATEN.t.default, tensor(rng, of)
    x = tensor(rng, of)
    return ATEN.transpose.int, x, *((dim(rng, of), dim(rng, of)) if of else (0, -1))


@case
def repeat(rng: Random) -> Drawn:
    of = shape(rng)
    times = [rng.choice([0, 1, 1, 2, 3]) if rng.random() < 0.5 else 1 for _ in range(len(of) + rng.choice([0, 0, 1]))]
    return ATEN.repeat.default, tensor(rng, of), times


@case
def flip(rng: Random) -> Drawn:
    of = shape(rng, 1)
    chosen = rng.sample(range(len(of)), rng.randint(0, len(of)))
    return ATEN.flip.default, tensor(rng, of, any_dtype(rng)), [d - rng.choice([0, len(of)]) for d in chosen]


@case
def triangles(rng: Random) -> Drawn:
    return rng.choice([ATEN.tril, ATEN.triu]).default, tensor(rng, shape(rng, 2)), rng.randint(-5, 5)


@case
def diagonals(rng: Random) -> Drawn:
    of = shape(rng, 2)
    a, b = rng.sample(range(len(of)), 2)
    if rng.random() < 0.5:
        return (
            rng.choice([ATEN.diagonal, ATEN.diagonal_copy]).default,
            tensor(rng, of),
            rng.randint(-3, 3),
            a,
            b - len(of),
        )
    return ATEN.diag_embed.default, tensor(rng, of[1:]), rng.randint(-3, 3), a, b - len(of)


@case
def unfold(rng: Random) -> Drawn:
    of = shape(rng, 1, 3)
    d = dim(rng, of)
    return ATEN.unfold.default, tensor(rng, of), d, rng.randint(0, of[d]), rng.randint(1, 4)


def patches(rng: Random) -> tuple[list[int], ...]:
    """The size of an image, and the kernel, dilation, padding and stride of its patches."""
    k, e, p, s = ([rng.randint(least, 3), rng.randint(least, 3)] for least in (1, 1, 0, 1))
    e = [1 if rng.random() < 0.7 else n for n in e]
    size = [max(rng.randint(1, 9), x * (y - 1) + 1 - 2 * z) for x, y, z in zip(e, k, p, strict=True)]
    return size, k, e, p, s


@case
def im2col(rng: Random) -> Drawn:
    size, *options = patches(rng)
    return ATEN.im2col.default, tensor(rng, [rng.randint(1, 3), rng.randint(1, 3), *size]), *options


@case
def col2im(rng: Random) -> Drawn:
    size, *options = patches(rng)
    counts = [(n + 2 * p - e * (k - 1) - 1) // s + 1 for n, k, e, p, s in zip(size, *options, strict=True)]
    of = [rng.randint(1, 3), rng.randint(1, 3) * math.prod(options[0]), math.prod(counts)]
    return ATEN.col2im.default, tensor(rng, of), size, *options


@case
def slice_(rng: Random) -> Drawn:
    of = shape(rng, 1)
    d = dim(rng, of)
    ends = [None if rng.random() < 0.3 else rng.randint(-10, 10) for _ in range(2)]
    return ATEN.slice.Tensor, tensor(rng, of, any_dtype(rng)), d, *ends, rng.choice([1, 1, 2, 3, 7])


@case
def select(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    d = dim(rng, of)
    return ATEN.select.int, tensor(rng, of, any_dtype(rng)), d, rng.randrange(-of[d], of[d])


@case
def unbind(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    return ATEN.unbind.int, tensor(rng, of), dim(rng, of)


@case
def split(rng: Random) -> Drawn:
    of = shape(rng, 1)
    d = dim(rng, of)
    if rng.random() < 0.5:
        return ATEN.split.Tensor, tensor(rng, of), rng.randint(1, 5), d
    cuts = sorted(rng.randint(0, of[d]) for _ in range(rng.randint(0, 3)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, of[d]], strict=True)]
    return ATEN.split_with_sizes.default, tensor(rng, of), sizes, d


@case
def cat(rng: Random) -> Drawn:
    of = shape(rng, 1)
    d = dim(rng, of)
    values = []
    for _ in range(rng.randint(1, 4)):
        own = list(of)
        own[d] = rng.choice([of[d], rng.randint(0, 6)])
        values.append(tensor(rng, own, rng.choice([torch.float64, torch.float64, torch.int64])))
    if rng.random() < 0.1:
        values.insert(rng.randint(0, len(values)), tensor(rng, [0]))
        return ATEN.cat.default, values, d, {"grads": False}
    return ATEN.cat.default, values, d


@case
def stack(rng: Random) -> Drawn:
    of = shape(rng)
    return (
        ATEN.stack.default,
        [tensor(rng, of) for _ in range(rng.randint(1, 3))],
        rng.randrange(-len(of) - 1, len(of) + 1),
    )


@case
def roll(rng: Random) -> Drawn:
    of = shape(rng)
    if not of or rng.random() < 0.3:
        return ATEN.roll.default, tensor(rng, of), [rng.randint(-9, 9)]
    dims = rng.sample(range(len(of)), rng.randint(1, len(of)))
    return (
        ATEN.roll.default,
        tensor(rng, of, any_dtype(rng)),
        [rng.randint(-9, 9) for _ in dims],
        [d - len(of) for d in dims],
    )


@case
def slice_scatter(rng: Random) -> Drawn:
    of = shape(rng, 1)
    d, step = dim(rng, of), rng.choice([1, 1, 2])
    a, b = sorted(rng.randint(0, of[d]) for _ in range(2))
    source = list(of)
    source[d] = len(range(a, b, step))
    dtype = rng.choice([torch.float64, torch.int64])
    return ATEN.slice_scatter.default, tensor(rng, of, dtype), tensor(rng, source, dtype), d, a, b, step


@case
def select_scatter(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    d = dim(rng, of) % len(of)
    return (
        ATEN.select_scatter.default,
        tensor(rng, of),
        tensor(rng, of[:d] + of[d + 1 :]),
        d,
        rng.randrange(-of[d], of[d]),
    )


# Indexing


@case
def index(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    common = shape(rng, 0, 2)
    chosen = rng.sample(range(len(of)), rng.randint(1, len(of)))
    indices = [places(rng, broadcast_from(rng, common), n) if d in chosen else None for d, n in enumerate(of)]
    return ATEN.index.Tensor, tensor(rng, of), indices[: max(chosen) + 1]


@case
def index_put(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    if rng.random() < 0.5:
        mask = tensor(rng, of[: rng.randint(1, len(of))], torch.bool)
        return ATEN.index_put.default, tensor(rng, of), [mask], tensor(rng, rng.choice([[], [1]]))
    n = rng.randint(1, 5)
    accumulate = rng.random() < 0.5
    at = (
        torch.randperm(of[0], generator=torch.Generator().manual_seed(n))[:n]
        if not accumulate
        else places(rng, [n], of[0])
    )
    return (
        ATEN.index_put.default,
        tensor(rng, of),
        [at],
        tensor(rng, [len(at), *of[1:]][rng.choice([0, 1]) :]),
        accumulate,
    )


@case
def gather(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    d = dim(rng, of) % len(of)
    own = [rng.choice([n, n, n, rng.randint(0, n)]) for n in of]
    own[d] = rng.randint(0, 5)
    return ATEN.gather.default, tensor(rng, of), d - rng.choice([0, len(of)]), places(rng, own, of[d])


@case
def scatter(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    d = dim(rng, of) % len(of)
    own = list(of)
    own[d] = 1
    at = places(rng, own, of[d])
    many = list(of)
    many[d] = rng.randint(0, 5)
    return rng.choice([
        (ATEN.scatter.src, tensor(rng, of), d, at, tensor(rng, own)),
        (ATEN.scatter.value, tensor(rng, of), d, at, 2.0),
        (ATEN.scatter_add.default, tensor(rng, of), d, places(rng, many, of[d]), tensor(rng, many)),
        (ATEN.scatter_reduce.two, tensor(rng, of), d, places(rng, many, of[d]), tensor(rng, many), "sum"),
    ])  # fmt: skip


@case
def along_indices(rng: Random) -> Drawn:
    of = [max(n, 1) for n in shape(rng, 1)]
    d = dim(rng, of)
    at = places(rng, [rng.randint(0, 5)], of[d])
    once = places(rng, [1], of[d])
    source, one = list(of), list(of)
    source[d], one[d] = len(at), 1
    return rng.choice([
        (ATEN.index_select.default, tensor(rng, of), d, at),
        (ATEN.index_add.default, tensor(rng, of), d, at, tensor(rng, source), {"alpha": 2}),
        (ATEN.index_copy.default, tensor(rng, of), d, once, tensor(rng, one)),
        (ATEN.index_fill.int_Scalar, tensor(rng, of), d, at, 3.0),
        (ATEN.index_fill.int_Tensor, tensor(rng, of), d, at, tensor(rng, ())),
    ])  # fmt: skip


@case
def tables(rng: Random) -> Drawn:
    x, table = tensor(rng, shape(rng)), torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    return rng.choice([
        (ATEN.bucketize.Tensor, x, table, {"right": rng.random() < 0.5}),
        (ATEN.searchsorted.Tensor, table, x),
        (ATEN.isin.Tensor_Tensor, x, table),
        (ATEN.take.default, tensor(rng, [3, 4]), places(rng, shape(rng), 12)),
    ])  # fmt: skip


@case
def embedding(rng: Random) -> Drawn:
    return ATEN.embedding.default, tensor(rng, [7, rng.randint(1, 4)]), places(rng, shape(rng), 7), rng.choice([-1, 2])


@case
def cross(rng: Random) -> Drawn:
    of = shape(rng)
    return ATEN.linalg_cross.default, tensor(rng, [3, *of]), tensor(rng, [3, *of]), {"dim": 0}


@inexact
def grid_sample(rng: Random) -> Drawn:
    n, k, h, w, a, b = (rng.randint(1, 5) for _ in range(6))
    options = rng.choice([0, 1, 2]), rng.choice([0, 1, 2]), rng.random() < 0.5
    return ATEN.grid_sampler_2d.default, tensor(rng, [n, k, h, w]), tensor(rng, [n, a, b, 2]) / 3.7, *options


@inexact
def affine_grid(rng: Random) -> Drawn:
    n = rng.randint(1, 5)
    return ATEN.affine_grid_generator.default, tensor(rng, [n, 2, 3]), [n, 3, 4, 5], False


# Creation


@case
def filled(rng: Random) -> Drawn:
    x, none = tensor(rng, shape(rng), any_dtype(rng)), {"grads": False}
    return rng.choice([
        (ATEN.zeros_like.default, x, none), (ATEN.full_like.default, x, 3, none), (ATEN.new_zeros.default, x, [2, 3], none),
        (ATEN.ones_like.default, x, {"dtype": torch.int64}), (ATEN.fill.Scalar, x, 2, none),
        (ATEN.fill.Tensor, tensor(rng, shape(rng)), tensor(rng, ()), none),
    ])  # fmt: skip


# Pools


@case
def max_pool(rng: Random) -> Drawn:
    k, s = rng.randint(1, 3), rng.randint(1, 3)
    p, e = rng.randint(0, k // 2), rng.randint(1, 2)
    of = [rng.randint(1, 3), rng.randint(1, 3), *(rng.randint(e * (k - 1) + 1, 9) for _ in range(2))]
    x = torch.randperm(math.prod(of), generator=torch.Generator().manual_seed(k)).double().view(of)  # no equal maxima
    return ATEN.max_pool2d_with_indices.default, x, [k, k], [s, s], [p, p], [e, e], rng.random() < 0.5


@inexact
def avg_pool(rng: Random) -> Drawn:
    k, s = rng.randint(1, 3), rng.randint(1, 3)
    of = [rng.randint(1, 3), rng.randint(1, 3), *(rng.randint(k, 9) for _ in range(2))]
    return (
        ATEN.avg_pool2d.default,
        tensor(rng, of),
        [k, k],
        [s, s],
        [rng.randint(0, k // 2)],
        rng.random() < 0.5,
        rng.random() < 0.5,
    )


def space(rng: Random, n: int) -> list[int]:
    return [rng.randint(1, 3), rng.randint(1, 3), *(rng.randint(1, 7) for _ in range(n))]


@inexact
def adaptive_pool(rng: Random) -> Drawn:
    n = rng.randint(2, 3)
    overload = ATEN._adaptive_avg_pool2d.default if n == 2 else ATEN._adaptive_avg_pool3d.default
    return overload, tensor(rng, space(rng, n)), [rng.randint(1, 5) for _ in range(n)]


@inexact
def upsample(rng: Random) -> Drawn:
    size = [rng.randint(1, 9), rng.randint(1, 9)]
    return rng.choice([
        (ATEN.upsample_nearest2d.vec, tensor(rng, space(rng, 2)), size, None),
        (ATEN.upsample_nearest2d.vec, tensor(rng, space(rng, 2)), None, [2.0, 1.5]),
        (ATEN.upsample_bilinear2d.vec, tensor(rng, space(rng, 2)), size, rng.random() < 0.5, None),
        (ATEN.upsample_bilinear2d.vec, tensor(rng, space(rng, 2)), None, False, [2.0, 1.25]),
        (ATEN.upsample_linear1d.vec, tensor(rng, space(rng, 1)), size[:1], rng.random() < 0.5, None),
        (ATEN.upsample_bicubic2d.vec, tensor(rng, space(rng, 2)), size, rng.random() < 0.5, None),
    ])  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*complex.*")  # torch's, of a cast that drops the imaginary part
def test_rule(name: str) -> None:
    refused = []

    @settings(max_examples=EACH, deadline=None, database=None, derandomize=True)
    @given(st.randoms(use_true_random=True))
    def run(rng: Random) -> None:
        overload, *args = CASES[name](rng)
        options = args.pop() if isinstance(args[-1], dict) else {}
        try:
            Case(rng, overload, *args, **options).check(exact=name not in INEXACT)
        except NoRule:
            refused.append(overload)

    run()
    assert not refused, refused


# Functions as graphs have them


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1:3] = 0
    y[y > 2] = 7
    y[:, :, ::2].mul_(2)
    y[..., 0] += 1
    return y


def coordinates(x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(x.shape[2]) / 2, torch.linspace(0, 1, x.shape[3]), indexing="ij")
    return x * rows + columns.to(x.dtype)


def masked(x: torch.Tensor) -> torch.Tensor:
    causal = torch.tril(torch.ones(x.shape[2], x.shape[3], dtype=torch.bool), 1)
    return x.masked_fill(~causal | (x > 3) & (x != 4), -1.0)


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in_place": in_place,
    "coordinates": coordinates,
    "masked": masked,
    "window_attention": lambda x: F.unfold(x, 3, padding=1).unflatten(1, (x.shape[1], 9)).mul(2),
    "shuffled": lambda x: F.channel_shuffle(F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), 2),
    "joined": lambda x: torch.hstack([x, x.flip(1)]).tensor_split(3, dim=2),
    "turned": lambda x: torch.fliplr(x).rot90(1, (2, 3)).moveaxis(1, -1).swapaxes(0, 1),
    "turned_further": lambda x: (x.rot90(2, (2, 3)), x.rot90(-1, (1, 3)), x.rot90(4, (0, 2))),
    "centred": lambda x: (torch.fft.fftshift(x), torch.fft.ifftshift(x, (2, 3)), torch.fft.fftshift(x, -1)),
    "differences": lambda x: torch.diff(x, dim=3) + torch.outer(x[0, 0, 0], x[0, 0, 1])[None, :1, None, 1:],
    "repeated": lambda x: (x.repeat_interleave(2, 3), x.tile(1, 2, 1, 1), x.broadcast_to(2, *x.shape)),
    "windows": lambda x: x.unfold(2, 4, 2).unfold(3, 3, 3).amax((-1, -2)),
    "typed": lambda x: x.to(torch.float32, memory_format=torch.channels_last).double() + x.int().bool().double(),
    "one_hot": lambda x: F.one_hot(x.long().clamp(0, 4), 5) & 1,
    "activations": lambda x: (
        F.relu6(x) + F.selu(x) + F.logsigmoid(x) + F.softsign(x) + F.prelu(x, torch.ones(x.shape[1], dtype=x.dtype))
    ),
    "looked_up": lambda x: (
        torch.take_along_dim(x, x.long().abs() % 3, 1),
        x[:, [2, 0]],
        x[[0]],
        torch.isin(x, torch.arange(2)),
    ),
    "renormalised": lambda x: (torch.renorm(x, 2, 1, 3.0), torch.renorm(x, 1, -1, 9.0)),
    "along_dims": lambda x: (
        x.kthvalue(2)[0],
        x.mode(1)[0],
        x.sort()[0],
        x.topk(2)[0],
        x.cumsum(2),
        x.aminmax()[0],
        x.sum().max(),
    ),
    "views": lambda x: (x.reshape(-1), x.flatten(1), x.reshape(x.shape[0], 2, -1, 2, x.shape[2], x.shape[3])),
    "chunks": lambda x: [*x.chunk(2, 1), *x.unbind(0), *x.split([1, 0, 7], 1)],
    "similarity": lambda x: (
        x[..., :1] * F.glu(x, 1).sum() + torch.view_as_real(torch.complex(x, -x)).mean((1, 3, 4))[:, None, :, None]
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, nothing is gathered for want of a rule, and values are equal."""
    monkeypatch.setattr("distdl_lite.model.compile.Compiler", Recorder)
    x = torch.randint(-5, 6, (2, 8, 12, 6)).double()
    captured = capture(_Function(FUNCTIONS[name]), (x.to("meta"),), {})
    made = FUNCTIONS[name](x)
    expected = [made] if isinstance(made, torch.Tensor) else made
    for shape in [(1, 1, 2, 2), (2, 1, 3, 1), (1, 2, 2, 1)]:
        grid = Grid(shape, tuple(range(math.prod(shape))))
        given = [(blocks(x.shape, range(4), grid), True)]
        programs = [compiled(captured, grid, rank, None, given, strict=True) for rank in grid.ranks]
        for program in programs:
            c = program.compiler
            for feed, value in program.feeds:
                whole = feed.target if isinstance(feed.target, torch.Tensor) else x
                own = block_of(whole.contiguous(), value.dims, grid, c.index).reshape(c.local(value.dims))
                c.blocks[value.name] = own.detach().requires_grad_(value.grad)
            c.source(*program.arguments)
        execute([program.compiler for program in programs])
        for program in programs:
            c = program.compiler
            for (_, value), whole in zip(program.outputs, expected, strict=True):
                part = block_of(whole.contiguous(), value.dims, grid, c.index).reshape(c.local(value.dims))
                compared(c.blocks[value.name].detach(), part, exact=False)


@pytest.mark.parametrize(
    "name", ["in_place", "joined", "turned", "turned_further", "centred", "windows", "window_attention", "shuffled"]
)
def test_gradients_over_ranks(name: str) -> None:
    """With operators that move between threads."""
    prove(_Function(FUNCTIONS[name]), (1, 1, 2, 2), (2, 8, 12, 6), steps=0)


def test_a_proof_names_the_first_operation_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward before any step, though a proof takes some."""

    def wrong(c: Any, op: Any, x: Any) -> Any:
        return c.call(lambda t: 1.01 * torch.tanh(t), x, dims=x.dims, dtype=x.dtype)

    monkeypatch.setitem(RULES, "tanh", wrong)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Tanh(), torch.nn.BatchNorm2d(2))
    with pytest.raises(AssertionError, match="first at tanh in module '1', by"):
        prove(model, (1, 1, 2, 1), (2, 2, 6, 5))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x.as_strided((4, 4), (1, 2)), "as_strided reads memory"),
        (lambda x: x[x > 0], "the result of index depends on data"),
        (lambda x: x.nonzero(), "the result of nonzero depends on data"),
        (lambda x: x.float().view(torch.int32), "view has no rule for this case"),
        (lambda x: x.masked_scatter(x > 0, x), "masked_scatter has no rule for this case"),
    ],
)
def test_refusal(function: Any, text: str) -> None:
    grid = Grid((1, 1, 2, 2), tuple(range(4)))
    shape = (2, 4, 6, 6)
    captured = capture(_Function(function), (torch.empty(shape, device="meta"),), {})
    with pytest.raises(RuntimeError, match=text):
        compiled(captured, grid, 0, None, [(blocks(shape, range(4), grid), True)], strict=True)


class Recurrent(torch.nn.Module):
    """A recurrence over time."""

    def __init__(self, kind: Callable[..., torch.nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = kind(4, 6, **options)

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> Any:
        return self.layer(x, *states)[0]


def test_recurrences() -> None:
    """Over whole times, for the samples of each rank; cells are taken apart."""
    for kind in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        for grid, options in (
            ((2, 2, 1), {"batch_first": True, "bidirectional": True}),
            ((1, 2, 2), {"num_layers": 2}),
            ((3, 1, 1), {"bias": False}),
        ):
            assert not prove(Recurrent(kind, **options), grid, (5, 2, 4), steps=0).program.gathered
    assert not prove(Recurrent(torch.nn.GRU), (2, 2, 1), (5, 2, 4), (1, 2, 6)).program.gathered
    with pytest.raises(RuntimeError, match=r"module layer, .*lstm draws random numbers"):
        prove(Recurrent(torch.nn.LSTM, num_layers=2, dropout=0.5), (2, 1, 1), (5, 2, 4))
    assert not prove(_Function(torch.nn.GRUCell(4, 6)), (2, 2), (5, 4)).program.gathered


def test_cases_that_are_gathered() -> None:
    x = torch.complex(*torch.randn(2, 2, 3, 6, generator=torch.Generator().manual_seed(0)).double())
    assert prove(_Function(lambda x: x.logsumexp(2)), (1, 1, 2), x).program.gathered
    for layer in (torch.nn.Conv2d(3, 2, 3, padding=1), torch.nn.ConvTranspose2d(3, 2, 3)):
        assert prove(layer, (1, 1, 2), (3, 4, 4)).program.gathered  # it has no batch


def test_norms_have_the_dtype_of_the_input() -> None:
    x = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    prove(_Function(lambda x: (x.norm(), x.norm(1, 2))), (1, 1, 2), x, dtype=None, tolerance=0.02, steps=0)


def test_cuts_without_common_factors() -> None:
    """Tokens cut in one go are added to rows and columns that are cut: they are gathered along the last axis alone."""

    def function(x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        heads = tokens.reshape(*tokens.shape[:2], 4, 2).transpose(1, 2)
        attended = (heads @ heads.transpose(2, 3)).softmax(-1) @ heads
        return tokens + attended.transpose(1, 2).reshape(tokens.shape).cumsum(-1)

    program = prove(_Function(function), (1, 1, 2, 2), (2, 8, 6, 6), out_axes=[(0, 2, None)], steps=0).program
    ends = [dims for m in program.compiler.movements if m.kind == "gather" and (dims := m.Y.dims)]
    assert all(any(dim.axes for dim in dims) for dims in ends)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_movements(share: float) -> None:
    """From any layout to any other no point is lost, and parts that ranks hold along some axes are added up.

    Also where the cuts of several dims have no factors in common, or the blocks of a dim change owner on the way.
    """
    for seed in range(500):
        rng = Random(seed)
        grid, of = random_grid(rng, 12), tuple(rng.choice((1, 4, 6, 8)) for _ in range(2))
        held, wanted = (random_dims(rng, grid, of) for _ in range(2))
        ranks = [Recorder(grid, rank) for rank in grid.ranks]
        axes = [a for a in ranks[0].free_axes(all_axes(held)) if rng.random() < share]
        parts = {i: tensor(rng, of) for i in sorted({tuple(c.index[a] for a in axes) for c in ranks})}
        for c in ranks:
            x, own = c.new(held, torch.float64, False, "x"), parts[tuple(c.index[a] for a in axes)]
            c.blocks |= {
                "x": block_of(own, held, grid, c.index).reshape(c.local(held)),
                "y": c.sum_over(x, axes, wanted),
            }
        execute(ranks)
        for c in ranks:
            expected = block_of(sum(parts.values()), wanted, grid, c.index).reshape(c.local(wanted))
            compared(c.blocks[c.blocks["y"].name], expected, exact=True)


def test_constants_are_made_late() -> None:
    """Zeros through views, slices, expands and casts are made in the layout in which they are used."""

    def function(x: torch.Tensor) -> torch.Tensor:
        big = torch.zeros(24, 6, dtype=torch.float32)[:12].to(x.dtype).view(1, 12, 6).expand(4, 12, 6).permute(0, 2, 1)
        return x + big.transpose(1, 2)[:, None]

    grid = Grid((1, 1, 2, 2), tuple(range(4)))
    captured = capture(_Function(function), (torch.empty((4, 2, 12, 6), device="meta"),), {})
    program = compiled(captured, grid, 0, None, [(blocks((4, 2, 12, 6), range(4), grid), False)])
    lines = program.compiler.source(*program.arguments).splitlines()
    (made,) = (line for line in lines if "make" in line)
    assert made.endswith("((4, 1, 6, 3))")
    assert not program.compiler.movements


def test_guide() -> None:
    """The page of rules prints what it says."""
    page = Path(__file__).parents[2] / "docs" / "guide" / "rules.rst"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert not failed
    assert tried > 5
