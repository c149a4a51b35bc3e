"""Retries: how often, how long between, never past the deadline, never more than the budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from helpers.answers import answered
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.client.retry import Answer, Attempt, Pause, Retries, RetryBudget, RetryPolicy, Step, drive
from expertmesh.cluster.client.routers.balance import Balance, Target
from expertmesh.experts.errors import BY_NAME, DeadlineExceeded, ExpertMeshError, RouterUnavailable, Unavailable


class World:
    """A client's surroundings: a clock that only moves when told, and a record of what the flow did."""

    def __init__(self, routers: int = 1) -> None:
        self.now = 1000.0
        targets = [Target(address=f"r{n}:1", connect_to=f"r{n}:1") for n in range(routers)]
        self.routers = Balance(targets, lambda: self.now, shuffle=lambda targets: None)
        self.attempts: list[Attempt] = []
        self.pauses: list[float] = []
        self.retries = Retries(policy=RetryPolicy(), budget=RetryBudget(), clock=lambda: self.now, jitter=lambda: 0.0)

    def call(
        self,
        server: Callable[[Attempt], Answer],
        *,
        timeout: float = 10.0,
        seconds: float = 0.0,
        only: Target | None = None,
    ) -> bytes:
        """Make one call; `server` answers each attempt, and takes `seconds` for it."""

        def perform(step: Step) -> Answer:
            if isinstance(step, Pause):
                self.pauses.append(step.seconds)
                self.now += step.seconds
                return None
            assert isinstance(step, Attempt)
            self.attempts.append(step)
            self.now += seconds
            return answered(step, server)

        route = self.routers.route(only=only)
        flow = self.retries.attempts("/Call", b"payload", route, timeout=timeout, metadata=(("k", "v"),))
        return drive(flow, perform)


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


@pytest.mark.parametrize("kind", [kind for kind in BY_NAME.values() if not issubclass(kind, Unavailable)])
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
    flow = world.retries.attempts("/Call", b"", world.routers.route(), timeout=1.0)
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


# several routers


def here(attempt: Attempt) -> str:
    """The router that has the attempt."""
    return attempt.route.tried[-1].address


def tried(world: World) -> list[str]:
    """The routers that had the last call, in order."""
    return [target.address for target in world.attempts[-1].route.tried]


def lost_at(*routers: str) -> Callable[[Attempt], Answer]:
    return lambda attempt: RouterUnavailable("lost") if here(attempt) in routers else b"answer"


def test_a_call_goes_on_to_another_router_at_once() -> None:
    world = World(routers=3)
    assert world.call(lost_at("r0:1", "r1:1")) == b"answer"
    assert tried(world) == ["r0:1", "r1:1", "r2:1"]
    assert world.pauses == []


def test_what_a_lost_router_had_in_flight_moves_on_whatever_the_budget() -> None:
    world = World(routers=2)
    while world.retries.budget.withdraw():
        pass
    flows = [world.retries.attempts("/Call", b"", world.routers.route(), timeout=10.0) for _ in range(100)]
    attempts = [flow.send(None) for flow in flows]
    taken = [attempt.route.begin().address for attempt in attempts if isinstance(attempt, Attempt)]
    assert taken.count("r0:1") == 50
    for flow, attempt, router in zip(flows, attempts, taken, strict=True):
        assert isinstance(attempt, Attempt)
        if router == "r0:1":
            attempt.route.end(RouterUnavailable("lost"))
            moved = flow.send(RouterUnavailable("lost"))
            assert isinstance(moved, Attempt)
            assert moved.route.begin().address == "r1:1"


def test_where_every_router_is_lost_the_budget_holds() -> None:
    world = World(routers=3)
    lost = lost_at("r0:1", "r1:1", "r2:1")
    for _ in range(1000):
        with pytest.raises(RouterUnavailable):
            world.call(lost)
    assert len(world.attempts) <= 1100 + 3  # each router was moved from once


def test_a_call_that_three_routers_died_of_is_not_sent_to_a_fourth() -> None:
    world = World(routers=5)
    for _ in range(5):
        world.call(fine)
    world.attempts.clear()
    with pytest.raises(RouterUnavailable):
        world.call(lambda attempt: RouterUnavailable("the connection was lost"))
    assert tried(world) == ["r0:1", "r1:1", "r2:1"]


def test_a_call_that_is_refused_goes_on_however_many_refuse() -> None:
    world = World(routers=5)
    for _ in range(5):
        world.call(fine)
    draining = RouterUnavailable("draining", request_id="r")
    assert world.call(lambda attempt: b"answer" if here(attempt) == "r3:1" else draining) == b"answer"
    assert world.pauses == []


def test_a_call_for_one_router_goes_nowhere_else() -> None:
    world = World(routers=2)
    only = world.routers.targets[0]
    with pytest.raises(RouterUnavailable):
        world.call(lost_at("r0:1"), only=only)
    assert tried(world) == ["r0:1"] * 3


def test_an_expert_that_is_down_is_waited_for_and_then_asked_for_elsewhere() -> None:
    world = World(routers=2)
    answers: list[Answer] = [Unavailable("every replica is down"), b"answer"]
    assert world.call(lambda _: answers.pop(0)) == b"answer"
    assert tried(world) == ["r0:1", "r1:1"]
    assert world.pauses == pytest.approx([0.1])


def test_a_flow_that_is_given_up_counts_as_ended() -> None:
    world = World(routers=2)

    def stop(step: Step) -> Answer:
        raise KeyboardInterrupt

    flow = world.retries.attempts("/Call", b"", world.routers.route(), timeout=1.0)
    with pytest.raises(KeyboardInterrupt):
        drive(flow, stop)
    assert flow.gi_frame is None
