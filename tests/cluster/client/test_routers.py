"""Clients of several routers over real gRPC: routers that are lost, frozen, draining or behind cost no call."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.front import TOKEN, Front, opened
from helpers.tls import CERTIFICATE, KEY
from helpers.waiting import run_async, until
from helpers.wire_faults import Wire, wire

from expertmesh.cluster.client.client import AsyncClient, Client
from expertmesh.cluster.client.retry import RetryPolicy
from expertmesh.experts.errors import DeadlineExceeded, RouterUnavailable
from expertmesh.router.epochs.epochs import Epoch

X = np.arange(-8, 8, dtype=np.float32).reshape(4, 4)
WATCH = "expertmesh-watch"
ONCE = RetryPolicy(attempts=1)
"""No retries: what succeeds with it has gone on to another router at once."""


class Fleet:
    """Two routers, each behind a wire that can be cut or frozen."""

    def __init__(self, fronts: list[Front], wires: list[Wire]) -> None:
        self.fronts, self.wires = fronts, wires
        self.endpoints = [wire.endpoint for wire in wires]

    @property
    def answered(self) -> list[int]:
        return [front.answered for front in self.fronts]

    @property
    def inside(self) -> list[int]:
        return [front.inside for front in self.fronts]

    def hold(self) -> Callable[[], None]:
        """Keep all requests inside until the function that is returned is called."""
        released = asyncio.Event()
        for front in self.fronts:
            front.hold = released
        return released.set


@asynccontextmanager
async def fleet(routers: int = 2) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        fronts = [await stack.enter_async_context(opened()) for _ in range(routers)]
        yield Fleet(fronts, [await stack.enter_async_context(wire(front.server.port)) for front in fronts])


class Caller:
    """One of the two clients, called from the event loop, so that every test runs with both."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def forward(self, x: Any = X, **options: Any) -> asyncio.Future[Any]:
        if isinstance(self.client, Client):
            return asyncio.ensure_future(asyncio.to_thread(self.client.forward, "l", x, **options))
        return asyncio.ensure_future(self.client.forward("l", x, **options))

    async def forward_all(self, calls: int) -> None:
        for n, y in enumerate(await asyncio.gather(*(self.forward(X - n) for n in range(calls)))):
            np.testing.assert_array_equal(y, np.abs(X - n))


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@asynccontextmanager
async def calling(kind: Any, endpoints: list[str], **options: Any) -> AsyncIterator[Caller]:
    client = kind(endpoints, token=TOKEN, **options)
    try:
        yield Caller(client)
    finally:
        closed = client.close()
        if closed is not None:
            await closed


def test_calls_are_shared_by_all_routers(kind: Any) -> None:
    async def main() -> None:
        async with fleet(3) as mesh, calling(kind, mesh.endpoints) as caller:
            for _ in range(6):
                await caller.forward()
            assert mesh.answered == [2, 2, 2]
            release = mesh.hold()
            calls = [caller.forward() for _ in range(6)]
            await until(lambda: mesh.inside == [2, 2, 2])
            release()
            await asyncio.gather(*calls)
            assert caller.client.endpoints == mesh.endpoints
            assert caller.client.endpoint == mesh.endpoints[0]

    run_async(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_router_that_is_killed_costs_no_call(kind: Any, stream: bool) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints) as caller:
            release = mesh.hold()
            calls = [caller.forward(X - n, stream=stream) for n in range(4)]
            await until(lambda: mesh.inside == [2, 2])
            mesh.wires[0].kill()
            await until(lambda: mesh.inside[1] == 4)
            release()
            for n, y in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_array_equal(y, np.abs(X - n))
            await caller.forward_all(6)
            assert mesh.answered[1] == 10

    run_async(main())


def test_a_router_that_is_started_again_is_used_again(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints, retry=ONCE) as caller:
            mesh.wires[0].kill()
            await caller.forward_all(4)
            assert mesh.answered == [0, 4]
            await mesh.wires[0].listen()
            while not mesh.answered[0]:
                await caller.forward()

    run_async(main())


def test_a_router_that_is_frozen_costs_no_call_and_is_left_alone_until_it_wakes(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints) as caller:
            await caller.forward_all(4)
            mesh.wires[0].freeze()
            await asyncio.wait_for(caller.forward_all(8), 30.0)  # their timeout
            assert mesh.answered == [2, 10]
            for n in range(8):
                await asyncio.wait_for(caller.forward(X - n), 30.0)
            assert mesh.answered == [2, 18]
            mesh.wires[0].thaw()
            while mesh.answered[0] == 2:
                await caller.forward()

    run_async(main())


def counted_checks(front: Front) -> list[str]:
    """The services whose health the router is asked for from now on."""
    asked: list[str] = []
    health_of = front.gateway.health_of
    front.gateway.health_of = lambda service: asked.append(service) or health_of(service)  # type: ignore
    return asked


def test_a_router_that_is_only_slow_keeps_its_calls(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints) as caller:
            release = mesh.hold()
            calls = [caller.forward(X - n) for n in range(4)]
            await until(lambda: mesh.inside == [2, 2])
            connections = [link.connections for link in mesh.wires]
            checks = [counted_checks(front) for front in mesh.fronts]
            await until(lambda: min(map(len, checks)) >= 2)
            assert mesh.inside == [2, 2]
            release()
            await asyncio.gather(*calls)
            assert mesh.answered == [2, 2]
            assert [link.connections for link in mesh.wires] == connections

    run_async(main())


