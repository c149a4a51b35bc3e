"""Whether a router may answer, told the time."""

from __future__ import annotations

import pytest

from expertmesh.experts.errors import Unavailable
from expertmesh.router.request.standing import PAUSE_SECONDS, TICK_SECONDS, Standing


class Story:
    """A router's standing, and what it has lost."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lost: list[str] = []
        self.standing = Standing(lambda: self.lost.append(self.standing.session), lambda: self.now)
        self.standing.required = True
        self.standing.confirmed(self.standing.session)

    def runs(self, seconds: float) -> None:
        while seconds > 0:
            self.standing.tick()
            self.now += min(TICK_SECONDS, seconds)
            seconds -= TICK_SECONDS


def test_a_new_router_answers_once_the_controller_knows_its_session() -> None:
    standing = Standing(clock=lambda: 0.0)
    standing.required = True
    with pytest.raises(Unavailable, match="has just started"):
        standing.check()
    standing.confirmed("")
    standing.confirmed("another")
    assert not standing.kept
    standing.confirmed(standing.session)
    standing.check()


def test_without_a_controller_nothing_is_asked() -> None:
    Standing().check()


def test_a_router_that_runs_answers_for_ever_without_its_controller() -> None:
    story = Story()
    story.runs(10_000.0)
    story.standing.check()
    assert story.lost == []


def test_a_pause_costs_the_session_also_before_the_next_tick() -> None:
    story = Story()
    story.runs(3.0)
    before = story.standing.session
    story.now += PAUSE_SECONDS + TICK_SECONDS
    with pytest.raises(Unavailable, match="was frozen for 7 s"):
        story.standing.check()
    assert story.lost == [story.standing.session]
    assert story.standing.session != before
    story.standing.confirmed(before)  # sent before the pause, and long on its way
    with pytest.raises(Unavailable):
        story.standing.check()
    story.standing.confirmed(story.standing.session)
    story.standing.check()


def test_a_short_pause_costs_nothing() -> None:
    story = Story()
    story.runs(3.0)
    story.now += PAUSE_SECONDS - TICK_SECONDS
    story.standing.check()


def test_a_session_that_was_given_up_ends_once_whoever_says_so() -> None:
    story = Story()
    before = story.standing.session
    story.standing.lose(before)
    after = story.standing.session
    assert after != before
    story.standing.lose(before)
    story.standing.lose("")
    assert story.standing.session == after
    assert story.lost == [after]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_session_that_was_given_up_before_it_was_confirmed_ends_too(fresh: bool) -> None:
    """Its controller takes no report of it any more: only under another one it can serve again."""
    story = Story()
    if fresh:
        story.standing.problem = "has just started"
    else:
        story.standing.lose(story.standing.session)
    reported = story.standing.session
    story.standing.lose(reported)
    assert story.standing.session != reported
    story.standing.confirmed(reported)
    assert not story.standing.kept
    story.standing.confirmed(story.standing.session)
    story.standing.check()


def test_a_pause_before_a_session_is_confirmed_changes_nothing() -> None:
    story = Story()
    story.runs(3.0)
    story.standing.lose(story.standing.session)
    session = story.standing.session
    story.now += PAUSE_SECONDS + TICK_SECONDS
    story.standing.tick()
    assert story.standing.session == session
    assert not story.standing.kept
