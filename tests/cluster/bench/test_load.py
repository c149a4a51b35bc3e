"""The open loop itself, with a fake client whose answers the test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import numpy as np
import pytest

from expertmesh.cluster.bench.load import Load, LoadClient, LoadSettings
from expertmesh.cluster.bench.report import make_report
from expertmesh.cluster.bench.samples import INTERRUPTED, NOT_SENT, OK, Measured
from expertmesh.cluster.bench.target import Target
from expertmesh.cluster.client.reply import Reply
from expertmesh.experts.errors import ExpertMeshError, Overloaded, Unavailable

QUICK = LoadSettings(rate=1000.0, rows=2, arrivals="uniform", seconds=0.1, warmup=0.0, timeout=5.0)
AIM = Target(layer="a", shape=(3,))
REPLY = Reply(
    output=np.zeros(1), epoch=7, versions={"a/e0": "v1-x"}, degraded=False, missing=[], lost_mass=None,
    max_lost_mass=0.0, request_id="r", dropped=0,
)  # fmt: skip
Answerer = Callable[[int], Awaitable[Reply | ExpertMeshError]]


class Fake:
    """A fake LoadClient; `answer` is called with the number of each request."""

    def __init__(self, answer: Answerer) -> None:
        self.calls = 0
        self.answer = answer

    async def call_counting_retries(
        self, layer: str, x: Any, *, raw: bool, timeout: float
    ) -> tuple[Reply | ExpertMeshError, int]:
        self.calls += 1
        return await self.answer(self.calls), 1

    async def status(self, *, timeout: float) -> dict[str, Any]:
        expert = {"rows": 2 * self.calls}
        return {"layers": {"a": {"experts": {"a/e0": expert}}}, "router": {"incarnation": "r"}}


def load(answer: Answerer, settings: LoadSettings = QUICK) -> Load:
    return Load([cast(LoadClient, Fake(answer))], [AIM], settings)


def run(running: Load, stop: asyncio.Event | None = None) -> Measured:
    async def main() -> Measured:
        return await asyncio.wait_for(running.run(stop or asyncio.Event()), 30)

    return asyncio.run(main())


def test_no_request_waits_for_another() -> None:
    all_sent = asyncio.Event()

    async def answer(number: int) -> Reply:
        if number == 100:
            all_sent.set()
        await all_sent.wait()
        return REPLY

    measured = run(load(answer))
    assert len(measured.samples) == 100
    assert {sample.code for sample in measured.samples} == {OK}
    first = min(measured.samples, key=lambda sample: sample.due)
    assert first.latency_ms > 90.0
    assert not measured.interrupted


def test_the_cap_drops_and_does_not_delay() -> None:
    release = asyncio.Event()

    async def answer(number: int) -> Reply:
        await release.wait()
        return REPLY

    async def main() -> Measured:
        running = load(answer, LoadSettings(**{**vars(QUICK), "most_in_flight": 10}))
        return await running.run(asyncio.Event(), lambda progress: release.set() if progress.failed == 90 else None)

    report = make_report(asyncio.run(main()), ["a"])
    assert (report.all.due, report.all.sent, report.all.ok) == (100, 10, 10)
    assert report.all.failed == {NOT_SENT: 90}


def test_failures_by_code_with_the_first_message() -> None:
    async def answer(number: int) -> Reply | ExpertMeshError:
        return [REPLY, Overloaded(f"full {number}"), Unavailable(f"down {number}")][number % 3]

    report = make_report(run(load(answer)), ["a"])
    assert report.all.failed == {"RESOURCE_EXHAUSTED": 34, "UNAVAILABLE": 33}
    assert report.errors == {"RESOURCE_EXHAUSTED": "Overloaded: full 1", "UNAVAILABLE": "Unavailable: down 2"}
    assert report.all.retries == 100
    assert (report.epochs, report.versions) == ({7: 33}, {"a/e0": {"v1-x": 33}})
    assert report.experts is not None
    assert report.experts["a/e0"] > 0


def test_the_warmup_is_not_measured() -> None:
    async def answer(number: int) -> Reply:
        return REPLY

    running = load(answer, LoadSettings(**{**vars(QUICK), "warmup": 0.05}))
    measured = run(running)
    assert len(measured.samples) == pytest.approx(150, abs=1)
    assert min(sample.due for sample in measured.samples) == pytest.approx(-0.05)
    report = make_report(measured, ["a"])
    assert report.all.due == report.all.ok == pytest.approx(100, abs=1)
    assert measured.versions["a/e0", "v1-x"] == report.all.ok == running.ok


def test_a_stop_ends_early_and_keeps_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.cluster.bench.load.GRACE", 0.05)

    async def main() -> tuple[Measured, int]:
        stop = asyncio.Event()

        async def answer(number: int) -> Reply:
            if number == 80:
                stop.set()
            if number > 50:
                await asyncio.Event().wait()
            return REPLY

        running = load(answer, LoadSettings(**{**vars(QUICK), "seconds": 60.0}))
        return await running.run(stop), running.in_flight

    measured, in_flight = asyncio.run(asyncio.wait_for(main(), 30))
    codes = [sample.code for sample in measured.samples]
    assert measured.interrupted
    assert measured.seconds < 60.0
    assert codes.count(OK) == 50
    assert codes.count(INTERRUPTED) == len(codes) - 50 >= 30
    assert in_flight == 0


def test_a_bug_is_not_swallowed() -> None:
    async def answer(number: int) -> Reply:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(load(answer))
