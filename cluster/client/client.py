"""The blocking client and the asyncio client: thin drivers of the flows in calls.py over gRPC.

Each client does its own I/O. The blocking client does not run an event loop in a thread, because gRPC's asyncio layer
polls one queue for all loops of a process, and complains about several.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from typing import Any

import grpc

from ...experts.errors import DeadlineExceeded, ExpertMeshError, FailedPrecondition
from ..rpc.channel_options import MAX_IN_FLIGHT, MAX_MESSAGE_BYTES, client_options
from ..rpc.methods import SERVICE
from ..rpc.status import from_status
from ..rpc.streams import MAX_REQUEST_BYTES, Streamed
from .calls import Calls
from .endpoint import Endpoint, resolve
from .methods import AwaitingMethods, BlockingMethods
from .retry import Answer, Attempt, Pause, RetryPolicy, Step, Work
from .sending import new_retries
from .stream import exchange, exchange_async

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

LAYER_CALLS = (f"/{SERVICE}/Call", f"/{SERVICE}/CallStream")
"""The calls of which an `AsyncClient` has a bounded number in flight; all others are sent at once."""

CUT_OFF = ("Socket closed", "Connection reset", "GOAWAY")
"""What gRPC says, among others, when a client without TLS speaks to a port with TLS."""


class _Connected:
    """The shared part of both clients: the endpoint, and the flows of the methods."""

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        name: str | None = None,
        ca_cert: str | os.PathLike[str] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        payload_dtype: str | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Prepare calls to `endpoint` ("host:port"); None finds this user's running cluster, by `name` among several.

        `token` None uses EXPERTMESH_TOKEN from the environment, else the token file of this user's cluster at that
        endpoint. Calls to a cluster that was found by its run file go over its Unix socket, unless `ca_cert` is given,
        and carry the token of the lowest role that may make them. `timeout` is the default of all calls, in seconds.
        `ca_cert`, a PEM file, enables TLS, which every other endpoint but loopback requires. `retry` None makes at
        most 3 attempts per call.

        `max_message_bytes` bounds one gRPC message, `max_request_bytes` a request or reply in chunks. Requests above a
        quarter of `max_message_bytes`, or above 4 MiB, are sent in chunks by default. `payload_dtype` "float16" or
        "bfloat16" sends float32 rows in half the bytes, as `call` explains.

        Raises NotFound, InvalidRequest, FailedPrecondition, or Unauthenticated if there is no token.
        """
        self._endpoint: Endpoint = resolve(endpoint, token=token, name=name, ca_cert=ca_cert)
        self._calls = Calls(
            token=self._endpoint.token,
            tokens=self._endpoint.tokens,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            max_request_bytes=max_request_bytes,
            payload_dtype=payload_dtype,
            retries=new_retries(retry or RetryPolicy()),
        )
        self._closed = False
        self._channel = self._connect()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.address!r}{', closed' if self._closed else ''})"

    @property
    def endpoint(self) -> str:
        """The address of the server: "host:port"."""
        return self._endpoint.address

    def _connect(self) -> Any:
        """The initial channel."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPrecondition("this client is closed: create a new one")

    def _open(self, module: Any) -> Any:
        """A channel of `grpc` or `grpc.aio`; it connects at the first call. Its user agent tells it from others."""
        options: list[tuple[str, Any]] = [("grpc.primary_user_agent", f"expertmesh/{uuid.uuid4().hex}")]
        options += client_options(self._calls.max_message_bytes, loopback=self._endpoint.loopback)
        if self._endpoint.ca_cert is None:
            return module.insecure_channel(self._endpoint.target, options=options)
        credentials = grpc.ssl_channel_credentials(root_certificates=self._endpoint.ca_cert)
        return module.secure_channel(self._endpoint.target, credentials, options=options)

    def _translate(self, error: Any) -> ExpertMeshError:
        """Convert a gRPC error into an ExpertMeshError, with the table in rpc/status.py."""
        text = error.details() or ""
        in_the_clear = self._endpoint.ca_cert is None and self._endpoint.target == self._endpoint.address
        if in_the_clear and error.code() is grpc.StatusCode.UNAVAILABLE and any(end in text for end in CUT_OFF):
            text += "; does the port speak TLS? Then pass ca_cert="
        return from_status(error.code().name, text, error.trailing_metadata() or ())


class Client(BlockingMethods, _Connected):
    """A blocking client of one cluster. Threads may share it; it reconnects automatically.

    Example:
        with Client("127.0.0.1:50051") as client:
            y = client.forward("news", x)
            reply = client.call("news", x, top_k=1)
            print(reply.output, reply.versions)
    """

    _sleep = staticmethod(time.sleep)

    def close(self) -> None:
        """Close the connection; calls in flight fail with an error. Closing twice is harmless."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _connect(self) -> Any:
        return self._open(grpc)

    def _perform(self, step: Step) -> Answer:
        if isinstance(step, Pause):
            self._sleep(step.seconds)
            return None
        if isinstance(step, Work):
            return step.action()
        self._check_open()
        try:
            if isinstance(step.payload, Streamed):
                stream = self._channel.stream_stream(step.method)
                messages = step.payload.messages()
                return exchange(stream(messages, timeout=step.timeout, metadata=step.metadata), step.payload.most)
            method = self._channel.unary_unary(step.method)
            reply: bytes = method(step.payload, timeout=step.timeout, metadata=step.metadata)
            return reply
        except grpc.RpcError as error:
            return self._translate(error)
        except ValueError:  # gRPC's error if another thread closes the channel before the call begins
            self._check_open()
            raise


