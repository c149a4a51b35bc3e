"""The server side of calls in chunks: reserves memory before allocating it, and releases it however a call ends.

No gRPC here. A call is refused early if its announced length exceeds a limit, alone or together with other streams.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ...experts.errors import DeadlineExceeded, ExpertMeshError, Overloaded, TooLarge
from ...experts.wire import Buffer, Frame, decode
from ..rpc.channel_options import MAX_MESSAGE_BYTES
from ..rpc.streams import ADMITTED, CHUNK_BYTES, MAX_REQUEST_BYTES, Assembly, Opening, Streamed, read_opening

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

RETRY_AFTER = 1.0
"""Seconds after which a client may retry a call that was refused for lack of memory."""


@dataclass(frozen=True, kw_only=True)
class StreamLimits:
    """The maximum bytes of one streamed request or reply, and of all streams in flight.

    `stall_seconds` is how long a stream may send nothing before it is complete.
    """

    max_request_bytes: int = MAX_REQUEST_BYTES
    max_stream_bytes: int = 2 * MAX_REQUEST_BYTES
    stall_seconds: float = 10.0


class StreamContext(Protocol):
    """The used part of a gRPC servicer context."""

    async def read(self) -> Any:
        """The next message, or an object other than bytes at the end."""

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """Send the initial metadata, before any message."""

    async def write(self, message: bytes) -> None:
        """Send a message when the flow control allows it."""


class StreamedCalls:
    """Serves calls whose requests and replies are streams of chunks, with a bound on the memory of all streams.

    A request counts with its announced length until its reply replaces it. An admitted call is never refused because of
    the total size of replies: if replies are larger than requests, new calls are refused until there is room again.
    """

    def __init__(self, limits: StreamLimits, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._limits = limits
        self._max_message_bytes = max_message_bytes
        self._reserved: dict[object, int] = {}

    @property
    def reserved(self) -> int:
        """The bytes of all streams in flight: announced requests, and replies."""
        return sum(self._reserved.values())

    def __len__(self) -> int:
        """The number of admitted streams in flight."""
        return len(self._reserved)

    async def serve(
        self, context: StreamContext, timeout: float, answer: Callable[[Frame], Awaitable[list[Buffer]]]
    ) -> None:
        """Receive a frame, call `answer`, and send the reply, within `timeout` seconds in all.

        Raises InvalidRequest, DataLoss, TooLarge, Overloaded, DeadlineExceeded, and the errors of `answer`.
        """
        stream = object()
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
        self, stream: object, context: StreamContext, answer: Callable[[Frame], Awaitable[list[Buffer]]]
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
        for message in Streamed(parts, chunk).messages():
            await context.write(message)

    async def _receive(self, stream: object, context: StreamContext) -> tuple[Opening, Frame]:
        opening = read_opening(await self._read(context) or b"")
        self._reserve(stream, opening.total)
        try:
            assembly = Assembly(opening.total)
        except MemoryError:
            raise Overloaded(f"the machine cannot allocate {opening.total} bytes", retry_after=RETRY_AFTER) from None
        await context.send_initial_metadata((ADMITTED,))
        while (message := await self._read(context)) is not None:
            assembly.take(message)
        return opening, decode(assembly.finish(), max_bytes=self._limits.max_request_bytes)

    async def _read(self, context: StreamContext) -> bytes | None:
        """The next message, or None at the end."""
        seconds = self._limits.stall_seconds
        try:
            message = await asyncio.wait_for(context.read(), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(f"the stream was silent for {seconds:g} s before it was complete") from None
        return message if isinstance(message, bytes) else None

    def _reserve(self, stream: object, total: int) -> None:
        limits = self._limits
        if total > limits.max_request_bytes:
            raise TooLarge(
                f"the request has {total} bytes, but max_request_bytes of this cluster is {limits.max_request_bytes}: "
                "send fewer rows per call, or raise it in the cluster's configuration"
            )
        if self.reserved + total > limits.max_stream_bytes:
            raise Overloaded(
                f"no room for {total} more bytes: {len(self)} streams hold {self.reserved} of the "
                f"{limits.max_stream_bytes} that max_stream_bytes allows; try again in a moment",
                retry_after=RETRY_AFTER,
            )
        self._reserved[stream] = total
