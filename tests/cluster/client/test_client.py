"""Both clients against a small gRPC server: arrays of every kind, errors, deadlines, reconnecting, many threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import itertools
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from expertmesh.cluster.client.client import AsyncClient, Client
from expertmesh.cluster.client.retry import RetryPolicy
from expertmesh.cluster.rpc.channel_options import MIN_PING_INTERVAL_MS, client_options, server_options
from expertmesh.cluster.rpc.documents import encode_document
from expertmesh.cluster.rpc.health import ServingStatus, encode_response
from expertmesh.cluster.rpc.status import to_status
from expertmesh.experts import wire
from expertmesh.experts.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

X = np.arange(12, dtype=np.float32).reshape(4, 3)
QUICK = RetryPolicy(first_pause=0.001, longest_pause=0.002)
Behaviour = Callable[[wire.Frame], Coroutine[Any, Any, bytes]]


async def echo(frame: wire.Frame) -> bytes:
    """Answer with the very rows."""
    meta = {"request_id": frame.meta["request_id"], "epoch": 1, "versions": {}}
    return wire.encode("reply", meta, {"output": frame.tensors["x"]})


class EchoServer(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc has no types
    """A gateway in miniature on an event loop in one thread: `behaviour` answers every call."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = echo
        self.calls: list[tuple[str, dict[str, str], str | None]] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's loop, which spares gRPC a second loop in the process."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=60)

    def start(self) -> None:
        self.run(self._start())

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=server_options())
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def stop(self) -> None:
        self.run(self._server.stop(None))

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        answer = {"/expertmesh.v1.Mesh/Call": self._call, "/expertmesh.v1.Mesh/Status": self._status,
                  "/grpc.health.v1.Health/Check": self._check}.get(details.method)  # fmt: skip
        return None if answer is None else grpc.unary_unary_rpc_method_handler(answer)

    async def _call(self, request: bytes, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        frame = wire.decode(request)
        self.calls.append((frame.kind, metadata, frame.meta["request_id"]))
        try:
            return await self.behaviour(frame)
        except ExpertMeshError as error:
            code, text, trailing = to_status(error)
            context.set_trailing_metadata(trailing)
            await context.abort(grpc.StatusCode[code], text)
            raise  # abort has raised

    async def _status(self, request: bytes, context: Any) -> bytes:
        return encode_document("status", {"layers": []})

    async def _check(self, request: bytes, context: Any) -> bytes:
        return encode_response(ServingStatus.SERVING)


class Caller:
    """One of the two clients behind the blocking interface of the first, so that every test runs with both."""

    def __init__(self, client: Client | AsyncClient, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.client = client
        self._run = run

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            return self._run(made) if inspect.iscoroutine(made) else made

        return call


@pytest.fixture(scope="module")
def module_server() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def server(module_server: EchoServer) -> EchoServer:
    module_server.behaviour = echo
    module_server.calls.clear()
    return module_server


@pytest.fixture(params=[Client, AsyncClient])
def connect(request: pytest.FixtureRequest, server: EchoServer) -> Iterator[Callable[..., Caller]]:
    opened: list[Caller] = []

    def open_client(endpoint: str | None = None, **options: Any) -> Caller:
        made = request.param(endpoint or server.endpoint, **({"token": "secret", "retry": QUICK} | options))
        opened.append(Caller(made, server.run))
        return opened[-1]

    yield open_client
    for caller in opened:
        caller.close()


def test_arrays_of_every_dtype_come_back(connect: Callable[..., Caller]) -> None:
    client = connect()
    for name in wire.ITEM_SIZES:
        if name != "bfloat16":
            x = X.astype(name)
            y = client.forward("news", x)
            assert isinstance(y, np.ndarray)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(x, y)
            y[0] = 1
    np.testing.assert_array_equal(client.forward("news", [[1.5, 2.5]]), [[1.5, 2.5]])
    assert client.forward("news", X[:0]).shape == (0, 3)


def test_tensors_of_every_dtype_come_back_without_a_warning(connect: Callable[..., Caller]) -> None:
    torch = pytest.importorskip("torch")
    client = connect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in wire.ITEM_SIZES:
            x = torch.from_numpy(X).to(getattr(torch, name))
            y = client.forward("news", x)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            assert torch.equal(x, y)
            y.zero_()


@pytest.mark.gpu
def test_tensors_on_a_gpu_come_back_to_it(connect: Callable[..., Caller]) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.randn(5, 3, device="cuda", dtype=torch.bfloat16)
    reply = connect().call("news", x)
    assert reply.output.device == reply.lost_mass.device == x.device
    assert torch.equal(reply.output, x)


def test_a_call_carries_token_and_request_id(server: EchoServer, connect: Callable[..., Caller]) -> None:
    reply = connect().call("news", X, request_id="mine-1")
    ((kind, metadata, request_id),) = server.calls
    assert (kind, request_id, reply.request_id) == ("call", "mine-1", "mine-1")
    assert (metadata["authorization"], metadata["x-request-id"]) == ("Bearer secret", "mine-1")


def test_status_and_health(connect: Callable[..., Caller]) -> None:
    client = connect()
    assert client.status() == {"layers": []}
    assert client.health() == "SERVING"
    with pytest.raises(FailedPrecondition, match="does not know this method"):
        client.drain()


def test_an_error_of_the_server_is_raised_as_itself(server: EchoServer, connect: Callable[..., Caller]) -> None:
    async def refuse(frame: wire.Frame) -> bytes:
        raise Overloaded("too many rows wait", retry_after=0.5, request_id=frame.meta["request_id"])

    server.behaviour = refuse
    with pytest.raises(Overloaded, match="too many rows wait") as caught:
        connect().call("news", X, request_id="r9")
    assert (caught.value.retry_after, caught.value.request_id) == (0.5, "r9")
    assert caught.value.__cause__ is None
    assert len(server.calls) == 1


def test_unavailable_is_tried_three_times_with_one_id(server: EchoServer, connect: Callable[..., Caller]) -> None:
    async def refuse(frame: wire.Frame) -> bytes:
        raise Unavailable("an expert restarts")

    server.behaviour = refuse
    with pytest.raises(Unavailable, match="an expert restarts") as caught:
        connect().call("news", X)
    assert len(server.calls) == 3
    assert {request_id for _, _, request_id in server.calls} == {caught.value.request_id}


def test_a_second_attempt_that_succeeds_is_a_success(server: EchoServer, connect: Callable[..., Caller]) -> None:
    async def refuse_once(frame: wire.Frame) -> bytes:
        if len(server.calls) == 1:
            raise Unavailable("an expert restarts")
        return await echo(frame)

    server.behaviour = refuse_once
    np.testing.assert_array_equal(connect().forward("news", X), X)


def test_a_crash_of_the_server_is_no_traceback_here(server: EchoServer, connect: Callable[..., Caller]) -> None:
    async def crash(frame: wire.Frame) -> bytes:
        raise ZeroDivisionError("secret path")

    server.behaviour = crash
    with pytest.raises(ExpertMeshError) as caught:
        connect().call("news", X)
    assert type(caught.value) is ExpertMeshError


def test_the_deadline_holds(server: EchoServer, connect: Callable[..., Caller]) -> None:
    ended = threading.Event()

    async def wait(frame: wire.Frame) -> bytes:
        try:
            return await asyncio.Future()  # for ever: only the deadline of the caller ends it
        finally:
            ended.set()

    server.behaviour = wait
    with pytest.raises(DeadlineExceeded):
        connect().call("news", X, timeout=0.1)
    assert ended.wait(60)
    assert len(server.calls) == 1


def test_a_reply_above_the_limit_names_the_setting(server: EchoServer, connect: Callable[..., Caller]) -> None:
    async def answer_much(frame: wire.Frame) -> bytes:
        return bytes(100_000)

    server.behaviour = answer_much
    client = connect(max_message_bytes=10_000)
    with pytest.raises(TooLarge, match="max_message_bytes of this client or of the server: call with stream=True"):
        client.call("news", X)
    with pytest.raises(TooLarge, match="max_message_bytes"):
        client.call("news", np.zeros(20_000, np.uint8), stream=False)


def test_no_server_is_unavailable_and_quick(connect: Callable[..., Caller]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        client = connect(f"127.0.0.1:{held.getsockname()[1]}")
        with pytest.raises(Unavailable, match="cannot be reached"):
            client.forward("news", X)
        with pytest.raises(Unavailable):
            client.health()


def test_it_reconnects_by_itself(connect: Callable[..., Caller]) -> None:
    restarted = EchoServer()
    try:
        client = connect(restarted.endpoint, retry=RetryPolicy(attempts=50, first_pause=0.05, longest_pause=0.2))
        client.forward("news", X)
        restarted.stop()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            client.forward("news", X, timeout=0.3)
        restarted.start()
        np.testing.assert_array_equal(client.forward("news", X), X)
    finally:
        client.close()
        restarted.close()


def test_a_closed_client_says_so(connect: Callable[..., Caller]) -> None:
    client = connect()
    client.forward("news", X)
    client.close()
    client.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        client.forward("news", X)
    assert "closed" in repr(client.client)


def test_no_repr_shows_the_token(connect: Callable[..., Caller]) -> None:
    client = connect(token="S3CRET").client
    shown = repr(client) + "".join(repr(value) for value in vars(client).values())
    assert "S3CRET" not in shown
    assert client.endpoint in repr(client)


def test_threads_share_a_client_without_mixing_rows(server: EchoServer) -> None:
    def work(thread: int) -> None:
        for n in range(40):
            x = np.full((2, 3), thread * 1000 + n, np.int64)
            np.testing.assert_array_equal(client.forward("news", x), x)

    with Client(server.endpoint, token="t") as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, thread) for thread in range(8)]:
            done.result(timeout=60)
    assert len(server.calls) == len({request_id for _, _, request_id in server.calls}) == 320


def test_tasks_share_a_client_without_mixing_rows(server: EchoServer) -> None:
    async def work() -> None:
        async with AsyncClient(server.endpoint, token="t") as client:
            sent = [np.full((2, 3), n, np.int64) for n in range(200)]
            for x, y in zip(sent, await asyncio.gather(*(client.forward("news", x) for x in sent)), strict=True):
                np.testing.assert_array_equal(x, y)

    server.run(work())


def test_a_cancelled_task_ends_its_call(server: EchoServer) -> None:
    ended: list[str] = []

    async def wait(frame: wire.Frame) -> bytes:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("server")
        return b""

    async def work() -> None:
        async with AsyncClient(server.endpoint, token="t") as client:
            task = asyncio.ensure_future(client.forward("news", X))
            while not server.calls:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not ended:
                await asyncio.sleep(0.005)

    server.behaviour = wait
    server.run(asyncio.wait_for(work(), 10))


def test_an_async_client_belongs_to_one_loop(server: EchoServer) -> None:
    client = AsyncClient(server.endpoint, token="t")

    async def use() -> None:
        await client.forward("news", X)

    server.run(use())
    with pytest.raises(FailedPrecondition, match="event loop"):
        asyncio.run(use())
    server.run(client.close())


def test_closing_while_another_thread_calls_ends_that_call(server: EchoServer) -> None:
    async def wait(frame: wire.Frame) -> bytes:
        await asyncio.sleep(30)
        return b""

    server.behaviour = wait
    client = Client(server.endpoint, token="t")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.forward, "news", X)
        for _ in itertools.takewhile(lambda _: not server.calls, range(1000)):
            time.sleep(0.005)
        client.close()
        with pytest.raises(FailedPrecondition, match="closed"):
            call.result(timeout=10)