class AsyncClient(AwaitingMethods, _Connected):
    """An asyncio client of one cluster, with the methods of `Client` as coroutines. It belongs to one event loop.

    Example:
        async with AsyncClient("127.0.0.1:50051") as client:
            y = await client.forward("news", x)
    """

    _loop: asyncio.AbstractEventLoop | None = None

    _sleep = staticmethod(asyncio.sleep)

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled. Closing twice is harmless."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def _connect(self) -> Any:
        self._in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        return None  # created by the first call, in its event loop

    async def _perform(self, step: Step) -> Answer:
        if isinstance(step, Pause):
            await self._sleep(step.seconds)
            return None
        if isinstance(step, Work):
            return await asyncio.to_thread(step.action)
        try:
            if step.method not in LAYER_CALLS:
                return await self._attempt(step, step.timeout)
            asked = time.monotonic()
            if not await self._take_turn(step.timeout):
                return DeadlineExceeded(
                    f"{MAX_IN_FLIGHT} calls of this client are in flight: this one was not sent in time"
                )
            try:
                return await self._attempt(step, step.timeout - (time.monotonic() - asked))
            finally:
                self._in_flight.release()
        except grpc.RpcError as error:
            return self._translate(error)
        except grpc.aio.UsageError:  # gRPC's error if another task closes the channel before the call begins
            self._check_open()
            raise

    async def _take_turn(self, timeout: float) -> bool:
        """Wait until few enough calls are in flight, `timeout` seconds at most; whether the call may be sent."""
        if not self._in_flight.locked():
            return await self._in_flight.acquire()
        try:
            async with deadline(timeout):
                return await self._in_flight.acquire()
        except (TimeoutError, asyncio.TimeoutError):
            return False

    async def _attempt(self, step: Attempt, timeout: float) -> Answer:
        if isinstance(step.payload, Streamed):
            stream = self._connection().stream_stream(step.method)
            return await exchange_async(stream(timeout=timeout, metadata=step.metadata), step.payload)
        method = self._connection().unary_unary(step.method)
        reply: bytes = await method(step.payload, timeout=timeout, metadata=step.metadata)
        return reply

    def _connection(self) -> Any:
        """The channel, which gRPC binds to the event loop that is running when the channel is created."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = self._open(grpc.aio), loop
        if self._loop is not loop:
            raise FailedPrecondition("an AsyncClient belongs to the event loop of its first call: create one per loop")
        return self._channel
