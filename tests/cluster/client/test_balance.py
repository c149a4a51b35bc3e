"""The choice of a router: load evens out, who fails is avoided and checked again, and there is always a choice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.client.routers.balance import (
    FIRST_CHECK_SECONDS,
    LONGEST_CHECK_SECONDS,
    SILENT_SECONDS,
    WATCHED_SECONDS,
    Balance,
    Route,
    Stay,
    Target,
)
from expertmesh.experts.errors import DeadlineExceeded, NotFound, Overloaded, RouterUnavailable, Unavailable

LOST = RouterUnavailable("the connection was lost")
REFUSED = RouterUnavailable("draining", request_id="r1")
A, B, C = (Target(address=f"10.0.0.{n}:1", connect_to=f"10.0.0.{n}:1") for n in (1, 2, 3))


class World:
    """Routers A, B and C, in this order, and a clock that only moves when told."""

    def __init__(self, *targets: Target) -> None:
        self.now = 1000.0
        self.balance = Balance(targets or (A, B, C), lambda: self.now, shuffle=lambda targets: None)

    def began(self, **options: Any) -> tuple[Target, Route]:
        route = self.balance.route(**options)
        return route.begin(), route

    def call(self, answer: Any = b"answer", **options: Any) -> Target:
        target, route = self.began(**options)
        route.end(answer)
        return target

    def fail(self, target: Target, answer: Any = LOST) -> None:
        assert self.call(answer, only=target) == target

    def check(self, target: Target, answer: Any = b"serving") -> None:
        route = self.balance.check(target)
        assert route.begin() == target
        route.end(answer)


def test_equals_take_turns() -> None:
    world = World()
    assert [world.call() for _ in range(6)] == [A, B, C, A, B, C]


def test_the_router_with_the_fewest_calls_in_flight_is_next() -> None:
    world = World()
    for target in (A, A, A, B, C, C):
        world.began(only=target)
    assert [world.began()[0] for _ in range(4)] == [B, C, B, A]


@pytest.mark.parametrize("answer", [LOST, REFUSED])
def test_a_router_that_fails_is_avoided_until_it_has_answered_a_check(answer: RouterUnavailable) -> None:
    world = World()
    world.fail(A, answer)
    assert {world.call() for _ in range(10)} == {B, C}
    world.now += 1e6
    assert {world.call() for _ in range(10)} == {B, C}
    assert world.balance.due() == [A]
    world.check(A)
    assert {world.call() for _ in range(10)} == {A, B, C}
    assert world.balance.due() == []


def test_checks_of_a_failed_router_come_less_and_less_often() -> None:
    world = World()
    world.fail(A)
    pauses = []
    for _ in range(8):
        began = world.now
        while not world.balance.due():
            world.now += FIRST_CHECK_SECONDS / 4
        assert world.balance.due() == []  # it is being checked
        pauses.append(world.now - began)
        world.check(A, DeadlineExceeded("no answer"))
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0] + [LONGEST_CHECK_SECONDS] * 3
    world.check(A)
    world.fail(A)  # a check alone does not make good what a call found
    world.now += LONGEST_CHECK_SECONDS - 0.1
    assert world.balance.due() == []
    world.now += 0.1
    assert world.balance.due() == [A]
    world.check(A)
    world.call(only=A)
    world.fail(A)
    world.now += FIRST_CHECK_SECONDS
    assert world.balance.due() == [A]


def test_a_silent_router_is_checked_and_one_that_answers_anything_is_not_silent() -> None:
    world = World()
    _, stuck = world.began(only=A)
    _, slow = world.began(only=B)
    world.began(only=B)
    world.now += SILENT_SECONDS * 0.9
    slow.end(NotFound("no such layer"))
    assert world.balance.due() == []
    world.now += SILENT_SECONDS * 0.1
    assert world.balance.due() == [A]
    world.check(A)
    assert not world.balance.is_lost(A)  # it is only slow
    world.now += SILENT_SECONDS
    assert set(world.balance.due()) == {A, B}
    world.check(A, DeadlineExceeded("no answer"))
    assert world.balance.is_lost(A)
    stuck.end(LOST)
    assert {world.call() for _ in range(10)} == {C}  # B has a call in flight


@pytest.mark.parametrize("end", [None, DeadlineExceeded("no answer")])
def test_a_call_that_was_given_up_leaves_its_router_silent(end: Any) -> None:
    world = World()
    world.call(end, only=A)
    world.now += SILENT_SECONDS
    assert world.balance.due() == [A]


def test_the_only_router_is_never_checked_nor_given_up() -> None:
    world = World(A)
    world.began()
    world.fail(A)
    world.now += 100.0
    assert world.balance.due() == []
    assert world.call() == A
    assert not world.balance.is_lost(A)


def test_nothing_is_cut_off_where_no_other_router_is_left() -> None:
    world = World(A, B)
    world.fail(A)
    assert world.balance.is_lost(A)
    world.fail(B)
    assert not world.balance.is_lost(A)
    assert not world.balance.is_lost(B)
    assert {world.call(LOST) for _ in range(4)} == {A, B}  # never an empty choice
    world.call(only=B)
    assert world.balance.is_lost(A)


def test_an_answer_that_was_asked_for_before_a_failure_does_not_undo_it() -> None:
    world = World()
    _, before = world.began(only=A)
    world.now += 0.1
    world.fail(A, REFUSED)
    world.now += 0.1
    before.end(b"answer")  # a router that drains finishes what it has accepted
    assert {world.call() for _ in range(4)} == {B, C}


def test_many_calls_that_fail_with_one_router_are_one_failure() -> None:
    world = World()
    routes = [world.began(only=A)[1] for _ in range(100)]
    for route in routes:
        route.end(LOST)
    world.now += FIRST_CHECK_SECONDS
    assert world.balance.due() == [A]


def test_a_call_moves_to_routers_that_it_has_not_tried_and_that_have_not_failed() -> None:
    world = World()
    route = world.balance.route()
    tried = []
    while not tried or route.can_move():
        tried.append(route.begin())
        route.end(LOST)
    assert tried == [A, B, C]
    assert route.losses == 0  # none had ever answered: the call cannot have broken them
    assert not world.balance.route(only=B).can_move()
    world.check(C)
    other = world.balance.route(only=A)
    other.begin()
    other.end(LOST)
    assert not other.can_move()
    assert world.call() == C


def test_only_a_router_that_had_answered_and_was_lost_may_have_died_of_the_call() -> None:
    world = World()
    for target in (A, B, C):
        world.call(only=target)
    route = world.balance.route()
    for answer, losses in ((LOST, 1), (REFUSED, 1), (LOST, 2)):
        route.begin()
        route.end(answer)
        assert route.losses == losses


def test_errors_of_experts_and_layers_are_no_failure_of_the_router() -> None:
    world = World()
    for error in (Unavailable("every replica is down"), NotFound("no such layer")):
        world.fail(A, error)
        assert {world.call() for _ in range(3)} == {A, B, C}


def test_a_second_attempt_prefers_another_router() -> None:
    world = World()
    for _ in range(3):
        route = world.balance.route()
        first = route.begin()
        route.end(Unavailable("an expert restarts"))
        assert route.begin() != first
        route.end(b"answer")


def test_a_full_router_is_left_alone_for_as_long_as_it_says() -> None:
    world = World()
    world.call(Overloaded("full", retry_after=0.5), only=A)
    assert {world.call() for _ in range(6)} == {B, C}
    world.now += 0.5
    assert {world.call() for _ in range(6)} == {A, B, C}


def test_what_stays_with_a_router_leaves_it_when_it_fails() -> None:
    world = World()
    stay = Stay()
    world.call()
    assert {world.call(stay=stay) for _ in range(5)} == {B}
    world.fail(B)
    assert {world.call(stay=stay) for _ in range(5)} == {C}


def test_routers_come_and_go_and_what_is_in_flight_ends_first() -> None:
    world = World(A, B)
    _, on_a = world.began(only=A)
    world.call(only=B)
    assert world.balance.replace([B, C]) == []
    assert {world.call() for _ in range(6)} == {B, C}
    on_a.end(b"answer")
    assert world.balance.replace([B, C]) == [A]
    assert world.balance.replace([]) == []  # never none
    _, on_b = world.began(only=B)
    assert world.balance.replace([C]) == []
    assert world.balance.replace([B, C]) == []  # it is back
    on_b.end(b"answer")
    assert world.balance.replace([A]) == [B, C]
    assert world.balance.targets == (A,)


def test_clients_do_not_all_begin_with_the_same_router() -> None:
    first = {Balance((A, B, C), lambda: 0.0).route().begin() for _ in range(100)}
    assert first == {A, B, C}


def test_a_watch_begins_with_a_call_and_ends_when_there_are_none() -> None:
    world = World()
    assert [world.balance.begin_watch() for _ in range(3)] == [True, False, False]
    _, route = world.began()
    world.now += 10 * WATCHED_SECONDS
    assert world.balance.go_on_watching()  # a call is in flight
    world.check(B)
    route.end(b"answer")
    assert not world.balance.go_on_watching()
    assert world.balance.begin_watch()
    world.call()
    assert world.balance.go_on_watching()


EVENTS = ["begin", "end", "fail", "refuse", "full", "check", "tick"]


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 7)), max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_history_leaves_a_choice_that_is_even_and_avoids_who_failed(history: list[tuple[str, int]]) -> None:
    world = World()
    in_flight: list[tuple[Target, Route]] = []
    ends: dict[str, Any] = {"end": b"answer", "fail": LOST, "refuse": REFUSED, "full": Overloaded("full")}
    for what, n in history:
        if what == "begin":
            in_flight.append(world.began())
        elif what == "tick":
            world.now += 0.1 * n
        elif what == "check":
            for target in world.balance.due():
                world.check(target, LOST if n % 2 else b"serving")
        elif in_flight:
            _, route = in_flight.pop(n % len(in_flight))
            route.end(ends[what])
    for target, route in in_flight:
        assert target in world.balance.targets
        route.end(b"answer")
    world.now += 60.0
    for target in world.balance.due():
        world.check(target)
    assert world.balance.due() == []
    taken = [world.began()[0] for _ in range(30)]
    assert all(taken.count(target) == 10 for target in (A, B, C))