def test_a_router_that_drains_finishes_what_it_accepted_and_gets_no_more(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints, retry=ONCE) as caller:
            release = mesh.hold()
            calls = [caller.forward(X - n) for n in range(4)]
            await until(lambda: mesh.inside == [2, 2])
            mesh.fronts[0].gateway.drain()
            calls += [caller.forward(X - n) for n in range(4, 6)]
            await until(lambda: mesh.inside == [2, 4])
            release()
            for n, y in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_array_equal(y, np.abs(X - n))

    run_async(main())


def test_where_no_router_is_left_calls_fail_with_a_typed_error(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints) as caller:
            await caller.forward_all(4)
            for link in mesh.wires:
                link.kill()
            with pytest.raises(RouterUnavailable, match="cannot be reached"):
                await caller.forward()
            await mesh.wires[1].listen()
            while mesh.answered[1] == 2:
                with suppress(RouterUnavailable):
                    await caller.forward()

    run_async(main())


def adopt(front: Front, number: int) -> None:
    mesh = front.mesh
    mesh.router.adopt(Epoch(number, mesh.versions, {mesh.layer.name: mesh.layer}, cluster="this"))


def test_no_router_answers_from_an_epoch_older_than_one_that_was_seen(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints) as caller:
            adopt(mesh.fronts[0], 2)
            while not mesh.answered[0]:
                await caller.forward()  # the epoch is seen
            behind = mesh.answered[1]
            await asyncio.gather(*(caller.forward(timeout=1.0) for _ in range(4)))  # they wait, and go on to the first
            assert mesh.answered[1] == behind
            adopt(mesh.fronts[1], 2)
            while mesh.answered[1] == behind:
                await caller.forward()

    run_async(main())


def test_a_deadline_holds_where_every_router_is_frozen(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(kind, mesh.endpoints) as caller:
            await caller.forward_all(2)
            for link in mesh.wires:
                link.freeze()
            with pytest.raises((DeadlineExceeded, RouterUnavailable)):
                await caller.forward(timeout=3.0)
            for link in mesh.wires:
                link.thaw()
            await caller.forward_all(4)

    run_async(main())


def test_a_task_that_is_cancelled_while_its_router_is_given_up_is_cancelled() -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(AsyncClient, mesh.endpoints) as caller:
            await caller.forward_all(2)
            mesh.wires[0].freeze()
            mesh.wires[1].freeze()
            call = caller.forward()
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run_async(main())


@pytest.mark.slow
def test_10000_async_calls_lose_none_when_a_router_is_killed_among_them() -> None:
    async def main() -> None:
        async with fleet() as mesh, calling(AsyncClient, mesh.endpoints, timeout=90.0) as caller:
            calls = asyncio.gather(*(caller.forward(np.full((1, 4), -n, np.float32)) for n in range(10_000)))
            await until(lambda: sum(mesh.answered) > 2000)
            mesh.wires[0].kill()
            for n, y in enumerate(await calls):
                assert (y.min(), y.max()) == (n, n)
            assert min(mesh.answered) > 0

    run_async(main())


def test_a_name_with_several_addresses_is_several_routers(
    kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(CERTIFICATE)
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "LOCALHOST":  # a name, and the one that the certificate bears
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.1", "127.0.0.2")]

    async def main() -> None:
        async with (
            opened(tls=(KEY, CERTIFICATE)) as one,
            opened(tls=(KEY, CERTIFICATE), host="127.0.0.2", port=one.server.port) as other,
            calling(kind, [f"LOCALHOST:{one.server.port}"], ca_cert=tmp_path / "ca.pem") as caller,
        ):
            await caller.forward_all(6)
            assert (one.answered, other.answered) == (3, 3)
            assert caller.client.endpoint == f"LOCALHOST:{one.server.port}"

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    run_async(main())


def test_a_name_that_cannot_be_looked_up_is_left_to_grpc(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CERTIFICATE)

    async def main() -> None:
        async with calling(kind, ["no-such-host.invalid:1"], ca_cert=tmp_path / "ca.pem", retry=ONCE) as caller:
            with pytest.raises((RouterUnavailable, DeadlineExceeded)):
                await caller.forward(timeout=5.0)

    run_async(main())


def test_a_call_needs_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_all_but_a_watch(thread: threading.Thread) -> None:
        if thread.name == WATCH:
            raise RuntimeError("can't start new thread")
        start(thread)

    async def main() -> None:
        async with fleet() as mesh, calling(Client, mesh.endpoints) as caller:
            await caller.forward_all(4)
            monkeypatch.undo()
            await caller.forward()
            assert _watches()

    monkeypatch.setattr(threading.Thread, "start", start_all_but_a_watch)
    run_async(main())


def test_closing_a_client_ends_its_watch(kind: Any) -> None:
    async def main() -> None:
        async with fleet() as mesh:
            async with calling(kind, mesh.endpoints) as caller:
                await caller.forward_all(2)
            await until(lambda: not _watches())

    run_async(main())


def _watches() -> list[Any]:
    tasks = [task for task in asyncio.all_tasks() if "_run_beside" in repr(task)]
    return [*tasks, *(thread for thread in threading.enumerate() if thread.name == WATCH)]
