"""Operations of random graphs on points and dims: each draws its options and appends a step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn, zeros

from zoo.graphs import Draw, Operation


def _texts(lines: str) -> list[str]:
    return [text.strip() for text in lines.split(";")]


UNARY = _texts("""
    F.relu({0}); torch.tanh({0}); {0}.sigmoid(); F.gelu({0}); F.silu({0}); {0}.abs(); -{0}; {0} ** 2;
    torch.exp(-{0}.abs()); F.softplus({0}); F.hardtanh({0}); F.leaky_relu({0}, 0.1); F.hardswish({0});
    F.hardsigmoid({0}); F.elu({0}); F.mish({0}); {0}.clamp(-1, 0.5); {0}.sin(); ({0} ** 2 + 1).rsqrt(); 2.5 * {0};
    {0} + 1; 1 - {0}; {0} / 3; {0}.detach() * 2 + {0}; {0}.clone(); torch.where({0} > 0, {0}, 0.1);
    {0}.masked_fill({0} > 0.5, -1.0); ({0} > 0).to({0}.dtype) + {0}; torch.log1p({0}.abs()); {0}.contiguous();
    torch.zeros_like({0}) + {0}; torch.ones_like({0}); {0}.new_full({0}.shape, 2.0) * {0}; F.relu6({0});
    F.celu({0}); {0}.atan(); {0}.clamp_min(0.2); F.logsigmoid({0}); F.tanhshrink({0}); F.softsign({0})
""")
BINARY = _texts("""
    {0} + {1}; {0} - {1}; {0} * {1}; {0} / (1 + {1} ** 2); torch.maximum({0}, {1}); torch.minimum({0}, {1});
    torch.atan2({0}, {1}); torch.where({0} > {1}, {0}, {1}); torch.lerp({0}, {1}, 0.3);
    torch.addcmul({0}, {0}, {1}, value=0.5); torch.hypot({0}, {1}); {0} + {1} * 2; torch.where({1} > 0, {0}, {1});
    torch.add({0}, {1}, alpha=2); {0}.masked_fill({1} > 0, 0.0); torch.broadcast_tensors({0}, {1})
""")
IN_PLACE = _texts("""
    {0}.clone().mul_({0}.sigmoid()); {0}.clone().add_(1); {0}.clone().relu_(); {0}.clone().clamp_(-1, 1);
    {0}.clone().tanh_(); {0}.clone().masked_fill_({0} > 0, 0.5); {0}.clone().sub_({0} * 0.3)
