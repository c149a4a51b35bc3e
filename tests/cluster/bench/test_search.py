"""The search for the highest rate, on clusters that exist only as a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.bench.search import FOLLOWS, LEAST_RATE, MOST_STEPS, PRECISION, Search, Step, why_not


def ended(search: Search, cluster: Callable[[float], Step]) -> tuple[Search, list[float]]:
    """The search once it has ended, and the rates that it tried."""
    tried = []
    while search.rate is not None:
        tried.append(search.rate)
        search = search.after(cluster(search.rate))
    return search, tried


def bears(capacity: float, base_ms: float = 2.0) -> Callable[[float], Step]:
    """A cluster that answers at most `capacity` requests a second, and ever later as it comes near."""

    def cluster(rate: float) -> Step:
        busy = min(rate / capacity, 0.999)
        return Step(offered=rate, achieved=min(rate, capacity), p99_ms=base_ms / (1.0 - busy))

    return cluster


@given(st.floats(2.0, 1e5), st.floats(0.2, 1e4))
def test_it_closes_in_on_what_a_cluster_bears(capacity: float, first: float) -> None:
    search, tried = ended(Search(rate=first), bears(capacity))
    bound = capacity / FOLLOWS  # a little more than it answers is still taken for following
    assert search.best is not None
    assert search.worst is not None
    assert search.best <= bound * 1.0001 <= search.worst * 1.0002
    assert search.worst <= search.best * (1.0 + PRECISION)
    assert len(tried) == search.steps <= MOST_STEPS
    assert "goodput stopped growing" in search.limit


@given(st.floats(100.0, 1e4), st.floats(3.0, 500.0))
def test_the_slo_is_kept_by_the_rate_that_is_found(capacity: float, slo_ms: float) -> None:
    cluster = bears(capacity)
    search, _ = ended(Search(rate=10.0, slo_ms=slo_ms), cluster)
    assert search.best is not None
    found = cluster(search.best).p99_ms
    assert found is not None
    assert found <= slo_ms


@given(
    st.lists(
        st.builds(
            Step,
            offered=st.floats(0.1, 1e6),
            achieved=st.floats(0.0, 1e6),
            failed=st.floats(0.0, 1.0),
            p99_ms=st.none() | st.floats(0.0, 1e5),
            late_ms=st.floats(0.0, 1e4),
            hopeless=st.booleans(),
        ),
        min_size=MOST_STEPS,
        max_size=MOST_STEPS,
    ),
    st.floats(1.0, 1e4),
    st.none() | st.floats(0.1, 1e4),
)
def test_whatever_comes_back_it_ends_between_what_was_borne_and_what_was_not(
    steps: list[Step], first: float, slo_ms: float | None
) -> None:
    search, borne, refused = Search(rate=first, slo_ms=slo_ms), [0.0], [float("inf")]
    for step in steps:
        if search.rate is None:
            break
        assert max(borne) < search.rate < min(refused)
        assert search.rate >= LEAST_RATE
        (borne if why_not(step, slo_ms) is None else refused).append(search.rate)
        search = search.after(step)
    assert search.rate is None
    assert search.best == (max(borne) or None)
    assert search.worst == (min(refused) if len(refused) > 1 else None)


def test_a_cluster_that_bears_nothing_ends_it() -> None:
    search, tried = ended(Search(rate=100.0), lambda rate: Step(offered=rate, achieved=0.0, failed=1.0))
    assert search.best is None
    assert search.limit == "100.0% of the requests failed"
    assert tried == [100.0, 25.0, 6.25, 1.5625, 0.390625]


def test_it_does_not_go_below_the_least_rate() -> None:
    _, tried = ended(Search(rate=100.0, least=5.0), lambda rate: Step(offered=rate, achieved=0.0, failed=1.0))
    assert tried == [100.0, 25.0, 6.25]


def test_what_no_lower_rate_mends_ends_it_at_once() -> None:
    _, tried = ended(Search(rate=100.0), lambda rate: Step(offered=rate, achieved=0.0, failed=1.0, hopeless=True))
    assert tried == [100.0]


def test_an_ended_search_takes_no_step() -> None:
    with pytest.raises(ValueError, match="ended"):
        Search(rate=None).after(Step(offered=1.0, achieved=1.0, p99_ms=1.0))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Step(offered=100, achieved=99, p99_ms=5), None),
        (Step(offered=100, achieved=99, p99_ms=5, failed=0.02), "2.0% of the requests failed"),
        (Step(offered=100, achieved=0), "nothing was answered"),
        (Step(offered=100, achieved=99, p99_ms=51), "p99 was 51 ms, above 50 ms"),
        (Step(offered=100, achieved=80, p99_ms=5), "goodput stopped growing: 100 requests/s were due, 80 answered"),
        (Step(offered=100, achieved=80, p99_ms=40, late_ms=30), "the load generator itself was the limit"),
        (Step(offered=100, achieved=80, p99_ms=40, late_ms=3), "80 answered"),
    ],
)
def test_why_a_step_was_too_much(step: Step, said: str | None) -> None:
    reason = why_not(step, 50.0)
    assert reason is None if said is None else reason is not None and said in reason
    if step.late_ms < 30:
        assert "generator" not in (reason or "")
