"""The layers of `generated`: per family a layer, its options, shapes, grids and dtypes, drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from generated import Cuts, Draw, Family, Function, Part, Twins, block, even

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.grid import balanced
from distdl_lite.layout import ranges_of

BATCHES = (0, 1, 1, 2, 2, 3, 5)
MOSTLY_DOUBLE = (torch.float64,) * 4 + (torch.float32,) * 2 + (torch.bfloat16,)
EPS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.complex128: 1e-13, torch.complex64: 1e-5}


def points(d: Draw, dims: int, least: Sequence[int] = ()) -> tuple[int, ...]:
    """Lengths of spatial dims, shorter ones where there are more; mostly enough for the layer."""
    lengths = d.each(dims, *range(1, {1: 14, 2: 10, 3: 7}[dims]))
    return tuple(max(n, k) for n, k in zip(lengths, least, strict=True)) if least and d.chance(0.96) else lengths


def dims_drawn(d: Draw) -> int:
    return d.choice((1, 1, 2, 2, 2, 3))


def described(name: str, options: Any, tensors: Sequence[torch.Tensor], cuts: Any, *partitions: Any) -> str:
    shapes = [(tuple(x.shape), x.dtype) for x in tensors]
    grids = [P and (P.shape, list(P.ranks)) for P in partitions]
    return f"{name} {options} of {shapes} cut at {cuts} on grids and ranks {grids}"


# ---- convolutions ----------------------------------------------------------------------------------------------------


def partitions_of_convolution(d: Draw, dims: int) -> tuple[Any, Any, Any]:
    """P_x, P_y and P_w, of which the last or both may be left out."""
    kind = d.choice(("alone", "alone", "target", "work", "work"))
    if kind == "alone":
        return d.partition(dims + 2), None, None
    if kind == "target":
        return d.partition(dims + 2), d.partition(dims + 2), None
    batch, out, ins, *space = work = d.grid(dims + 3)
    P_x, P_y = d.over(d.grid(dims + 2, {1: ins})), d.over((batch, out, *space))
    return P_x, P_y, d.over(work[1:] if batch == 1 and d.chance(0.5) else work)


def convolution(d: Draw, kind: str) -> Twins:
    dims = dims_drawn(d)
    partitions = P_x, P_y, P_w = partitions_of_convolution(d, dims)
    parts = (P_y or P_x).shape[1]
    groups = 1 if P_w is not None and P_x.shape[1] > 1 else d.choice((1, 1, parts, 2 * parts, 3))
    kernel, dilation = d.each(dims, 1, 2, 3, 3, 4, 5), d.each(dims, 1, 1, 2, 3)
    own, least = (of_convolution if kind == "Conv" else of_transposed)(d, dims, kernel, dilation)
    options: dict[str, Any] = {
        "kernel_size": kernel[0] if len(set(kernel)) == 1 else kernel,
        "dilation": dilation[0] if len(set(dilation)) == 1 else dilation,
        "groups": groups,
        **own,
    }
    return convolved(d, f"{kind}{dims}d", partitions, options, points(d, dims, least), d.choice(BATCHES), 0.5)


def overlapping(d: Draw) -> Twins:
    """Convolutions whose halo can travel while they compute: cut along batch and space in even blocks, of odd kernels."""
    dims = dims_drawn(d)
    P = d.over(d.grid(dims + 2, {0: d.choice((1, 1, 1, 2)), 1: 1}))
    kernel, dilation = d.each(dims, 1, 3, 3, 3, 5), d.each(dims, 1, 1, 1, 2)
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": d.choice((1, 1, 2, 3)),
        "stride": tuple(1 if p > 1 else d.choice((1, 1, 2)) for p in P.shape[2:]),
        "padding": tuple(gap * (k - 1) // 2 for gap, k in zip(dilation, kernel, strict=True)),
        "padding_mode": d.choice(("zeros", "zeros", "circular")),
    }
    space = tuple(max(p * d.choice((1, 2, 3, 4, 5)), 4) + d.choice((0, 1)) for p in P.shape[2:])
    return convolved(d, f"Conv{dims}d", (P, None, None), options, space, d.choice((2, 2, 3, 4, 1, 0)), 0.1)


def convolved(
    d: Draw,
    name: str,
    partitions: Sequence[Any],
    options: dict[str, Any],
    space: Sequence[int],
    batch: int,
    uneven: float,
) -> Twins:
    """A convolution over a tensor of the given lengths."""
    P_x, P_y, P_w = partitions
    ins, outs = options["groups"] * d.choice((1, 1, 2, 3)), options["groups"] * d.choice((1, 2, 3))
    dtype = d.choice((*MOSTLY_DOUBLE, torch.complex128))
    options.update(bias=d.chance(0.7), dtype=dtype)
    x = d.integers(batch, ins, *space, dtype=dtype)
    cuts = d.cuts(x.shape, P_x.shape, uneven)
    return Twins(
        described(name, (ins, outs, options), [x], cuts, *partitions),
        lambda: getattr(dnn, f"Distributed{name}")(P_x, ins, outs, P_y=P_y, P_w=P_w, **options),
        lambda: getattr(torch.nn, name)(ins, outs, **options),
        [x],
        [block(P_x, cuts)],
        even(P_y or P_x),
        [P for P in partitions if P],
        EPS[dtype] if dtype is torch.bfloat16 else 0.0,
        refusals=("do not fall on the boundaries of groups", "has no output"),
    )


Options = tuple[dict[str, Any], Sequence[int]]  # and the least lengths that they fit


def of_convolution(d: Draw, dims: int, kernel: Sequence[int], dilation: Sequence[int]) -> Options:
    padding = d.choice((0, 1, 2, "same", "same", "valid", d.each(dims, 0, 1, 2, 3), d.each(dims, 1, 2)))
    mode = d.choice(("zeros", "zeros", "zeros", "circular", "circular", "reflect", "replicate"))
    stride = 1 if padding == "same" else d.choice((1, d.each(dims, 1, 1, 2, 3, 4)))
    reach = [gap * (k - 1) for gap, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        pads = [n // 2 + n % 2 if padding == "same" else 0 for n in reach]
    else:
        pads = [padding] * dims if isinstance(padding, int) else list(padding)
    least = [max(n + 1 - 2 * p, p + 1 if mode != "zeros" else 1) for n, p in zip(reach, pads, strict=True)]
    return {"padding": padding, "stride": stride, "padding_mode": mode}, least


def of_transposed(d: Draw, dims: int, kernel: Sequence[int], dilation: Sequence[int]) -> Options:
    stride = d.each(dims, 1, 2, 2, 3, 4)
    extra = tuple(d.randrange(max(s, k)) for s, k in zip(stride, dilation, strict=True))
    padding = d.choice((0, 1, d.each(dims, 0, 1, 2)))
    return {"stride": stride, "padding": padding, "output_padding": d.choice((0, extra))}, ()


# ---- pools, pads, interpolation --------------------------------------------------------------------------------------


def spatial(
    d: Draw, name: str, options: dict[str, Any], x: torch.Tensor, tolerance: float = 0.0, refusals: Sequence[str] = ()
) -> Twins:
    """A layer without weights over a tensor with an axis per dim."""
    P = d.partition(x.dim())
    cuts = d.cuts(x.shape, P.shape)
    return Twins(
        described(name, options, [x], cuts, P),
        lambda: getattr(dnn, f"Distributed{name}")(P, **options),
        lambda: getattr(torch.nn, name)(**options),
        [x],
        [block(P, cuts)],
        even(P),
        [P],
        tolerance,
        refusals=tuple(refusals),
    )


def image(d: Draw, dims: int, dtype: torch.dtype, least: Sequence[int] = ()) -> torch.Tensor:
    shape = d.choice(BATCHES), d.choice((1, 2, 3, 4)), *points(d, dims, least)
    return d.integers(*shape, dtype=dtype) if d.chance(0.5) else d.normal(*shape, dtype=dtype)


def sliding(d: Draw, dims: int) -> dict[str, Any]:
    kernel = d.each(dims, 1, 2, 2, 3, 3, 4)
    return {
        "kernel_size": kernel,
        "stride": d.choice((None, d.each(dims, 1, 2, 3), 2)),
        "padding": d.choice((0, tuple(d.randint(0, k // 2) for k in kernel))),
        "ceil_mode": d.chance(0.5),
    }


def max_pool(d: Draw) -> Twins:
    dims = dims_drawn(d)
    options = {**sliding(d, dims), "dilation": d.each(dims, 1, 1, 2, 3), "return_indices": d.chance(0.3)}
    least = [gap * (k - 1) + 1 for gap, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    x = image(d, dims, d.choice(MOSTLY_DOUBLE), least)
    if d.chance(0.2):
        x[x > 0.5] = d.choice((-torch.inf, torch.inf, torch.nan))
    return spatial(d, f"MaxPool{dims}d", options, x, refusals=["has windows of nothing but padding"])


def avg_pool(d: Draw) -> Twins:
    dims, dtype = dims_drawn(d), d.choice(MOSTLY_DOUBLE)
    options = {**sliding(d, dims), "count_include_pad": d.chance(0.5)}
    if dims > 1:
        options["divisor_override"] = d.choice((None, None, 3, -2))
    x = image(d, dims, dtype, options["kernel_size"])
    return spatial(d, f"AvgPool{dims}d", options, x, EPS[dtype], ["no average in three dims"])


def adaptive_pool(d: Draw) -> Twins:
    dims, kind, dtype = dims_drawn(d), d.choice(("Max", "Avg")), d.choice(MOSTLY_DOUBLE)
    sizes = d.each(dims, 1, 2, 3, 5, 7, *([None] if dims > 1 else []))
    options = {"output_size": d.choice((sizes, d.choice((1, 2, 4))))}
    tolerance = 0.0 if kind == "Max" else EPS[dtype]
    return spatial(d, f"Adaptive{kind}Pool{dims}d", options, image(d, dims, dtype), tolerance)


def pad(d: Draw) -> Twins:
    kind = d.choice(("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"))
    dims, dtype = dims_drawn(d), d.choice((*MOSTLY_DOUBLE, torch.complex128, torch.int64))
    some = tuple(d.choice((0, 0, 1, 2, 3, -1, -2)) for _ in range(2 * dims))
    options: dict[str, Any] = {"padding": d.choice((some, some, some, 1, 2))}
    leading = d.each(d.choice((1, 2)) if kind != "ConstantPad" else d.choice((0, 1, 2)), 0, 1, 2, 3)
    if kind == "ConstantPad":
        options["value"] = d.choice((0.0, 3.0, -2.0))
    pads = [options["padding"]] * 2 * dims if isinstance(options["padding"], int) else list(options["padding"])
    least = [1 + max(a, b, 0) - min(a, 0) - min(b, 0) for a, b in zip(pads[::2], pads[1::2], strict=True)][::-1]
    x = d.integers(*leading, *points(d, dims, least), dtype=dtype)
    return spatial(d, f"{kind}{dims}d", options, x, refusals=["reads more than what it leaves"])


def upsample(d: Draw) -> Twins:
    dims, dtype = dims_drawn(d), d.choice(MOSTLY_DOUBLE)
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    mode = d.choice(("nearest", "nearest-exact", linear, linear, "area", *(["bicubic"] if dims == 2 else [])))
    options: dict[str, Any] = {"mode": mode}
    if d.chance(0.5):
        options["size"] = d.choice((d.each(dims, 1, 2, 3, 5, 7, 8, 13), d.choice((1, 4, 6))))
    else:
        factors = d.each(dims, 0.5, 2.0, 2.0, 3.0, 1.7, 0.3, 1.0, 4.0, 2.05)
        options["scale_factor"] = d.choice((factors, d.choice((2, 2.0, 1.5))))
        options["recompute_scale_factor"] = d.choice((None, True, False))
    if mode in (linear, "bicubic"):
        options["align_corners"] = d.choice((None, True, False))
    x = image(d, dims, dtype)
    if "scale_factor" in options and min(x.shape[2:]) < 4:  # an output without points has no gradient in torch
        x = x.repeat(1, 1, *(4,) * dims)
    tolerance = 0.0 if mode.startswith("nearest") and dtype is not torch.bfloat16 else 10 * EPS[dtype]
    return spatial(d, "Upsample", options, x, tolerance, ["torch's gradient is not that of"])


# ---- norms -----------------------------------------------------------------------------------------------------------


def amplified(x: torch.Tensor, name: str, arguments: tuple[Any, ...], eps: float) -> float:
    """What becomes of a rounding error of the largest value where it is divided by the smallest root of a variance.

    In a gradient that is twice, unless all values of a row are equal, and times a gradient and a weight of up to 4; the parts
    that cancel are not there to compare it with. torch's own errors are of that size: 2e-3 in the gradient of a layer norm of
    single values about 50, 1.4e-2 in that of a group norm of pairs.
    """
    rows = {
        "LayerNorm": lambda x: x.flatten(x.dim() - len(arguments[0])),
        "GroupNorm": lambda x: x.reshape(x.shape[0] * arguments[0], -1),
        "InstanceNorm": lambda x: x.flatten(2),
        "BatchNorm": lambda x: x.transpose(0, 1).flatten(1),
    }
    if name not in rows or not x.numel():  # a root mean square is not near 0 where values are not
        return 0.0
    var = rows[name](x.double()).var(-1, correction=0)
    once, twice = 8 * (var + eps).rsqrt().max(), 16 * (1 / (var + eps)).where(var > 0, 0).max()
    return 2.0**-24 * x.abs().max().item() * max(once, twice).item()


def norm(d: Draw, kind: str) -> Twins:
    """Values about some mean; of few equal ones little but rounding errors would be left."""
    dims = d.randint(*{"Batch": (2, 5), "Instance": (3, 5), "Group": (2, 4)}.get(kind, (1, 4)))
    dtype = d.choice(MOSTLY_DOUBLE)
    shape = [d.choice((1, 2, 3, 4, 5)) for _ in range(dims)]
    if d.chance(0.1) and kind != "Instance":  # torch's running statistics do not take it
        shape[0] = 0
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {"eps": d.choice((1e-5, 0.1))}
    ours, theirs = f"{kind}Norm", f"{kind}Norm"
    if kind in ("Layer", "RMS"):
        arguments = (tuple(shape[d.randrange(dims) :]),)
        options["elementwise_affine"] = d.chance(0.8)
    elif kind == "Group":
        groups = d.choice((1, 2, 3))
        shape[1] = groups * d.choice((1, 2, 3))
        arguments = (groups, shape[1])
        options["affine"] = d.chance(0.8)
    else:
        arguments = (shape[1],)
        options.update(affine=d.chance(0.8), track_running_stats=d.chance(0.6), momentum=d.choice((None, 0.1, 0.4)))
        theirs = f"{kind}Norm{max(dims - 2, 1)}d"
    if kind == "RMS":
        options["eps"] = d.choice((None, 1e-5, 0.1))
    else:
        options["bias"] = d.chance(0.8)
    is_half = dtype is torch.bfloat16
    held = torch.float32 if is_half else dtype

    def serial() -> torch.nn.Module:
        made = getattr(torch.nn, theirs)(*arguments, dtype=held, **options)
        if is_half:  # torch rounds on the way, ours computes in float32
            made.register_forward_pre_hook(lambda module, given: given[0].float())
            made.register_forward_hook(lambda module, given, y: y.to(dtype))
        return made

    P = d.partition(dims)
    cuts = d.cuts(shape, P.shape)
    x = (d.normal(*shape) * d.choice((1, 3)) + (0 if is_half else d.choice((0, 1, 50)))).to(dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.15}[dtype]
    if dtype is torch.float32:
        tolerance = max(tolerance, amplified(x, ours, arguments, options["eps"] or 1e-7))
    return Twins(
        described(theirs, (arguments, options), [x], cuts, P),
        lambda: getattr(dnn, f"Distributed{ours}")(P, *arguments, dtype=held, **options),
        serial,
        [x],
        [block(P, cuts)],
        block(P, cuts),
        [P],
        tolerance,
        modes=(True, False),
    )


# ---- linear layers ---------------------------------------------------------------------------------------------------


def linear(d: Draw) -> Twins:
    lead, kind = d.choice((0, 1, 1, 2, 3)), d.choice(("alone", "target", "work", "work"))
    P_x, P_y, P_w = d.partition(lead + 1), None, None
    if kind == "target":
        P_y = d.partition(lead + 1)
    elif kind == "work":
        *leads, out, ins = d.grid(lead + 2)
        P_x, P_y = d.over(d.grid(lead + 1, {lead: ins})), d.over((*leads, out))
        while leads and leads[-1] == 1 and d.chance(0.7):
            leads.pop()
        P_w = d.over((*leads, out, ins))
    n_in, n_out, bias = d.choice((1, 2, 5, 7)), d.choice((1, 3, 4, 8)), d.chance(0.7)
    dtype = d.choice((*MOSTLY_DOUBLE, torch.complex128))
    x = d.integers(*d.each(lead, *BATCHES), n_in, dtype=dtype)
    cuts = d.cuts(x.shape, P_x.shape)
    return Twins(
        described("Linear", (n_in, n_out, bias), [x], cuts, P_x, P_y, P_w),
        lambda: dnn.DistributedLinear(P_x, P_y, P_w, n_in, n_out, bias, dtype=dtype),
        lambda: torch.nn.Linear(n_in, n_out, bias, dtype=dtype),
        [x],
        [block(P_x, cuts)],
        even(P_y or P_x),
        [P for P in (P_x, P_y, P_w) if P],
        EPS[dtype] if dtype is torch.bfloat16 else 0.0,
    )


def on_lines(d: Draw, P: dl.Partition, lead: Sequence[int]) -> tuple[Cuts, tuple[slice, ...] | None]:
    """Cuts of the leading dims over all axes but the last, and this rank's block of them; axes are aligned at the end."""
    axes = (*(1,) * (len(lead) + 1 - P.dim), *P.shape)[:-1]
    cuts = d.cuts(lead, axes)
    if P.index is None:
        return cuts, None
    index = (*(0,) * (len(lead) + 1 - P.dim), *P.index)
    return cuts, tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, index, strict=False))