""")


def unary(d: Draw) -> None:
    d.evaluate(d.choice(UNARY), d.real())


def binary(d: Draw) -> None:
    d.evaluate(d.choice(BINARY), d.real(), d.real())


def weighted(d: Draw) -> None:
    """A product or sum with a parameter that broadcasts."""
    i = d.real()
    shape = [n if d.chance(0.6) else 1 for n in d.values[i].shape]
    layer = nn.ParameterList([zeros(shape[d.randrange(len(shape) + 1) :])])
    if d.chance(0.5):
        d.step(f"{{0}} + parameter {tuple(layer[0].shape)}", i, lambda m, x: x + m[0], layer)
    else:
        d.step(f"parameter {tuple(layer[0].shape)} * {{0}}", i, lambda m, x: m[0] * x, layer)


def ordered(d: Draw) -> None:
    i = d.real()
    n = d.values[i].dim()
    if n:
        a, b = d.signed(d.randrange(n), n), d.randrange(n)
        texts = [f"{{0}}.permute({d.sample(range(n), n)})", f"{{0}}.transpose({a}, {b})", f"{{0}}.movedim({a}, {b})"]
        d.evaluate(d.choice(texts), i)


def viewed(d: Draw) -> None:
    i = d.real()
    shape = list(d.values[i].shape)
    n = len(shape)
    texts = [f"{{0}}.unsqueeze({d.randint(-n - 1, n)})", "{0}.squeeze()"]
    if n:
        a = d.randrange(n)
        k = d.choice([m for m in range(1, shape[a] + 1) if shape[a] % m == 0])
        texts += [f"{{0}}.flatten({a}, {d.randrange(a, n)})"] * 3 + [f"{{0}}.squeeze({a})"]
        texts += [f"{{0}}.unflatten({a}, ({k}, {d.choice([-1, shape[a] // k])}))"] * 3
    left, new = math.prod(shape), list[int]()
    while left > 1 and len(new) < 5:
        new.append(d.choice([m for m in range(2, left + 1) if left % m == 0]))
        left //= new[-1]
    d.evaluate(d.choice([*texts, f"{{0}}.reshape({[*new, left]})", f"{{0}}.reshape({[left, *new]})"]), i)


def sliced(d: Draw) -> None:
    i = d.real()
    words = []
    for n in d.values[i].shape:
        a, b, s = d.randrange(n), d.randint(1, n), d.choice([1, 1, 2, 3])
        some = [
            f"{min(a, b)}:{max(a, b)}",
            f"::{s}",
            f"{a}::{s}",
            f"-{b}:",
            f":-{a}" if a else ":",
            str(a - n),
            "None, :",
        ]
        words.append(d.choice([":", ":", ":", *some]))
    if d.chance(0.2) and words:
        words[0] = "..."
    d.evaluate(f"{{0}}[{', '.join(words) or '...'}]", i)


def joined(d: Draw) -> None:
    x = d.values[d.real()]
    if x.dim():
        a = d.randrange(x.dim())
        alike = [j for j, v in enumerate(d.values) if v.dtype == x.dtype and _all_but(v, a) == _all_but(x, a)]
        takes = [d.choice(alike) for _ in range(d.choice([1, 2, 2, 3]))]
        names = ", ".join(f"{{{k}}}" for k in range(len(takes)))
        d.evaluate(f"torch.{d.choice(['cat', 'cat', 'stack'])}([{names}], {d.signed(a, x.dim())})", *takes)


def _all_but(x: Tensor, a: int) -> list[int]:
    return [n if e != a else -1 for e, n in enumerate(x.shape)]


def parted(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    if x.dim():
        a = d.randrange(x.dim())
        n, k = x.shape[a], d.randint(1, 4)
        b = d.randint(1, max(n - 1, 1))
        texts = [
            f"{{0}}.split({k}, {a})",
            f"{{0}}.chunk({k}, {a})",
            f"{{0}}.split([{b}, {n - b}], {a})",
            f"{{0}}.unbind({a})",
        ]
        d.evaluate(d.choice([*texts, f"torch.tensor_split({{0}}, {k}, {a})", f"{{0}}.unfold({a}, {b}, {k})"]), i)


def shifted(d: Draw) -> None:
    i = d.real()
    n = d.values[i].dim()
    dims, times = d.dims(n), [d.choice([1, 1, 2]) for _ in range(n)]
    texts = [f"torch.roll({{0}}, {[d.randint(-5, 5) for _ in dims]}, {dims})", f"torch.flip({{0}}, {dims})"] * 2
    texts += [f"{{0}}.repeat({times})", f"{{0}}.tile({times[1:]})"]
    pads = [d.choice([0, 0, 1, 2, -1]) for _ in range(2 * d.randint(0, n))]
    texts += [f"F.pad({{0}}, {pads}, value={d.choice([0.0, 1.5])})"] * 2
    if n > 2:
        few = [d.choice([0, 1, 2]) for _ in range(2 * (n - 2))]
        texts += [f"F.pad({{0}}, {few}, mode={d.choice(['reflect', 'replicate', 'circular'])!r})"] * 2
    if n:
        a = d.randrange(n)
        texts += [f"{{0}}.repeat_interleave(2, {a})", f"torch.roll({{0}}, {d.randint(-9, 9)})"]
        texts += [f"{{0}}.cumsum({a})", f"{{0}}.diff(dim={a})"]
    if n > 1:
        texts += [f"torch.tril({{0}}, {d.randint(-1, 1)})", "torch.triu({0})", "torch.rot90({0})"]
    d.evaluate(d.choice(texts), i)


def reduced(d: Draw) -> None:
    i = d.real()
    n = d.values[i].dim()
    keep, dims = d.chance(0.5), d.dims(n)
    names = ("sum", "mean", "sum", "mean", "amax", "amin", "logsumexp", "var", "std")
    texts = [f"{{0}}.{name}({dims}, keepdim={keep})" for name in names]
    texts += ["{0}.sum()", "{0}.mean()", "{0}.max()", "{0}.norm()", "{0}.std()"]
    texts += [f"torch.linalg.vector_norm({{0}}, {d.choice([1, 2, 3])}, {dims}, {keep})"]
    texts += [f"torch.var_mean({{0}}, {dims}, correction={d.choice([0, 1])}, keepdim={keep})"]
    if n:
        a = d.signed(d.randrange(n), n)
        texts += [f"{{0}}.{name}({a}, keepdim={keep})" for name in ("prod", "argmax", "median")]
        texts += [f"{{0}}.{name}({a}, keepdim={keep})[0]" for name in ("max", "min")]
        texts += [
            f"{{0}}.softmax({a})",
            f"{{0}}.log_softmax({a})",
            f"F.normalize({{0}}, dim={a})",
            f"{{0}}.softmax({a})",
        ]
        texts += [f"{{0}}.sort({a})[0]", f"{{0}}.topk(1, {a})[0]", f"({{0}} > 0).any({a}, {keep})"]
        texts += [f"F.cosine_similarity({{0}}, {{0}} + 1, dim={a})"]
    d.evaluate(d.choice(texts), i)


def in_place(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    texts = [*IN_PLACE]
    if i >= len(d.inputs):
        texts += ["F.relu({0}, inplace=True)", "{0}.mul_(0.5)", "{0}.add_(1)"]
    if x.dim():
        a = d.randrange(x.dim())
        b = d.randint(1, x.shape[a])
        some = d.choice([f"slice({d.randrange(b)}, {b}, {d.choice([1, 1, 2])})"] * 2 + [str(b - 1)])
        where = f"({', '.join(['slice(None)'] * a + [some])},)"
        value = d.choice(["2.0", f"{{0}}[{where}] * 3", f"{{0}}[{where}].flip(0)" if x.dim() > 1 else "1.0"])
        texts += [f"put({base}, {where}, {value})" for base in ("{0}.clone()", "torch.zeros_like({0})")] * 4
    d.evaluate(d.choice(texts), i, put=_put)


def _put(x: Tensor, where: Any, value: Any) -> Tensor:
    x[where] = value
    return x


TIMES: dict[Operation, int] = {
    unary: 5, binary: 8, weighted: 3, ordered: 4, viewed: 6, sliced: 6, joined: 4, parted: 4, shifted: 5, reduced: 6, in_place: 5
}  # fmt: skip
