"""The output of `expertmesh bench`: a progress line on a terminal, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..bench.load import Load
from ..bench.report import Report, Summary, percentiles
from ..bench.samples import NOT_SENT, OK
from ..bench.search import Search, delays_dominate
from .output import new_console, new_table

_COLUMNS = ("layer", "sent", "ok", "failed", "offered/s", "achieved/s", "rows/s")
_LATENCIES = ("p50", "p90", "p99", "p99.9", "max")
_RECENT = 200


class LoadView:
    """A progress line on standard error, updated in place; only on a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._quiet = quiet
        self._live: Live | None = None

    def __enter__(self) -> LoadView:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, load: Load) -> None:
        """Update the progress line."""
        if self._live is not None:
            self._live.update(Text(progress_line(load)), refresh=True)

    def print(self, line: str) -> None:
        """Print a line above the progress line."""
        if not self._quiet:
            self._console.print(Text(line), soft_wrap=True)


def progress_line(load: Load) -> str:
    """One line for the progress of a load."""
    settings, samples = load.settings, load.measured.samples
    if load.now < 0:
        return f"warming up at {settings.rate:.4g} requests/s: {-load.now:.0f} s left, {load.in_flight} in flight"
    recent = percentiles(sample.latency_ms for sample in samples[-_RECENT:] if sample.code == OK)
    p99 = f", recent p99 {recent['p99']:.4g} ms" if recent else ""
    return (
        f"{min(load.now, settings.seconds):.0f} of {settings.seconds:g} s at {settings.rate:.4g} requests/s: "
        f"{load.ok:,} ok, {load.failed:,} failed, {load.in_flight:,} in flight{p99}"
    )


def step_line(rate: float, report: Report, reason: str | None) -> str:
    """One line for a step of a search; `reason` says why its rate was not sustained, None if it was."""
    latency = report.all.latency_ms
    p99 = f", p99 {latency['p99']:.4g} ms" if latency else ""
    verdict = "sustained" if reason is None else f"not sustained, {reason}"
    return f"{rate:.4g} requests/s: {report.all.goodput_rows:,.0f} rows/s{p99}: {verdict}"


def search_line(search: Search, *, interrupted: bool) -> str:
    """One line for the result of a search."""
    if search.best is None and search.worst is None:
        return "no rate was measured: the search was interrupted"
    if search.best is None:
        return f"no rate was sustained: at {search.worst:.4g} requests/s, {search.limit}"
    if search.worst is None:
        end = "was interrupted" if interrupted else "ended"
        return f"{search.best:.4g} requests/s were sustained; the search {end} before it reached the limit"
    early = " (interrupted)" if interrupted else ""
    return f"{search.best:.4g} requests/s were sustained, {search.worst:.4g} were not{early}: {search.limit}"


def print_report(report: Report) -> None:
    """Print the tables, and the notes that go with them."""
    console = new_console()
    rows = [_row(name, summary) for name, summary in report.layers.items()]
    if len(rows) > 1:
        rows.append(_row("all", report.all))
    title = "latency in ms, from the time each request was due"
    console.print(new_table(title, (*_COLUMNS, *_LATENCIES), rows))
    if report.experts:
        console.print()
        total = sum(report.experts.values()) or 1.0
        cells = [(id, _figure(rate), f"{rate / total:.1%}") for id, rate in report.experts.items()]
        console.print(new_table(None, ("expert", "rows/s", "share"), cells))
    console.print()
    for line in notes(report):
        click.echo(line)


def _row(name: str, summary: Summary) -> Sequence[object]:
    rates = (_figure(summary.offered), _figure(summary.achieved), _figure(summary.goodput_rows))
    latencies = (_figure(summary.latency_ms.get(percentile)) for percentile in _LATENCIES)
    return (name, summary.sent, summary.ok, sum(summary.failed.values()), *rates, *latencies)


def _figure(value: float | None) -> float | int | None:
    """A number to print; without decimals from 1000 on."""
    return value if value is None or value < 1000 else round(value)


def notes(report: Report) -> Iterator[str]:
    """What the tables do not show: failures and their reasons, retries, versions, and delays of the load generator."""
    summary = report.all
    if report.interrupted:
        yield f"ended early, after {report.seconds:.1f} s"
    for code, count in summary.failed.items():
        reason = f", the first: {report.errors[code]}" if code in report.errors else ""
        yield f"failed: {code} {count:,} times{reason}"
    if summary.within_slo is not None:
        yield f"within the SLO: {summary.within_slo:.2%} of the requests that were due"
    yield f"client retries: {summary.retries:,}"
    yield from _epochs(report)
    if report.experts is None:
        yield "rows by expert are not known: the status call failed, or the router restarted during the load"
    if report.late_ms:
        p50, p99 = report.late_ms["p50"], report.late_ms["p99"]
        limit = "; the load generator itself was a limit" if delays_dominate(p99, summary.latency_ms.get("p99")) else ""
        yield f"requests were sent late: p50 {p50:,.2f} ms, p99 {p99:,.2f} ms, included in the latency{limit}"
    if NOT_SENT in summary.failed:
        yield f"NOT_SENT: {summary.failed[NOT_SENT]:,} requests were dropped, as --max-in-flight others were in flight"


def _epochs(report: Report) -> Iterator[str]:
    if len(report.epochs) == 1:
        yield f"all answers came from epoch {next(iter(report.epochs))}"
    elif report.epochs:
        epochs = ", ".join(f"{number} ({answers:,} answers)" for number, answers in report.epochs.items())
        yield f"versions changed during the load: epochs {epochs}"
    for id, versions in report.versions.items():
        if len(versions) > 1:
            yield f"  {id}: {', '.join(f'{version} ({answers:,})' for version, answers in versions.items())}"
