"""A whole bench: one load, or the loads of a search, on one event loop; Ctrl-C stops it early."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace

from .load import Load, LoadClient, LoadSettings
from .report import Report, make_report
from .samples import NOT_SENT
from .search import RateStep, Search, failure_reason
from .target import Target

Watch = Callable[[Load], None]
OnStep = Callable[[float, Report, str | None], None]
"""Called with the rate, the report and the failure reason of each step of a search."""
OVERLOAD_CODES = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", NOT_SENT)
"""Failures that a lower rate may avoid."""
_MIN_REQUESTS = 10
"""Fewest requests in a step of a search for its result to mean anything."""


@dataclass(kw_only=True)
class BenchResult:
    """The result of a bench: each rate that was tried with its report, and the search, if there was one."""

    steps: list[tuple[float, Report]] = field(default_factory=list)
    search: Search | None = None
    interrupted: bool = False

    @property
    def report(self) -> Report:
        """The report of the highest sustained rate, or else of the last step with answers, or of the last step."""
        best = None if self.search is None else self.search.best
        answered = [report for _, report in self.steps if report.all.ok]
        return next((report for rate, report in self.steps if rate == best), (answered or [self.steps[-1][1]])[-1])


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The plan of a bench: `connect` makes one client; `slo_ms` bounds the latency that counts as good."""

    connect: Callable[[], LoadClient]
    connections: int
    targets: Sequence[Target]
    settings: LoadSettings
    slo_ms: float | None = None

    async def run(self, *, search: bool, watch: Watch, on_step: OnStep) -> BenchResult:
        """Run one load, or search for the highest rate; Ctrl-C stops early and keeps what was measured so far.

        `watch` is called with the load a few times per second, `on_step` after each step of a search.
        """
        stop, result = asyncio.Event(), BenchResult()
        async with AsyncExitStack() as stack:
            clients = [self.connect() for _ in range(self.connections)]
            for client in clients:
                await stack.enter_async_context(client)
            with _interrupt(stop):
                if not search:
                    result.steps.append((self.settings.rate, await self._load(clients, self.settings, stop, watch)))
                else:
                    await self._search(clients, result, stop, watch, on_step)
        result.interrupted = stop.is_set()
        return result

    async def _search(
        self, clients: Sequence[LoadClient], result: BenchResult, stop: asyncio.Event, watch: Watch, on_step: OnStep
    ) -> None:
        min_rate = _MIN_REQUESTS / self.settings.seconds
        result.search = Search(rate=self.settings.rate, slo_ms=self.slo_ms, min_rate=min_rate)
        while (rate := result.search.rate) is not None and not stop.is_set():
            report = await self._load(clients, replace(self.settings, rate=rate), stop, watch)
            result.steps.append((rate, report))
            if report.interrupted:
                return
            step = step_of(report)
            on_step(rate, report, failure_reason(step, self.slo_ms))
            result.search = result.search.after(step)

    async def _load(
        self, clients: Sequence[LoadClient], settings: LoadSettings, stop: asyncio.Event, watch: Watch
    ) -> Report:
        measured = await Load(clients, self.targets, settings).run(stop, watch)
        return make_report(measured, [target.layer for target in self.targets], self.slo_ms)


def step_of(report: Report) -> RateStep:
    """Reduce the report of a load to what a search needs."""
    summary = report.all
    overloaded = any(code in OVERLOAD_CODES for code in summary.failed)
    return RateStep(
        offered=summary.offered,
        achieved=summary.achieved,
        failed=sum(summary.failed.values()) / summary.due if summary.due else 0.0,
        p99_ms=summary.latency_ms.get("p99"),
        late_ms=report.late_ms.get("p99", 0.0),
        hopeless=summary.ok == 0 and bool(summary.failed) and not overloaded,
    )


@contextmanager
def _interrupt(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; the next one interrupts the process as usual."""
    loop = asyncio.get_running_loop()

    def on_interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
