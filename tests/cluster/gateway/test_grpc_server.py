"""The gateway's life, over real gRPC on loopback: ready, serving, draining, closed; and what it says of what it did."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.waiting import run_async

from expertmesh.cluster.gateway.authorise import TokenTable
from expertmesh.cluster.gateway.gateway import Gateway, GatewaySettings
from expertmesh.cluster.gateway.grpc_server import GrpcServer
from expertmesh.cluster.machine.tokens import new_token, token_digest
from expertmesh.cluster.rpc import health
from expertmesh.cluster.rpc.channel_options import client_options
from expertmesh.cluster.rpc.documents import decode_document
from expertmesh.cluster.rpc.health import ServingStatus, decode_response, encode_request
from expertmesh.cluster.rpc.methods import SERVICE, Role
from expertmesh.cluster.rpc.status import ERROR_KEY, REQUEST_ID_KEY, RETRY_AFTER_KEY
from expertmesh.experts import wire
from expertmesh.experts.errors import Unavailable
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.mixture.layer import Layer

TOKEN = new_token()
X = np.ones((2, 3), np.float32)


class Served:
    """A gateway before a mesh, and a channel to it."""

    def __init__(self, mesh: RouterInProcess, gateway: Gateway, server: GrpcServer) -> None:
        self.mesh, self.gateway, self.server = mesh, gateway, server
        address = f"127.0.0.1:{server.port}"
        self.channel = grpc.aio.insecure_channel(address, options=client_options(loopback=True))

    def send(self, method: str, message: bytes, timeout: float | None = 30.0, **metadata: str) -> Any:
        sent = (("authorization", f"Bearer {TOKEN}"), *((k.replace("_", "-"), v) for k, v in metadata.items()))
        return self.channel.unary_unary(method)(message, metadata=sent, timeout=timeout, wait_for_ready=True)

    async def forward(self, x: np.ndarray = X, timeout: float | None = 30.0, **options: Any) -> wire.Frame:
        metadata = {key: options.pop(key) for key in list(options) if key.startswith("x_")}
        frame = wire.encode("call", {"layer": "l", **options}, {"x": wire.WireTensor.from_numpy(x)})
        return wire.decode(await self.send(f"/{SERVICE}/Call", frame, timeout, **metadata))

    async def state(self) -> str:
        status = wire.decode(await self.send(f"/{SERVICE}/Status", wire.encode("status", {})))
        return str(decode_document(status, "status")["state"])

    async def health(self, service: str = "") -> ServingStatus:
        return decode_response(await self.send(health.CHECK, encode_request(service)))


@asynccontextmanager
async def opened(expert: Expert | None = None, ready: bool = True, **settings: Any) -> AsyncIterator[Served]:
    layer = Layer("l", gates.Fixed([1.0]), {"e": expert or Expert("torch:sin")})
    mesh = RouterInProcess(layer, max_rows_in_flight=settings.pop("rows", 1000))
    tokens = TokenTable()
    tokens.add(token_digest(TOKEN), Role.ADMIN)

    async def status() -> dict[str, Any]:
        return {"name": "here"}

    gateway = Gateway(mesh.router, tokens, GatewaySettings(**settings), status)
    if ready:
        await mesh.__aenter__()
    server = GrpcServer(gateway)
    await server.start()
    served = Served(mesh, gateway, server)
    try:
        yield served
    finally:
        await served.channel.close()
        await server.stop()
        await mesh.__aexit__()


def refused(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    return error.code().name, {key: str(value) for key, value in error.trailing_metadata()}


def test_a_call_is_answered_with_its_summary() -> None:
    async def main() -> None:
        async with opened() as served:
            frame = await served.forward(request_id="r-7")
            assert frame.kind == "reply"
            assert set(frame.tensors) == {"output"}
            assert np.allclose(frame.tensors["output"].to_numpy(), np.sin(X))
            assert frame.meta["request_id"] == "r-7"
            assert frame.meta["versions"] == {name: served.mesh.versions[name] for name in ("l/e", "l/gate")}
            routed = await served.forward(return_routing=True, x_request_id="from-metadata")
            assert routed.tensors["indices"].to_numpy().tolist() == [[0], [0]]
            assert routed.meta["request_id"] == "from-metadata"

    run_async(main())


def test_what_was_lost_comes_with_the_answer() -> None:
    def sometimes(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(rows < 0, torch.nan, rows)

    async def main() -> None:
        async with opened(Expert.from_function(sometimes)) as served:
            x = np.array([[1.0], [-2.0]], np.float32)
            frame = await served.forward(x, on_missing="residual", max_lost_mass=1.0)
            assert frame.tensors["output"].to_numpy().tolist() == x.tolist()
            assert frame.tensors["lost_mass"].to_numpy().tolist() == [0.0, 1.0]
            assert (frame.meta["degraded"], frame.meta["missing"]) == (True, ["l/e"])

    run_async(main())


def test_a_refusal_carries_its_class_and_the_requests_id_and_is_logged_with_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("expertmesh"), "propagate", True)

    async def main() -> None:
        async with opened(rows=4) as served:
            for options, wanted in [
                ({"top_k": 5}, ("INVALID_ARGUMENT", "InvalidRequest")),
                ({"x": np.ones((9, 3), np.float32)}, ("RESOURCE_EXHAUSTED", "TooLarge")),
            ]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await served.forward(**options, x_request_id="r-9")  # type: ignore[arg-type]
                code, trailers = refused(caught.value)
                assert (code, trailers[ERROR_KEY]) == wanted
                assert trailers[REQUEST_ID_KEY] == "r-9"
            with served.mesh.router.admission.admit("l", 3), pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward()
            assert int(refused(caught.value)[1][RETRY_AFTER_KEY]) > 0

    with caplog.at_level(logging.INFO, "expertmesh"):
        run_async(main())
    logged = [(vars(record)["code"], vars(record)["request_id"]) for record in caplog.records if "code" in vars(record)]
    once = list(dict.fromkeys(logged))  # caplog may listen at a logger and at the root
    assert once[:2] == [("INVALID_ARGUMENT", "r-9"), ("RESOURCE_EXHAUSTED", "r-9")]


def test_an_id_is_given_to_who_brings_none() -> None:
    async def main() -> None:
        async with opened() as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward(top_k=5)
            assert len(refused(caught.value)[1][REQUEST_ID_KEY]) == 32
            assert len((await served.forward()).meta["request_id"]) == 32

    run_async(main())


def test_a_bug_of_ours_is_internal_and_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "expertmesh")

    async def main() -> None:
        async with opened() as served:

            async def broken(request: object) -> None:
                raise KeyError("/a/path/of/the/server")

            monkeypatch.setattr(served.mesh.router, "forward", broken)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward()
            code, trailers = refused(caught.value)
            assert (code, trailers[ERROR_KEY]) == ("INTERNAL", "ExpertMeshError")
            assert caught.value.details() == "internal error: look up the request id in the log"

    run_async(main())


@pytest.mark.parametrize("whose", ["client", "gateway"])
def test_a_deadline_ends_the_call_and_frees_the_rows(whose: str) -> None:
    release = threading.Event()

    def slow(rows: torch.Tensor) -> torch.Tensor:
        assert release.wait(60)
        return rows

    async def main() -> None:
        async with opened(Expert.from_function(slow), default_timeout=0.05) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward(timeout=0.2 if whose == "client" else None)
            assert refused(caught.value)[0] == "DEADLINE_EXCEEDED"
            release.set()
            while served.mesh.router.admission.rows:  # a client that gave up is noticed a moment later
                await asyncio.sleep(0)
            await served.mesh.at_rest()

    try:
        run_async(main())
    finally:
        release.set()


def test_it_serves_once_there_are_layers_and_who_watches_is_told() -> None:
    async def main() -> None:
        async with opened(ready=False) as served:
            seen: list[ServingStatus] = []
            metadata = (("authorization", f"Bearer {TOKEN}"),)
            watch = served.channel.unary_stream(f"/{health.SERVICE}/Watch")(b"", metadata=metadata, timeout=60)

            async def look() -> None:
                async for message in watch:
                    seen.append(decode_response(message))

            looking = asyncio.ensure_future(look())
            assert await served.health() == ServingStatus.NOT_SERVING
            assert await served.health("l") == ServingStatus.SERVICE_UNKNOWN
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward()
            assert refused(caught.value)[0] == "UNAVAILABLE"
            while not seen:
                await asyncio.sleep(0.001)
            await served.mesh.__aenter__()
            served.gateway.notify()
            while len(seen) < 2:
                await asyncio.sleep(0.001)
            for service in ("", "l", SERVICE):
                assert await served.health(service) == ServingStatus.SERVING
            assert await served.health("m") == ServingStatus.SERVICE_UNKNOWN
            (name,) = served.mesh.hosts
            served.mesh.report(served.mesh.replica(name, state="restarting"))
            assert await served.health("l") == ServingStatus.NOT_SERVING
            assert await served.health() == await served.health(SERVICE) == ServingStatus.NOT_SERVING
            assert await served.state() == "not_serving"
            served.mesh.report()
            assert await served.health() == await served.health("l") == ServingStatus.SERVING
            assert await served.state() == "serving"
            served.mesh.router.adopt(Epoch(2, {}, {}))
            served.gateway.notify()  # nothing that this watcher watches has changed
            served.gateway.drain()
            while len(seen) < 3:
                await asyncio.sleep(0.001)
            assert seen == [ServingStatus.NOT_SERVING, ServingStatus.SERVING, ServingStatus.NOT_SERVING]
            looking.cancel()

    run_async(main())


def test_a_drain_finishes_what_was_accepted_and_takes_nothing_new() -> None:
    began, release = threading.Event(), threading.Event()

    def slow(rows: torch.Tensor) -> torch.Tensor:
        began.set()
        assert release.wait(60)
        return rows * 2

    async def main() -> None:
        async with opened(Expert.from_function(slow)) as served:
            accepted = asyncio.ensure_future(served.forward())
            await asyncio.get_running_loop().run_in_executor(None, began.wait, 60)
            drained = wire.decode(await served.send(f"/{SERVICE}/Drain", wire.encode("drain", {})))
            assert drained.kind == "status"
            assert await served.health() == ServingStatus.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward()
            assert refused(caught.value)[0] == "UNAVAILABLE"
            assert "draining" in str(caught.value.details())
            stopping = asyncio.ensure_future(served.server.stop(grace=60))
            await asyncio.sleep(0)
            release.set()
            frame = await accepted
            assert frame.tensors["output"].to_numpy().tolist() == (X * 2).tolist()
            await stopping

    try:
        run_async(main())
    finally:
        release.set()


def test_a_port_in_use_is_said_and_the_first_goes_on() -> None:
    async def main() -> None:
        async with opened() as served:
            with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{served.server.port}: is the port in"):
                async with opened(port=served.server.port):
                    raise AssertionError
            assert (await served.forward()).kind == "reply"

    run_async(main())


def test_a_port_is_free_again_once_it_is_closed() -> None:
    async def main() -> int:
        async with opened() as served:
            await served.server.stop()
            await served.server.stop()
            return served.server.port

    ports: list[int] = []

    async def keep() -> None:
        ports.append(await main())

    run_async(keep())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports[0]))


def test_a_message_that_is_too_large_is_refused_by_the_settings_name() -> None:
    async def main() -> None:
        async with opened(max_message_bytes=4096) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.forward(np.ones((2000, 3), np.float32))
            assert refused(caught.value)[0] == "RESOURCE_EXHAUSTED"
            assert (await served.forward()).kind == "reply"

    run_async(main())
