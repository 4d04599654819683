"""Recurrent networks: cut along the batch, whole in time and features."""

from __future__ import annotations

from typing import Any

from distdl_lite.factors import uncut
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import NoRule, Value, rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(
    c: Compiler, op: Any, x: Value, states: Any, weights: list[Value], biases: bool, layers: int, dropout: float,
    train: bool, both_ways: bool, batch_first: bool = False,
) -> list[Value]:  # fmt: skip
    if (
        not isinstance(train, bool) or x.ndim != 3 or (dropout and train and layers > 1)
    ):  # packed, without batch, random
        raise NoRule
    batch = 0 if batch_first else 1
    x = c.wholly(x, [1 - batch, 2], "whole")

    def laid(state: Value) -> Value:
        return c.move(state, ((uncut(state.shape[0]),), x.dims[batch], (uncut(state.shape[2]),)))

    states = [laid(s) for s in states] if isinstance(states, list) else laid(states)
    first, *rest = (shape for shape, *_ in op.outputs)
    dims = [x.with_dims({1 - batch: uncut(first[1 - batch]), 2: uncut(first[2])})]
    dims += [((uncut(shape[0]),), x.dims[batch], (uncut(shape[2]),)) for shape in rest]
    options = biases, layers, dropout, train, both_ways, batch_first
    return c.apply(op, x, states, [c.whole(w) for w in weights], *options, dims=dims)  # type: ignore[no-any-return]
