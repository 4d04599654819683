"""The rules of linear layers and embeddings in graphs, with weights that are cut along features."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from distdl_lite.factors import cut, uncut
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.features import cut_features, finished
from distdl_lite.nn.linear.embedding import rows_of
from distdl_lite.nn.value import NoRule, Value, rule


@rule("linear")
def linear(c: Compiler, op: Any, x: Value, weight: Value, bias: Value | None = None) -> Value:
    x, ins, outs, summed = cut_features(c, x, x.ndim - 1, op.shape[-1])
    weight = c.placed_at(weight, (outs, ins), c.feature_axes)
    bias = bias and c.placed_at(bias, (outs,), c.feature_axes)
    y = c.call(F.linear, x, weight, None if summed else bias, dims=x.with_dims({-1: outs}), dtype=op.dtype)
    if not summed:
        y.product = c.now
    return finished(c, y, summed, bias, 0)


@rule("embedding")
def embedding(
    c: Compiler, op: Any, table: Value, index: Value, padding_idx: int = -1, scale: bool = False, sparse: bool = False
) -> Value:
    if sparse or scale:
        raise NoRule
    rows = cut(table.shape[0], c.free_features(index), c.grid)
    table = c.placed_at(table, ((rows,), (uncut(table.shape[1]),)), c.feature_axes)
    dims = (*index.dims, (uncut(table.shape[1]),))
    if not rows.axes:
        return c.apply(op, table, index, padding_idx, dims=dims)
    y = c.call(rows_of, table, index, c.range(rows), table.shape[0], padding_idx, dims=dims, dtype=op.dtype)
    return c.sum_over(y, rows.axes)
