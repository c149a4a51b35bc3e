"""Drives an open-loop load: sends each request when it is due and records its outcome.

The decisions are pure and elsewhere (`schedule`, `search`, `report`); this is the shell around AsyncClient.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...experts.errors import ExpertMeshError
from ..client.client import AsyncClient
from ..client.reply import Reply
from ..client.retry import Answer, Attempt, Step, drive_async
from .samples import INTERRUPTED, NOT_SENT, OK, Counters, Measured, Sample, counters_of
from .schedule import arrivals, layer_order
from .target import Target

MOST_IN_FLIGHT = 4096
GRACE = 2.0
"""Seconds that an interrupted load waits for the requests in flight."""
STATUS_TIMEOUT = 5.0
_DEADLINE_MARGIN = 2.0
_TICK = 0.25


class LoadClient(AsyncClient):
    """A client that reports how often it retried."""

    async def call_counting_retries(self, layer: str, x: Any, **options: Any) -> tuple[Reply | ExpertMeshError, int]:
        """Call a layer; returns the reply or the error, and the number of retries."""
        attempts = 0

        async def perform(step: Step) -> Answer:
            nonlocal attempts
            attempts += isinstance(step, Attempt)
            return await self._perform(step)

        try:
            return await drive_async(self._calls.call(layer, x, **options), perform), attempts - 1
        except ExpertMeshError as error:
            return error, max(0, attempts - 1)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """One load: `rate` requests per second of `rows` rows each for `seconds`, after an unmeasured `warmup`."""

    rate: float
    rows: int = 8
    arrivals: str = "poisson"
    seconds: float = 10.0
    warmup: float = 2.0
    seed: int = 0
    timeout: float = 10.0
    most_in_flight: int = MOST_IN_FLIGHT


class Load:
    """One load on a running cluster; call `run` once. `measured` grows while it runs."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, clients: Sequence[LoadClient], targets: Sequence[Target], settings: LoadSettings) -> None:
        self.settings = settings
        self.measured = Measured(seconds=settings.seconds)
        self.ok = self.failed = 0
        self._clients = itertools.cycle(clients)
        self._observer = clients[0]
        self._targets = targets
        self._batches = [itertools.cycle(target.batches(settings.rows, settings.seed)) for target in targets]
        self._tasks: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._start = 0.0

    @property
    def now(self) -> float:
        """Seconds since the measurement started; below 0 during the warm-up."""
        return self.clock() - self._start

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return len(self._tasks)

    async def run(self, stop: asyncio.Event, watch: Callable[[Load], None] | None = None) -> Measured:
        """Send all requests and wait for the answers. Setting `stop` ends sending and shortens the wait to GRACE."""
        self._start = self.clock() + self.settings.warmup
        first_counters = asyncio.create_task(self._first_counters())
        watching = asyncio.create_task(self._watch(watch))
        sending = asyncio.create_task(self._send_all())
        try:
            await _done_or_stopped(sending, stop)
            if not sending.done():
                self.measured.interrupted = True
                self.measured.seconds = min(self.settings.seconds, max(0.0, self.now))
            await self._wait_for_answers(stop)
            self.measured.after = await self._counters()
            self.measured.before = await first_counters if first_counters.done() else None
        finally:
            for task in (sending, watching, first_counters, *self._tasks):
                task.cancel()
            await asyncio.gather(sending, watching, first_counters, *self._tasks, return_exceptions=True)
        if self._crash is not None:
            raise self._crash
        return self.measured

    async def _send_all(self) -> None:
        settings = self.settings
        total = settings.warmup + settings.seconds
        schedule = arrivals(settings.arrivals, settings.rate, total, settings.seed)
        for due, index in zip(schedule, layer_order(len(self._targets), settings.seed), strict=False):
            due -= settings.warmup
            await asyncio.sleep(max(0.0, due - self.now))
            if len(self._tasks) >= settings.most_in_flight:
                self._record(Sample(self._targets[index].layer, settings.rows, due, due, due, NOT_SENT))
                continue
            task = asyncio.create_task(self._request(index, due))
            self._tasks.add(task)
            task.add_done_callback(self._request_done)
        await asyncio.sleep(max(0.0, settings.seconds - self.now))

    async def _request(self, index: int, due: float) -> None:
        target, client, x = self._targets[index], next(self._clients), next(self._batches[index])
        sent, code, retries, epoch = self.now, INTERRUPTED, 0, 0
        try:
            answer, retries = await client.call_counting_retries(
                target.layer, x, raw=target.dtype == "bfloat16", timeout=self.settings.timeout
            )
            code, epoch = self._code_and_epoch(answer, due)
        finally:  # also if the task is cancelled
            self._record(Sample(target.layer, len(x), due, sent, self.now, code, retries, epoch))

    def _code_and_epoch(self, answer: Reply | ExpertMeshError, due: float) -> tuple[str, int]:
        if isinstance(answer, Reply):
            if due >= 0:
                self.measured.versions.update(answer.versions.items())
            return OK, answer.epoch
        self.measured.errors.setdefault(answer.code, f"{type(answer).__name__}: {answer.message}")
        return answer.code, 0

    def _record(self, sample: Sample) -> None:
        self.measured.samples.append(sample)
        self.ok += sample.due >= 0 and sample.code == OK
        self.failed += sample.due >= 0 and sample.code != OK

    def _request_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._crash = self._crash or task.exception()

    async def _wait_for_answers(self, stop: asyncio.Event) -> None:
        if not self._tasks:
            return
        if not stop.is_set():
            answers = asyncio.ensure_future(asyncio.wait(self._tasks, timeout=self.settings.timeout + _DEADLINE_MARGIN))
            await _done_or_stopped(answers, stop)
            answers.cancel()
        if stop.is_set() and self._tasks:
            self.measured.interrupted = True
            await asyncio.wait(self._tasks, timeout=GRACE)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _first_counters(self) -> Counters | None:
        await asyncio.sleep(max(0.0, -self.now))
        return await self._counters()

    async def _counters(self) -> Counters | None:
        try:
            return counters_of(await self._observer.status(timeout=STATUS_TIMEOUT), self.now)
        except ExpertMeshError:
            return None  # the report then has no rates by expert

    async def _watch(self, watch: Callable[[Load], None] | None) -> None:
        while watch is not None:
            watch(self)
            await asyncio.sleep(_TICK)


async def _done_or_stopped(future: asyncio.Future[Any], stop: asyncio.Event) -> None:
    """Wait until `future` is done or `stop` is set. Raises the exception of the future, if it has one."""
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({future, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    if future.done():
        future.result()
