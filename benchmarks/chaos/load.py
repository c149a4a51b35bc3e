"""Load on a layer: as many requests as it bears, or open-loop at a rate, and what came of each request.

A latency counts from the moment at which a request was due, not from when it was sent: a load generator that falls
behind must not hide what a caller would have waited.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertmesh import AsyncClient, errors

from .exact import rows

LOAD_SHARE = 0.6
"""Of what a layer bears, in experiments with swaps and kills."""

POOL = 256
FREEZE_EVERY = 1000
"""Requests after which the garbage collector is told to leave alone what is there: its pauses are not the cluster's."""


@dataclass(frozen=True, slots=True)
class SeenEpoch:
    """One request: its number, when it was due, sent and done (monotonic seconds), its reply or the error's name."""

    number: int
    due: float
    sent: float
    done: float
    reply: Any = None
    error: str = ""

    @property
    def latency(self) -> float:
        """Seconds from when it was due."""
        return self.done - self.due


@dataclass
class Load:
    """Requests to one layer from a thread of its own, while it is entered; `seen` is complete after that.

    `rate` is in requests a second, in random order of arrival; with `callers` instead, so many callers ask as fast as
    they are answered.
    """

    endpoint: str
    layer: str
    rate: float = 0.0
    callers: int = 0
    count: int = 4
    timeout: float = 10.0
    inputs: Sequence[Any] = ()
    seen: list[SeenEpoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = self.inputs or [rows(number, self.count) for number in range(POOL)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="load")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Send nothing more, and wait for what is under way."""
        self._stop.set()
        self._thread.join()

    def input(self, seen: SeenEpoch) -> Any:
        """The rows of a request."""
        return self.inputs[seen.number % len(self.inputs)]

    async def _main(self) -> None:
        async with AsyncClient(self.endpoint, timeout=self.timeout) as client:
            if self.callers:
                await asyncio.gather(*(self._caller(client, place) for place in range(self.callers)))
            else:
                await self._open_loop(client)

    async def _caller(self, client: AsyncClient, place: int) -> None:
        number = place
        while not self._stop.is_set():
            await self._ask(client, number, time.monotonic())
            number += self.callers

    async def _open_loop(self, client: AsyncClient) -> None:
        arrivals = random.Random(0)
        asked: set[asyncio.Task[None]] = set()
        due, number = time.monotonic(), 0
        while not self._stop.is_set():
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(min(wait, 0.1))
                continue
            task = asyncio.create_task(self._ask(client, number, due))
            asked.add(task)
            task.add_done_callback(asked.discard)
            due += arrivals.expovariate(self.rate)
            number += 1
            await asyncio.sleep(0)
        await asyncio.gather(*asked)

    async def _ask(self, client: AsyncClient, number: int, due: float) -> None:
        if number == 0:
            gc.collect()
        if number % FREEZE_EVERY == 0:
            gc.freeze()
        sent = time.monotonic()
        x = self.inputs[number % len(self.inputs)]
        try:
            reply = await client.call(self.layer, x)
        except errors.ExpertMeshError as error:
            name = f"{type(error).__name__}: {error.message[:160]}"
            self.seen.append(SeenEpoch(number, due, sent, time.monotonic(), error=name))
        else:
            self.seen.append(SeenEpoch(number, due, sent, time.monotonic(), reply))


def capacity(load: Load, *, seconds: float = 5.0, warm: float = 1.0) -> float:
    """The most rows a second that a layer bears from the callers of a load, after `warm` seconds to warm up.

    A request counts with the share of its time that lies in the window: answers come in bursts, as a batch ends, and
    whether one burst more or less falls into the window must not decide.
    """
    with load:
        time.sleep(warm)
        begin = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
        time.sleep(warm)  # those under way at the end finish beside as many others as before
    return sum(load.count * share(seen, begin, end) for seen in load.seen if not seen.error) / (end - begin)


def share(seen: SeenEpoch, begin: float, end: float) -> float:
    """How much of a request's time lies between two moments, as a fraction of all of it."""
    return max(0.0, min(seen.done, end) - max(seen.sent, begin)) / (seen.done - seen.sent)
