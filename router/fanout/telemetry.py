"""Plain counters of what the router does; status and the metrics page read them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram, in seconds; one more bucket counts what is above them all."""


@dataclass
class Histogram:
    """Counts of observations by bucket, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass
class Telemetry:
    """Everything that is counted, since the start of this router.

    By expert id: rows, errors, gate_mass, seconds (from sending to the answer). By replica id: messages, and
    the seconds that they waited there and were computed. By (layer, code): requests. By layer: latency of whole
    requests, and batches that went through its gate. `copied`: bytes of rows that were copied on their way, beside what
    the kernel copies.
    """

    rows: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    gate_mass: dict[str, float] = field(default_factory=dict)
    messages: Counter[str] = field(default_factory=Counter)
    queued: dict[str, float] = field(default_factory=dict)
    computing: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    copied: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    request_latency: dict[str, Histogram] = field(default_factory=dict)
    expert_latency: dict[str, Histogram] = field(default_factory=dict)

    def answered(self, layer: str, code: str, seconds: float) -> None:
        """Count one request that ended, well ("OK") or not."""
        self.requests[layer, code] += 1
        self._of(self.request_latency, layer).observe(seconds)

    def chosen(self, experts: Sequence[str], mass: Mapping[int, float]) -> None:
        """Count the |gate weight| with which some of the experts were chosen, by their position."""
        for position, weight in mass.items():
            expert = experts[position]
            self.gate_mass[expert] = self.gate_mass.get(expert, 0.0) + weight

    def replied(self, replica: str, queued: float, computed: float) -> None:
        """Count the seconds that a message waited in a replica and was computed."""
        self.queued[replica] = self.queued.get(replica, 0.0) + queued
        self.computing[replica] = self.computing.get(replica, 0.0) + computed

    def computed(self, expert: str, rows: int, seconds: float) -> None:
        """Count rows that an expert answered."""
        self.rows[expert] += rows
        self._of(self.expert_latency, expert).observe(seconds)

    @staticmethod
    def _of(histograms: dict[str, Histogram], name: str) -> Histogram:
        found = histograms.get(name)
        if found is None:
            found = histograms[name] = Histogram()
        return found
