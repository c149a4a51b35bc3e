"""The view: only ready holders are chosen, suspects recover, and the rows in flight always add up."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.experts.errors import Unavailable, VersionGone
from expertmesh.router.fanout.replica_view import READY, SUSPECT_REPORTS, Replica, View

OLD, NEW = ("l/e", "v1-a"), ("l/e", "v2-b")
STATES = [READY, "starting", "restarting", "unresponsive", "hung", "draining", "failed"]


def replica(name: str, *holds: tuple[str, str], incarnation: str = "1", state: str = READY) -> Replica:
    return Replica(name, ("l/e",), incarnation, frozenset(holds), state)


def view_of(*replicas: Replica, seed: int = 0) -> View:
    view = View(random.Random(seed))
    view.update(replicas)
    return view


def test_only_ready_holders_of_exactly_this_version_are_chosen() -> None:
    view = view_of(replica("a", OLD), replica("b", NEW), *(replica(state, OLD, state=state) for state in STATES[1:]))
    assert {view.choose([OLD]).id for _ in range(50)} == {"a"}
    assert {view.choose([NEW]).id for _ in range(50)} == {"b"}
    assert view.holds("a", *OLD)
    assert not view.holds("a", *NEW)
    assert not any(view.holds(state, *OLD) for state in STATES[1:])


def test_the_error_says_why_no_replica_can_be_chosen() -> None:
    with pytest.raises(Unavailable, match="no replica of l/e is ready; retry"):
        view_of().choose([OLD])
    with pytest.raises(Unavailable, match="no replica of l/e is ready; retry"):
        view_of(replica("a", OLD, state="restarting")).choose([OLD])
    hung = replace(replica("a", OLD, state="hung"), problem="l/other has not returned for 9 s")
    with pytest.raises(Unavailable, match=r"no replica of l/e is ready \(l/other has not returned for 9 s\); retry"):
        view_of(hung, replica("b", OLD, state="restarting")).choose([OLD])
    with pytest.raises(VersionGone, match="no replica holds l/e v1-a any more"):
        view_of(replica("a", NEW)).choose([OLD])
    with pytest.raises(Unavailable, match="every replica of l/e is down or restarting"):
        view_of(replica("a", OLD)).choose([OLD], exclude={"a"})


def test_the_less_busy_of_two_is_chosen_and_ties_alternate() -> None:
    view = view_of(replica("a", OLD), replica("b", OLD))
    counted = Counter(view.choose([OLD]).id for _ in range(200))
    assert min(counted["a"], counted["b"]) > 50
    view.sent("a", 3)
    assert {view.choose([OLD]).id for _ in range(50)} == {"b"}
    view.sent("b", 5)
    assert {view.choose([OLD]).id for _ in range(50)} == {"a"}


@given(loads=st.lists(st.integers(0, 20), min_size=2, max_size=6, unique=True), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_busier_of_two_drawn_is_never_chosen(loads: list[int], seed: int) -> None:
    view = view_of(*(replica(str(number), OLD) for number in range(len(loads))), seed=seed)
    for number, load in enumerate(loads):
        view.sent(str(number), load)
    chosen = Counter(view.choose([OLD]).id for _ in range(300))
    busiest = str(max(range(len(loads)), key=lambda number: loads[number]))
    assert busiest not in chosen
    assert len(chosen) == len(loads) - 1  # every other replica is the less busy one of some draw


def test_a_suspect_recovers_after_two_ready_reports() -> None:
    a, b = replica("a", OLD), replica("b", OLD)
    view = view_of(a, b)
    view.failed("a")
    for _ in range(SUSPECT_REPORTS - 1):
        assert {view.choose([OLD]).id for _ in range(20)} == {"b"}
        assert [shown.state for shown in view.replicas()] == ["suspect", READY]
        view.update([a, b])
    view.update([replica("a", OLD, state="restarting"), b])  # not a ready report
    view.update([a, b])
    assert view.holds("a", *OLD)


def test_another_failure_starts_over_and_a_new_incarnation_is_not_suspect() -> None:
    a = replica("a", OLD)
    view = view_of(a)
    view.failed("a")
    view.update([a])
    view.failed("a")
    view.update([a])
    assert not view.holds("a", *OLD)
    view.failed("a")
    view.update([replica("a", OLD, incarnation="2")])
    assert view.holds("a", *OLD)
    view.failed("unknown")
    assert [shown.id for shown in view.replicas()] == ["a"]


class Rows(RuleBasedStateMachine):
    """Reports arrive in any order while rows are in flight."""

    @initialize(seed=st.integers(0, 9))
    def start(self, seed: int) -> None:
        self.view = View(random.Random(seed))
        self.reported: dict[str, Replica] = {}
        self.sent: list[tuple[str, int]] = []

    @rule(names=st.sets(st.sampled_from("abc")), incarnation=st.sampled_from("12"), state=st.sampled_from(STATES))
    def report(self, names: set[str], incarnation: str, state: str) -> None:
        self.reported = {name: replica(name, OLD, incarnation=incarnation, state=state) for name in sorted(names)}
        self.view.update(self.reported.values())

    @rule(rows=st.integers(1, 9), exclude=st.sets(st.sampled_from("abc")))
    def send(self, rows: int, exclude: set[str]) -> None:
        try:
            name = self.view.choose([OLD], exclude=exclude).id
        except (Unavailable, VersionGone):
            return
        assert name not in exclude
        assert self.reported[name].state == READY
        assert self.view.holds(name, *OLD)
        self.view.sent(name, rows)
        self.sent.append((name, rows))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), lost=st.booleans())
    def return_rows(self, data: Any, lost: bool) -> None:
        name, rows = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        self.view.sent(name, -rows)
        if lost:
            self.view.failed(name)

    @invariant()
    def rows_add_up(self) -> None:
        if not hasattr(self, "reported"):
            return
        expected = {name: sum(rows for sent, rows in self.sent if sent == name) for name in self.reported}
        assert self.view.rows_in_flight() == expected

    def teardown(self) -> None:
        if not hasattr(self, "reported"):
            return
        for name, rows in self.sent:
            self.view.sent(name, -rows)
        self.view.update([replica(name) for name in "abc"])
        assert self.view.rows_in_flight() == dict.fromkeys("abc", 0)


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=80, deadline=None)