def always(slices: tuple[slice, ...] | None) -> Part:
    return lambda shape: slices


def parallel_linear(d: Draw, kind: str) -> Twins:
    """On one side, the input of rows and the output of columns, the features may be cut; on the other the last lead dim."""
    P = d.partition(d.choice((1, 2, 2, 3)))
    lead, line = d.each(P.dim - 1 + d.randrange(3), 0, 1, 2, 5, 7), P.shape[-1]
    n_in, n_out, bias = d.choice((1, 2, 5, 7)), d.choice((1, 3, 4, 8)), d.chance(0.7)
    dtype = d.choice(MOSTLY_DOUBLE)
    whole, rows_cut, of_columns = d.chance(0.5), d.chance(0.5) and len(lead) > 0, kind == "Column"
    names = ("gather_output", "sequence_parallel") if of_columns else ("input_is_parallel", "scatter_output")
    options = dict(zip(names, (whole == of_columns, rows_cut), strict=True))
    cuts, rows = on_lines(d, P, lead)
    wild = 0.0, 0.5  # outputs are in balanced blocks
    features = d.cuts((n_out if of_columns else n_in,), (line,), wild[not of_columns])[0]
    pieces = {r: d.cuts((r[1] - r[0],), (line,), wild[of_columns])[0] for r in ranges_of(cuts[-1])} if lead else {}
    some_features = some_rows = None
    if rows is not None:
        i = P.index[-1]
        some_features = (*rows, slice(None) if whole else slice(features[i], features[i + 1]))
        some_rows = (*rows, slice(None))
        if rows_cut:
            start = rows[-1].start
            piece = pieces[start, rows[-1].stop]
            some_rows = (*rows[:-1], slice(start + piece[i], start + piece[i + 1]), slice(None))
    x = d.integers(*lead, n_in, dtype=dtype)
    name = f"Distributed{kind}ParallelLinear"
    return Twins(
        described(name, (n_in, n_out, bias, options), [x], (cuts, pieces, features), P),
        lambda: getattr(dnn, name)(P, n_in, n_out, bias, dtype=dtype, **options),
        lambda: torch.nn.Linear(n_in, n_out, bias, dtype=dtype),
        [x],
        [always(some_rows if of_columns else some_features)],
        always(some_features if of_columns else some_rows),
        [P],
        EPS[dtype] if dtype is torch.bfloat16 else 0.0,
    )


