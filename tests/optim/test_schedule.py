"""Schedules are pure: lists compared with those written by hand."""

from __future__ import annotations

import pytest

import distdl_lite as dl

S, F, A, T, U = (0, 0, 0), (4, 1, 1), (8, 2, 2), (2, 1, 1), (1, 1, 1)


def skips(losses: list[float] | None = None, **options: object) -> list[tuple[int, int, int]]:
    total = options["total_epochs"]
    losses = [1.0] * total if losses is None else losses
    schedule = dl.DASOSchedule(**options)
    return [schedule(epoch, 0, losses[:epoch]) for epoch in range(total)]


@pytest.mark.check("A31")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Heat's own, for a constant loss.
        (
            {"warmup_epochs": 2, "cooldown_epochs": 2, "total_epochs": 30},
            [S] * 2 + [F] * 3 + [T] * 3 + [U] * 3 + [A] * 3 + [F] * 3 + [T] * 3 + [U] * 3 + [A] * 3 + [F] * 2 + [S] * 2,
        ),
        # Without warm-up Heat stays synchronous for ever. The first epoch has no loss to look at.
        (
            {"warmup_epochs": 0, "cooldown_epochs": 1, "total_epochs": 16},
            [F] * 4 + [T] * 3 + [U] * 3 + [A] * 3 + [F] * 2 + [S],
        ),
        # A factor of 4 takes 2 to 0 in Heat, which is synchronous for ever.
        (
            {"warmup_epochs": 1, "cooldown_epochs": 0, "total_epochs": 18, "skip_reduction_factor": 4},
            [S] + [F] * 3 + [U] * 3 + [A] * 3 + [T] * 3 + [U] * 3 + [A] * 2,
        ),
        ({"total_epochs": 8}, [S] * 8),
        ({"total_epochs": 9}, [S] * 4 + [F] + [S] * 4),
        ({"total_epochs": 3, "warmup_epochs": 9}, [S] * 3),
        ({"total_epochs": 9, "warmup_epochs": 1, "cooldown_epochs": 1, "max_global_skips": 0}, [S] * 9),
        (
            {"total_epochs": 14, "warmup_epochs": 0, "cooldown_epochs": 0, "max_global_skips": 2},
            [T] * 4 + [U] * 3 + [T] * 3 + [U] * 3 + [T],
        ),
        (
            {
                "total_epochs": 14,
                "warmup_epochs": 0,
                "cooldown_epochs": 0,
                "max_global_skips": 12,
                "local_skip_factor": 3,
            },
            [F] * 4 + [T] * 3 + [U] * 3 + [(12, 4, 4)] * 3 + [(6, 2, 3)],
        ),
    ],
)
def test_table(options: dict[str, object], wanted: list[tuple[int, int, int]]) -> None:
    assert skips(**options) == wanted


@pytest.mark.check("A31")
def test_only_a_flat_loss_counts() -> None:
    options = {"total_epochs": 12, "warmup_epochs": 1, "cooldown_epochs": 1}
    falling = [0.9**epoch for epoch in range(12)]
    assert skips(falling, **options) == [S] + [F] * 10 + [S]
    slowly = [0.96**epoch for epoch in range(12)]  # two epochs are better by more than 5 %
    assert skips(slowly, **options) == [S] + [F] * 10 + [S]
    # Flat in epochs 1 to 3; that of epoch 6 is the first below 0.8; flat again in 7 to 9.
    assert skips(slowly, stability_level=0.2, **options) == [S] + [F] * 3 + [T] * 6 + [U] + [S]
    assert skips([float("nan")] * 12, **options) == [S] + [F] * 2 + [T] * 3 + [U] * 3 + [A] * 2 + [S]
    below_zero = [-(1.1**epoch) for epoch in range(12)]  # better all the time
    assert skips(below_zero, **options) == [S] + [F] * 10 + [S]
    rising = [-(0.99**epoch) for epoch in range(12)]
    assert skips(rising, **options)[:5] == [S] + [F] * 3 + [T]


def test_schedules_are_pure_and_ignore_what_comes_later() -> None:
    schedule = dl.DASOSchedule(30, 2, 2)
    losses = [1.0] * 30
    backwards = [schedule(epoch, 7, losses)[0] for epoch in reversed(range(30))]
    assert backwards[::-1] == [s[0] for s in skips(total_epochs=30, warmup_epochs=2, cooldown_epochs=2)]
    assert schedule(12, 0, losses[:2]) == F  # losses that were not told


def test_simple_schedules() -> None:
    assert dl.Periodic(5)(3, 4, ()) == (5, 0, 0)
    assert dl.Periodic(5, 2, 1)(0, 0, ()) == (5, 2, 1)
    first = dl.PostLocal(3, dl.Periodic(4, 0, 1))
    assert [first(0, batch, ()) for batch in range(5)] == [S] * 3 + [(4, 0, 1)] * 2
    epochs = dl.PostLocal(3, dl.Periodic(4), steps_per_epoch=2)
    assert [epochs(e, b, ())[0] for e in range(3) for b in range(2)] == [0, 0, 0, 4, 4, 4]
    with pytest.raises(ValueError, match="PostLocal: steps_per_epoch is needed where epochs are counted"):
        first(1, 0, ())


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: dl.Periodic(0), ValueError, "global_every must be at least 1, not 0"),
        (lambda: dl.Periodic(2.0), TypeError, "global_every must be an int, not 2.0"),
        (lambda: dl.Periodic(2, -1), ValueError, "local_every must be at least 0, not -1"),
        (lambda: dl.Periodic(2, 1, True), TypeError, "delay must be an int, not True"),
        (lambda: dl.PostLocal(-1, dl.Periodic(1)), ValueError, "first must be at least 0, not -1"),
        (lambda: dl.DASOSchedule(5, stability_level=1), TypeError, "stability_level must be a float, not 1"),
    ],
)
def test_refusals(make: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()
