"""From the samples of a load to its report: counts, rates and percentiles of the latency. Pure: no clock, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .samples import NOT_SENT, OK, Counters, Measured, Sample

PER_MILLE: Mapping[str, int] = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The requests to one layer, or to all. Rates are a second; `latency_ms` is that of the answers that were OK.

    `offered` counts what was due while it was measured, and `achieved` the answers that came OK in that time, also
    those to the warm-up: so a queue that grows shows, and a constant latency does not. `goodput_rows` are the rows of
    those answers, of those within the SLO where there is one; `within_slo` is the share of the due that kept it.
    """

    due: int
    sent: int
    ok: int
    failed: dict[str, int]
    offered: float
    achieved: float
    goodput_rows: float
    latency_ms: dict[str, float]
    retries: int
    within_slo: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is told of a load.

    `experts` has rows a second by expert, of all clients, None where the router was restarted meanwhile. `epochs` has
    the answers by epoch and `versions` those by id and version. `late_ms` says how late requests were sent: what this
    process, not the cluster, added to the latency. `timeline` has a row for each second.
    """

    seconds: float
    interrupted: bool
    all: Summary
    layers: dict[str, Summary]
    experts: dict[str, float] | None
    epochs: dict[int, int]
    versions: dict[str, dict[str, int]]
    errors: dict[str, str]
    late_ms: dict[str, float]
    timeline: list[dict[str, Any]]


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99, p99.9 and max: each the smallest value that so many do not exceed; empty for no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {name: ordered[-(-len(ordered) * share // 1000) - 1] for name, share in PER_MILLE.items()}
    return {**found, "max": ordered[-1]}


def summarise(samples: Sequence[Sample], seconds: float, slo_ms: float | None = None) -> Summary:
    """Count the samples of a load in which requests were measured for `seconds`."""
    due = [sample for sample in samples if sample.due >= 0]
    ok = [sample for sample in due if sample.code == OK]
    came = [sample for sample in samples if sample.code == OK and 0 <= sample.done <= seconds]
    each = 1.0 / seconds if seconds > 0 else 0.0
    return Summary(
        due=len(due),
        sent=sum(sample.code != NOT_SENT for sample in due),
        ok=len(ok),
        failed=dict(sorted(Counter(sample.code for sample in due if sample.code != OK).items())),
        offered=len(due) * each,
        achieved=len(came) * each,
        goodput_rows=sum(sample.rows for sample in came if _is_good(sample, slo_ms)) * each,
        latency_ms=percentiles(sample.latency_ms for sample in ok),
        retries=sum(sample.retries for sample in due),
        within_slo=None if slo_ms is None or not due else sum(_is_good(s, slo_ms) for s in ok) / len(due),
    )


def _is_good(sample: Sample, slo_ms: float | None) -> bool:
    return slo_ms is None or sample.latency_ms <= slo_ms


def make_report(measured: Measured, layers: Sequence[str], slo_ms: float | None = None) -> Report:
    """Judge a load on these layers."""
    samples, seconds = measured.samples, measured.seconds
    due = [sample for sample in samples if sample.due >= 0]
    versions: dict[str, dict[str, int]] = {}
    for (id, version), answers in sorted(measured.versions.items()):
        versions.setdefault(id, {})[version] = answers
    return Report(
        seconds=seconds,
        interrupted=measured.interrupted,
        all=summarise(samples, seconds, slo_ms),
        layers={name: summarise([s for s in samples if s.layer == name], seconds, slo_ms) for name in layers},
        experts=expert_rates(measured.before, measured.after, layers),
        epochs=dict(sorted(Counter(sample.epoch for sample in due if sample.code == OK).items())),
        versions=versions,
        errors=dict(sorted(measured.errors.items())),
        late_ms=percentiles((sample.sent - sample.due) * 1000.0 for sample in due if sample.code != NOT_SENT),
        timeline=timeline(samples),
    )


def expert_rates(before: Counters | None, after: Counters | None, layers: Iterable[str]) -> dict[str, float] | None:
    """Rows a second of each expert of these layers between two looks at the counters; None if they do not compare."""
    if before is None or after is None or before.router != after.router or after.at <= before.at:
        return None
    ours = tuple(f"{name}/" for name in layers)
    span = after.at - before.at
    return {id: (rows - before.rows.get(id, 0)) / span for id, rows in after.rows.items() if id.startswith(ours)}


def timeline(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each second from the first to the last: p50 and p99 of what was due in it, rows answered and failures."""
    latencies: dict[int, list[float]] = {}
    rows: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    for sample in samples:
        if sample.code == OK and sample.done >= 0:
            rows[int(sample.done)] += sample.rows
        if sample.code == OK and sample.due >= 0:
            latencies.setdefault(int(sample.due), []).append(sample.latency_ms)
        elif sample.due >= 0:
            failed[int(sample.due)] += 1
    made = []
    for second in range(max([*latencies, *rows, *failed], default=-1) + 1):
        found = percentiles(latencies.get(second, ()))
        p50, p99 = found.get("p50"), found.get("p99")
        made.append({"second": second, "p50_ms": p50, "p99_ms": p99, "rows": rows[second], "failed": failed[second]})
    return made
