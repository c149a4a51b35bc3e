"""What `expertmesh bench` shows: how the load gets on, on a terminal, and its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..bench.load import Load
from ..bench.report import Report, Summary, percentiles
from ..bench.samples import NOT_SENT, OK
from ..bench.search import Search, is_by_us
from .output import new_console, new_table

_COLUMNS = ("layer", "sent", "ok", "failed", "offered/s", "achieved/s", "rows/s")
_LATENCIES = ("p50", "p90", "p99", "p99.9", "max")
_RECENT = 200


class LoadView:
    """One line on standard error that follows a load; nothing where that is no terminal."""

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
        """Show where a load stands."""
        if self._live is not None:
            self._live.update(Text(progress_line(load)), refresh=True)

    def say(self, line: str) -> None:
        """Print a line that stays, above the one that moves."""
        if not self._quiet:
            self._console.print(Text(line), soft_wrap=True)


def progress_line(load: Load) -> str:
    """One line on where a load stands."""
    settings, samples = load.settings, load.measured.samples
    if load.now < 0:
        return f"warming up at {settings.rate:.4g} requests/s: {-load.now:.0f} s left, {load.in_flight} in flight"
    recent = percentiles(sample.latency_ms for sample in samples[-_RECENT:] if sample.code == OK)
    p99 = f", recent p99 {recent['p99']:.4g} ms" if recent else ""
    return (
        f"{min(load.now, settings.seconds):.0f} of {settings.seconds:g} s at {settings.rate:.4g} requests/s: "
        f"{load.ok:,} ok, {load.failed:,} failed, {load.in_flight:,} in flight{p99}"
    )


def step_line(rate: float, report: Report, refusal: str | None) -> str:
    """One line on a step of a search."""
    latency = report.all.latency_ms
    p99 = f", p99 {latency['p99']:.4g} ms" if latency else ""
    return f"{rate:.4g} requests/s: {report.all.goodput_rows:,.0f} rows/s{p99}: {refusal or 'borne'}"


def found_line(search: Search, *, ended_early: bool) -> str:
    """One line on what a search has found."""
    if search.best is None:
        return f"no rate was borne: at {search.worst or 0:.4g} requests/s, {search.limit or 'it was ended'}"
    if search.worst is None:
        return (
            f"{search.best:.4g} requests/s are borne; the search {'was ended' if ended_early else 'ended'} before more"
        )
    early = " (ended early)" if ended_early else ""
    return f"{search.best:.4g} requests/s are borne, {search.worst:.4g} are not{early}: {search.limit}"


def print_report(report: Report) -> None:
    """Print the tables, and a line for each thing that must not be overlooked."""
    console = new_console()
    rows = [_row(name, found) for name, found in report.layers.items()]
    if len(rows) > 1:
        rows.append(_row("all", report.all))
    title = "latency in ms, from the moment when a request was due"
    console.print(new_table(title, (*_COLUMNS, *_LATENCIES), rows))
    if report.experts:
        console.print()
        shares = sum(report.experts.values()) or 1.0
        cells = [(id, _figure(rate), f"{rate / shares:.1%}") for id, rate in report.experts.items()]
        console.print(new_table(None, ("expert", "rows/s", "share"), cells))
    console.print()
    for line in notes(report):
        click.echo(line)


def _row(name: str, found: Summary) -> Sequence[object]:
    rates = (_figure(found.offered), _figure(found.achieved), _figure(found.goodput_rows))
    latencies = (_figure(found.latency_ms.get(share)) for share in _LATENCIES)
    return (name, found.sent, found.ok, sum(found.failed.values()), *rates, *latencies)


def _figure(value: float | None) -> float | int | None:
    """A number that is shown without its decimals where it is large."""
    return value if value is None or value < 1000 else round(value)


def notes(report: Report) -> Iterator[str]:
    """What a table does not show: failures with their reason, retries, versions, and doubts about the load itself."""
    found = report.all
    if report.interrupted:
        yield f"ended early, after {report.seconds:.1f} s"
    for code, number in found.failed.items():
        reason = f", the first: {report.errors[code]}" if code in report.errors else ""
        yield f"failed: {code} {number:,} times{reason}"
    if found.within_slo is not None:
        yield f"within the SLO: {found.within_slo:.2%} of the requests that were due"
    yield f"retries of the client: {found.retries:,}"
    yield from _epochs(report)
    if report.experts is None:
        yield "rows by expert are not known: the status was not to be had, or the router was restarted meanwhile"
    if report.late_ms:
        p50, p99 = report.late_ms["p50"], report.late_ms["p99"]
        ours = "; the load generator itself was a limit" if is_by_us(p99, found.latency_ms.get("p99")) else ""
        yield f"sent late by p50 {p50:,.2f} ms, p99 {p99:,.2f} ms, which is part of the latency{ours}"
    if NOT_SENT in found.failed:
        yield f"NOT_SENT: {found.failed[NOT_SENT]:,} requests were due while the most that may be were in flight"


def _epochs(report: Report) -> Iterator[str]:
    if len(report.epochs) == 1:
        yield f"all answers are of epoch {next(iter(report.epochs))}"
    elif report.epochs:
        each = ", ".join(f"{number} ({answers:,} answers)" for number, answers in report.epochs.items())
        yield f"versions changed during the load: epochs {each}"
    for id, versions in report.versions.items():
        if len(versions) > 1:
            yield f"  {id}: {', '.join(f'{version} ({answers:,})' for version, answers in versions.items())}"
