"""Admission: rows never exceed the limits, no layer starves the others, and no call is let in to wait for nothing."""

from __future__ import annotations

import heapq
import itertools
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.experts.errors import Overloaded, TooLarge
from expertmesh.router.request.admission import ALWAYS, MAX_CALLS, Admission, CallAdmission


class Admitting(RuleBasedStateMachine):
    @initialize(max_rows=st.integers(1, 40))
    def start(self, max_rows: int) -> None:
        self.admission = Admission(max_rows)
        self.limit = max(1, int(max_rows * 0.75))
        self.held: list[tuple[str, int, AbstractContextManager[None]]] = []

    def rows(self, layer: str | None = None) -> int:
        return sum(rows for name, rows, _ in self.held if layer in (None, name))

    @rule(layer=st.sampled_from("abc"), rows=st.integers(0, 45))
    def admit(self, layer: str, rows: int) -> None:
        counted = max(1, rows)
        admitted = self.admission.admit(layer, rows)
        fits = self.rows(layer) + counted <= self.limit and self.rows() + counted <= self.admission.max_rows
        if counted > self.limit:
            with pytest.raises(TooLarge, match="max_rows_in_flight"):
                admitted.__enter__()
        elif not fits:
            with pytest.raises(Overloaded) as caught:
                admitted.__enter__()
            assert caught.value.retry_after > 0
        else:
            admitted.__enter__()
            self.held.append((layer, counted, admitted))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), fails=st.booleans())
    def release(self, data: Any, fails: bool) -> None:
        _, _, admitted = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        arguments = (ValueError, ValueError("the request failed"), None) if fails else (None, None, None)
        assert not admitted.__exit__(*arguments)  # an error propagates to the caller

    @invariant()
    def the_count_is_right(self) -> None:
        if not hasattr(self, "held"):
            return
        assert self.admission.rows == self.rows() <= self.admission.max_rows
        assert self.admission.by_layer() == {name: self.rows(name) for name, _, _ in self.held}


TestAdmitting = Admitting.TestCase
TestAdmitting.settings = settings(max_examples=60, deadline=None)


@given(max_rows=st.integers(4, 100_000))
@settings(max_examples=30)
def test_a_full_layer_leaves_room_for_others(max_rows: int) -> None:
    admission = Admission(max_rows)
    with admission.admit("slow", int(max_rows * 0.75)):
        with pytest.raises(Overloaded, match="in layer slow"), admission.admit("slow", 1):
            pass
        with admission.admit("other", 1):
            assert admission.by_layer()["other"] == 1
    assert (admission.rows, admission.by_layer()) == (0, {})


class Server:
    """A layer that computes `lanes` calls at a time, each for `seconds`; the test moves the clock."""

    def __init__(self, lanes: int, seconds: float, layer: str = "l") -> None:
        self.admission = CallAdmission()
        self.layer, self.seconds = layer, seconds
        self.free = [0.0] * lanes
        self.ends: list[tuple[float, int, float, int]] = []
        self.answered: list[tuple[float, float]] = []
        self.refused: list[Overloaded] = []
        self._numbers = itertools.count()

    def arrive(self, now: float, timeout: float) -> None:
        self.until(now)
        try:
            self.admission.check(self.layer, timeout)
        except Overloaded as error:
            self.refused.append(error)
            return
        end = max(now, heapq.heappop(self.free)) + self.seconds
        heapq.heappush(self.free, end)
        heapq.heappush(self.ends, (end, next(self._numbers), now, self.admission.began(self.layer)))

    def until(self, now: float) -> None:
        while self.ends and self.ends[0][0] <= now:
            end, _, began, ahead = heapq.heappop(self.ends)
            self.admission.ended(self.layer, ahead, end - began, end)
            self.answered.append((end, end - began))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("overload", [2.0, 3.0, 10.0])
