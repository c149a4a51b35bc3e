"""Telemetry: each observation counts once, in its bucket, and each request by layer and code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.fanout.telemetry import LATENCY_BUCKETS, Histogram, Telemetry

seconds = st.floats(0, 100) | st.sampled_from(LATENCY_BUCKETS)


@given(st.lists(seconds, max_size=50))
def test_every_observation_is_in_its_bucket(observed: list[float]) -> None:
    histogram = Histogram()
    for value in observed:
        histogram.observe(value)
    bounds = (0.0, *LATENCY_BUCKETS, float("inf"))
    for count, low, high in zip(histogram.counts, bounds[:-1], bounds[1:], strict=True):
        first = low == 0.0
        assert count == sum((low < value or (first and value == 0.0)) and value <= high for value in observed)
    assert histogram.total == pytest.approx(sum(observed))


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["OK", "UNAVAILABLE"]), seconds), max_size=30))
def test_requests_are_counted_by_layer_and_end(requests: list[tuple[str, str, float]]) -> None:
    telemetry = Telemetry()
    for layer, code, took in requests:
        telemetry.count_request(layer, code, took)
    assert sum(telemetry.requests.values()) == len(requests)
    for layer in {layer for layer, _, _ in requests}:
        assert sum(telemetry.request_latency[layer].counts) == sum(name == layer for name, _, _ in requests)


def test_two_telemetries_share_nothing() -> None:
    one, other = Telemetry(), Telemetry()
    one.count_answer("l/e", 5, 0.1)
    assert one.rows["l/e"] == 5
    assert (other.rows, other.expert_latency) == ({}, {})
