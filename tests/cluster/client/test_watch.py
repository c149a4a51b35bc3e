"""The watch over routers as a flow: who is checked when, whose connection is cut, when names are looked up, the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from expertmesh.cluster.client.retry import Answer, Attempt, Beside, Cut, Pause, Step, Work, drive
from expertmesh.cluster.client.routers.balance import SILENT_SECONDS, WATCHED_SECONDS, Balance, Route, Target
from expertmesh.cluster.client.routers.watch import LOOK_SECONDS, LOOK_UP_SECONDS, Watch
from expertmesh.experts.errors import DeadlineExceeded, RouterUnavailable

A, B, C = (Target(address=f"{name}:1", connect_to=f"{name}:1") for name in "abc")


class World:
    """Routers A and B, which answer checks unless they are `frozen`, and a clock that moves with the pauses."""

    def __init__(self, *targets: Target, look_up: Callable[[], list[Target]] | None = None) -> None:
        self.now = 0.0
        self.frozen: set[Target] = set()
        self.checked: list[Target] = []
        self.cut: list[Target] = []
        self.balance = Balance(targets or (A, B), lambda: self.now, shuffle=lambda targets: None)
        self.watch = Watch(routers=self.balance, clock=lambda: self.now, check=self._check, look_up=look_up)
        self.flow = self.watch.run()

    def _check(self, target: Target) -> Attempt:
        return Attempt("/Check", b"", 1.0, self.balance.check(target))

    def call(self, target: Target) -> Route:
        route = self.balance.route(only=target)
        route.begin()
        return route

    def run(self, seconds: float) -> bool:
        """Watch for some time; whether the watch goes on."""
        until, answer = self.now + seconds, None
        while self.now < until:
            try:
                answer = self.perform(self.flow.send(answer))
            except StopIteration:
                return False
        return True

    def perform(self, step: Step) -> Answer:
        if isinstance(step, Attempt):
            target = step.route.begin()
            self.checked.append(target)
            answer: Answer = DeadlineExceeded("no answer") if target in self.frozen else b"serving"
            step.route.end(answer)
            return answer
        if isinstance(step, Work):
            return step.action()
        if isinstance(step, Pause):
            self.now += step.seconds
        elif isinstance(step, Beside):
            drive(step.flow, self.perform)
        else:
            assert isinstance(step, Cut)
            self.cut.append(step.target)
        return None


def taken_by(world: World) -> Target:
    """The router that takes a call, which is answered at once."""
    route = world.balance.route()
    target = route.begin()
    route.end(b"answer")
    return target


def test_a_router_that_owes_answers_and_is_frozen_is_cut_and_checked_until_it_answers() -> None:
    world = World()
    world.frozen = {A}
    stuck = world.call(A)
    assert world.run(SILENT_SECONDS - LOOK_SECONDS)
    assert world.checked == []
    assert world.run(2 * LOOK_SECONDS)
    assert (world.checked, world.cut) == ([A], [A])
    stuck.end(RouterUnavailable("the connection was closed"))
    assert stuck.losses == 0
    again = world.call(B)
    assert world.run(10.0)
    assert 3 <= world.checked.count(A) <= 8
    assert [taken_by(world) for _ in range(3)] == [B, B, B]
    world.frozen.clear()
    assert world.run(10.0)
    assert taken_by(world) == A  # B has a call in flight
    again.end(b"answer")


def test_a_router_that_is_slow_is_checked_and_keeps_its_calls() -> None:
    world = World()
    slow = world.call(A)
    assert world.run(20.0)
    assert len(world.checked) >= 10
    assert world.cut == []
    slow.end(b"answer")


def test_where_all_are_frozen_no_call_is_cut_off() -> None:
    world = World()
    world.frozen = {A, B}
    calls = [world.call(A), world.call(B)]
    assert world.run(30.0)
    assert world.cut == [A]  # as long as B might have taken its calls
    for call in calls:
        call.end(RouterUnavailable("lost"))


def test_a_watch_ends_after_the_last_call() -> None:
    world = World()
    assert world.balance.begin_watch()
    world.call(A).end(b"answer")
    assert world.run(WATCHED_SECONDS - LOOK_SECONDS)
    assert not world.run(2 * LOOK_SECONDS)
    assert world.balance.begin_watch()


def test_a_watch_that_is_ended_from_outside_can_begin_again() -> None:
    world = World()
    assert world.balance.begin_watch()
    world.call(A)
    assert world.run(1.0)
    world.flow.close()
    assert world.balance.begin_watch()


def test_names_are_looked_up_again_and_what_is_gone_is_closed_once_its_calls_have_ended() -> None:
    found = [A, B]
    world = World(look_up=lambda: found)
    on_b = world.call(B)
    found = [A, C]
    assert world.run(2 * LOOK_SECONDS)
    assert set(world.balance.targets) == {A, C}
    assert world.run(2 * LOOK_UP_SECONDS)
    assert world.cut == []
    on_b.end(b"answer")
    world.call(C)
    assert world.run(LOOK_UP_SECONDS)
    assert world.cut == [B]


@pytest.mark.parametrize(
    ("routers", "named", "needed"), [((A,), False, False), ((A,), True, True), ((A, B), False, True)]
)
def test_one_router_needs_no_watch(routers: tuple[Target, ...], named: bool, needed: bool) -> None:
    assert World(*routers, look_up=(lambda: [A]) if named else None).watch.is_needed is needed
