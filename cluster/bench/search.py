"""The search for the highest rate that a cluster sustains: takes the result of a step, returns the next rate.

The rate doubles while the cluster sustains it; then the search narrows the bounds from both sides. No clock and no I/O:
a search is a value, and `after` returns the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GROWTH = 2.0
BACKOFF = 4.0
PRECISION = 0.1
MAX_STEPS = 24
MIN_ACHIEVED = 0.95
"""Share of the offered requests that must be answered."""
MAX_FAILED = 0.01
"""Share of the offered requests that may fail."""
MIN_RATE = 0.1
MAX_DELAY_MS = 5.0
"""Delays of the load generator up to this p99 never count as the limit."""


@dataclass(frozen=True, kw_only=True)
class RateStep:
    """The result of one rate: requests per second that were due and that were answered OK, p99 latency, and failures.

    `failed` is the share of the due requests. `p99_ms` is None if nothing was answered. `late_ms` is the p99 delay
    between due and sent. `hopeless` means that every request failed for a reason that a lower rate cannot fix.
    """

    offered: float
    achieved: float
    failed: float = 0.0
    p99_ms: float | None = None
    late_ms: float = 0.0
    hopeless: bool = False


@dataclass(frozen=True, kw_only=True)
class Search:
    """The state of a search. `rate` is the next rate to try, None once the search has ended.

    `best` is the highest rate that was sustained so far, `worst` the lowest that was not, and `limit` the reason. The
    search ends when the two are within a tenth of each other, or after 24 steps; it tries no rate below `min_rate`.
    """

    rate: float | None
    min_rate: float = MIN_RATE
    slo_ms: float | None = None
    best: float | None = None
    worst: float | None = None
    limit: str = ""
    steps: int = 0

    def after(self, step: RateStep) -> Search:
        """The next state, given the result of the step at `rate`. Raises ValueError if the search has ended."""
        if self.rate is None:
            raise ValueError("this search has ended")
        reason = failure_reason(step, self.slo_ms)
        if reason is None:
            search = replace(self, best=self.rate, steps=self.steps + 1)
        else:
            search = replace(self, worst=self.rate, limit=reason, steps=self.steps + 1)
        return replace(search, rate=None if step.hopeless or search.steps >= MAX_STEPS else search._next_rate())

    def _next_rate(self) -> float | None:
        if self.best is None:
            lower = (self.worst or 0.0) / BACKOFF
            return lower if lower >= self.min_rate else None
        if self.worst is None:
            return self.best * GROWTH
        return math.sqrt(self.best * self.worst) if self.worst > self.best * (1.0 + PRECISION) else None


def failure_reason(step: RateStep, slo_ms: float | None) -> str | None:
    """Why the rate of a step was not sustained, or None if it was."""
    if step.failed > MAX_FAILED:
        return f"{step.failed:.1%} of the requests failed"
    if step.p99_ms is None:
        return "nothing was answered"
    if slo_ms is not None and step.p99_ms > slo_ms:
        return f"p99 was {step.p99_ms:.4g} ms, above {slo_ms:g} ms{_delay_note(step)}"
    if step.achieved < MIN_ACHIEVED * step.offered:
        rates = f"{step.offered:.4g} requests/s were due, {step.achieved:.4g} answered"
        return f"goodput stopped growing: {rates}{_delay_note(step)}"
    return None


def delays_dominate(late_ms: float, p99_ms: float | None) -> bool:
    """Whether the p99 delay of the load generator exceeds 5 ms and a quarter of the p99 latency."""
    return late_ms > max(MAX_DELAY_MS, (p99_ms or 0.0) / 4.0)


def _delay_note(step: RateStep) -> str:
    """The end of a failure reason that blames the load generator rather than the cluster; otherwise empty."""
    if not delays_dominate(step.late_ms, step.p99_ms):
        return ""
    return f"; the load generator itself was the limit, sending {step.late_ms:.4g} ms late (p99)"
