"""The faults that a run of the nemesis is made of."""

from __future__ import annotations

from tests.nemesis.plan import CASES, draw


def test_a_seed_always_draws_the_same_faults() -> None:
    assert draw(1, 70) == draw(1, 70)
    assert draw(1, 70) != draw(2, 70)
    # A longer run begins like a shorter one of the same seed.
    assert draw(1, 70)[:8] == draw(1, 8)


def test_every_case_comes_before_one_comes_twice() -> None:
    drawn = [("+".join(fault.victims), fault.phase) for fault in draw(7, 2 * len(CASES))]
    assert sorted(drawn[: len(CASES)]) == sorted(CASES)
    assert sorted(drawn[len(CASES) :]) == sorted(CASES)


def test_most_faults_kill_and_some_stop() -> None:
    stopped = [fault.stopped for fault in draw(1, 400) if fault.stopped]
    assert 60 < len(stopped) < 140
    assert min(stopped) >= 0.3
    assert max(stopped) <= 2.5
