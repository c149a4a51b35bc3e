"""The streaming protocol of both ends: a message is announced, split into chunks, and reassembled.

The first message of a stream is a small frame of kind "stream" that announces the total bytes. The next messages are
the bytes of a frame (see `wire.py`), split at any position. A server that admits the request says so at once, in its
initial metadata; a client may wait for that. The reply has the same form. Neither end concatenates chunks: the sender
slices views, and the receiver writes into one buffer of the announced size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ...experts.errors import DataLoss, InvalidRequest, TooLarge
from ...experts.protocol import from_mapping
from ...experts.wire import Buffer, decode, encode
from .channel_options import MAX_MESSAGE_BYTES

KIND = "stream"
CHUNK_BYTES = 2**20
LEAST_CHUNK_BYTES = 4096
MAX_OPENING_BYTES = 1024
MAX_REQUEST_BYTES = 2**30
ADMITTED = ("expertmesh-stream", "admitted")
"""The server's initial metadata once it has reserved memory for the announced bytes."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The first message of a stream: the total bytes, and the largest chunk that the sender accepts in the reply."""

    total: int
    chunk: int = CHUNK_BYTES

    def encode(self) -> bytes:
        """Encode the opening as a frame."""
        return encode(KIND, asdict(self))


def read_opening(message: Buffer) -> Opening:
    """Decode the first message of a stream. Raises InvalidRequest for any other message."""
    if len(message) > MAX_OPENING_BYTES:
        raise InvalidRequest(f"a stream must begin with a frame that announces its length, not {len(message)} bytes")
    try:
        frame = decode(message)
    except DataLoss as error:
        raise InvalidRequest(f"a stream must begin with a frame that announces its length: {error.message}") from None
    if frame.kind != KIND or frame.tensors:
        raise InvalidRequest(f"a stream must begin with a {KIND} frame, not a {frame.kind[:64]!r} frame")
    opening = from_mapping(Opening, frame.meta)
    if opening.total < 1 or opening.chunk < LEAST_CHUNK_BYTES:
        raise InvalidRequest(f"a stream must have at least 1 byte, and chunks of at least {LEAST_CHUNK_BYTES} bytes")
    return opening


@dataclass(frozen=True)
class Streamed:
    """A message to send in chunks: its buffers from `encode_parts`, which still share memory with the caller's arrays.

    `most` bounds the bytes of the reply, `chunk` those of one chunk in either direction.
    """

    parts: Sequence[Buffer] = field(repr=False)
    chunk: int = CHUNK_BYTES
    most: int = MAX_REQUEST_BYTES

    @classmethod
    def of(cls, parts: Sequence[Buffer], *, max_message_bytes: int = MAX_MESSAGE_BYTES, most: int) -> Streamed:
        """A stream whose chunks fit into messages of `max_message_bytes`."""
        return cls(parts, max(LEAST_CHUNK_BYTES, min(CHUNK_BYTES, max_message_bytes)), most)

    def messages(self) -> Iterator[bytes]:
        """The messages to send, in order; may be iterated again for a retry."""
        yield Opening(total=sum(len(part) for part in self.parts), chunk=self.chunk).encode()
        yield from chunks(self.parts, self.chunk)


def chunks(parts: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """Split the bytes of the buffers into chunks of `size`, the last one shorter; each byte is copied once."""
    pending: list[memoryview] = []
    room = size
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            pending.append(rest[:room])
            room -= len(pending[-1])
            rest = rest[len(pending[-1]) :]
            if room == 0:
                yield b"".join(pending)
                pending, room = [], size
    if pending:
        yield b"".join(pending)


class Assembly:
    """Reassembles a message of `total` bytes in one buffer; untouched pages of it take no physical memory."""

    def __init__(self, total: int) -> None:
        self._data = np.empty(total, np.uint8).data
        self._arrived = 0

    def take(self, chunk: Buffer) -> None:
        """Add the next chunk. Raises InvalidRequest if it is empty, DataLoss if it exceeds the announced bytes."""
        if not len(chunk):
            raise InvalidRequest("a chunk of a stream must have at least 1 byte")
        end = self._arrived + len(chunk)
        if end > len(self._data):
            raise DataLoss(f"the stream has more than the {len(self._data)} bytes that it announced")
        self._data[self._arrived : end] = chunk
        self._arrived = end

    def finish(self) -> memoryview:
        """The message, as a read-only view. Raises DataLoss if bytes are missing."""
        if self._arrived < len(self._data):
            raise DataLoss(f"the stream ended after {self._arrived} of the {len(self._data)} bytes that it announced")
        return self._data.toreadonly()


class StreamedAnswer:
    """Reassembles a streamed reply of at most `most` bytes; a malformed reply raises DataLoss."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._assembly: Assembly | None = None

    def take(self, message: Buffer) -> None:
        """Add the next message of the reply. Raises DataLoss or TooLarge."""
        try:
            if self._assembly is not None:
                return self._assembly.take(message)
            total = read_opening(message).total
        except InvalidRequest as error:
            raise DataLoss(f"the reply cannot be read: {error.message}") from None
        if total > self._most:
            raise TooLarge(
                f"the reply has {total} bytes, but max_request_bytes of this client is {self._most}: "
                "send fewer rows per call, or raise it at the client"
            )
        self._assembly = Assembly(total)

    def finish(self) -> memoryview:
        """The reply. Raises DataLoss if it is incomplete."""
        if self._assembly is None:
            raise DataLoss("the reply has no bytes")
        return self._assembly.finish()
