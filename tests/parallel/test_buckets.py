"""Buckets alone: how parameters are cut into them, and whose memory the results are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from distdl_lite.parallel.replicas.bucket import FIRST_BYTES, Bucket, filled


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from("abc")), max_size=20), st.integers(1, 100), st.randoms())
def test_buckets_hold_every_parameter_once(kinds: list[tuple[int, str]], most: int, draw: object) -> None:
    order = list(range(len(kinds)))
    draw.shuffle(order)
    sizes, names = [size for size, _ in kinds], [name for _, name in kinds]
    made = filled(order, sizes, names, most, most)
    assert sorted(n for bucket in made for n in bucket) == sorted(order)
    place = {n: at for at, n in enumerate(order)}
    assert [max(place[n] for n in bucket) for bucket in made] == sorted(max(place[n] for n in b) for b in made)
    for bucket in made:
        assert len({names[n] for n in bucket}) == 1
        assert [place[n] for n in bucket] == sorted(place[n] for n in bucket)
        total = sum(sizes[n] for n in bucket)
        assert total <= most or total - sizes[bucket[-1]] <= most // 8


def test_the_first_bucket_is_small() -> None:
    made = filled(range(8), [FIRST_BYTES // 2] * 8, "a" * 8, 4 * FIRST_BYTES, FIRST_BYTES)
    assert [len(bucket) for bucket in made] == [2, 6]


def test_a_bias_travels_with_its_weight() -> None:
    assert filled(range(6), [1, 90, 1, 90, 1, 90], "a" * 6, 100, 100) == [(0, 1), (2, 3), (4, 5)]
    assert filled(range(6), [9, 900, 9, 900, 9, 900], "a" * 6, 100, 100) == [(0, 1), (2, 3), (4, 5)]


def summed(
    bucket: Bucket, *given: torch.Tensor | None, weight: float = 2, scale: float = 1
) -> list[torch.Tensor | None]:
    """As if a second rank had given the same."""
    bucket.free()
    bucket.pack(given, weight * scale, weight, 1)
    bucket.flat.mul_(2)
    return bucket.unpack(True, scale)[0]


def test_memory_is_used_again_unless_somebody_holds_a_result() -> None:
    for size in (3, 5000):
        bucket = Bucket([0, 1], [torch.zeros(size), torch.zeros(2, 2)])
        a, b = torch.arange(float(size)), torch.ones(2, 2)
        found = summed(bucket, a, b)
        assert torch.equal(found[0], a)
        assert torch.equal(found[1], b)
        memory = found[0].data_ptr()
        kept = found[1].numpy()
        del found
        other = summed(bucket, 3 * a, None, scale=0.25)
        assert other[0].data_ptr() != memory
        assert torch.equal(other[0], 3 * a)
        assert other[1] is None
        assert (kept == 1).all()
        memory = other[0].data_ptr()
        del other
        assert summed(bucket, a, b)[0].data_ptr() == memory


def test_empty_ranks_give_zeros_whatever_they_hold() -> None:
    bucket = Bucket([0], [torch.zeros(2, dtype=torch.bfloat16)], header=1)
    bucket.header = [7.0]
    bucket.pack([torch.full((2,), torch.nan, dtype=torch.bfloat16)], 0.0, 0.0, 1.0)
    found, weight, marks = bucket.unpack(True)
    assert torch.equal(found[0], torch.zeros(2))
    assert (weight, marks, bucket.header) == (0.0, 1.0, [7.0])
    bucket.pack([None], 1.0, 1.0, 0.0)
    assert bucket.unpack(True)[0] == [None]
