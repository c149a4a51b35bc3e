"""The blocking client and the asyncio client: thin drivers of the flows in calls.py over gRPC.

Each client does its own I/O. The blocking client does not run an event loop in a thread, because gRPC's asyncio layer
polls one queue for all loops of a process, and complains about several.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc

from ...experts.errors import DeadlineExceeded, ExpertMeshError, FailedPrecondition, RouterUnavailable
from ..rpc.channel_options import MAX_IN_FLIGHT, MAX_MESSAGE_BYTES
from ..rpc.methods import SERVICE
from ..rpc.streams import MAX_REQUEST_BYTES, Streamed
from .calls import Calls
from .methods import AwaitingMethods, BlockingMethods
from .retry import (
    Answer,
    Attempt,
    Beside,
    Flow,
    Pause,
    RetryPolicy,
    Step,
    Work,
    drive,
    drive_async,
)
from .routers.balance import Balance
from .routers.channels import Channels, exchange, exchange_async
from .routers.endpoint import Endpoint, resolve
from .sending import new_retries

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

LAYER_CALLS = (f"/{SERVICE}/Call", f"/{SERVICE}/CallStream")
"""The calls of which an `AsyncClient` has a bounded number in flight; all others are sent at once."""


class _Connected:
    """The shared part of both clients: the routers, a channel of `_grpc` to each, and the flows of the methods."""

    _grpc: Any

    def __init__(
        self,
        endpoint: str | Sequence[str] | None = None,
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

        A cluster with several routers has several endpoints: `endpoint` is then a list of them, or a name that resolves
        to the address of each, which is looked up here and again every 10 seconds while there are calls. None finds
        them all. Each call goes to the router with the fewest calls of this client in flight. A call whose router is
        lost, frozen or draining goes on to another one at once, and that router is avoided until it answers again.

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
        retries = new_retries(retry or RetryPolicy())
        self._calls = Calls(
            token=self._endpoint.token,
            tokens=self._endpoint.tokens,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            max_request_bytes=max_request_bytes,
            payload_dtype=payload_dtype,
            retries=retries,
            routers=Balance(self._endpoint.look_up(), retries.clock),
            look_up=self._endpoint.look_up if self._endpoint.has_names else None,
        )
        ca_cert_text, size = self._endpoint.ca_cert, max_message_bytes
        self._channels = Channels(self._grpc, ca_cert=ca_cert_text, max_message_bytes=size)
        self._prepare()

    def _prepare(self) -> None:
        """Create what one of the clients alone has."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.endpoints)!r}{', closed' if self._channels.closed else ''})"

    @property
    def endpoint(self) -> str:
        """The address of the router, or of the first of several: "host:port"."""
        return self.endpoints[0]

    @property
    def endpoints(self) -> list[str]:
        """The addresses of all routers, as they were given or found."""
        return list(self._endpoint.addresses)


