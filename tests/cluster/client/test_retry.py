"""Retries: how often, how long between, never past the deadline, never more than the budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.client.retry import Answer, Attempt, Pause, Retries, RetryBudget, RetryPolicy, Step, drive
from expertmesh.experts.errors import BY_NAME, DeadlineExceeded, ExpertMeshError, Unavailable


class World:
    """A client's surroundings: a clock that only moves when told, and a record of what the flow did."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.attempts: list[Attempt] = []
        self.pauses: list[float] = []
        self.retries = Retries(policy=RetryPolicy(), budget=RetryBudget(), clock=lambda: self.now, jitter=lambda: 0.0)

    def call(self, server: Callable[[Attempt], Answer], *, timeout: float = 10.0, seconds: float = 0.0) -> bytes:
        """Make one call; `server` answers each attempt, and takes `seconds` for it."""

        def perform(step: Step) -> Answer:
            if isinstance(step, Pause):
                self.pauses.append(step.seconds)
                self.now += step.seconds
                return None
            self.attempts.append(step)
            self.now += seconds
            return server(step)

        return drive(self.retries.attempts("/Call", b"payload", timeout=timeout, metadata=(("k", "v"),)), perform)


def fine(_: Attempt) -> Answer:
    return b"answer"


def down(_: Attempt) -> Answer:
    return Unavailable("down")


def test_unavailable_is_tried_again_with_the_same_bytes_and_less_time() -> None:
    world = World()
    answers: list[Answer] = [Unavailable("a"), Unavailable("b"), b"answer"]
    assert world.call(lambda _: answers.pop(0), seconds=1.0) == b"answer"
    assert [attempt.timeout for attempt in world.attempts] == pytest.approx([10.0, 8.9, 7.7])
    assert world.pauses == pytest.approx([0.1, 0.2])
    assert {(attempt.method, attempt.payload, attempt.metadata) for attempt in world.attempts} == {
        ("/Call", b"payload", (("k", "v"),))
    }


def test_three_attempts_and_no_more() -> None:
    world = World()
    with pytest.raises(Unavailable):
        world.call(down)
    assert len(world.attempts) == 3


@pytest.mark.parametrize("kind", [kind for kind in BY_NAME.values() if kind is not Unavailable])
def test_nothing_else_is_tried_again(kind: type[ExpertMeshError]) -> None:
    world = World()
    with pytest.raises(kind):
        world.call(lambda _: kind("no"))
    assert len(world.attempts) == 1


def test_no_pause_reaches_past_the_deadline() -> None:
    world = World()
    with pytest.raises(Unavailable):
        world.call(down, timeout=0.25)
    assert world.pauses == pytest.approx([0.1])
    assert world.now - 1000.0 < 0.25


def test_time_used_up_by_an_attempt_is_not_tried_again() -> None:
    world = World()
    with pytest.raises(Unavailable):
        world.call(down, timeout=1.0, seconds=1.0)
    assert len(world.attempts) == 1


def test_a_clock_that_jumps_during_a_pause_ends_the_call() -> None:
    world = World()
    flow = world.retries.attempts("/Call", b"", timeout=1.0)
    flow.send(None)
    assert isinstance(flow.send(Unavailable("down")), Pause)
    world.now += 5.0
    with pytest.raises(DeadlineExceeded, match="within 1 s"):
        flow.send(None)


def test_pauses_grow_to_a_limit_and_jitter_only_shortens_them() -> None:
    policy = RetryPolicy(first_pause=0.5, longest_pause=3.0)
    assert [policy.pause(n, 0.0) for n in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert policy.pause(2_000, 0.0) == 3.0
    for jitter in (0.0, 0.3, 0.999):
        assert 0.25 < policy.pause(0, jitter) <= 0.5


@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=600))
@settings(max_examples=60, deadline=None)
def test_retries_never_exceed_a_tenth_of_the_calls_beyond_the_reserve(outcomes: list[bool]) -> None:
    world = World()
    for works in outcomes:
        with contextlib.suppress(Unavailable):
            world.call(fine if works else down)
    retries = len(world.attempts) - len(outcomes)
    assert retries <= max(10.0, 0.1 * len(outcomes)) + 1e-6


def test_a_retry_storm_is_sent_at_most_a_tenth_more() -> None:
    world = World()
    for _ in range(1000):
        with pytest.raises(Unavailable):
            world.call(down)
    assert 1.05 < len(world.attempts) / 1000 <= 1.1


def test_a_budget_does_not_grow_without_limit() -> None:
    budget = RetryBudget(ratio=0.1, reserve=3.0)
    for _ in range(10_000):
        budget.deposit()
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
