"""How products with weights are cut along features: one rule for convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from distdl_lite.factors import Factors, cut, uncut
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import Value
from distdl_lite.nn.work_grid import with_bias


def cut_features(c: Compiler, x: Value, d: int, out: int) -> tuple[Value, Factors, Factors, tuple[int, ...]]:
    """The input, the cuts of its features and of the output's, and the axes over which products are added up.

    Where the features of dim `d` are cut along an axis that may cut weights, and are no fewer than the output's, the weight is
    cut along its inputs and the ranks' products are added up; else the features are made whole. Where they are whole on ranks
    that such an axis does not tell apart, the weight is cut along its outputs. So a product cut along its outputs and the next
    one, cut along its inputs, need no movement between them (Shoeybi et al. 2019, "Megatron-LM", section 3).
    """
    x = c.plain(x, [d])
    axes = set(x.axes(d))
    if axes and axes <= set(c.feature_axes) and out <= x.shape[d]:
        return x, x.dims[d], (uncut(out),), x.axes(d)
    x = c.wholly(x, [d], "features", spread=not axes & set(c.feature_axes))
    free = c.free_features(x)
    lengths, at = c.wishes.get(c.now, ((out,), 0))
    return x, x.dims[d], tuple(cut(n, free if i == at else (), c.grid) for i, n in enumerate(lengths)), ()


def finished(c: Compiler, y: Value, summed: Sequence[int], bias: Value | None, dims: int) -> Value:
    """The ranks' products, added up where the weight is cut along its inputs, then the bias: it counts once.

    Behind the features stand `dims` spatial dims. Products that are not added up have their bias already.
    """
    if not summed:
        return y
    y = c.sum_over(y, summed)
    return y if bias is None else c.call(with_bias, y, bias, dims, dims=y.dims, dtype=y.dtype)


def wish(c: Compiler, y: Value, lengths: Sequence[int], at: int | None = None) -> None:
    """Remember that the features of a product will be viewed as dims of these lengths, or split, where its cuts do not fit that.

    The program is then compiled once more, with the cut in dim `at`, or in the longest but the last that it cuts evenly. So of
    queries, keys and values that come out of one product each rank has those of its heads.
    """
    if not y.product or not set(y.axes(y.ndim - 1)) <= set(c.feature_axes) or y.product in c.wishes:
        return
    parts = c.parts(c.feature_axes)
    if at is None:
        at = max(
            range(len(lengths)),
            key=lambda i: (lengths[i] >= parts, i < len(lengths) - 1, lengths[i] % parts == 0, lengths[i]),
        )
    c.wishes[y.product] = tuple(lengths), at
