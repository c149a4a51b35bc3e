"""The search for the highest rate that a cluster bears: what a step gave goes in, the rate of the next one comes out.

The rate is doubled while the cluster follows; once it does not, the bound is closed in on from both sides. No clock and
no I/O: a search is a value, and `after` gives the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GROWTH = 2.0
DESCENT = 4.0
PRECISION = 0.1
MOST_STEPS = 24
FOLLOWS = 0.95
MOST_FAILED = 0.01
LEAST_RATE = 0.1
MUCH_LATE_MS = 5.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What came of one rate: requests a second that were due and that were answered well, p99 latency, and failures.

    `failed` is a share of those that were due. `p99_ms` is None where nothing was answered. `late_ms` is how late (p99)
    requests were sent. `hopeless` says that all were refused for what a lower rate does not mend.
    """

    offered: float
    achieved: float
    failed: float = 0.0
    p99_ms: float | None = None
    late_ms: float = 0.0
    hopeless: bool = False


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where a search stands. `rate` is what to try next, None when it has ended.

    `best` is the highest rate that was borne, None while there is none; `worst` the lowest that was not, and `limit`
    says why not. The search ends when the two lie within a tenth of each other, or after 24 steps; it tries no rate
    below `least`.
    """

    rate: float | None
    least: float = LEAST_RATE
    slo_ms: float | None = None
    best: float | None = None
    worst: float | None = None
    limit: str = ""
    steps: int = 0

    def after(self, step: Step) -> Search:
        """The search once the step at `rate` has come to `step`."""
        if self.rate is None:
            raise ValueError("this search has ended")
        refusal = why_not(step, self.slo_ms)
        if refusal is None:
            known = replace(self, best=self.rate, steps=self.steps + 1)
        else:
            known = replace(self, worst=self.rate, limit=refusal, steps=self.steps + 1)
        return replace(known, rate=None if step.hopeless or known.steps >= MOST_STEPS else known._next())

    def _next(self) -> float | None:
        if self.best is None:
            lower = (self.worst or 0.0) / DESCENT
            return lower if lower >= self.least else None
        if self.worst is None:
            return self.best * GROWTH
        return math.sqrt(self.best * self.worst) if self.worst > self.best * (1.0 + PRECISION) else None


def why_not(step: Step, slo_ms: float | None) -> str | None:
    """Why a step was too much, or None if it was borne."""
    if step.failed > MOST_FAILED:
        return f"{step.failed:.1%} of the requests failed"
    if step.p99_ms is None:
        return "nothing was answered"
    if slo_ms is not None and step.p99_ms > slo_ms:
        return f"p99 was {step.p99_ms:.4g} ms, above {slo_ms:g} ms{_by_us(step)}"
    if step.achieved < FOLLOWS * step.offered:
        behind = f"{step.offered:.4g} requests/s were due, {step.achieved:.4g} answered"
        return f"goodput stopped growing: {behind}{_by_us(step)}"
    return None


def is_by_us(late_ms: float, p99_ms: float | None) -> bool:
    """Whether so late a sending (p99) makes a good part of the latency, so that it tells little of the cluster."""
    return late_ms > max(MUCH_LATE_MS, (p99_ms or 0.0) / 4.0)


def _by_us(step: Step) -> str:
    """The end of a refusal that is the doing of the load generator rather than that of the cluster."""
    ours = is_by_us(step.late_ms, step.p99_ms)
    return f"; the load generator itself was the limit, sending {step.late_ms:.4g} ms late (p99)" if ours else ""
