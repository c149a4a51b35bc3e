"""The report: percentiles against their definition, consistent counts, and rates that show a growing queue."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.bench.report import PER_MILLE, expert_rates, make_report, percentiles, summarise, timeline
from expertmesh.cluster.bench.samples import NOT_SENT, OK, Counters, Measured, Sample, counters_of

TIMES = st.floats(0.0, 30.0)


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    """Requests to two layers, each sent after it was due and done after it was sent."""
    requests = []
    for _ in range(draw(st.integers(0, 40))):
        due, late, took = draw(st.floats(-10.0, 30.0)), draw(TIMES), draw(TIMES)
        code = draw(st.sampled_from([OK, OK, "UNAVAILABLE", NOT_SENT]))
        layer, rows, epoch = draw(st.sampled_from("ab")), draw(st.integers(1, 9)), draw(st.integers(1, 3))
        requests.append(Sample(layer, rows, due, due + late, due + late + took, code, draw(st.integers(0, 2)), epoch))
    return requests


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_percentiles_follow_the_nearest_rank_definition(values: list[float]) -> None:
    result = percentiles(values)
    assert result["max"] == max(values)
    for name, share in PER_MILLE.items():
        within = sum(value <= result[name] for value in values)
        below = sum(value < result[name] for value in values)
        assert Fraction(within, len(values)) >= Fraction(share, 1000) > Fraction(below, len(values))


def test_percentiles_of_nothing() -> None:
    assert percentiles([]) == {}
    assert percentiles(range(1, 2001)) == {"p50": 1000, "p90": 1800, "p99": 1980, "p99.9": 1998, "max": 2000}


@given(samples(), st.floats(0.5, 40.0), st.none() | st.floats(0.1, 1e5))
def test_counts_add_up(requests: list[Sample], seconds: float, slo_ms: float | None) -> None:
    report = make_report(Measured(seconds=seconds, samples=requests), ["a", "b"], slo_ms)
    layers = report.layers.values()
    for name in ("due", "sent", "ok", "retries"):
        assert getattr(report.all, name) == sum(getattr(layer, name) for layer in layers)
    assert report.all.due == sum(s.due >= 0 for s in requests) == report.all.ok + sum(report.all.failed.values())
    assert report.all.sent == report.all.due - report.all.failed.get(NOT_SENT, 0)
    assert Counter(report.all.failed) == sum((Counter(layer.failed) for layer in layers), Counter())
    assert sum(report.epochs.values()) == report.all.ok
    assert report.all.achieved == pytest.approx(sum(layer.achieved for layer in layers))
    assert report.all.achieved * seconds <= sum(s.code == OK for s in requests) * 1.000001
    assert sum(item["rows"] for item in report.timeline) == sum(
        s.rows for s in requests if s.code == OK and s.done >= 0
    )
    assert sum(item["failed"] for item in report.timeline) == sum(report.all.failed.values())


def test_latency_counts_from_when_a_request_was_due() -> None:
    summary = summarise([Sample("a", 1, due=1.0, sent=1.5, done=1.75)], 2.0)
    assert summary.latency_ms["p50"] == 750.0


def test_a_constant_latency_is_not_falling_behind_and_a_queue_is() -> None:
    steady = [Sample("a", 4, due=n / 10, sent=n / 10, done=n / 10 + 3.01) for n in range(-40, 100)]
    assert summarise(steady, 10.0).achieved == pytest.approx(10.0, rel=0.02)
    assert summarise(steady, 10.0).goodput_rows == pytest.approx(40.0, rel=0.02)
    queued = [Sample("a", 4, due=n / 10, sent=n / 10, done=n / 5 + 4.01) for n in range(-20, 100)]
    assert summarise(queued, 10.0).achieved == pytest.approx(5.0, rel=0.02)
    assert summarise(queued, 10.0).offered == pytest.approx(10.0)


def test_goodput_excludes_late_answers() -> None:
    requests = [Sample("a", 2, due=0.0, sent=0.0, done=ms / 1000) for ms in (10, 20, 30, 40)]
    summary = summarise(requests, 1.0, slo_ms=25.0)
    assert (summary.goodput_rows, summary.within_slo) == (4.0, 0.5)
    assert (summary.achieved, summary.ok) == (4.0, 4)


def test_versions_and_epochs_that_changed() -> None:
    requests = [Sample("a", 1, 0.0, 0.0, 0.1, epoch=epoch) for epoch in (3, 3, 4)]
    versions = Counter({("a/e0", "v1-x"): 2, ("a/e0", "v2-y"): 1, ("a/gate", "v1-z"): 3})
    report = make_report(Measured(seconds=1.0, samples=requests, versions=versions), ["a"])
    assert report.epochs == {3: 2, 4: 1}
    assert report.versions == {"a/e0": {"v1-x": 2, "v2-y": 1}, "a/gate": {"v1-z": 3}}


def test_rates_of_experts_between_two_readings() -> None:
    before = Counters(at=0.0, router="r", rows={"a/e0": 10, "b/e0": 5})
    after = Counters(at=2.0, router="r", rows={"a/e0": 30, "a/e1": 4, "b/e0": 9, "ab/e0": 9})
    assert expert_rates(before, after, ["a"]) == {"a/e0": 10.0, "a/e1": 2.0}
    assert expert_rates(before, Counters(at=2.0, router="another", rows={"a/e0": 30}), ["a"]) is None
    assert expert_rates(None, after, ["a"]) is None
    assert expert_rates(before, None, ["a"]) is None


def test_counters_of_a_status_document() -> None:
    status = {"layers": {"a": {"experts": {"a/e0": {"rows": 7}, "a/e1": {}}}}, "router": {"incarnation": "r"}}
    assert counters_of(status, 1.5) == Counters(at=1.5, router="r", rows={"a/e0": 7, "a/e1": 0})
    assert counters_of({}, 0.0).rows == {}


def test_a_timeline_has_every_second() -> None:
    requests = [Sample("a", 3, 0.1, 0.1, 2.4), Sample("a", 3, 0.2, 0.2, 0.3), Sample("a", 3, 1.0, 1.0, 1.0, NOT_SENT)]
    rows = timeline(requests)
    assert [item["second"] for item in rows] == [0, 1, 2]
    assert [item["rows"] for item in rows] == [3, 0, 3]
    assert [item["failed"] for item in rows] == [0, 1, 0]
    assert rows[0]["p50_ms"] == pytest.approx(100.0)
    assert rows[0]["p99_ms"] == pytest.approx(2300.0)
    assert rows[1]["p50_ms"] is None
    assert timeline([]) == []


def test_a_load_that_was_interrupted_at_once() -> None:
    report = make_report(Measured(seconds=0.0, interrupted=True), ["a"])
    assert (report.all.due, report.all.offered, report.all.achieved) == (0, 0.0, 0.0)
    assert not any(map(math.isnan, report.all.latency_ms.values()))
