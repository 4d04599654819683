"""How products with weights are cut along features: one rule for convolutions and linear layers."""

from __future__ import annotations

from distdl_lite.factors import Factors, cut, uncut
from distdl_lite.nn.compiler import Compiler, Value


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
    return x, x.dims[d], (cut(out, c.free_features(x), c.grid),), ()
