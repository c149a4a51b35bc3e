"""Drives an open loop: sends each request when it is due, whatever became of those before, and notes what comes back.

All decisions are elsewhere (bench_schedule, bench_search, bench_report); this is the shell round an AsyncClient.
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
from ..client.retry import Answer, Pause, Step, drive_async
from .samples import INTERRUPTED, NOT_SENT, OK, Counters, Measured, Sample, counters_of
from .schedule import arrivals, turns
from .target import Target

MOST_IN_FLIGHT = 4096
GRACE = 2.0
"""Seconds that an interrupted load waits for the answers under way."""
STATUS_TIMEOUT = 5.0
_AFTER_DEADLINES = 2.0
_TICK = 0.25


class LoadClient(AsyncClient):
    """A client that says how often it retried."""

    async def measured(self, layer: str, x: Any, **options: Any) -> tuple[Reply | ExpertMeshError, int]:
        """Call a layer; returns the reply or the error, and the number of retries."""
        retries = 0

        async def perform(step: Step) -> Answer:
            nonlocal retries
            retries += isinstance(step, Pause)
            return await self._perform(step)

        try:
            return await drive_async(self._calls.call(layer, x, **options), perform), retries
        except ExpertMeshError as error:
            return error, retries


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """One load: `rate` requests a second of `rows` rows each for `seconds`, after a `warmup` that is not measured."""

    rate: float
    rows: int = 8
    arrivals: str = "poisson"
    seconds: float = 10.0
    warmup: float = 2.0
    seed: int = 0
    timeout: float = 10.0
    most_in_flight: int = MOST_IN_FLIGHT


class Load:
    """One load on a running cluster; `run` it once. `measured` grows meanwhile, for those who watch."""

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
        """Seconds since measuring began; below 0 while it warms up."""
        return self.clock() - self._start

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return len(self._tasks)

    async def run(self, stop: asyncio.Event, watch: Callable[[Load], None] | None = None) -> Measured:
        """Send everything and wait for the answers. Once `stop` is set nothing more is sent, and waiting is short."""
        self._start = self.clock() + self.settings.warmup
        opening = asyncio.create_task(self._opening())
        watching = asyncio.create_task(self._watch(watch))
        sending = asyncio.create_task(self._send_all())
        try:
            await _either(sending, stop)
            if not sending.done():
                self.measured.interrupted = True
                self.measured.seconds = min(self.settings.seconds, max(0.0, self.now))
            await self._wait_for_answers(stop)
            self.measured.after = await self._counters()
            self.measured.before = await opening if opening.done() else None
        finally:
            for task in (sending, watching, opening, *self._tasks):
                task.cancel()
            await asyncio.gather(sending, watching, opening, *self._tasks, return_exceptions=True)
        if self._crash is not None:
            raise self._crash
        return self.measured

    async def _send_all(self) -> None:
        settings = self.settings
        total = settings.warmup + settings.seconds
        schedule = arrivals(settings.arrivals, settings.rate, total, settings.seed)
        for due, turn in zip(schedule, turns(len(self._targets), settings.seed), strict=False):
            due -= settings.warmup
            await asyncio.sleep(max(0.0, due - self.now))
            if len(self._tasks) >= settings.most_in_flight:
                self._note(Sample(self._targets[turn].layer, settings.rows, due, due, due, NOT_SENT))
                continue
            task = asyncio.create_task(self._one(turn, due))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        await asyncio.sleep(max(0.0, settings.seconds - self.now))

    async def _one(self, turn: int, due: float) -> None:
        target, client, x = self._targets[turn], next(self._clients), next(self._batches[turn])
        sent, code, retries, epoch = self.now, INTERRUPTED, 0, 0
        try:
            answer, retries = await client.measured(
                target.layer, x, raw=target.dtype == "bfloat16", timeout=self.settings.timeout
            )
            code, epoch = self._judge(answer, due)
        finally:  # also when it is cancelled
            self._note(Sample(target.layer, len(x), due, sent, self.now, code, retries, epoch))

    def _judge(self, answer: Reply | ExpertMeshError, due: float) -> tuple[str, int]:
        if isinstance(answer, Reply):
            if due >= 0:
                self.measured.versions.update(answer.versions.items())
            return OK, answer.epoch
        self.measured.errors.setdefault(answer.code, f"{type(answer).__name__}: {answer.message}")
        return answer.code, 0

    def _note(self, sample: Sample) -> None:
        self.measured.samples.append(sample)
        self.ok += sample.due >= 0 and sample.code == OK
        self.failed += sample.due >= 0 and sample.code != OK

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._crash = self._crash or task.exception()

    async def _wait_for_answers(self, stop: asyncio.Event) -> None:
        if not self._tasks:
            return
        if not stop.is_set():
            answers = asyncio.ensure_future(asyncio.wait(self._tasks, timeout=self.settings.timeout + _AFTER_DEADLINES))
            await _either(answers, stop)
            answers.cancel()
        if stop.is_set() and self._tasks:
            self.measured.interrupted = True
            await asyncio.wait(self._tasks, timeout=GRACE)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _opening(self) -> Counters | None:
        await asyncio.sleep(max(0.0, -self.now))
        return await self._counters()

    async def _counters(self) -> Counters | None:
        try:
            return counters_of(await self._observer.status(timeout=STATUS_TIMEOUT), self.now)
        except ExpertMeshError:
            return None  # the report then goes without the experts' rates

    async def _watch(self, watch: Callable[[Load], None] | None) -> None:
        while watch is not None:
            watch(self)
            await asyncio.sleep(_TICK)


async def _either(future: asyncio.Future[Any], stop: asyncio.Event) -> None:
    """Wait until a future is done, which raises what it raises, or `stop` is set."""
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({future, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    if future.done():
        future.result()
