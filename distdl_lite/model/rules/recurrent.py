"""Recurrences over a dim of time, which is whole; samples are independent, however they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distdl_lite.factors import uncut
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.value import NoRule, Value, rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(
    c: Compiler, op: Any, x: Value, states: Value | Sequence[Value], weights: Sequence[Value], *options: Any
) -> list[Value]:
    *_, dropout, is_training, _, batch_first = options
    if x.ndim != 3 or (dropout and is_training):  # packed sequences, and random numbers
        raise NoRule
    batch = 0 if batch_first else 1
    x = c.wholly(x, [1 - batch, 2], "whole")
    given = states if isinstance(states, (list, tuple)) else [states]
    held = [c.move(s, ((uncut(s.shape[0]),), x.dims[batch], (uncut(s.shape[2]),))) for s in given]
    dims = [x.with_dims({2: uncut(op.shape[2])}), *(s.dims for s in held)]
    first = held if isinstance(states, (list, tuple)) else held[0]
    return c.apply(op, x, first, [c.whole(w) for w in weights], *options, dims=dims)  # type: ignore[no-any-return]
