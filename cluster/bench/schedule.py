"""The schedule of a load: when each request is due and for which layer, fixed before the first one is sent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ARRIVALS = ("poisson", "uniform")
_CHUNK = 1024
_TIMES, _LAYERS = 0, 1  # separate random streams, so that the number of layers does not change the times


def arrivals(kind: str, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """The times in [0, seconds) at which requests are due, ascending, on average `rate` per second.

    "poisson" draws independent, exponential gaps, as many independent users produce; "uniform" makes all gaps equal.
    Equal arguments give equal times, and a longer load starts with the times of a shorter one.

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


def layer_order(layers: int, seed: int) -> Iterator[int]:
    """An endless sequence of layer indices: each round has every layer once, in random order."""
    generator = np.random.default_rng([seed, _LAYERS])
    while True:
        yield from generator.permutation(layers).tolist()