@pytest.mark.parametrize("timeout", [0.5, 2.0, 30.0])
def test_in_an_overload_all_that_is_let_in_is_in_time_and_nothing_idles(
    lanes: int, overload: float, timeout: float
) -> None:
    server, capacity = Server(lanes, 0.001 * lanes), 1000.0
    for number in range(int(10 * capacity * overload)):
        server.arrive(number / capacity / overload, timeout)
    server.until(1e9)
    assert all(took < timeout for end, took in server.answered if end > 2.0)
    assert sum(took >= timeout for _, took in server.answered) < 0.2 * overload * capacity  # before anything is known
    assert sum(1.0 < end <= 10.0 for end, _ in server.answered) > 0.99 * 9 * capacity
    assert all(0 < error.retry_after <= 5 for error in server.refused)
    assert server.admission.calls == 0
    server.arrive(1e9, timeout)  # at once after it
    assert server.admission.calls == 1


@pytest.mark.parametrize("before", [1, 10, 100])
@pytest.mark.parametrize("seconds", [0.001, 1.0, 10.0])
def test_where_calls_do_not_wait_for_each_other_a_burst_is_not_refused(before: int, seconds: float) -> None:
    server = Server(20_000, seconds)
    for number in range(200 * before):
        server.arrive(number * seconds / before, 30.0)
    for _ in range(10_000):
        server.arrive(200 * seconds, 60.0)
    assert server.refused == []


def test_a_burst_is_let_in_as_far_as_its_deadline_allows() -> None:
    server = Server(1, 0.001)
    for number in range(3000):
        server.arrive(0.0005 * number, 30.0)  # as much as twice the capacity: now it is known
    for _ in range(10_000):
        server.arrive(1.5, 60.0)
    assert not server.refused
    for _ in range(10_000):
        server.arrive(1.5, 30.0)
    assert server.refused


def test_a_layer_that_hangs_and_one_that_has_become_quicker_do_not_stay_refused() -> None:
    server = Server(1, 5.0)
    for number in range(100):
        server.arrive(1.0 * number, 60.0)
    assert server.refused
    server.until(1000.0)
    server.refused.clear()
    server.seconds = 0.001
    for number in range(10_000):
        server.arrive(1000.0 + number * 0.002, 10.0)
    assert server.refused == []


def test_a_slow_layer_says_nothing_of_another_and_few_calls_say_nothing() -> None:
    admission = CallAdmission()
    admission.began("slow")
    for number in range(1000):
        admission.began("slow")
        admission.ended("slow", number % 50, 1.0 + number % 50, 1.0 + number)  # a second for each that was there before
    admission.ended("slow", 0, None, 1001.0)
    for _ in range(ALWAYS - 1):
        admission.began("slow")
    admission.check("slow", 0.001)
    assert admission.only_layer() == "slow"
    admission.began("slow")
    with pytest.raises(Overloaded, match="calls of layer slow are in flight"):
        admission.check("slow", 10.0)
    admission.check("other", 0.001)
    admission.began("other")
    assert admission.only_layer() == ""


def test_calls_are_bounded_in_all() -> None:
    admission = CallAdmission()
    for number in range(MAX_CALLS):
        admission.began(f"l{number % 7}")
    with pytest.raises(Overloaded, match="in flight already"):
        admission.check("l8", 1e9)
    admission.ended("l0", 0, None, 1.0)
    admission.check("l8", 1e9)


def test_a_burst_that_makes_its_first_calls_slow_is_not_taken_for_an_overload() -> None:
    """All arrive before the first is answered, so that calls which found few others in flight take long."""
    admission, ahead = CallAdmission(), []
    for number in range(100):
        admission.ended("l", admission.began("l"), 0.001, number * 0.01)
    for _ in range(2000):
        ahead.append(admission.began("l"))
    for number, found in enumerate(ahead[:1000]):
        admission.ended("l", found, 1.0 + number * 0.001, 2.0 + number * 0.001)
        admission.check("l", 20.0)  # a second of work is left
