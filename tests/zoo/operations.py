"""The operations of random graphs: each draws its options and appends a step to the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from random_graphs import Draw
OPERATIONS: list[Callable[[Draw], Any]] = []


def operation(times: int) -> Callable[[Callable[[Draw], Any]], Callable[[Draw], Any]]:
    """Register an operation, which is drawn as often as others so many times."""

    def register(function: Callable[[Draw], Any]) -> Callable[[Draw], Any]:
        OPERATIONS.extend([function] * times)
        return function

    return register


def step(d: Draw, text: str, takes: Any, function: Callable[..., Any], layer: nn.Module | None = None) -> bool:
    from random_graphs import Step

    takes = takes if isinstance(takes, tuple) else (takes,)
    return d.add(Step(text, takes, function), layer)


def evaluated(d: Draw, text: str, *takes: int) -> bool:
    """A step whose text is its program."""
    names = "abcdefgh"[: len(takes)]
    function = eval(f"lambda {', '.join(names)}: {text.format(*names)}", {"torch": torch, "F": F, "math": math})
    return step(d, text, takes, function)


UNARY = (
    "F.relu({0})", "torch.tanh({0})", "{0}.sigmoid()", "F.gelu({0})", "F.silu({0})", "{0}.abs()", "-{0}", "{0} ** 2", "torch.exp(-{0}.abs())",
    "F.softplus({0})", "F.hardtanh({0})", "F.leaky_relu({0}, 0.1)", "F.hardswish({0})", "F.hardsigmoid({0})", "F.elu({0})", "{0}.clamp(-1, 0.5)",
    "{0}.sin()", "({0} ** 2 + 1).rsqrt()", "2.5 * {0}", "{0} + 1", "1 - {0}", "{0} / 3", "{0}.detach() * 2 + {0}", "F.mish({0})", "{0}.clone()",
    "torch.where({0} > 0, {0}, 0.1)", "{0}.masked_fill({0} > 0.5, -1.0)", "({0} > 0).to({0}.dtype) + {0}", "torch.log1p({0}.abs())", "{0}.contiguous()",
    "torch.zeros_like({0}) + {0}", "torch.ones_like({0})", "{0}.new_full({0}.shape, 2.0) * {0}", "F.relu6({0})", "F.celu({0})", "{0}.atan()",
    "{0}.clamp_min(0.2)", "F.logsigmoid({0})", "F.tanhshrink({0})", "F.softsign({0})",
)  # fmt: skip
BINARY = (
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "{0} / (1 + {1} ** 2)", "torch.maximum({0}, {1})", "torch.minimum({0}, {1})", "torch.atan2({0}, {1})",
    "torch.where({0} > {1}, {0}, {1})", "torch.lerp({0}, {1}, 0.3)", "torch.addcmul({0}, {0}, {1}, value=0.5)", "torch.hypot({0}, {1})",
    "{0} + {1} * 2", "torch.where({1} > 0, {0}, {1})", "torch.add({0}, {1}, alpha=2)", "{0}.masked_fill({1} > 0, 0.0)", "torch.broadcast_tensors({0}, {1})",
)  # fmt: skip


@operation(5)
def unary(d: Draw) -> None:
    evaluated(d, d.choice(UNARY), d.real())


@operation(8)
def binary(d: Draw) -> None:
    evaluated(d, d.choice(BINARY), d.real(), d.real())


@operation(3)
def weighted(d: Draw) -> None:
    """A product or sum with a parameter that broadcasts."""
    i = d.real()
    shape = [n if d.chance(0.6) else 1 for n in d.values[i].shape]
    layer = nn.ParameterList([torch.zeros(shape[d.randrange(len(shape) + 1) :])])
    sign = d.choice("+*")
    step(d, f"{{0}} {sign} parameter {tuple(layer[0].shape)}", i, _sum if sign == "+" else _product, layer)


def _sum(layer: nn.ParameterList, x: Tensor) -> Tensor:
    return x + layer[0]


def _product(layer: nn.ParameterList, x: Tensor) -> Tensor:
    return layer[0] * x


@operation(4)
def ordered(d: Draw) -> None:
    i = d.real()
    n = d.values[i].dim()
    if n:
        a, b = d.signed(d.randrange(n), n), d.randrange(n)
        texts = [f"{{0}}.permute({d.sample(range(n), n)})", f"{{0}}.transpose({a}, {b})", f"{{0}}.movedim({a}, {b})"]
        evaluated(d, d.choice(texts), i)


@operation(6)
def viewed(d: Draw) -> None:
    i = d.real()
    shape = list(d.values[i].shape)
    n = len(shape)
    a = d.randrange(max(n, 1))
    b = d.randrange(a, max(n, 1))
    texts = [f"{{0}}.unsqueeze({d.randint(-n - 1, n)})", "{0}.squeeze()"]
    if n:
        texts += [f"{{0}}.flatten({a}, {b})"] * 3 + [f"{{0}}.squeeze({a})"]
        k = d.choice([m for m in range(1, shape[a] + 1) if shape[a] % m == 0])
        texts += [f"{{0}}.unflatten({a}, ({k}, {d.choice([-1, shape[a] // k])}))"] * 3
    left, new = math.prod(shape), list[int]()
    while left > 1 and len(new) < 5:
        new.append(d.choice([m for m in range(2, left + 1) if left % m == 0]))
        left //= new[-1]
    texts += [f"{{0}}.reshape({[*new, left]})"] * 2
    evaluated(d, d.choice(texts), i)


@operation(6)
def sliced(d: Draw) -> None:
    i = d.real()
    words = []
    for n in d.values[i].shape:
        a, b, s = d.randrange(n), d.randint(1, n), d.choice([1, 1, 2, 3])
        choices = [
            ":",
            ":",
            ":",
            f"{min(a, b)}:{max(a, b)}",
            f"::{s}",
            f"{a}::{s}",
            f"-{b}:",
            f":-{a}" if a else ":",
            str(a - n),
            "None, :",
        ]
        words.append(d.choice(choices))
    if d.chance(0.2) and words:
        words[0] = "..."
    evaluated(d, f"{{0}}[{', '.join(words) or '...'}]", i)


@operation(4)
def joined(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    if x.dim():
        a = d.randrange(x.dim())
        alike = [
            j
            for j, v in enumerate(d.values)
            if v.dtype == x.dtype and v.dim() == x.dim() and _all_but(v, a) == _all_but(x, a)
        ]
        takes = [d.choice(alike) for _ in range(d.choice([1, 2, 2, 3]))]
        names = ", ".join(f"{{{k}}}" for k in range(len(takes)))
        evaluated(d, f"torch.{d.choice(['cat', 'cat', 'stack'])}([{names}], {d.signed(a, x.dim())})", *takes)


def _all_but(x: Tensor, a: int) -> list[int]:
    return [n for e, n in enumerate(x.shape) if e != a]


@operation(4)
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
        evaluated(d, d.choice([*texts, f"torch.tensor_split({{0}}, {k}, {a})", f"{{0}}.unfold({a}, {b}, {k})"]), i)


@operation(5)
def shifted(d: Draw) -> None:
    i = d.real()
    n = d.values[i].dim()
    dims = d.dims(n)
    by = [d.randint(-5, 5) for _ in dims]
    texts = [
        f"torch.roll({{0}}, {by}, {dims})",
        f"torch.flip({{0}}, {dims})",
        f"{{0}}.repeat({[d.choice([1, 1, 2]) for _ in range(n)]})",
    ]
    pads = [d.choice([0, 0, 1, 2, -1]) for _ in range(2 * d.randint(0, n))]
    texts += [f"F.pad({{0}}, {pads}, value={d.choice([0.0, 1.5])})"] * 2
    if n > 2:
        few = [d.choice([0, 1, 2]) for _ in range(2 * (n - 2))]
        texts += [f"F.pad({{0}}, {few}, mode={d.choice(['reflect', 'replicate', 'circular'])!r})"] * 2
    if n:
        a = d.randrange(n)
        texts += [
            f"{{0}}.repeat_interleave(2, {a})",
            f"torch.roll({{0}}, {d.randint(-9, 9)})",
            f"{{0}}.cumsum({a})",
            f"{{0}}.diff(dim={a})",
        ]
    if n > 1:
        texts += [f"torch.tril({{0}}, {d.randint(-1, 1)})", f"torch.triu({{0}})", "torch.rot90({0})"]
    evaluated(d, d.choice(texts), i)


@operation(6)
def reduced(d: Draw) -> None:
    i = d.real()
    n = d.values[i].dim()
    keep, dims = d.chance(0.5), d.dims(n)
    texts = [
        f"{{0}}.{name}({dims}, keepdim={keep})"
        for name in ("sum", "mean", "sum", "mean", "amax", "amin", "logsumexp", "var", "std")
    ]
    texts += [
        "{0}.sum()",
        "{0}.mean()",
        f"torch.linalg.vector_norm({{0}}, {d.choice([1, 2, 3])}, {dims}, {keep})",
        "{0}.max()",
        "{0}.norm()",
    ]
    texts += [f"torch.var_mean({{0}}, {dims}, correction={d.choice([0, 1])}, keepdim={keep})", "{0}.std()"]
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
        texts += [
            f"{{0}}.sort({a})[0]",
            f"{{0}}.topk(1, {a})[0]",
            f"({{0}} > 0).any({a}, {keep})",
            f"F.cosine_similarity({{0}}, {{0}} + 1, dim={a})",
        ]
    evaluated(d, d.choice(texts), i)


@operation(6)
def multiplied(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    n = x.dim()
    letters = "abcde"[:n]
    if not n:
        return
    summed, others = d.choice(letters), d.sample(letters, d.randint(1, n))
    second = "".join(dict.fromkeys([summed, *others]))
    out = [letter for letter in letters if letter != summed or d.chance(0.2)]
    d.shuffle(out)
    shape = [x.shape[letters.index(letter)] for letter in second]
    layer = nn.ParameterList([torch.zeros([*shape, 3])])
    text = f"{letters},{second}z->{''.join([*out, 'z'])}"
    choices = [
        lambda: step(d, f"einsum({text!r}, {{0}}, weight)", i, lambda m, t: torch.einsum(text, t, m[0]) / 3, layer)
    ]
    choices += [lambda: step(d, "Linear({0})", i, _called, nn.Linear(x.shape[-1], d.randint(1, 4), d.chance(0.5)))] * 2
    if n > 1:
        choices += [
            lambda: evaluated(d, "{0} @ {0}.transpose(-1, -2) / 3", i),
            lambda: evaluated(d, "{0}.mT @ {0} / 3", i),
        ]
        choices += [
            lambda: evaluated(d, "{0} @ {1} / 3", i, d.real()),
            lambda: evaluated(d, f"torch.einsum('{letters}->{letters[::-1]}', {{0}})", i),
        ]
    if n > 2:
        how = d.choice(["{0}, {0}, {0} + 1", "{0}, {0}, {0}, is_causal=True", "{0}[..., :1, :], {0}, {0}"])
        choices += [lambda: evaluated(d, f"F.scaled_dot_product_attention({how})", i)]
    d.choice(choices)()


def _called(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


@operation(8)
def windowed(d: Draw) -> None:
    """Convolutions, pools, interpolation."""
    i = d.choice([d.real() for _ in range(3)])
    x = d.values[i]
    n = x.dim() - 2
    if n not in (1, 2, 3):
        return
    kernel, stride, dilation = (tuple(d.choice(c) for _ in range(n)) for c in ([1, 2, 3, 3], [1, 1, 2, 3], [1, 1, 2]))
    padding = tuple(d.choice([0, 1, k // 2]) for k in kernel)
    channels = x.shape[1]
    groups = d.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
    half = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    conv, transposed = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
    size = tuple(d.randint(1, 8) for _ in range(n))
    mode = d.choice(["nearest", "nearest-exact", ("linear", "bilinear", "trilinear")[n - 1]])
    corners = d.chance(0.5) if "linear" in mode else None
    how = d.choice([f"size={size}", "scale_factor=2", "scale_factor=1.5"])
    layers = [
        conv(channels, groups * d.randint(1, 2), kernel, stride, padding, dilation, groups, d.chance(0.5)),
        conv(
            channels,
            groups,
            kernel,
            1,
            "same",
            dilation,
            groups,
            padding_mode=d.choice(["zeros", "circular", "reflect"]),
        ),
        transposed(channels, groups, kernel, stride, half, d.choice([0, 0, min(stride) - 1]), groups),
    ]
    if d.chance(0.5):
        layer = d.choice(layers)
        step(d, f"{layer}({{0}})", i, _called, layer)
        return
    ceil, counts = d.chance(0.3), d.chance(0.5)
    texts = [
        f"F.max_pool{n}d({{0}}, {kernel}, {stride}, {half}, ceil_mode={ceil})", f"F.interpolate({{0}}, {how}, mode={mode!r}, align_corners={corners})",
        f"F.avg_pool{n}d({{0}}, {kernel}, {stride}, {half}, ceil_mode={ceil}, count_include_pad={counts})",
        f"F.adaptive_avg_pool{n}d({{0}}, {size})", f"F.adaptive_max_pool{n}d({{0}}, {size})",
    ]  # fmt: skip
    evaluated(d, d.choice(texts + ["F.pixel_shuffle({0}, 2)"] * (n == 2) + ["F.pixel_unshuffle({0}, 2)"] * (n == 2)), i)


@operation(4)
def normed(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    n = x.dim()
    if n < 2:
        return
    affine, last = d.chance(0.5), d.randint(1, n - 1)
    channels = x.shape[1]
    groups = d.choice([g for g in range(1, channels + 1) if channels % g == 0])
    layers: list[nn.Module] = [
        nn.LayerNorm(x.shape[-last:], elementwise_affine=affine),
        nn.GroupNorm(groups, channels, affine=affine),
    ]
    layers += [nn.RMSNorm(x.shape[-last:], eps=1e-3), nn.PReLU(d.choice([1, channels]))]
    if n < 6:
        which = max(n - 2, 1)
        layers += [getattr(nn, f"BatchNorm{which}d")(channels, affine=affine)] * 2
        layers += [getattr(nn, f"InstanceNorm{which}d")(channels, affine=affine, track_running_stats=d.chance(0.5))]
    layer = d.choice(layers)
    step(d, f"{layer}({{0}})", i, _called, layer)


@operation(4)
def looked_up(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    if not x.dim():
        return
    a = d.randrange(x.dim())
    n = x.shape[a]
    points = [d.randrange(n) for _ in range(d.randint(1, 5))]
    where = ":, " * a
    texts = [
        f"{{0}}[{where}{points}]",
        f"{{0}}.index_select({a}, torch.tensor({points}))",
        f"{{0}}.gather({a}, {{0}}.argsort({a}))",
    ]
    texts += [
        f"torch.arange({n}, dtype={{0}}.dtype).view({[-1] + [1] * (x.dim() - 1 - a)}) * {{0}}",
        f"{{0}} + torch.linspace(0, 1, {x.shape[-1]}, dtype={{0}}.dtype)",
    ]
    integers = [j for j, v in enumerate(d.values) if v.dtype == torch.int64 and v.min() >= 0 and v.max() < 4]
    if integers and d.chance(0.7):
        j = d.choice(integers)
        choices = [
            lambda: step(d, "Embedding({0})", j, _called, nn.Embedding(4, 3)),
            lambda: evaluated(d, f"{{0}}[{where}{{1}} % {n}]", i, j),
        ]
        choices += [
            lambda: evaluated(d, "{0} + F.one_hot({1}, 4).sum() + {1}.sum()", i, j),
            lambda: evaluated(d, "{0} * ({1} > 1)", i, j),
        ]
        d.choice(choices)()
    else:
        evaluated(d, d.choice(texts), i)


@operation(5)
def in_place(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    n = x.dim()
    names = [
        "mul_({0}.sigmoid())",
        "add_(1)",
        "relu_()",
        "clamp_(-1, 1)",
        "tanh_()",
        "masked_fill_({0} > 0, 0.5)",
        "sub_({0} * 0.3)",
    ]
    texts = [f"{{0}}.clone().{name}" for name in names]
    if i >= len(d.inputs):
        texts += ["F.relu({0}, inplace=True)", "{0}.mul_(0.5)", "{0}.add_(1)"]
    if not n:
        evaluated(d, d.choice(texts), i)
        return
    a = d.randrange(n)
    m = x.shape[a]
    b = d.randint(1, m)
    s = d.choice([1, 1, 2])
    where = f"({', '.join(['slice(None)'] * a + [f'slice({d.randrange(b)}, {b}, {s})'])},)"
    point = f"({', '.join(['slice(None)'] * a + [str(b - 1)])},)"
    chosen = d.choice([where, where, point])
    value = d.choice(["2.0", f"{{0}}[{chosen}] * 3", f"{{0}}[{chosen}].flip(0)" if n > 1 else "1.0"])
    texts += [f"_put({{0}}.clone(), {chosen}, {value})", f"_put(torch.zeros_like({{0}}), {chosen}, {value})"] * 4
    text = d.choice(texts)
    step(d, text, i, eval(f"lambda a: {text.format('a')}", {"torch": torch, "F": F, "_put": _put}))


def _put(x: Tensor, where: Any, value: Any) -> Tensor:
    x[where] = value
    return x


@operation(1)
def transformed(d: Draw) -> None:
    i = d.real()
    if d.values[i].dim():
        dims = d.dims(d.values[i].dim())[:2]
        texts = [
            f"torch.view_as_real(torch.fft.rfftn({{0}}, dim={dims})) / 3",
            f"torch.fft.fftn({{0}}, dim={dims}).real",
        ]
        texts += [
            f"torch.fft.irfftn(torch.fft.rfftn({{0}}, dim={dims}), s={[d.values[i].shape[a] for a in dims]}, dim={dims})"
        ]
        evaluated(d, d.choice(texts), i)
