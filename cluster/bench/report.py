"""Turns the samples of a load into a report of counts, rates and latency percentiles. Pure: no clock, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .samples import NOT_SENT, OK, Counters, Measured, Sample

PER_MILLE: Mapping[str, int] = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The requests to one layer, or to all layers. Rates are per second; `latency_ms` covers the answers that were OK.

    `offered` counts the requests that were due during the measurement, `achieved` the OK answers that arrived during
    it, including answers to the warm-up: `achieved` falls below `offered` if a queue grows, but not if latency is
    constant. `goodput_rows` are the rows of these answers, with an SLO only of those within it. `within_slo` is the
    share of the due requests that met the SLO.
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
    """All results of one load.

    `experts` has rows per second by expert, over all clients; None if a status call failed or the router restarted
    during the load. `epochs` counts the answers by epoch, `versions` by id and version. `late_ms` has percentiles of
    the delay between due and sent: the latency that this process, not the cluster, added. `timeline` has a row for
    each second.
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
    """p50, p90, p99, p99.9 and max by the nearest-rank method: pN is the smallest value that N % of them do not exceed.

    Empty for no values.
    """
    ordered = sorted(values)
    if not ordered:
        return {}
    ranked = {name: ordered[-(-len(ordered) * share // 1000) - 1] for name, share in PER_MILLE.items()}
    return {**ranked, "max": ordered[-1]}


def summarise(samples: Sequence[Sample], seconds: float, slo_ms: float | None = None) -> Summary:
    """Summarise the samples of a load that was measured for `seconds`."""
    due = [sample for sample in samples if sample.due >= 0]
    ok = [sample for sample in due if sample.code == OK]
    answered = [sample for sample in samples if sample.code == OK and 0 <= sample.done <= seconds]
    per_second = 1.0 / seconds if seconds > 0 else 0.0
    return Summary(
        due=len(due),
        sent=sum(sample.code != NOT_SENT for sample in due),
        ok=len(ok),
        failed=dict(sorted(Counter(sample.code for sample in due if sample.code != OK).items())),
        offered=len(due) * per_second,
        achieved=len(answered) * per_second,
        goodput_rows=sum(sample.rows for sample in answered if _meets_slo(sample, slo_ms)) * per_second,
        latency_ms=percentiles(sample.latency_ms for sample in ok),
        retries=sum(sample.retries for sample in due),
        within_slo=None if slo_ms is None or not due else sum(_meets_slo(s, slo_ms) for s in ok) / len(due),
    )


def _meets_slo(sample: Sample, slo_ms: float | None) -> bool:
    return slo_ms is None or sample.latency_ms <= slo_ms


def make_report(measured: Measured, layers: Sequence[str], slo_ms: float | None = None) -> Report:
    """Build the report of a load on these layers."""
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
    """Rows per second of each expert of these layers between two readings; None if they are not comparable."""
    if before is None or after is None or before.router != after.router or after.at <= before.at:
        return None
    prefixes = tuple(f"{name}/" for name in layers)
    span = after.at - before.at
    return {id: (rows - before.rows.get(id, 0)) / span for id, rows in after.rows.items() if id.startswith(prefixes)}


def timeline(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each second: p50 and p99 of the requests due in it, the rows answered in it, and failures."""
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
    table = []
    for second in range(max([*latencies, *rows, *failed], default=-1) + 1):
        latency = percentiles(latencies.get(second, ()))
        p50, p99 = latency.get("p50"), latency.get("p99")
        table.append({"second": second, "p50_ms": p50, "p99_ms": p99, "rows": rows[second], "failed": failed[second]})
    return table
