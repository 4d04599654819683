"""Hooks that change gradients before their sum."""

from __future__ import annotations

from copies import assert_gradients, draw, mean_square, mlp, twins
from ranks import on_ranks
from twins import assert_refused

import distdl_lite as dl
from distdl_lite.parallel.replicas.bucket import Bucket


def halve(bucket: Bucket) -> None:
    bucket.gradients.div_(2)


@on_ranks(2)
def test_a_hook_of_ones_own(world: dl.Partition) -> None:
    dp, single = twins(mlp(3, 4, 2), comm_hook=halve)
    x = draw(4, 3)
    mean_square(dp(x[2 * world.rank :][:2])).backward()
    (mean_square(single(x)) / 2).backward()
    assert_gradients(dp, single)


@on_ranks(2)
def test_hooks_that_differ_are_refused(world: dl.Partition) -> None:
    hook = halve if world.rank else None
    text = "DataParallel: rank 1 has comm_hook='halve', rank 0 None"
    assert_refused(world, world, lambda: dl.DataParallel(mlp(3, 2), comm_hook=hook), text, ValueError)
