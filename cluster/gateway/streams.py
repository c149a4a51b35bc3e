"""Receives requests, in one message or in chunks, within a bound on the memory of all, however they end.

No gRPC here. A call is refused early if its announced length exceeds a limit, alone or together with other requests.
A message on its way takes memory before anybody knows its size: so each token may have only a few on their way at a
time, the others wait while those arrive, and one that does not arrive whole in time is given up.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ...experts.errors import DeadlineExceeded, ExpertMeshError, InvalidRequest, Overloaded, TooLarge
from ...experts.wire import Buffer, Frame, decode
from ..rpc.channel_options import MAX_MESSAGE_BYTES
from ..rpc.streams import ADMITTED, CHUNK_BYTES, MAX_REQUEST_BYTES, Assembly, Opening, Streamed, read_opening

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

RETRY_AFTER = 1.0
"""Seconds after which a client may retry a call that was refused for lack of memory."""

MAX_RECEIVING = 64
"""How many calls of layers, and how many messages of other methods, are received of one token at a time."""

SLOT_SECONDS = 1.0
"""How long a message waits to be received while none of those before it arrives."""

MAX_STREAMS = 256
"""How many streams may be in flight: each may be receiving a chunk beyond what it has announced."""

LEAST_RATE = 256 * 1024
"""Bytes per second that a stream averages in each direction, after its first `stall_seconds`, or it is ended."""

Read = Callable[[], Awaitable[Any]]
"""Reads the next message of a call: bytes, or an object other than bytes at the end."""


@dataclass(frozen=True, kw_only=True)
class StreamLimits:
    """The maximum bytes of one streamed request or reply, of all streams in flight, and of all other requests.

    The streams of one token together may have half of all, or one request of the allowed size if that is more.
    `stall_seconds` is how long one message, or one chunk of a stream, may take to arrive or to be accepted.
    """

    max_request_bytes: int = MAX_REQUEST_BYTES
    max_stream_bytes: int = 2 * MAX_REQUEST_BYTES
    stall_seconds: float = 10.0

    @property
    def max_token_bytes(self) -> int:
        """The maximum bytes of the streams of one token."""
        return max(self.max_request_bytes, self.max_stream_bytes // 2)


class StreamContext(Protocol):
    """The used part of a gRPC servicer context."""

    async def read(self) -> Any:
        """The next message, or an object other than bytes at the end."""

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """Send the initial metadata, before any message."""

    async def write(self, message: bytes) -> None:
        """Send a message when the flow control allows it."""


@dataclass(frozen=True, eq=False)
class _Stream:
    """One stream of a caller."""

    caller: str


class StreamedCalls:
    """Serves calls whose requests and replies are streams of chunks, with a bound on the memory of all streams.

    A request counts with its announced length until its reply replaces it. An admitted call is never refused because of
    the total size of replies: if replies are larger than requests, new calls are refused until there is room again.
    """

    def __init__(self, limits: StreamLimits, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._limits = limits
        self._max_message_bytes = max_message_bytes
        self._reserved: dict[_Stream, int] = {}
        self._messages = 0
        self._receiving: defaultdict[tuple[str, bool], _Slots] = defaultdict(_Slots)

    @property
    def reserved(self) -> int:
        """The bytes of all streams in flight: announced requests, and replies."""
        return sum(self._reserved.values())

    def __len__(self) -> int:
        """The number of admitted streams in flight."""
        return len(self._reserved)

    async def one_message(self, read: Read, caller: str, timeout: float, *, of_layer: bool = True) -> bytes:
        """Receive a request of one message, within `timeout` seconds; calls of layers hold up no other method.

        Raises InvalidRequest, DeadlineExceeded, or Overloaded if too many messages are half-sent.
        """
        end = _now() + timeout
        async with self._receiving[caller, of_layer].one(timeout):
            message = await self._read(read, end - _now())
        if message is None:
            raise InvalidRequest("the call ended before its message was sent")
        return message

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Count the bytes of a request of one message while it lasts. Raises Overloaded if there is no room.

        Such requests together may have as many bytes as all streams, and are answered whatever the streams hold.
        """
        if self._messages + nbytes > self._limits.max_stream_bytes:
            raise Overloaded(
                f"no room for {nbytes} more bytes: requests in flight hold {self._messages} of the "
                f"{self._limits.max_stream_bytes} that max_stream_bytes allows; try again in a moment",
                retry_after=RETRY_AFTER,
            )
        self._messages += nbytes
        try:
            yield
        finally:
            self._messages -= nbytes

    async def serve(
        self, context: StreamContext, caller: str, timeout: float, answer: Callable[[Frame], Awaitable[list[Buffer]]]
    ) -> None:
        """Receive a frame, call `answer`, and send the reply, within `timeout` seconds in all.

        Raises InvalidRequest, DataLoss, TooLarge, Overloaded, DeadlineExceeded, and the errors of `answer`.
        """
        stream = _Stream(caller)
        try:
            async with deadline(timeout):  # in the call's own task: gRPC handles its errors on cancellation
                await self._serve(stream, context, answer)
        except ExpertMeshError:  # DeadlineExceeded is a TimeoutError too
            raise
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(f"the stream did not finish within {timeout:g} s") from None
        finally:
            self._reserved.pop(stream, None)

    async def _serve(
        self,
        stream: _Stream,
        context: StreamContext,
        answer: Callable[[Frame], Awaitable[list[Buffer]]],
    ) -> None:
        opening, frame = await self._receive(stream, context)
        parts = await answer(frame)
        del frame  # free it before the reply is written
        total = sum(len(part) for part in parts)
        if total > self._limits.max_request_bytes:
            raise TooLarge(
                f"the reply has {total} bytes, but max_request_bytes of this cluster is "
                f"{self._limits.max_request_bytes}: send fewer rows per call, or raise it on both the client and the "
                "cluster"
            )
        self._reserved[stream] = total  # replaces the request, which is freed
        chunk = min(CHUNK_BYTES, opening.chunk, self._max_message_bytes)
        slowest = self._slowest()
        for message in Streamed(parts, chunk).messages():
            seconds = max(0.0, min(slowest - _now(), self._limits.stall_seconds))
            try:
                async with deadline(seconds):
                    await context.write(message)
            except (TimeoutError, asyncio.TimeoutError):
                raise DeadlineExceeded("the reply was not read, or too slowly, before it was complete") from None
            slowest += len(message) / LEAST_RATE

    async def _receive(self, stream: _Stream, context: StreamContext) -> tuple[Opening, Frame]:
        async with self._receiving[stream.caller, True].one(math.inf):  # the whole stream has a deadline
            opening = read_opening(await self._read(context.read) or b"")
        self._reserve(stream, opening.total)
        try:
            assembly = Assembly(opening.total)
        except MemoryError:
            raise Overloaded(f"the machine cannot allocate {opening.total} bytes", retry_after=RETRY_AFTER) from None
        await context.send_initial_metadata((ADMITTED,))
        slowest = self._slowest()
        while (message := await self._read(context.read, slowest - _now())) is not None:
            assembly.take(message)
            slowest += len(message) / LEAST_RATE
        return opening, decode(assembly.finish(), max_bytes=self._limits.max_request_bytes)

    def _slowest(self) -> float:
        """When a stream that begins now is ended, unless bytes come; each gives it more time, by `LEAST_RATE`."""
        return _now() + self._limits.stall_seconds

    async def _read(self, read: Read, timeout: float = math.inf) -> bytes | None:
        """The next message, or None at the end."""
        seconds = max(0.0, min(timeout, self._limits.stall_seconds))
        try:
            async with deadline(seconds):
                message = await read()
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(
                f"the call was silent for {seconds:.2g} s, or too slow, before it was complete"
            ) from None
        return message if isinstance(message, bytes) else None

    def _reserve(self, stream: _Stream, total: int) -> None:
        limits = self._limits
        if total > limits.max_request_bytes:
            raise TooLarge(
                f"the request has {total} bytes, but max_request_bytes of this cluster is {limits.max_request_bytes}: "
                "send fewer rows per call, or raise it in the cluster's configuration"
            )
        if len(self) >= MAX_STREAMS:
            raise Overloaded(
                f"{len(self)} streams are in flight already: try again in a moment", retry_after=RETRY_AFTER
            )
        if self.reserved + total > limits.max_stream_bytes:
            raise Overloaded(
                f"no room for {total} more bytes: {len(self)} streams hold {self.reserved} of the "
                f"{limits.max_stream_bytes} that max_stream_bytes allows; try again in a moment",
                retry_after=RETRY_AFTER,
            )
        own = sum(held for other, held in self._reserved.items() if other.caller == stream.caller)
        if own + total > limits.max_token_bytes:
            raise Overloaded(
                f"no room for {total} more bytes: the streams of this token hold {own} of the "
                f"{limits.max_token_bytes} that one token may of max_stream_bytes; try again in a moment",
                retry_after=RETRY_AFTER,
            )
        self._reserved[stream] = total


