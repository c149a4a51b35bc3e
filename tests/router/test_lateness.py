"""When a message is late: well beyond what was usual, but early enough to ask another replica."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.fanout.lateness import (
    BURST,
    COLD_SECONDS,
    FACTOR,
    FLOOR_SECONDS,
    KEPT,
    KNOWN,
    SHARE,
    HedgeBudget,
    Pace,
)


def pace_of(*seconds: float, rows: int = 1) -> Pace:
    pace = Pace()
    for taken in seconds:
        pace.took(taken, rows)
    return pace


def test_while_little_is_known_a_message_has_a_second_or_half_of_its_time() -> None:
    assert pace_of().bound(5, math.inf) == COLD_SECONDS
    assert pace_of().bound(5, 0.5) == 0.25
    assert pace_of(0.6).bound(1, math.inf) == FACTOR * 0.6


def test_what_was_usual_lately_decides() -> None:
    assert pace_of(*[0.001] * KNOWN).bound(1, math.inf) == FLOOR_SECONDS
    assert pace_of(*[0.2] * KNOWN).bound(1, math.inf) == FACTOR * 0.2
    assert pace_of(*[0.2] * 199, 9.0).bound(1, math.inf) == FACTOR * 0.2  # one in a hundred is no rule
    assert pace_of(*[9.0] * KEPT, *[0.2] * KEPT).bound(1, math.inf) == FACTOR * 0.2


def test_more_rows_than_any_message_had_may_take_longer() -> None:
    pace = pace_of(*[0.1] * KNOWN, rows=10)
    assert pace.bound(10, math.inf) == pace.bound(1, math.inf) == FACTOR * 0.1
    assert pace.bound(1000, math.inf) == FACTOR * 10.0


def test_another_replica_is_asked_while_it_can_still_answer() -> None:
    slow = pace_of(*[2.0] * KNOWN)
    assert slow.bound(1, 30.0) == 6.0
    assert slow.bound(1, 7.0) == 3.0
    assert slow.bound(1, 5.0) == 2.0


@given(st.lists(st.floats(0, 100), max_size=50), st.integers(0, 10**6), st.floats(-1, 1e6))
def test_a_bound_is_never_below_the_floor_nor_below_what_is_usual(took: list[float], rows: int, timeout: float) -> None:
    pace = pace_of(*took, rows=100)
    assert pace.bound(rows, timeout) >= FLOOR_SECONDS
    if took:
        assert pace.bound(rows, timeout) >= sorted(took)[-1 - len(took) // 100]
    assert not pace.is_late(pace.bound(rows, timeout), rows, timeout)
    assert pace.is_late(pace.bound(rows, timeout) * 2, rows, timeout)


def test_a_share_of_the_messages_may_be_sent_twice_and_a_burst_of_them() -> None:
    budget = HedgeBudget()
    assert [budget.take() for _ in range(int(BURST) + 1)] == [True] * int(BURST) + [False]
    for _ in range(round(1 / SHARE)):
        budget.sent()
    budget.sent()
    assert [budget.take(), budget.take()] == [True, False]
    for _ in range(1000):
        budget.sent()
    assert sum(budget.take() for _ in range(100)) == int(BURST)
