"""Turns of autoscaling: what routers count becomes decisions, and what was decided is told with its reason."""

from __future__ import annotations

from expertmesh import Autoscale, Expert, Layer, gates
from expertmesh.cluster.placement.autoscale import Decision
from expertmesh.cluster.placement.autoscale_turns import Autoscaling, rules_of
from expertmesh.router.fanout.replica_view import READY, Replica
from expertmesh.router.fanout.telemetry import ReplicaLoad, Scaled

RULE = Autoscale(max=4, target_queue_ms=50, up_after=5, down_after=20)
EXPERTS = {
    "hot": Expert("numpy:sin", autoscale=RULE),
    "a": Expert("numpy:cos", pack="p", autoscale=RULE),
    "b": Expert("numpy:tan", pack="p", autoscale=RULE),
    "fixed": Expert("numpy:exp", replicas=2),
}
RULES = rules_of([Layer("l", gates.Fixed([1.0] * 4), EXPERTS)])


class Course:
    """Autoscaling of `EXPERTS`, told every second what one router has counted of replicas that are all ready."""

    def __init__(self) -> None:
        self.autoscaling = Autoscaling()
        self.autoscaling.rules = RULES
        self.ids = ["l/hot#0", "l/p#0", "l/fixed#0", "l/fixed#1"]
        self.totals = dict.fromkeys(self.ids, ReplicaLoad())
        self.now = 0.0

    def seconds(self, count: int, waits: dict[str, float], *, ready: bool = True) -> list[Decision]:
        """The decisions of some seconds in which each replica gets 100 rows, which wait for so many seconds."""
        decided = []
        for _ in range(count):
            for id, wait in waits.items():
                old = self.totals[id]
                self.totals[id] = ReplicaLoad(old.rows + 100, 0, old.waited + 100 * wait, old.computing + min(wait, 1))
            self.autoscaling.reported("router-0", "1", dict(self.totals))
            replicas = [Replica(id, state=READY if ready else "starting") for id in self.ids]
            decided += self.autoscaling.turn(self.now, self.ids, replicas)
            self.now += 1.0
        return decided


def test_the_group_whose_rows_wait_is_scaled_and_told_with_its_reason() -> None:
    course = Course()
    decided = course.seconds(10, {"l/hot#0": 1.0, "l/fixed#0": 1.0})
    assert [(decision.group, decision.wanted) for decision in decided] == [("l/hot", 2)]
    assert course.autoscaling.scaled["l/hot"] == Scaled(1, 1, 0, decided[0].reason)
    assert "rows have waited more than 50 ms" in decided[0].reason
    assert course.autoscaling.scaled.keys() == {"l/hot", "l/p"}


def test_what_is_carried_out_is_told_and_taken_back_when_it_is_calm() -> None:
    course = Course()
    course.seconds(10, {"l/hot#0": 1.0})
    course.ids.append("l/hot#1")
    course.totals["l/hot#1"] = ReplicaLoad()
    decided = course.seconds(40, {"l/hot#0": 0.0, "l/hot#1": 0.0})
    assert {(decision.group, decision.wanted) for decision in decided} == {("l/hot", 1)}
    scaled = course.autoscaling.scaled["l/hot"]
    assert (scaled.wanted, scaled.up) == (2, 1)
    assert scaled.down >= 1


def test_a_pack_is_one_group() -> None:
    course = Course()
    assert [decision.group for decision in course.seconds(10, {"l/p#0": 1.0})] == ["l/p"]


def test_nothing_is_decided_where_replicas_are_not_ready() -> None:
    assert not Course().seconds(30, {"l/hot#0": 1.0}, ready=False)


def test_what_is_asked_for_is_the_last_decision_and_each_has_a_number_of_its_own() -> None:
    course = Course()
    course.seconds(10, {"l/hot#0": 1.0})
    assert course.autoscaling.asked == {"l/hot": (1, 2)}
    course.seconds(6, {"l/hot#0": 1.0})  # it was not carried out: asked for again
    assert course.autoscaling.asked == {"l/hot": (2, 2)}


def test_turns_within_a_tick_measure_nothing() -> None:
    autoscaling = Autoscaling()
    autoscaling.rules = RULES
    assert autoscaling.turn(0.0, [], []) == []
    told = autoscaling.scaled
    assert told.keys() == {"l/hot", "l/p"}
    autoscaling.rules = {}
    assert autoscaling.turn(0.5, [], []) == []
    assert autoscaling.scaled is told
    assert autoscaling.turn(1.0, [], []) == []
    assert autoscaling.scaled == {}


def test_a_pack_has_one_rule() -> None:
    assert RULES == {"l/hot": RULE, "l/p": RULE}
