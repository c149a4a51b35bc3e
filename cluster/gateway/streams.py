"""The gateway's part of calls in chunks: memory is reserved before it is taken, and given back however a call ends.

No gRPC in here. A call is refused early where its announced length exceeds a setting, or all streams together would.
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
"""Seconds after which a client that was refused for want of memory may try again."""


@dataclass(frozen=True, kw_only=True)
class StreamLimits:
    """Bytes of one streamed request, and of its reply; and of all streams under way.

    `stall_seconds` is how long a stream may be silent before it has sent what it announced.
    """

    max_request_bytes: int = MAX_REQUEST_BYTES
    max_stream_bytes: int = 2 * MAX_REQUEST_BYTES
    stall_seconds: float = 10.0


class StreamContext(Protocol):
    """What is used of a call of gRPC's."""

    async def read(self) -> Any:
        """The next message, or what is no bytes once there is none."""

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """Send what comes before any message."""

    async def write(self, message: bytes) -> None:
        """Send a message, once there is room for it."""


class StreamedCalls:
    """Serves calls whose requests and replies are streams of chunks, within a bound on the memory of all of them.

    A request counts with the length that it announced, until its reply takes its place. What was admitted is never
    refused for its reply's sake: where replies are larger than requests, others wait until there is room again.
    """

    def __init__(self, limits: StreamLimits, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._limits = limits
        self._max_message_bytes = max_message_bytes
        self._reserved: dict[object, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that the streams under way have announced, or hold as replies."""
        return sum(self._reserved.values())

    def __len__(self) -> int:
        """How many streams have been admitted and are not over."""
        return len(self._reserved)

    async def serve(
        self, context: StreamContext, timeout: float, answer: Callable[[Frame], Awaitable[list[Buffer]]]
    ) -> None:
        """Receive a frame, have it answered, and send the reply, within `timeout` seconds in all.

        Raises InvalidRequest, DataLoss, TooLarge, Overloaded, DeadlineExceeded, and what `answer` raises.
        """
        stream = object()
        try:
            async with deadline(timeout):  # in the call's own task: what it raises as it is cancelled, gRPC takes
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
        del frame  # before the reply is written
        total = sum(len(part) for part in parts)
        if total > self._limits.max_request_bytes:
            raise TooLarge(
                f"the reply has {total} bytes, but max_request_bytes of this cluster is "
                f"{self._limits.max_request_bytes}: send fewer rows per call, or raise it on both the client and the "
                "cluster"
            )
        self._reserved[stream] = total  # in place of the request, which is gone
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
