"""Connections end: those of strangers that say nothing soon, all others after a time, and no call is lost by that."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import numpy as np
import pytest
from benchmarks.breakage.raw_http2 import RawConnection
from helpers.front import METADATA, TOKEN, Front, opened
from helpers.waiting import run_async

from expertmesh import Client
from expertmesh.cluster.client.retry import RetryPolicy
from expertmesh.cluster.rpc import channel_options, health
from expertmesh.cluster.rpc.health import ServingStatus

STRANGERS = 32
CLIENTS = 4
ONCE = RetryPolicy(attempts=1)
X = np.ones((2, 3), np.float32)


def silent(port: int) -> None:
    """Strangers that connect and send nothing; returns once all were hung up on."""
    connections = [socket.create_connection(("127.0.0.1", port), timeout=60.0) for _ in range(STRANGERS)]
    for each in connections:
        with each:
            while each.recv(65_536):
                pass


def without_calls(port: int) -> None:
    """Strangers that speak HTTP/2 and never call anything; returns once all were hung up on."""
    connections = [RawConnection(port, patience=60.0) for _ in range(STRANGERS)]
    for each in connections:
        while each.listen():
            pass
        assert each.closed
        each.close()


@pytest.mark.parametrize(("strangers", "bound"), [(silent, "HANDSHAKE_MS"), (without_calls, "IDLE_MS")])
def test_a_connection_that_carries_nothing_is_closed(
    monkeypatch: pytest.MonkeyPatch, strangers: Any, bound: str
) -> None:
    monkeypatch.setattr(channel_options, bound, 300)

    async def main() -> None:
        async with opened() as front:
            await asyncio.to_thread(strangers, front.server.port)
            async with front.client() as client:
                np.testing.assert_array_equal(await client.forward("l", X), X)

    run_async(main())


def test_clients_under_load_lose_no_call_when_their_connections_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_options, "AGE_MS", 300)
    addresses: set[str] = set()

    def old() -> bool:
        return len(addresses) >= 4 * (CLIENTS + 1)  # each client has connected three times more

    def blocking(endpoint: str) -> int:
        answered = 0
        with Client(endpoint, token=TOKEN, retry=ONCE) as client:
            while not old():
                np.testing.assert_array_equal(client.forward("l", X), X)
                answered += 1
        return answered

    async def calling(front: Front, streamed: bool) -> int:
        answered = 0
        async with front.client(retry=ONCE) as client:
            while not old():
                many = [client.forward("l", X, stream=streamed) for _ in range(8)]
                for output in await asyncio.gather(*many):
                    np.testing.assert_array_equal(output, X)
                    answered += 1
        return answered

    async def main() -> None:
        async with opened() as front, front.channel() as channel:
            forward = front.mesh.router.forward

            async def noted(request: Any) -> Any:
                addresses.add(request.client)
                return await forward(request)

            front.mesh.router.forward = noted  # type: ignore[method-assign]
            watch = channel.unary_stream(f"/{health.SERVICE}/Watch")(health.encode_request("l"), metadata=METADATA)
            assert health.decode_response(await watch.read()) is ServingStatus.SERVING
            answered = await asyncio.gather(
                asyncio.to_thread(blocking, front.endpoint),
                *(calling(front, streamed=bool(number % 2)) for number in range(CLIENTS)),
            )
            assert min(answered) > 0
            front.gateway.drain()  # a call that lasts is not cut off by the age of its connection
            assert health.decode_response(await watch.read()) is ServingStatus.NOT_SERVING
            watch.cancel()

    run_async(main())