def embedding(d: Draw) -> Twins:
    P, how = d.partition(d.choice((1, 2, 2, 3, 3))), d.choice(("vocabulary", "feature"))
    n, dim = d.choice(((7, 5), (3, 2), (12, 1), (6, 4), (1, 6)))
    dtype = d.choice(MOSTLY_DOUBLE)
    options: dict[str, Any] = {
        "padding_idx": d.choice((None, 0, n - 1, -1, n // 2)),
        "scale_grad_by_freq": d.chance(0.4),
        "dtype": dtype,
    }
    lead = d.each(P.dim - 1 + d.randrange(2), 0, 1, 2, 2, 5, 5, 9, 9)
    cuts, rows = on_lines(d, P, lead)
    index = d.integers(*lead, dtype=d.choice((torch.int32, torch.int64)), low=0, high=n)
    out = None
    if rows is not None:
        i, features = P.index[-1], balanced(dim, P.shape[-1])
        out = (*rows, slice(features[i], features[i + 1]) if how == "feature" else slice(None))
    return Twins(
        described("Embedding", (n, dim, how, options), [index], cuts, P),
        lambda: dnn.DistributedEmbedding(P, n, dim, cut=how, **options),
        lambda: torch.nn.Embedding(n, dim, **options),
        [index],
        [always(rows)],
        always(out),
        [P],
        EPS[dtype] if options["scale_grad_by_freq"] or dtype is torch.bfloat16 else 0.0,
    )


# ---- layers without a shape of their own -----------------------------------------------------------------------------


def of_any_shape(
    d: Draw, *sizes: int, dims: Sequence[int] = (1, 2, 3, 4)
) -> tuple[dl.CartesianPartition, list[int], Cuts]:
    P = d.partition(d.choice(dims))
    shape = list(d.each(P.dim, *sizes))
    return P, shape, d.cuts(shape, P.shape)


def softmax(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 7)
    kind, dim, dtype = d.choice(("Softmax", "LogSoftmax")), d.randrange(-P.dim, P.dim), d.choice(MOSTLY_DOUBLE)
    x = d.normal(*shape) * d.choice((1, 10, 1e4)) + d.choice((0, 0, 1e5))
    x[d.normal(*shape) > d.choice((0.5, 9))] = -torch.inf
    x[d.normal(*shape) > d.choice((2, 9, 9))] = d.choice((torch.inf, torch.nan))
    x = x.to(dtype)
    return Twins(
        described(kind, dim, [x], cuts, P),
        lambda: getattr(dnn, f"Distributed{kind}")(P, dim),
        lambda: getattr(torch.nn, kind)(dim),
        [x],
        [block(P, cuts)],
        block(P, cuts),
        [P],
        10 * EPS[dtype],
    )


def dropout(d: Draw) -> Twins:
    """The mask does not depend on the partition: that of the layer on this rank alone."""
    name = d.choice(("Dropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"))
    dims = (int(name[-2]) + 2,) if name.endswith("d") else (1, 2, 3, 4)
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 7, dims=dims)
    p, inplace, dtype = d.choice((0.0, 0.1, 0.5, 0.9, 1.0)), d.chance(0.3), d.choice((*MOSTLY_DOUBLE, torch.complex128))
    x = d.integers(*shape, dtype=dtype)

    def made(P: dl.Partition) -> torch.nn.Module:
        layer = getattr(dnn, f"Distributed{name}")(P, p, inplace)
        return torch.nn.Sequential(Function(lambda x: x * 1), layer)  # which may then be overwritten

    return Twins(
        described(name, (p, inplace), [x], cuts, P),
        lambda: made(P),
        lambda: made(d.world.grid((1,) * P.dim, [d.world.rank])),
        [x],
        [block(P, cuts)],
        block(P, cuts),
        [P],
        modes=(True, False),
    )


def flatten(d: Draw) -> Twins:
    P_x, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 5)
    start, end = sorted(d.randrange(P_x.dim) for _ in range(2))
    is_needed = max((1, *P_x.shape[start + 1 : end + 1])) > 1
    P_y = d.partition(P_x.dim - (end - start)) if d.chance(0.95 if is_needed else 0.4) else None
    x = d.integers(*shape, dtype=d.choice((*MOSTLY_DOUBLE, torch.complex128, torch.int64, torch.bool)))
    row, kept = math.prod(shape[start + 1 : end + 1]), [*range(start + 1), *range(end + 1, P_x.dim)]
    if P_y is None:
        merged = [*cuts[:start], [c * row for c in cuts[start]], *cuts[end + 1 :]]
        give = block(P_x, dict(zip(kept, merged, strict=True)), kept)
    else:
        rows = list(P_y.bounds([shape[a] for a in kept]))
        give = block(P_y, [*rows[:start], [c * row for c in rows[start]], *rows[start + 1 :]])
    return Twins(
        described("Flatten", (start, end), [x], cuts, P_x, P_y),
        lambda: dnn.DistributedFlatten(P_x, start, end - P_x.dim, P_y),
        lambda: torch.nn.Flatten(start, end),
        [x],
        [block(P_x, cuts)],
        give,
        [P for P in (P_x, P_y) if P],
        refusals=("so that its blocks are no boxes",),
    )