def test_both_clients_have_the_same_methods_with_documentation() -> None:
    def public(kind: type) -> dict[str, Any]:
        return {name: value for name, value in vars(kind).items() if not name.startswith("_")}

    assert list(public(Client)) == list(public(AsyncClient))
    for name, method in public(Client).items():
        other = public(AsyncClient)[name]
        assert method.__doc__
        assert list(inspect.signature(method).parameters) == list(inspect.signature(other).parameters)
        unwrapped = inspect.unwrap(other)  # `pin` is a context manager
        assert inspect.iscoroutinefunction(other) or (name == "pin" and inspect.isasyncgenfunction(unwrapped))
        assert not inspect.iscoroutinefunction(method)


def test_the_keepalives_of_both_ends_agree() -> None:
    client, server = dict(client_options()), dict(server_options())
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert server["grpc.http2.min_recv_ping_interval_without_data_ms"] == MIN_PING_INTERVAL_MS
    assert server["grpc.so_reuseport"] == 0
    assert dict(server_options(port_held=True))["grpc.so_reuseport"] == 1


def test_a_compressed_message_is_refused(server: EchoServer) -> None:
    with grpc.insecure_channel(server.endpoint) as channel:
        call = channel.unary_unary("/expertmesh.v1.Mesh/Call")
        with pytest.raises(grpc.RpcError):
            call(bytes(100_000), compression=grpc.Compression.Gzip, timeout=10)
    assert server.calls == []


