"""A whole bench: one load, or the loads of a search, on one event loop that ends early on Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace

from .load import Load, LoadClient, LoadSettings
from .report import Report, make_report
from .samples import NOT_SENT
from .search import Search, Step, why_not
from .target import Target

Watch = Callable[[Load], None]
OF_LOAD = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", NOT_SENT)
"""Failures that a lower rate may mend."""
_FEWEST = 10
"""Requests in a step of a search, below which it would say nothing."""


@dataclass(kw_only=True)
class Found:
    """What a bench has found: the rates that were tried with their reports, and the search if it was one."""

    steps: list[tuple[float, Report]] = field(default_factory=list)
    search: Search | None = None
    interrupted: bool = False

    @property
    def report(self) -> Report:
        """The report of the highest rate that was borne, or else of the last one that had answers."""
        best = None if self.search is None else self.search.best
        answered = [report for _, report in self.steps if report.all.ok]
        return next((report for rate, report in self.steps if rate == best), (answered or [self.steps[-1][1]])[-1])


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is to be done: `connect` makes one client; `slo_ms` bounds the latency that counts as good."""

    connect: Callable[[], LoadClient]
    connections: int
    targets: Sequence[Target]
    settings: LoadSettings
    slo_ms: float | None = None

    async def run(self, *, search: bool, watch: Watch, tell: Callable[[float, Report, str | None], None]) -> Found:
        """Run one load, or search for the highest rate; Ctrl-C ends it early, with what was measured until then.

        `tell` is called with rate, report and refusal of each step of a search.
        """
        stop, found = asyncio.Event(), Found()
        async with AsyncExitStack() as stack:
            clients = [self.connect() for _ in range(self.connections)]
            for client in clients:
                await stack.enter_async_context(client)
            with _interrupt(stop):
                if not search:
                    found.steps.append((self.settings.rate, await self._load(clients, self.settings, stop, watch)))
                else:
                    await self._search(clients, found, stop, watch, tell)
        found.interrupted = stop.is_set()
        return found

    async def _search(
        self,
        clients: Sequence[LoadClient],
        found: Found,
        stop: asyncio.Event,
        watch: Watch,
        tell: Callable[[float, Report, str | None], None],
    ) -> None:
        least = _FEWEST / self.settings.seconds
        found.search = Search(rate=self.settings.rate, slo_ms=self.slo_ms, least=least)
        while (rate := found.search.rate) is not None and not stop.is_set():
            report = await self._load(clients, replace(self.settings, rate=rate), stop, watch)
            found.steps.append((rate, report))
            if report.interrupted:
                return
            step = step_of(report)
            tell(rate, report, why_not(step, self.slo_ms))
            found.search = found.search.after(step)

    async def _load(
        self, clients: Sequence[LoadClient], settings: LoadSettings, stop: asyncio.Event, watch: Watch
    ) -> Report:
        measured = await Load(clients, self.targets, settings).run(stop, watch)
        return make_report(measured, [target.layer for target in self.targets], self.slo_ms)


def step_of(report: Report) -> Step:
    """What a search needs to know of a load."""
    found = report.all
    return Step(
        offered=found.offered,
        achieved=found.achieved,
        failed=sum(found.failed.values()) / found.due if found.due else 0.0,
        p99_ms=found.latency_ms.get("p99"),
        late_ms=report.late_ms.get("p99", 0.0),
        hopeless=found.ok == 0 and bool(found.failed) and not any(code in OF_LOAD for code in found.failed),
    )


@contextmanager
def _interrupt(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C sets `stop`; the next one ends everything at once."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
