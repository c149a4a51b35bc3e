"""The schedule of a load: ascending times, at the rate, and equal for equal seeds."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.bench.schedule import ARRIVALS, arrivals, layer_order

KINDS = st.sampled_from(ARRIVALS)
RATES = st.floats(0.1, 500.0)
SECONDS = st.floats(0.0, 10.0)
SEEDS = st.integers(0, 2**32)


@given(KINDS, RATES, SECONDS, SEEDS)
def test_times_are_in_order_and_in_time(kind: str, rate: float, seconds: float, seed: int) -> None:
    times = list(arrivals(kind, rate, seconds, seed))
    assert times == sorted(times)
    assert all(0.0 <= due < seconds for due in times)


@given(KINDS, RATES, SECONDS, SECONDS, SEEDS)
def test_a_longer_load_begins_as_a_shorter_one(kind: str, rate: float, one: float, other: float, seed: int) -> None:
    short, long = (list(arrivals(kind, rate, seconds, seed)) for seconds in sorted((one, other)))
    assert long[: len(short)] == short


@given(st.floats(1.0, 100.0), st.integers(0, 500), SEEDS)
def test_uniform_gaps_are_equal(rate: float, number: int, seed: int) -> None:
    times = list(arrivals("uniform", rate, (number + 0.5) / rate, seed))
    assert len(times) == number + 1
    np.testing.assert_allclose(np.diff(times), 1.0 / rate, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_poisson_gaps_are_exponential(seed: int) -> None:
    rate, number = 40.0, 20_000
    gaps = np.diff([0.0, *islice(arrivals("poisson", rate, 1e9, seed), number)])
    assert gaps.mean() == pytest.approx(1.0 / rate, rel=0.05)
    assert gaps.std() == pytest.approx(1.0 / rate, rel=0.05)  # as large as the mean, so arrivals come in bursts
    assert (gaps > 1.0 / rate).mean() == pytest.approx(np.exp(-1.0), abs=0.02)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_seeds_differ() -> None:
    first, second = (list(arrivals("poisson", 50.0, 5.0, seed)) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(("kind", "rate"), [("bursty", 1.0), ("poisson", 0.0), ("uniform", -1.0)])
def test_invalid_arrivals_are_refused(kind: str, rate: float) -> None:
    with pytest.raises(ValueError, match="poisson or uniform"):
        arrivals(kind, rate, 1.0, 0)


@given(st.integers(1, 12), st.integers(1, 40), SEEDS)
def test_layers_share_the_load_evenly(layers: int, rounds: int, seed: int) -> None:
    order = list(islice(layer_order(layers, seed), layers * rounds))
    assert [sorted(order[at : at + layers]) for at in range(0, len(order), layers)] == [list(range(layers))] * rounds
    assert order == list(islice(layer_order(layers, seed), layers * rounds))
