"""Start values of weights, which are those of torch's layers to the bit, drawn by every rank in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from distdl_lite.layout import Shape, shape_of

Draw = Callable[[torch.Tensor], Any]
_DRAWN_AT_ONCE = 2**20  # elements: a large weight is never whole in memory


def uniform(bound: float) -> Draw:
    """Draw from U(-bound, bound), block by block bit-equal to one call."""
    return lambda block: block.uniform_(-bound, bound)


def normal(total: int) -> Draw:
    """Draw `total` numbers from N(0, 1), block by block bit-equal to one call.

    torch draws normal numbers in groups of 16, and the last 16 once more where the total is no multiple of it: so blocks but
    the last must be multiples of 16, and no last one shorter.
    """
    left, drawn = total, torch.empty(0)

    def draw(block: torch.Tensor) -> torch.Tensor:
        nonlocal left, drawn
        drawn = drawn.to(block)
        while drawn.numel() < block.numel():
            n = _DRAWN_AT_ONCE if left >= _DRAWN_AT_ONCE + 16 else left
            drawn, left = torch.cat([drawn, block.new_empty(n).normal_()]), left - n
        taken, drawn = drawn[: block.numel()], drawn[block.numel() :]
        return block.copy_(taken.view(block.shape))

    return draw


def constant(value: float) -> Draw:
    """Fill without drawing."""
    return lambda block: block.fill_(value)


def kaiming_bound(fan_in: int) -> float:
    """The bound of ``kaiming_uniform_(a=sqrt(5))``, torch's start value of linear and convolution weights."""
    gain = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    return math.sqrt(3.0) * (gain / math.sqrt(fan_in)) if fan_in else 0.0


def bias_bound(fan_in: int) -> float:
    """The bound of torch's start value of linear and convolution biases."""
    return 1 / math.sqrt(fan_in) if fan_in else 0.0


def drawn(global_shape: Shape, box: Any, draw: Draw, dtype: torch.dtype) -> torch.Tensor:
    """A box of a tensor that is drawn whole, a block of rows at a time; 0 elements where there is no box."""
    if not global_shape:
        value = draw(torch.empty((), dtype=dtype))
        return value if box is not None else value.new_empty(0)
    shape = (0, *global_shape[1:]) if box is None else shape_of(box)
    rows, rest = box[0] if box else (0, 0), tuple(slice(*r) for r in box[1:]) if box else ()
    kept = torch.empty(shape, dtype=dtype)
    step = max(1, _DRAWN_AT_ONCE // max(1, math.prod(global_shape[1:])))
    for start in range(0, global_shape[0], step):
        stop = min(start + step, global_shape[0])
        block = draw(torch.empty((stop - start, *global_shape[1:]), dtype=dtype))
        low, high = max(start, rows[0]), min(stop, rows[1])
        if low < high:
            kept[low - rows[0] : high - rows[0]] = block[(slice(low - start, high - start), *rest)]
    return kept
