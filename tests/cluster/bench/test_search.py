"""The search for the highest rate, on simulated clusters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.bench.search import (
    MAX_STEPS,
    MIN_ACHIEVED,
    MIN_RATE,
    PRECISION,
    RateStep,
    Search,
    failure_reason,
)


def ended(search: Search, cluster: Callable[[float], RateStep]) -> tuple[Search, list[float]]:
    """The search once it has ended, and the rates that it tried."""
    tried = []
    while search.rate is not None:
        tried.append(search.rate)
        search = search.after(cluster(search.rate))
    return search, tried


def cluster_with(capacity: float, base_ms: float = 2.0) -> Callable[[float], RateStep]:
    """A cluster that answers at most `capacity` requests per second, with latency growing as it saturates."""

    def cluster(rate: float) -> RateStep:
        busy = min(rate / capacity, 0.999)
        return RateStep(offered=rate, achieved=min(rate, capacity), p99_ms=base_ms / (1.0 - busy))

    return cluster


@given(st.floats(2.0, 1e5), st.floats(0.2, 1e4))
def test_it_converges_to_the_capacity_of_a_cluster(capacity: float, first: float) -> None:
    search, tried = ended(Search(rate=first), cluster_with(capacity))
    bound = capacity / MIN_ACHIEVED  # a rate a little above the capacity still counts as sustained
    assert search.best is not None
    assert search.worst is not None
    assert search.best <= bound * 1.0001 <= search.worst * 1.0002
    assert search.worst <= search.best * (1.0 + PRECISION)
    assert len(tried) == search.steps <= MAX_STEPS
    assert "goodput stopped growing" in search.limit


@given(st.floats(100.0, 1e4), st.floats(3.0, 500.0))
def test_the_slo_is_kept_by_the_rate_that_is_found(capacity: float, slo_ms: float) -> None:
    cluster = cluster_with(capacity)
    search, _ = ended(Search(rate=10.0, slo_ms=slo_ms), cluster)
    assert search.best is not None
    p99_ms = cluster(search.best).p99_ms
    assert p99_ms is not None
    assert p99_ms <= slo_ms


@given(
    st.lists(
        st.builds(
            RateStep,
            offered=st.floats(0.1, 1e6),
            achieved=st.floats(0.0, 1e6),
            failed=st.floats(0.0, 1.0),
            p99_ms=st.none() | st.floats(0.0, 1e5),
            late_ms=st.floats(0.0, 1e4),
            hopeless=st.booleans(),
        ),
        min_size=MAX_STEPS,
        max_size=MAX_STEPS,
    ),
    st.floats(1.0, 1e4),
    st.none() | st.floats(0.1, 1e4),
)
def test_any_results_end_it_between_sustained_and_failed_rates(
    steps: list[RateStep], first: float, slo_ms: float | None
) -> None:
    search, sustained, failed = Search(rate=first, slo_ms=slo_ms), [0.0], [float("inf")]
    for step in steps:
        if search.rate is None:
            break
        assert max(sustained) < search.rate < min(failed)
        assert search.rate >= MIN_RATE
        (sustained if failure_reason(step, slo_ms) is None else failed).append(search.rate)
        search = search.after(step)
    assert search.rate is None
    assert search.best == (max(sustained) or None)
    assert search.worst == (min(failed) if len(failed) > 1 else None)


def test_a_cluster_that_sustains_no_rate_ends_it() -> None:
    search, tried = ended(Search(rate=100.0), lambda rate: RateStep(offered=rate, achieved=0.0, failed=1.0))
    assert search.best is None
    assert search.limit == "100.0% of the requests failed"
    assert tried == [100.0, 25.0, 6.25, 1.5625, 0.390625]


def test_it_does_not_go_below_the_minimum_rate() -> None:
    _, tried = ended(Search(rate=100.0, min_rate=5.0), lambda rate: RateStep(offered=rate, achieved=0.0, failed=1.0))
    assert tried == [100.0, 25.0, 6.25]


def test_a_failure_at_any_rate_ends_it_at_once() -> None:
    _, tried = ended(Search(rate=100.0), lambda rate: RateStep(offered=rate, achieved=0.0, failed=1.0, hopeless=True))
    assert tried == [100.0]


def test_an_ended_search_takes_no_step() -> None:
    with pytest.raises(ValueError, match="ended"):
        Search(rate=None).after(RateStep(offered=1.0, achieved=1.0, p99_ms=1.0))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (RateStep(offered=100, achieved=99, p99_ms=5), None),
        (RateStep(offered=100, achieved=99, p99_ms=5, failed=0.02), "2.0% of the requests failed"),
        (RateStep(offered=100, achieved=0), "nothing was answered"),
        (RateStep(offered=100, achieved=99, p99_ms=51), "p99 was 51 ms, above 50 ms"),
        (RateStep(offered=100, achieved=80, p99_ms=5), "goodput stopped growing: 100 requests/s were due, 80 answered"),
        (RateStep(offered=100, achieved=80, p99_ms=40, late_ms=30), "the load generator itself was the limit"),
        (RateStep(offered=100, achieved=80, p99_ms=40, late_ms=3), "80 answered"),
    ],
)
def test_why_a_rate_was_not_sustained(step: RateStep, message: str | None) -> None:
    reason = failure_reason(step, 50.0)
    assert reason is None if message is None else reason is not None and message in reason
    if step.late_ms < 30:
        assert "generator" not in (reason or "")
