"""What is made of probes: states that follow from what was heard, whatever the order."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.control.replica_health import (
    DEATHS_UNTIL_DEADLY,
    FIRST_REST,
    LONGEST_REST,
    TIMEOUTS_UNTIL_UNRESPONSIVE,
    DeadlyVersions,
    Health,
    Probe,
)
from expertmesh.router.fanout.replica_view import READY, Replica

HELD = frozenset({("l/e", "v1-a")})
REPORT = Replica("r", ("l/e",), "1", HELD, READY)


def health_of(*probes: Probe) -> Health:
    health = Health()
    health.expect({"r": ("l/e",)})
    for probe in probes:
        health.probed("r", probe)
    return health


def state(health: Health) -> str:
    (replica,) = health.replicas()
    return replica.state


DOWN, LATE, UP = Probe(failure="down"), Probe(failure="timeout"), Probe(REPORT)


def test_a_replica_starts_reports_and_is_ready() -> None:
    assert state(health_of()) == "starting"
    assert state(health_of(DOWN, LATE, DOWN, LATE)) == "starting"
    assert health_of(DOWN, UP).replicas() == (REPORT,)


def test_one_that_is_gone_is_restarting_at_once_and_holds_nothing() -> None:
    (replica,) = health_of(UP, DOWN).replicas()
    assert (replica.state, replica.holds, replica.experts) == ("restarting", frozenset(), ("l/e",))
    assert state(health_of(UP, DOWN, UP)) == READY


def test_one_that_is_late_is_believed_to_be_busy_for_a_while() -> None:
    late = [LATE] * (TIMEOUTS_UNTIL_UNRESPONSIVE - 1)
    assert state(health_of(UP, *late)) == READY
    assert state(health_of(UP, *late, LATE)) == "unresponsive"
    assert state(health_of(UP, *late, UP, *late)) == READY
    assert state(health_of(UP, *late, LATE, UP)) == READY
    assert state(health_of(UP, *late, LATE, DOWN)) == "restarting"


def test_one_that_failed_says_why_and_a_restart_may_mend_it() -> None:
    failed = Probe(Replica("r", ("l/e",), "1", state="failed", problem="no such file"))
    (replica,) = health_of(failed).replicas()
    assert (replica.state, replica.problem) == ("failed", "no such file")
    assert state(health_of(failed, LATE, LATE, LATE)) == "failed"
    assert state(health_of(failed, DOWN, UP)) == READY


def test_what_ended_a_replica_is_told_while_it_restarts() -> None:
    hung = Probe(replace(REPORT, state="hung", problem="l/e has not returned for 9 s"))
    (replica,) = health_of(UP, hung, DOWN, LATE).replicas()
    assert (replica.state, replica.problem) == ("restarting", "l/e has not returned for 9 s")
    assert health_of(UP, hung, DOWN, UP).replicas() == (REPORT,)


def test_what_a_replica_holds_is_known_between_probes_but_only_of_the_incarnation_that_said_so() -> None:
    health, new = health_of(UP), ("l/e", "v2-b")
    health.holds("r", "0", *new)
    assert health.replicas()[0].holds == HELD
    health.holds("r", "1", *new)
    assert health.replicas()[0].holds == HELD | {new}
    health.forgets("r", *new)
    health.forgets("r", "l/e", "v9-z")
    assert health.replicas() == (REPORT,)
    health.holds("stranger", "1", *new)
    health.forgets("stranger", *new)
    assert health.replicas() == (REPORT,)


def test_what_is_not_expected_is_forgotten_and_never_heard() -> None:
    health = health_of(UP)
    health.probed("stranger", UP)
    assert len(health.replicas()) == 1
    health.expect({"s": ("l/f",)})
    health.probed("r", UP)
    assert [(replica.id, replica.state) for replica in health.replicas()] == [("s", "starting")]
    health.expect({"r": ("l/e",)})
    assert state(health) == "starting"


def test_what_a_replica_is_for_is_what_is_expected_of_it() -> None:
    health = health_of(UP)
    health.expect({"r": ("l/e", "l/f")})
    assert health.replicas()[0].experts == ("l/e", "l/f")
    assert state(health) == READY
    health.probed("r", UP)
    assert health.replicas()[0].experts == ("l/e", "l/f")


@given(st.lists(st.sampled_from([DOWN, LATE, UP]), max_size=30))
def test_the_state_follows_from_the_last_probes(probes: list[Probe]) -> None:
    (replica,) = health_of(*probes).replicas()
    heard = [probe for probe in probes if probe is not LATE]
    if UP not in probes:
        assert replica.state == "starting"
    elif heard[-1] is DOWN:
        assert (replica.state, replica.holds) == ("restarting", frozenset())
    else:
        late = len(probes) - 1 - max(n for n, probe in enumerate(probes) if probe is UP)
        assert replica.state == ("unresponsive" if late >= TIMEOUTS_UNTIL_UNRESPONSIVE else READY)
        assert replica.holds == HELD


def test_a_replica_that_is_down_waits_where_no_node_has_what_it_reserves() -> None:
    health = health_of(Probe(REPORT), Probe(failure="down", problem="it waits for a node with zone_b=1"))
    (replica,) = health.replicas()
    assert (replica.state, replica.problem) == ("waiting", "it waits for a node with zone_b=1")
    health.probed("r", Probe(failure="down"))
    (replica,) = health.replicas()
    assert (replica.state, replica.problem) == ("restarting", "")


def test_all_were_asked_once_each_has_answered_or_failed() -> None:
    health = Health()
    health.expect({"r": ("l/e",), "s": ("l/e",)})
    assert not health.all_asked()
    health.probed("r", UP)
    assert not health.all_asked()
    health.probed("s", LATE)
    assert health.all_asked()
    health.expect({"r": ("l/e",), "t": ("l/e",)})
    assert not health.all_asked()
    health.expect({"r": ("l/e",)})
    assert health.all_asked()


def test_a_version_that_ended_a_process_once_is_tried_again_at_once_and_after_that_at_growing_intervals() -> None:
    deadly, now = DeadlyVersions(), 100.0
    assert not deadly.died("r", "l/e", "v1-a", now)
    assert not deadly.spared("r", "l/e", "v1-a", now)
    for rest in (FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST):
        assert deadly.died("r", "l/e", "v1-a", now)
        assert deadly.spared("r", "l/e", "v1-a", now + rest - 0.1)
        assert not deadly.spared("s", "l/e", "v1-a", now)
        assert not deadly.spared("r", "l/f", "v1-a", now)
        assert not deadly.spared("r", "l/e", "v2-b", now)
        now += rest
        assert not deadly.spared("r", "l/e", "v1-a", now)
    for _ in range(3000):
        assert deadly.died("r", "l/e", "v1-a", now)
    assert not deadly.spared("r", "l/e", "v1-a", now + LONGEST_REST)


@given(st.lists(st.sampled_from(["died", "loaded"]), max_size=12))
def test_deaths_before_a_version_was_loaded_are_not_held_against_it(happens: list[str]) -> None:
    deadly, deaths = DeadlyVersions(), 0
    for what in happens:
        if what == "died":
            deaths += 1
            assert deadly.died("r", "l/e", "v1-a", 0.0) == (deaths >= DEATHS_UNTIL_DEADLY)
        else:
            deadly.loaded("r", "l/e", "v1-a")
            deaths = 0
        assert deadly.spared("r", "l/e", "v1-a", 0.0) == (deaths >= DEATHS_UNTIL_DEADLY)
