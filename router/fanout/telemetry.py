"""The counters of a router; the status document and the metrics page read them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram, in seconds; one more bucket counts everything above."""


@dataclass
class Histogram:
    """The number of observations in each bucket, and the sum of all."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass(frozen=True)
class ReplicaLoad:
    """What a router gave a replica, since the router's start.

    `rows` were sent to it and `waiting` are to follow. Together they have waited for `waited` seconds, so that a row
    that waits for 2 s counts 2, in the router or the replica. `computing` is the seconds that the replica computed.
    """

    rows: int = 0
    waiting: int = 0
    waited: float = 0.0
    computing: float = 0.0


@dataclass(frozen=True)
class Scaled:
    """What autoscaling has made of an expert or pack: the replicas that are wanted, the decisions, the last reason."""

    wanted: int = 0
    up: int = 0
    down: int = 0
    reason: str = ""

    def decided(self, wanted: int, reason: str) -> Scaled:
        """After a decision, which counts whether it can be carried out or not."""
        more = wanted > self.wanted
        return replace(self, up=self.up + more, down=self.down + (not more), wanted=wanted, reason=reason)


@dataclass
class Telemetry:
    """Counts since the start of this router.

    By expert id: `rows`, `errors`, `gate_mass` and `expert_latency` (from sending to the answer). By replica id:
    `messages` and `rows_sent`, the seconds that messages were `queued` and `computing` there, and those that rows have
    `waited`, all together, before they were computed. By (layer, code): `requests`. By layer:
    `request_latency`, and `batches` that went through the gate. `retries`: pieces of work that were sent again,
    `hedges`: that were sent to a second replica because the first was late.
    `copied`: bytes of rows that were copied on their way, apart from copies by the kernel. `scaled`: what the
    controller tells of experts and packs that are scaled by their load.
    """

    rows: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    gate_mass: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    messages: Counter[str] = field(default_factory=Counter)
    rows_sent: Counter[str] = field(default_factory=Counter)
    waited: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    queued: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    computing: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    retries: int = 0
    hedges: int = 0
    copied: int = 0
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    request_latency: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    expert_latency: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))

    def count_request(self, layer: str, code: str, seconds: float) -> None:
        """Count one request that ended, with "OK" or the code of its error."""
        self.requests[layer, code] += 1
        self.request_latency[layer].observe(seconds)

    def add_gate_mass(self, experts: Sequence[str], mass: Mapping[int, float]) -> None:
        """Add to the |gate weight| of the chosen experts; `mass` is by position in `experts`."""
        for position, weight in mass.items():
            self.gate_mass[experts[position]] += weight

    def count_message(self, replica: str, rows: int, waited: float) -> None:
        """Count a message to a replica, and the seconds that its rows have waited for it, all together."""
        self.messages[replica] += 1
        self.rows_sent[replica] += rows
        self.waited[replica] += waited

    def add_message_seconds(self, replica: str, rows: int, queued: float, computed: float) -> None:
        """Add the seconds that a message of some rows waited in a replica and was computed."""
        self.queued[replica] += queued
        self.waited[replica] += rows * queued
        self.computing[replica] += computed

    def replica_load(self, replica: str, waiting: int, waited: float) -> ReplicaLoad:
        """The load of a replica, for which rows are waiting that have waited so long, all together."""
        total = self.waited[replica] + waited
        return ReplicaLoad(self.rows_sent[replica], waiting, total, self.computing[replica])

    def count_answer(self, expert: str, rows: int, seconds: float) -> None:
        """Count the rows of one answer of an expert, and its latency."""
        self.rows[expert] += rows
        self.expert_latency[expert].observe(seconds)
