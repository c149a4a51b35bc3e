"""How many replicas: more where rows wait, fewer where one can be spared, within bounds, and never to and fro."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from expertmesh import Autoscale
from expertmesh.cluster.placement.autoscale import Autoscaler, Decision, Load

RULE = Autoscale(min=1, max=8, target_queue_ms=50, up_after=5, down_after=20)
SLOW = Load(queue_ms=80.0, busy=1.9, ready=2, wanted=2)
IDLE = Load(queue_ms=0.0, busy=0.0, ready=2, wanted=2)


def told(load: Load, seconds: int, rule: Autoscale = RULE, start: int = 0) -> dict[int, Decision]:
    """The decisions, by their second, of an autoscaler that is told one load again and again."""
    scaler = Autoscaler()
    ticks = {second: scaler.tick(second, {"l/e": rule}, {"l/e": load}) for second in range(start, start + seconds)}
    return {second: decisions[0] for second, decisions in ticks.items() if decisions}


def test_more_replicas_once_rows_have_waited_too_long_for_a_while() -> None:
    assert list(told(SLOW, 8)) == [5]
    decision = told(SLOW, 8)[5]
    assert (decision.group, decision.before, decision.wanted) == ("l/e", 2, 4)
    assert decision.reason == "for 5 s rows have waited more than 50 ms, now 80 ms"


def test_the_excess_says_how_many_and_at_most_twice_as_many() -> None:
    many = Load(queue_ms=60.0, busy=5.0, ready=5, wanted=5)
    assert told(many, 6)[5].wanted == 6
    assert told(replace(many, queue_ms=51.0), 6)[5].wanted == 6
    assert told(replace(many, queue_ms=80.0), 6)[5].wanted == 8
    assert told(replace(SLOW, queue_ms=math.inf), 6)[5].wanted == 4


def test_a_peak_that_passes_changes_nothing() -> None:
    scaler = Autoscaler()
    for second in range(30):
        load = SLOW if second % 5 else replace(SLOW, queue_ms=40.0)
        assert not scaler.tick(second, {"l/e": RULE}, {"l/e": load})


def test_one_fewer_once_it_could_be_spared_for_longer() -> None:
    decisions = told(IDLE, 22)
    assert list(decisions) == [20]
    assert (decisions[20].before, decisions[20].wanted) == (2, 1)
    assert decisions[20].reason == "for 20 s rows have waited little, now 0 ms, and 0.0 of 2 replicas are busy"


def test_none_is_spared_whose_work_the_others_could_not_do() -> None:
    assert not told(Load(queue_ms=1.0, busy=1.6, ready=3, wanted=3), 60)  # 0.8 of two
    assert not told(Load(queue_ms=20.0, busy=1.0, ready=3, wanted=3), 60)  # rows would wait 40 ms, of 50
    assert told(Load(queue_ms=10.0, busy=1.0, ready=3, wanted=3), 60)


def test_nothing_is_decided_while_a_change_is_under_way() -> None:
    assert not told(replace(SLOW, ready=1), 60)
    assert not told(replace(IDLE, ready=3), 60)
    assert not told(Load(queue_ms=0.0, busy=0.0, ready=0, wanted=2), 60)


def test_a_rule_that_was_narrowed_holds_at_once() -> None:
    decision = told(replace(IDLE, wanted=9), 1)[0]
    assert (decision.wanted, decision.reason) == (8, "autoscale allows 1 to 8")
    assert told(replace(IDLE, wanted=2), 1, replace(RULE, min=3))[0].wanted == 3


def test_a_decision_that_was_not_carried_out_is_made_again_after_as_long() -> None:
    assert list(told(SLOW, 20)) == [5, 11, 17]


def test_a_group_that_comes_back_starts_anew() -> None:
    scaler = Autoscaler()
    for second in range(5):
        assert not scaler.tick(second, {"l/e": RULE}, {"l/e": SLOW})
    assert not scaler.tick(5, {}, {"l/e": SLOW})
    assert not scaler.tick(6, {"l/e": RULE}, {"l/e": SLOW})


rules = st.builds(
    lambda low, more, target, up, down: Autoscale(
        min=low, max=low + more, target_queue_ms=target, up_after=up, down_after=down
    ),
    st.integers(1, 5), st.integers(0, 20), st.floats(1, 1000), st.floats(0.1, 20), st.floats(0.1, 100),
)  # fmt: skip
loads = st.builds(
    lambda queue, busy, ready, wanted: Load(queue_ms=queue, busy=busy * ready, ready=ready, wanted=wanted),
    st.floats(0, 1e5) | st.just(math.inf), st.floats(0, 1), st.integers(0, 30), st.integers(1, 30),
)  # fmt: skip


@given(rules, st.lists(loads, max_size=60), st.floats(0.1, 30))
def test_never_outside_the_bounds_and_never_more_than_twice_as_many(
    rule: Autoscale, told: list[Load], step: float
) -> None:
    scaler = Autoscaler()
    for number, load in enumerate(told):
        for decision in scaler.tick(number * step, {"l/e": rule}, {"l/e": load}):
            assert rule.min <= decision.wanted <= rule.max
            assert decision.wanted != decision.before == load.wanted
            if rule.min <= load.wanted <= rule.max:
                assert load.wanted - 1 <= decision.wanted <= 2 * load.wanted
                assert load.ready == load.wanted


@given(rules, loads, st.floats(1, 100), st.floats(0, 1))
def test_more_load_never_means_fewer_replicas(rule: Autoscale, less: Load, times: float, rest: float) -> None:
    """Told a load or a greater one for as long, the greater one leads to as many replicas or more, at every tick."""
    assume(rule.min <= less.wanted <= rule.max)
    more = replace(less, queue_ms=less.queue_ms * times, busy=less.busy + rest * (less.ready - less.busy))
    one, other = Autoscaler(), Autoscaler()
    for tick in range(60):
        low = one.tick(tick * rule.up_after / 3, {"l/e": rule}, {"l/e": less})
        high = other.tick(tick * rule.up_after / 3, {"l/e": rule}, {"l/e": more})
        wanted = [decided[0].wanted if decided else less.wanted for decided in (low, high)]
        if wanted != [less.wanted] * 2:
            assert wanted[0] <= wanted[1]
            break


@given(
    st.dictionaries(st.text("abc", min_size=1), st.tuples(rules, st.lists(loads, min_size=8, max_size=8))), st.randoms()
)
def test_the_order_of_experts_changes_nothing(groups, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(groups)
    random.shuffle(shuffled)
    scalers = Autoscaler(), Autoscaler()
    alone = {name: Autoscaler() for name in groups}
    for tick in range(8):
        told = [
            scaler.tick(tick * 10.0, {name: groups[name][0] for name in names}, {n: groups[n][1][tick] for n in names})
            for scaler, names in zip(scalers, (list(groups), shuffled), strict=True)
        ]
        assert told[0] == told[1]
        single = [
            decision
            for name in sorted(groups)
            for decision in alone[name].tick(tick * 10.0, {name: groups[name][0]}, {name: groups[name][1][tick]})
        ]
        assert told[0] == single


@dataclass
class Queues:
    """Groups of replicas as queues of rows: what they cannot compute in a second waits; new replicas take a while.

    `service` is the seconds that a row takes; where all is computed, rows wait as in front of a single server.
    """

    service: float
    starts: float = 4.0
    wanted: dict[str, int] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)
    backlog: dict[str, float] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)

    def second(self, now: float, arrivals: Mapping[str, float]) -> dict[str, Load]:
        """Serve for a second what arrives in it; returns the loads."""
        loads = {}
        for group, rate in arrivals.items():
            wanted = self.wanted.setdefault(group, 1)
            ready = self.ready.setdefault(group, 1)
            if wanted < ready or (wanted > ready and now >= self._due[group]):
                ready = self.ready[group] = wanted
            capacity = ready / self.service
            rows = self.backlog.get(group, 0.0) + rate
            served = min(rows, capacity)
            self.backlog[group] = rows - served
            busy = served * self.service
            idle = max(ready - busy, 1e-3)
            waits = self.backlog[group] / capacity + self.service * busy / ready / idle
            loads[group] = Load(queue_ms=1000 * waits, busy=busy, ready=ready, wanted=wanted)
        return loads

    def scale(self, now: float, decision: Decision) -> None:
        """Start or end replicas."""
        self.wanted[decision.group] = decision.wanted
        self._due[decision.group] = now + self.starts


def course(rule: Autoscale, queues: Queues, rates: list[Mapping[str, float]]) -> dict[str, list[int]]:
    """The wanted replicas of each group in every second of a load."""
    scaler, wanted = Autoscaler(), {group: list[int]() for group in rates[0]}
    for now, arrivals in enumerate(rates):
        loads = queues.second(now, arrivals)
        for decision in scaler.tick(now, dict.fromkeys(arrivals, rule), loads):
            queues.scale(now, decision)
        for group in arrivals:
            wanted[group].append(queues.wanted[group])
    return wanted


def directions(counts: list[int]) -> list[int]:
    """The signs of the changes, without repetitions."""
    signs = [(after > before) - (after < before) for before, after in pairwise(counts)]
    moved = [sign for sign in signs if sign]
    return [sign for number, sign in enumerate(moved) if not number or sign != moved[number - 1]]


@given(
    st.floats(0.001, 0.5), st.floats(0.01, 18), st.integers(1, 20),
    st.sampled_from([Autoscale(max=20, target_queue_ms=target, up_after=up, down_after=down)
                     for target in (5, 50, 500) for up in (1, 5) for down in (10, 30)]),
)  # fmt: skip
def test_under_a_constant_load_the_number_settles_with_one_change_of_direction_at_most(
    service: float, offered: float, started: int, rule: Autoscale
) -> None:
    queues = Queues(service, wanted={"l/e": started}, ready={"l/e": started})
    counts = course(rule, queues, [{"l/e": offered / service}] * 1600)["l/e"]
    assert len(directions(counts)) <= 2
    assert len(set(counts[-400:])) == 1
    assert queues.second(1600.0, {"l/e": offered / service})["l/e"].queue_ms <= rule.target_queue_ms or counts[-1] == 20


def test_a_zipf_load_grows_the_hot_expert_and_shrinks_it_afterwards() -> None:
    names = [f"l/e{number}" for number in range(8)]
    zipf = {name: 1 / (rank + 1) ** 1.2 for rank, name in enumerate(names)}
    peak = {name: 250.0 * share for name, share in zipf.items()}  # a replica computes 100 rows a second
    calm = {name: 20.0 * share for name, share in zipf.items()}
    counts = course(RULE, Queues(service=0.01), [calm] * 30 + [peak] * 300 + [calm] * 300)
    at_peak = {name: wanted[329] for name, wanted in counts.items()}
    assert 3 <= at_peak["l/e0"] <= 5
    assert list(at_peak.values()) == sorted(at_peak.values(), reverse=True)
    assert at_peak["l/e7"] == 1
    assert {wanted[-1] for wanted in counts.values()} == {1}
    assert directions(counts["l/e0"]) == [1, -1]