def mean(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 7)
    dims = d.sample(range(P.dim), d.randint(0, P.dim))
    dim = d.choice((tuple(k - P.dim * d.randrange(2) for k in dims), None if not dims else dims[0]))
    keepdim, dtype = d.chance(0.5), d.choice((*MOSTLY_DOUBLE, torch.complex128, torch.complex64))
    x = d.integers(*shape, dtype=dtype)
    averaged = {k % P.dim for k in ((dim,) if isinstance(dim, int) else dim or range(P.dim))}
    slices = None
    if P.index is not None:
        every = [slice(None) if k in averaged else slice(cuts[k][i], cuts[k][i + 1]) for k, i in enumerate(P.index)]
        slices = tuple(every if keepdim else [s for k, s in enumerate(every) if k not in averaged])
    return Twins(
        described("Mean", (dim, keepdim), [x], cuts, P),
        lambda: dnn.DistributedMean(P, dim, keepdim),
        lambda: Function(lambda x: x.mean(dim, keepdim)),
        [x],
        [block(P, cuts)],
        always(slices),
        [P],
        EPS[dtype],
    )


def fft(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, *(2, 3, 4, 5, 8) * 2, 1, dims=(*(2, 3, 3, 4) * 3, 1))
    function = d.choice(("fft", "ifft", "rfft", "irfft"))
    most = min(3, P.dim - 1 if P.size > 1 and P.dim > 1 and d.chance(0.9) else P.dim)  # some dim must stay to be cut
    dim = tuple(k - P.dim * d.randrange(2) for k in d.sample(range(P.dim), d.randint(1, most)))
    s = tuple(d.choice((-1, 3, 4, 7)) for _ in dim) if d.chance(0.5) else None
    norm = d.choice((None, "forward", "backward", "ortho"))
    real, both = (torch.float64, torch.float32), (torch.complex128, torch.complex64)
    dtype = d.choice(real if function == "rfft" else both * 2 + real)
    x = d.normal(*shape, dtype=dtype)
    return Twins(
        described(function, (dim, s, norm), [x], cuts, P),
        lambda: dnn.DistributedFFT(P, function, dim, s, norm),
        lambda: Function(lambda x: getattr(torch.fft, f"{function}n")(x, s=s, dim=dim, norm=norm)),
        [x],
        [block(P, cuts)],
        even(P),
        [P],
        10 * EPS[dtype],
        refusals=("can be cut in place of", "has no points"),
    )


