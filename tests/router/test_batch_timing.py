"""When a batch may start: with none in flight, or as large as the last one, and never later than the bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.request.batch_timing import LONGEST_WAIT, TARGET_IN_FLIGHT, BatchTiming

ROWS = st.integers(0, 5_000)


@given(ROWS)
def test_a_batch_starts_at_once_while_none_is_in_flight(rows: int) -> None:
    timing = BatchTiming()
    assert timing.wait(rows) == 0.0
    timing.started(7)
    timing.ended(0.004)
    assert timing.wait(rows) == 0.0


@given(ROWS, ROWS, ROWS)
def test_a_second_batch_is_as_large_as_the_last_that_started(first: int, second: int, rows: int) -> None:
    timing = BatchTiming()
    timing.started(1)
    timing.ended(0.004)
    timing.started(first)
    assert (timing.wait(rows) == 0.0) == (rows >= first)
    timing.started(second)
    assert timing.wait(5_000) > 0.0  # a third batch waits for one of them to end
    timing.ended(0.002)
    assert (timing.wait(rows) == 0.0) == (rows >= second)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), ROWS)
def test_the_wait_follows_the_duration_of_batches_and_is_bounded(seconds: list[float], rows: int) -> None:
    timing = BatchTiming()
    for _ in range(TARGET_IN_FLIGHT):
        timing.started(1)
    for taken in seconds:
        timing.started(1)
        timing.ended(taken)
        assert 0.0 <= timing.wait(rows) <= min(LONGEST_WAIT, max(seconds))
    assert timing.in_flight == TARGET_IN_FLIGHT
