"""Operations of random graphs with weights, windows, norms and indices: each draws its options and appends a step."""

from __future__ import annotations

import torch
from torch import nn

from zoo.graphs import Draw, Operation


def multiplied(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    n = x.dim()
    if n:
        texts = [f"torch.einsum('{'abcdefg'[:n]}->{'abcdefg'[:n][::-1]}', {{0}})"]
        if n > 1:
            texts += ["{0} @ {0}.transpose(-1, -2) / 3", "{0}.mT @ {0} / 3", "{0} @ {1} / 3", "{1} @ {0} / 3"]
        if n > 2:
            how = d.choice(["{0}, {0}, {0} + 1", "{0}, {0}, {0}, is_causal=True", "{0}[..., :1, :], {0}, {0}"])
            texts += [f"F.scaled_dot_product_attention({how})"] * 2
        d.choice([lambda: d.evaluate(d.choice(texts), i, d.real()), lambda: _linear(d, i), lambda: _einsum(d, i)])()


def _linear(d: Draw, i: int) -> None:
    d.apply(nn.Linear(d.values[i].shape[-1], d.randint(1, 4), d.chance(0.5)), i)


def _einsum(d: Draw, i: int) -> None:
    """With a weight that has some of the value's dims and one of its own."""
    shape = d.values[i].shape
    letters = "abcdefg"[: len(shape)]
    summed = d.choice(letters)
    second = "".join(dict.fromkeys([summed, *d.sample(letters, d.randint(1, len(letters)))]))
    out = [letter for letter in letters if letter != summed or d.chance(0.2)]
    d.shuffle(out)
    equation = f"{letters},{second}z->{''.join([*out, 'z'])}"
    layer = nn.ParameterList([torch.zeros(*(shape[letters.index(letter)] for letter in second), 3)])
    d.step(f"einsum('{equation}', {{0}}, weight) / 3", i, lambda m, x: torch.einsum(equation, x, m[0]) / 3, layer)


def convolved(d: Draw) -> None:
    i = next((i for i in [d.real() for _ in range(4)] if 2 < d.values[i].dim() < 6), 0)
    n, c = d.values[i].dim() - 2, d.values[i].shape[1] if d.values[i].dim() > 1 else 1
    if n not in (1, 2, 3):
        return
    kernel, stride, dilation = (tuple(d.choice(k) for _ in range(n)) for k in ([1, 2, 3, 3], [1, 1, 2, 3], [1, 1, 2]))
    padding = tuple(d.choice([0, 1, k // 2]) for k in kernel)
    groups = d.choice([g for g in (1, 1, 2, c) if c % g == 0])
    conv, transposed = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
    mode = d.choice(["zeros", "circular", "reflect"])
    layers = [
        conv(c, groups * d.randint(1, 2), kernel, stride, padding, dilation, groups, d.chance(0.5)),
        conv(c, groups * d.randint(1, 2), kernel, stride, padding, dilation, groups, d.chance(0.5)),
        conv(c, groups, kernel, 1, "same", dilation, groups, padding_mode=mode),
        transposed(c, groups, kernel, stride, padding, d.choice([0, 0, min(stride) - 1]), groups),
    ]
    d.apply(d.choice(layers), i)


def windowed(d: Draw) -> None:
    """Pools and interpolation."""
    i = next((i for i in [d.real() for _ in range(4)] if 2 < d.values[i].dim() < 6), 0)
    n = d.values[i].dim() - 2
    if n not in (1, 2, 3):
        return
    kernel, stride = (tuple(d.choice(k) for _ in range(n)) for k in ([1, 2, 3, 3], [1, 1, 2, 3]))
    padding, size = tuple(d.randint(0, k // 2) for k in kernel), tuple(d.randint(1, 8) for _ in range(n))
    mode = d.choice(["nearest", "nearest-exact", ("linear", "bilinear", "trilinear")[n - 1]])
    corners = d.chance(0.5) if "linear" in mode else None
    how = d.choice([f"size={size}", "scale_factor=2", "scale_factor=1.5"])
    window = f"{{0}}, {kernel}, {stride}, {padding}, ceil_mode={d.chance(0.3)}"
    texts = [
        f"F.max_pool{n}d({window})", f"F.avg_pool{n}d({window}, count_include_pad={d.chance(0.5)})",
        f"F.adaptive_avg_pool{n}d({{0}}, {size})", f"F.adaptive_max_pool{n}d({{0}}, {size})",
        f"F.interpolate({{0}}, {how}, mode={mode!r}, align_corners={corners})",
    ]  # fmt: skip
    d.evaluate(d.choice(texts + ["F.pixel_shuffle({0}, 2)", "F.pixel_unshuffle({0}, 2)"] * (n == 2)), i)


def normed(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    if x.dim() < 2:
        return
    affine, last, c = d.chance(0.5), d.randint(1, x.dim() - 1), x.shape[1]
    groups = d.choice([g for g in range(1, c + 1) if c % g == 0])
    layers: list[nn.Module] = [nn.LayerNorm(x.shape[-last:], elementwise_affine=affine), nn.PReLU(d.choice([1, c]))]
    layers += [nn.GroupNorm(groups, c, affine=affine), nn.RMSNorm(x.shape[-last:], eps=1e-3)]
    if x.dim() < 6:
        n = max(x.dim() - 2, 1)
        layers += [getattr(nn, f"BatchNorm{n}d")(c, affine=affine)] * 2
        # Without statistics: torch.export removes one that is not used further, with the update, which its schema lacks.
        layers += [getattr(nn, f"InstanceNorm{n}d")(c, affine=affine)]
    d.apply(d.choice(layers), i)


def looked_up(d: Draw) -> None:
    i = d.real()
    x = d.values[i]
    if not x.dim():
        return
    a = d.randrange(x.dim())
    n, where = x.shape[a], ":, " * a
    points, ones = [d.randrange(n) for _ in range(d.randint(1, 5))], [1] * (x.dim() - 1 - a)
    integers = [j for j, v in enumerate(d.values) if v.dtype == torch.int64 and v.min() >= 0 and v.max() < 4]
    if integers and d.chance(0.7):
        j = d.choice(integers)
        texts = [f"{{0}}[{where}{{1}} % {n}]", "{0} + F.one_hot({1}, 4).sum() + {1}.sum()", "{0} * ({1} > 1)"]
        d.choice([lambda: d.apply(nn.Embedding(4, 3), j), lambda: d.evaluate(d.choice(texts), i, j)])()
    else:
        texts = [f"{{0}}[{where}{points}]", f"{{0}}.index_select({a}, torch.tensor({points}))"]
        texts += [
            f"{{0}}.gather({a}, {{0}}.argsort({a}))",
            f"torch.arange({n}, dtype={{0}}.dtype).view({[-1, *ones]}) * {{0}}",
        ]
        d.evaluate(d.choice([*texts, f"{{0}} + torch.linspace(0, 1, {x.shape[-1]}, dtype={{0}}.dtype)"]), i)


def transformed(d: Draw) -> None:
    i = d.real()
    if d.values[i].dim():
        dims = d.dims(d.values[i].dim())[:2]
        texts = [
            f"torch.view_as_real(torch.fft.rfftn({{0}}, dim={dims})) / 3",
            f"torch.fft.fftn({{0}}, dim={dims}).real",
        ]
        sizes = [d.values[i].shape[a] for a in dims]
        texts += [f"torch.fft.irfftn(torch.fft.rfftn({{0}}, dim={dims}), s={sizes}, dim={dims})"]
        d.evaluate(d.choice(texts), i)


TIMES: dict[Operation, int] = {multiplied: 6, convolved: 6, windowed: 5, normed: 5, looked_up: 4, transformed: 1}
