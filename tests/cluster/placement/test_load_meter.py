"""Loads from what routers count: all routers together, since the last measure, and nothing from before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.placement.load_meter import LoadMeter
from expertmesh.router.fanout.telemetry import ReplicaLoad

LONG = 1000.0  # so many seconds that nothing of before is left in an average


def test_a_row_waits_as_long_as_all_rows_together_by_their_number() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    for router, factor in (("router-0", 1), ("router-1", 2)):
        meter.reported(router, "1", {"l/e#0": ReplicaLoad(rows=900, waited=1e6, computing=1e6)})
        counted = ReplicaLoad(rows=900 + 100 * factor, waited=1e6 + 3 * factor, computing=1e6 + 200 * factor)
        meter.reported(router, "1", {"l/e#0": counted, "l/other#0": ReplicaLoad()})
    assert meter.measure(LONG, ["l/e"]) == {"l/e": (pytest.approx(30.0), pytest.approx(0.6))}


def test_the_replicas_of_a_group_are_measured_together() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(), "l/e#1": ReplicaLoad()})
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=10, waited=1.0), "l/e#1": ReplicaLoad(rows=30, waited=3.0)})
    assert meter.measure(LONG, ["l/e"])["l/e"][0] == pytest.approx(100.0)


def test_rows_that_wait_for_what_does_not_return_have_waited_since() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    for tick in range(21):
        meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=5, waiting=4, waited=4 * 0.5 * tick)})
        if tick % 10 == 0:
            measured = meter.measure(LONG * (tick + 1), ["l/e"])["l/e"][0]
            assert measured == pytest.approx(500.0 * tick)
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=9, waited=4 * 11.0)})
    assert meter.measure(LONG * 50, ["l/e"])["l/e"][0] == pytest.approx(11_000)
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=19, waited=4 * 11.0)})
    assert meter.measure(LONG * 60, ["l/e"])["l/e"][0] == pytest.approx(0)


def test_a_restarted_router_and_a_new_replica_count_from_their_first_report() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=10, waited=99.0, computing=99.0)})
    meter.reported("r", "2", {"l/e#0": ReplicaLoad(rows=1, waited=1.0)})
    meter.reported("r", "2", {"l/e#0": ReplicaLoad(rows=1, waited=1.0), "l/e#1": ReplicaLoad(rows=7, waited=70.0)})
    assert meter.measure(LONG, ["l/e"]) == {"l/e": (0.0, 0.0)}


def test_a_router_that_has_left_and_comes_back_counts_from_its_first_report() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    meter.reported("r", "1", {"l/e#0": ReplicaLoad()})
    meter.left("r")
    meter.left("never there")
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=10, waited=10.0)})
    assert meter.measure(LONG, ["l/e"])["l/e"][0] == 0


def test_rows_that_waited_for_a_replica_or_router_that_is_gone_wait_no_more() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=1, waiting=3), "l/e#1": ReplicaLoad()})
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=1, waiting=3, waited=30.0), "l/e#1": ReplicaLoad()})
    assert meter.measure(1.0, ["l/e"])["l/e"][0] == pytest.approx(10_000)
    meter.reported("r", "1", {"l/e#1": ReplicaLoad()})
    assert meter.measure(2.0, ["l/e"])["l/e"][0] == 0


def test_the_wait_is_that_of_the_last_rows_and_what_is_busy_an_average() -> None:
    meter = LoadMeter()
    meter.measure(0.0, ["l/e"])
    meter.reported("r", "1", {"l/e#0": ReplicaLoad()})
    meter.reported("r", "1", {"l/e#0": ReplicaLoad(rows=10, waited=10.0, computing=1.0)})
    course = [meter.measure(float(second), ["l/e"])["l/e"] for second in range(1, 30)]
    assert [round(wait) for wait, _ in course] == [1000] + [0] * 28
    busy = [computes for _, computes in course]
    assert 0.1 < busy[0] < 0.5
    assert busy == sorted(busy, reverse=True)
    assert busy[-1] < 0.01


counts = st.builds(
    ReplicaLoad, rows=st.integers(0, 50), waiting=st.integers(0, 9), waited=st.floats(0, 50), computing=st.floats(0, 5)
)


@given(st.lists(st.tuples(st.sampled_from(["r", "s"]), counts), max_size=20), st.integers(1, 5))
def test_a_load_is_never_negative_and_does_not_depend_on_how_reports_are_cut(
    reports: list[tuple[str, ReplicaLoad]], cut: int
) -> None:
    """Counted up report by report, or in one, the same is measured; what waited and was dropped takes nothing off."""
    whole, parts = LoadMeter(), LoadMeter()
    totals = {"r": ReplicaLoad(), "s": ReplicaLoad()}
    for meter in (whole, parts):
        meter.measure(0.0, ["l/e"])
        for router, nothing in totals.items():
            meter.reported(router, "1", {"l/e#0": nothing})
    for number, (router, more) in enumerate(reports):
        old = totals[router]
        totals[router] = ReplicaLoad(old.rows + more.rows, more.waiting, old.waited + more.waited,
                                     old.computing + more.computing)  # fmt: skip
        if number % cut == 0:
            parts.reported(router, "1", {"l/e#0": totals[router]})
    for router, total in totals.items():
        for meter in (whole, parts):
            meter.reported(router, "1", {"l/e#0": total})
    wait, busy = whole.measure(LONG, ["l/e"])["l/e"]
    assert wait >= 0 <= busy
    if any(total.rows for total in totals.values()):
        assert parts.measure(LONG, ["l/e"])["l/e"] == (pytest.approx(wait), pytest.approx(busy))