# where to call, and with which token


def test_the_environment_gives_the_token(server: EchoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_TOKEN", "from-environment")
    with Client(server.endpoint) as client:
        client.forward("news", X)
    assert server.calls[0][1]["authorization"] == "Bearer from-environment"


def test_without_a_token_there_is_no_client(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTMESH_TOKEN", raising=False)
    with pytest.raises(Unauthenticated, match="EXPERTMESH_TOKEN"):
        Client("127.0.0.1:1")


def test_without_a_cluster_and_without_an_endpoint(own_home: Path) -> None:
    with pytest.raises(NotFound):
        Client()


@pytest.mark.parametrize(
    "endpoint", ["", "localhost", ":1", "127.0.0.1:0", "127.0.0.1:65536", "a b:1", "unix:///x", "::1:5"]
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(InvalidRequest, match="host:port"):
        Client(endpoint, token="t")


@pytest.mark.parametrize("endpoint", ["10.0.0.1:50051", "mesh.example:50051", "0.0.0.0:1", "[2001:db8::1]:1"])
def test_a_token_never_leaves_the_machine_in_the_clear(endpoint: str, tmp_path: Any) -> None:
    with pytest.raises(InvalidRequest, match="ca_cert"):
        Client(endpoint, token="t")
    with pytest.raises(NotFound, match="ca_cert"):
        Client(endpoint, token="t", ca_cert=tmp_path / "missing.pem")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "127.8.9.1:1", "localhost:1", "[::1]:1"])
def test_loopback_needs_no_tls(endpoint: str) -> None:
    Client(endpoint, token="t").close()


def test_the_client_loads_neither_ray_nor_torch() -> None:
    code = "import sys, expertmesh.cluster.client.client; print({'ray', 'torch', 'google.protobuf'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "set()"