class Client(BlockingMethods, _Connected):
    """A blocking client of one cluster, over any number of its routers. Threads may share it; it reconnects by itself.

    Example:
        with Client(["127.0.0.1:50051", "127.0.0.1:50052"]) as client:
            y = client.forward("news", x)
            reply = client.call("news", x, top_k=1)
            print(reply.output, reply.versions)
    """

    _grpc = grpc
    _sleep = staticmethod(time.sleep)

    def close(self) -> None:
        """Close the connections; calls in flight fail with an error. Closing twice is harmless."""
        for channel in self._channels.close():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _perform(self, step: Step) -> Answer:
        if isinstance(step, Attempt):
            return self._attempt(step)
        if isinstance(step, Work):
            return step.action()
        if isinstance(step, Pause):
            self._sleep(step.seconds)
        elif isinstance(step, Beside):
            thread = threading.Thread(target=self._run_beside, args=(step.flow,), name="expertmesh-watch", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there are too many, or the interpreter ends: the call needs none
                self._calls.routers.end_watch()
        else:
            for channel in self._channels.cut(step.target):
                channel.close()
        return None

    def _attempt(self, step: Attempt) -> Answer:
        self._channels.check_open()
        target = step.route.begin()
        answer: Answer = None
        try:
            channel = self._channels.to(target)
            answer = self._exchange(channel, step)
        except grpc.RpcError as error:
            answer = self._channels.translate(error, target)
        except ValueError:  # gRPC's error if another thread closes the channel before the call begins
            self._channels.check_open()
            if not self._channels.was_cut(target, channel):
                raise
            answer = RouterUnavailable("it did not answer, and the connection was closed")
        finally:
            step.route.end(answer)
        return answer

    def _exchange(self, channel: Any, step: Attempt) -> Answer:
        if isinstance(step.payload, Streamed):
            stream = channel.stream_stream(step.method)
            messages = step.payload.messages()
            return exchange(stream(messages, timeout=step.timeout, metadata=step.metadata), step.payload.most)
        reply: bytes = channel.unary_unary(step.method)(step.payload, timeout=step.timeout, metadata=step.metadata)
        return reply

    def _run_beside(self, flow: Flow[None]) -> None:
        def perform(step: Step) -> Answer:
            self._channels.check_open()
            return self._perform(step)

        with suppress(ExpertMeshError):  # the client was closed
            drive(flow, perform)


class AsyncClient(AwaitingMethods, _Connected):
    """An asyncio client of one cluster, with the methods of `Client` as coroutines. It belongs to one event loop.

    Example:
        async with AsyncClient(["127.0.0.1:50051", "127.0.0.1:50052"]) as client:
            y = await client.forward("news", x)
    """

    _grpc = grpc.aio
    _sleep = staticmethod(asyncio.sleep)

    async def close(self) -> None:
        """Close the connections; calls in flight are cancelled. Closing twice is harmless."""
        for task in self._beside:
            task.cancel()
        for channel in self._channels.close():
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def _prepare(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._beside: set[asyncio.Future[None]] = set()

    async def _perform(self, step: Step) -> Answer:
        if isinstance(step, Attempt):
            return await self._attempt_in_turn(step)
        if isinstance(step, Work):
            return await asyncio.to_thread(step.action)
        if isinstance(step, Pause):
            await self._sleep(step.seconds)
        elif isinstance(step, Beside):
            self._beside.add(task := asyncio.ensure_future(self._run_beside(step.flow)))
            task.add_done_callback(self._beside.discard)
        else:
            for channel in self._channels.cut(step.target):
                await channel.close()
        return None

    async def _attempt_in_turn(self, step: Attempt) -> Answer:
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
        self._channels.check_open()
        self._check_loop()
        target = step.route.begin()
        answer: Answer = None
        try:
            channel = self._channels.to(target)
            answer = await self._exchange(channel, step, timeout)
        except grpc.RpcError as error:
            answer = self._channels.translate(error, target)
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            if isinstance(error, grpc.aio.UsageError):  # another task closed the channel before the call began
                self._channels.check_open()
            cut = self._channels.was_cut(target, channel)
            if not cut or getattr(asyncio.current_task(), "cancelling", int)():  # before Python 3.11, tasks cannot say
                raise
            answer = RouterUnavailable("it did not answer, and the connection was closed")
        finally:
            step.route.end(answer)
        return answer

    async def _exchange(self, channel: Any, step: Attempt, timeout: float) -> Answer:
        if isinstance(step.payload, Streamed):
            stream = channel.stream_stream(step.method)
            return await exchange_async(stream(timeout=timeout, metadata=step.metadata), step.payload)
        method = channel.unary_unary(step.method)
        reply: bytes = await method(step.payload, timeout=timeout, metadata=step.metadata)
        return reply

    def _check_loop(self) -> None:
        """gRPC binds a channel to the event loop that is running when it is created."""
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise FailedPrecondition("an AsyncClient belongs to the event loop of its first call: create one per loop")

    async def _run_beside(self, flow: Flow[None]) -> None:
        with suppress(ExpertMeshError):  # the client was closed
            await drive_async(flow, self._perform)
