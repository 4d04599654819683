"""Ready-made ``comm_hook`` of `DataParallel`, under the names that they have in torch: gradients travel as halves.

Two bytes a number go in place of four, and each number is rounded where it leaves a rank: by 2^-11 of itself at most as float16,
2^-8 as bfloat16. Ranks add up in float32 or wider. With more than two ranks the sum is rounded once more on its way back.
Weights and flags travel beside the gradients, exactly, in a small message of their own, so that uneven and empty batches are
averaged as without. A first backward, in which no rank knows yet how much all weigh together, travels whole, as do complex
gradients.

With ``engine="poll"`` these sums are made where they start, and ``timeout`` is no limit to them.

Examples
--------
>>> import distdl_lite as dl
>>> def body(world):
...     model = dl.DataParallel(torch.nn.Linear(3, 1, bias=False), comm_hook=dl.parallel.hooks.bf16_compress_hook)
...     for _ in range(2):
...         model.zero_grad()
...         model(torch.full((2, 3), 1 + 2**-9 * world.rank)).mean().backward()
...     return model.module.weight.grad[0, 0].item() == 1  # and not 1 + 2**-10
>>> dl.testing.spmd(2, body)
[True, True]
"""

from __future__ import annotations

import torch

from distdl_lite.parallel.buckets import Bucket


def bf16_compress_hook(bucket: Bucket) -> None:
    """Let gradients travel as bfloat16, which has the range of float32."""
    if not bucket.dtype.is_complex:
        bucket.sent_as = torch.bfloat16


def fp16_compress_hook(bucket: Bucket) -> None:
    """Let gradients travel as float16; what is out of its range becomes NaN, so that a GradScaler sees it."""
    if not bucket.dtype.is_complex:
        bucket.sent_as = torch.float16
