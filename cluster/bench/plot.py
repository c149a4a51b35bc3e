"""Plots of a load: latency and rows per second over time, or over the rates of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Report

_SIZE = (9.0, 6.0)


def plot_seconds(report: Report, path: Path, title: str) -> None:
    """Plot p50 and p99 of the requests due in each second, and the rows answered in it."""
    figure, latency, rows = _panels(title)
    seconds = [item["second"] for item in report.timeline]
    for name in ("p50", "p99"):
        latency.plot(seconds, [_number(item[f"{name}_ms"]) for item in report.timeline], label=name)
    rows.plot(seconds, [item["rows"] for item in report.timeline], label="rows/s")
    failed = [item["failed"] for item in report.timeline]
    if any(failed):
        rows.plot(seconds, failed, label="failed requests/s", color="tab:red")
    _finish(figure, latency, rows, "seconds", path)


def plot_rates(steps: Sequence[tuple[float, Report]], path: Path, title: str) -> None:
    """Plot p50, p99 and rows per second of each rate that a search tried."""
    figure, latency, rows = _panels(title)
    ordered = sorted(steps, key=lambda step: step[0])
    rates = [rate for rate, _ in ordered]
    for name in ("p50", "p99"):
        latency.plot(rates, [_number(report.all.latency_ms.get(name)) for _, report in ordered], "o-", label=name)
    rows.plot(rates, [report.all.goodput_rows for _, report in ordered], "o-", label="rows/s")
    rows.set_xscale("log")
    _finish(figure, latency, rows, "requests/s due", path)


def _panels(title: str) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    latency, rows = figure.subplots(2, 1, sharex=True)
    latency.set_title(title)
    return figure, latency, rows


def _finish(figure: Figure, latency: Axes, rows: Axes, across: str, path: Path) -> None:
    latency.set_ylabel("latency, ms")
    latency.set_yscale("log")
    rows.set_ylabel("rows/s")
    rows.set_ylim(bottom=0)
    rows.set_xlabel(across)
    for axes in (latency, rows):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
