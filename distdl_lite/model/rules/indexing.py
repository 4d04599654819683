"""Look-ups by integer tensors."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.factors import uncut
from distdl_lite.nn.broadcasting import common_dims
from distdl_lite.nn.compiler import Compiler, NoRule, Value, rule


@rule("index")
def index(c: Compiler, op: Any, x: Value, indices: list[Value | None]) -> Value:
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        raise NoRule
    places = [d for d, i in enumerate(indices) if i is not None]
    x = c.wholly(x, places, "whole")
    given = [i if i is None else c.whole(i) for i in indices]
    count = len(op.shape) - (x.ndim - len(places))
    is_run = places == list(range(places[0], places[0] + len(places)))
    first = places[0] if is_run else 0
    rest = [f for d, f in enumerate(x.dims) if d not in places]
    dims = (*rest[:first], *((uncut(n),) for n in op.shape[first : first + count]), *rest[first:])
    return c.call(op.function, x, given, dims=dims, dtype=x.dtype)


@rule("index_select")
def index_select(c: Compiler, op: Any, x: Value, d: int, indices: Value) -> Value:
    d %= x.ndim
    x, indices = c.wholly(x, [d], "whole"), c.whole(indices)
    return c.call(torch.index_select, x, d, indices, dims=x.with_dims({d: uncut(op.shape[d])}), dtype=x.dtype)


@rule("gather", "take_along_dim")
def gather(c: Compiler, op: Any, x: Value, d: int, indices: Value, *, sparse_grad: bool = False) -> Value:
    d %= x.ndim
    x, indices = c.wholly(x, [d], "whole"), c.wholly(indices, [d], "whole")
    if any(n != m for e, (n, m) in enumerate(zip(x.shape, indices.shape, strict=True)) if e != d):
        x, indices = c.whole(x), c.whole(indices)
        return c.call(torch.gather, x, d, indices, dims=indices.dims, dtype=x.dtype)
    lead = common_dims(c, [indices], indices.shape)
    x = c.move(x, tuple((uncut(x.shape[d]),) if e == d else f for e, f in enumerate(lead)))
    return c.call(torch.gather, x, d, indices, dims=indices.dims, dtype=x.dtype)


@rule("embedding")
def embedding(c: Compiler, op: Any, table: Value, indices: Value, *options: Any) -> Value:
    table = c.whole(table)
    return c.call(
        op.function, table, indices, *options, dims=(*indices.dims, (uncut(table.shape[1]),)), dtype=table.dtype
    )
