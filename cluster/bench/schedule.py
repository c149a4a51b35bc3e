"""When the requests of a load are due and which layer each is for: decided before any is sent, whatever comes back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ARRIVALS = ("poisson", "uniform")
_CHUNK = 1024
_TIMES, _TURNS = 0, 1  # each draws from a stream of its own, so that more layers do not move the times


def arrivals(kind: str, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """The times in [0, seconds) at which requests are due, in order, `rate` of them a second on average.

    "poisson" has independent, exponential gaps, as many users who know nothing of each other make them; "uniform" has
    equal ones. Equal arguments give equal times, and a longer load begins with the times of a shorter one.

    Raises ValueError for another kind, or a rate that is not above 0.
    """
    if kind not in ARRIVALS or not rate > 0:
        raise ValueError(f"arrivals are {' or '.join(ARRIVALS)} at a rate above 0, not {kind!r} at {rate}")
    if kind == "uniform":
        return _uniform(rate, seconds)
    return _poisson(rate, seconds, np.random.default_rng([seed, _TIMES]))


def _uniform(rate: float, seconds: float) -> Iterator[float]:
    number = 0
    while (due := number / rate) < seconds:
        yield due
        number += 1


def _poisson(rate: float, seconds: float, generator: np.random.Generator) -> Iterator[float]:
    last = 0.0
    while True:
        for due in (last + np.cumsum(generator.exponential(1.0 / rate, _CHUNK))).tolist():
            if due >= seconds:
                return
            yield due
            last = due


def turns(layers: int, seed: int) -> Iterator[int]:
    """Which of the layers each request is for, without end: every one once in each round, in an order that is drawn."""
    generator = np.random.default_rng([seed, _TURNS])
    while True:
        yield from generator.permutation(layers).tolist()