# ---- losses ----------------------------------------------------------------------------------------------------------


def loss(
    d: Draw, P: dl.CartesianPartition, name: str, options: dict, x: torch.Tensor, t: torch.Tensor, cuts: Cuts
) -> Twins:
    """Input and target; the target, and the terms, may lack the class dim."""
    axes = [a for a in range(P.dim) if t.dim() == x.dim() or a != min(1, P.dim - 1)]
    options["reduction"] = d.choice(("mean", "sum", "none", *(["batchmean"] if name == "KLDiv" else [])))
    over_classes = name in ("NLL", "CrossEntropy")
    terms = [a for a in range(P.dim) if not over_classes or a != min(1, P.dim - 1)]
    give = block(P, cuts, terms if options["reduction"] == "none" else ())
    return Twins(
        described(f"{name}Loss", options, [x, t], cuts, P),
        lambda: getattr(dnn, f"Distributed{name}Loss")(P, **options),
        lambda: getattr(torch.nn, f"{name}Loss")(**options),
        [x, t],
        [block(P, cuts), block(P, cuts, axes)],
        give,
        [P],
        {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2}[x.dtype],
    )


def elementwise_loss(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 0, 1, 2, 3, 5)
    name = d.choice(("MSE", "L1", "SmoothL1", "Huber", "BCE", "BCEWithLogits", "KLDiv", "PoissonNLL"))
    x, t = d.normal(*shape) * 2, d.normal(*shape).sigmoid()
    trailing = shape[d.randrange(P.dim) :]
    weight = d.normal(*(d.choice((1, n)) for n in trailing)).abs()
    options: dict[str, Any] = {}
    if name == "SmoothL1":
        options["beta"] = d.choice((0.5, 1.0, 0.0))
    elif name == "Huber":
        options["delta"] = d.choice((0.7, 1.0))
    elif name == "BCE":
        x, options = x.sigmoid(), d.choice(({}, {"weight": weight}))
    elif name == "BCEWithLogits":
        options = d.choice(
            ({}, {"weight": weight}, {"pos_weight": weight}, {"weight": weight, "pos_weight": weight + 1})
        )
    elif name == "KLDiv":
        options = {"log_target": d.chance(0.5)}
        x, t = -x.abs(), t.log() if options["log_target"] else t
    elif name == "PoissonNLL":
        options = {"log_input": d.chance(0.5), "full": d.chance(0.5), "eps": d.choice((1e-8, 1e-3))}
        x, t = (x if options["log_input"] else x.abs() + 0.1), (t * 5).round()
    dtype = d.choice((torch.float64, torch.float64, torch.float32))
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return loss(d, P, name, options, x.to(dtype), t.to(dtype), cuts)