class _Slots:
    """Lets `MAX_RECEIVING` messages be received at a time; `given_back` counts those that were, or were given up."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(MAX_RECEIVING)
        self._given_back = 0

    @asynccontextmanager
    async def one(self, timeout: float) -> AsyncIterator[None]:
        """Hold a slot. Raises Overloaded after `timeout` seconds, or once none was given back for `SLOT_SECONDS`."""
        end = _now() + timeout
        while not await self._acquire(min(SLOT_SECONDS, end - _now())):
            pass
        try:
            yield
        finally:
            self._given_back += 1
            self._free.release()

    async def _acquire(self, seconds: float) -> bool:
        """Whether a slot was had in time; False if others were given back meanwhile."""
        if not self._free.locked():
            return await self._free.acquire()
        before = self._given_back
        try:
            async with deadline(max(0.0, seconds)):
                return await self._free.acquire()
        except (TimeoutError, asyncio.TimeoutError):
            if seconds >= SLOT_SECONDS and self._given_back > before:
                return False
            raise Overloaded(
                f"{MAX_RECEIVING} messages of this token are being received already: try again in a moment",
                retry_after=RETRY_AFTER,
            ) from None


def _now() -> float:
    """Monotonic seconds of the event loop."""
    return asyncio.get_running_loop().time()
