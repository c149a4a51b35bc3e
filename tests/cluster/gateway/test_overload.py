"""Overload at the gateway: what cannot be in time is refused before it is received, and never handed to the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.front import TOKEN, Front, opened
from helpers.waiting import run_async, until

from expertmesh.cluster.client import client as client_module
from expertmesh.cluster.gateway.gateway import CallInfo
from expertmesh.cluster.rpc.status import RETRY_AFTER_KEY, to_status
from expertmesh.experts import wire
from expertmesh.experts.errors import DeadlineExceeded, Overloaded
from expertmesh.experts.spec import Expert
from expertmesh.router.request import admission
from expertmesh.router.request.admission import ALWAYS

X = np.arange(-3, 3, dtype=np.float32).reshape(2, 3)
FRAME = wire.encode("call", {"layer": "l"}, {"x": wire.WireTensor.from_numpy(X)})


def overloaded(front: Front) -> None:
    """Let the gateway believe that calls of the layer wait for each other, a second each."""
    calls = front.gateway._admission
    for number in range(1000):
        for _ in range(number % 40):
            calls.began("l")
        calls.ended("l", number % 40, 1.0 + number % 40, float(number))
        for _ in range(number % 40 - 1):
            calls.ended("l", 0, None, float(number))
        if not number % 40:
            calls.began("l")
    while calls.calls < ALWAYS:
        calls.began("l")


async def never() -> Any:
    raise AssertionError("the message was read")


async def at_once() -> Any:
    return FRAME


def never_run(work: Any) -> Any:
    work.close()
    raise AssertionError("the router was asked")


def test_names_that_callers_make_up_are_not_counted_as_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(admission, "MAX_CALLS", 0)
        async with opened() as front:
            for layer in ("l", "made up", "made up too"):
                with pytest.raises(Overloaded):
                    await front.gateway.unary("Call", never, CallInfo(request_id="r", token=TOKEN, layer=layer))
            counted = front.gateway._router.telemetry.requests
            assert {layer: number for (layer, _), number in counted.items()} == {"l": 1, "": 2}

    run_async(main())


@pytest.mark.parametrize(("layer", "read"), [("l", never), ("", never), ("none", at_once), ("other", at_once)])
def test_a_call_that_would_wait_too_long_is_refused_and_says_when_to_come_again(
    layer: str, read: Callable[[], Any]
) -> None:
    async def main() -> None:
        async with opened() as front:
            overloaded(front)
            front.gateway._run = never_run
            call = CallInfo(request_id="r", token=TOKEN, layer=layer, deadline=front.gateway._clock() + 1.0)
            with pytest.raises(Overloaded, match="calls of layer l are in flight") as caught:
                await front.gateway.unary("Call", read, call)
            assert 0.05 <= caught.value.retry_after <= 5.0
            assert int(dict(to_status(caught.value)[2])[RETRY_AFTER_KEY]) >= 50
            assert front.mesh.router.telemetry.requests["l", "RESOURCE_EXHAUSTED"] == 1

    run_async(main())


def test_a_call_is_refused_if_others_were_let_in_while_it_was_received() -> None:
    async def main() -> None:
        async with opened() as front:
            front.gateway._run = never_run

            async def late() -> bytes:
                overloaded(front)
                return FRAME

            call = CallInfo(request_id="r", token=TOKEN, layer="l", deadline=front.gateway._clock() + 1.0)
            with pytest.raises(Overloaded, match="calls of layer l are in flight"):
                await front.gateway.unary("Call", late, call)
            assert front.mesh.router.telemetry.requests["l", "RESOURCE_EXHAUSTED"] == 1

    run_async(main())


def test_what_does_not_fit_into_the_rows_in_flight_is_refused_without_asking_the_router() -> None:
    async def main() -> None:
        async with opened() as front:
            front.gateway._run = never_run
            front.mesh.router.admission.max_rows = 4
            with front.mesh.router.admission.admit("l", 2), pytest.raises(Overloaded, match="too many rows"):
                await front.gateway.unary("Call", at_once, CallInfo(request_id="r", token=TOKEN))
            assert front.mesh.router.telemetry.requests["l", "RESOURCE_EXHAUSTED"] == 1

    run_async(main())


def test_calls_in_flight_are_counted_until_they_end_however_they_do() -> None:
    async def main() -> None:
        async with opened(Expert.from_function(lambda rows: 1 / 0)) as front, front.client(timeout=5.0) as client:
            front.hold = asyncio.Event()
            calls = [asyncio.ensure_future(client.forward("l", X, timeout=t)) for t in (30.0, 30.0, 0.2)]
            await until(lambda: front.gateway._admission.calls == 3)
            calls[0].cancel()
            await until(lambda: front.gateway._admission.calls == 1)
            front.hold.set()
            assert [type(end) for end in await asyncio.gather(*calls, return_exceptions=True)][2] is DeadlineExceeded
            await until(lambda: front.gateway._admission.calls == 0)

    run_async(main())


def test_a_client_keeps_what_is_too_much_at_once_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_IN_FLIGHT", 8)

    async def main() -> None:
        async with opened() as front, front.client() as client:
            answers = await asyncio.gather(*(client.forward("l", X) for _ in range(200)))
            assert all(np.array_equal(answer, np.abs(X)) for answer in answers)
            assert front.most_inside <= 8
            front.hold = asyncio.Event()
            held = [asyncio.ensure_future(client.forward("l", X)) for _ in range(8)]
            await until(lambda: front.inside == 8)
            with pytest.raises(DeadlineExceeded, match="8 calls of this client are in flight"):
                await client.forward("l", X, timeout=0.05)
            with pytest.raises(DeadlineExceeded, match="8 calls of this client are in flight"):
                await client.forward("l", X, timeout=0.05, stream=True)
            assert await client.health("l") == "SERVING"
            assert (await client.status())["state"] == "serving"
            assert front.inside == 8
            front.hold.set()
            await asyncio.gather(*held)
            np.testing.assert_array_equal(await client.forward("l", X), np.abs(X))

    run_async(main())


@pytest.mark.slow
def test_thousands_of_calls_at_once_are_all_answered() -> None:
    async def main() -> None:
        async with opened() as front, front.client(timeout=90.0) as client:
            answers = await asyncio.gather(*(client.forward("l", X) for _ in range(2500)), return_exceptions=True)
            assert all(isinstance(answer, np.ndarray) for answer in answers)

    run_async(main())