def class_loss(d: Draw) -> Twins:
    P, shape, cuts = of_any_shape(d, 1, 2, 3, 5, dims=(1, 2, 3, 4))
    if P.dim > 1 and d.chance(0.1):
        shape[0] = 0
        cuts = d.cuts(shape, P.shape)
    axis = min(1, P.dim - 1)
    name, classes = d.choice(("NLL", "CrossEntropy", "CrossEntropy")), shape[axis]
    dtype = d.choice((torch.float64, torch.float64, torch.float32))
    x = d.normal(*shape, dtype=dtype) * d.choice((1, 10))
    x = x.log_softmax(axis) if name == "NLL" else x
    options: dict[str, Any] = {"weight": d.choice((None, d.normal(classes, dtype=dtype).abs()))}
    if name == "CrossEntropy":
        options["label_smoothing"] = d.choice((0.0, 0.0, 0.2, 1.0))
    without = [n for a, n in enumerate(shape) if a != axis]
    if name == "CrossEntropy" and d.chance(0.3):
        t = d.normal(*shape, dtype=dtype).softmax(axis)
    else:
        t = d.integers(*without, dtype=torch.long, low=0, high=classes)
        options["ignore_index"] = d.choice((-100, -100, 0, 1, 2))
        t[d.normal(*without) > d.choice((0, 1, 9))] = (
            options["ignore_index"] if options["ignore_index"] < classes else 0
        )
    return loss(d, P, name, options, x, t, cuts)


FAMILIES: dict[str, Family] = {
    "conv": lambda d: convolution(d, "Conv"),
    "conv_overlapping": overlapping,
    "conv_transpose": lambda d: convolution(d, "ConvTranspose"),
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "adaptive_pool": adaptive_pool,
    "pad": pad,
    "upsample": upsample,
    "batch_norm": lambda d: norm(d, "Batch"),
    "instance_norm": lambda d: norm(d, "Instance"),
    "group_norm": lambda d: norm(d, "Group"),
    "layer_norm": lambda d: norm(d, "Layer"),
    "rms_norm": lambda d: norm(d, "RMS"),
    "linear": linear,
    "column_parallel": lambda d: parallel_linear(d, "Column"),
    "row_parallel": lambda d: parallel_linear(d, "Row"),
    "embedding": embedding,
    "softmax": softmax,
    "dropout": dropout,
    "flatten": flatten,
    "mean": mean,
    "fft": fft,
    "elementwise_loss": elementwise_loss,
    "class_loss": class_loss,
}
