"""When a batch may begin: at once while there is room, never later than the bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.pace import AT_ONCE, LONGEST_WAIT, SHARE, Pace


def test_nothing_waits_while_there_is_room() -> None:
    pace = Pace()
    for _ in range(AT_ONCE):
        assert pace.wait() == 0.0
        pace.begun()
    pace.ended(0.004)
    assert pace.wait() == 0.0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_the_wait_follows_what_batches_take_and_is_bounded(seconds: list[float]) -> None:
    pace = Pace()
    for _ in range(AT_ONCE):
        pace.begun()
    for taken in seconds:
        pace.begun()
        pace.ended(taken)
        assert 0.0 <= pace.wait() <= min(LONGEST_WAIT, SHARE * max(seconds))
    assert pace.under_way == AT_ONCE
