"""A message in chunks, as both ends of a stream see it: what is announced, how it is cut, how it is put together.

The first message of a stream is a small frame of kind "stream" that announces how many bytes come; the next ones are
those bytes, of a frame as `wire.py` has it, cut anywhere. A server that admits the request says so at once, in its
initial metadata; a client may wait for that. The reply comes the same way. Neither end ever joins a chunk to what came
before: the sender cuts views, the receiver writes into one buffer of the announced size.
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
"""What the server's initial metadata hold once there is room for what was announced."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a stream begins with: the bytes that come, and the largest chunk that is taken in answer."""

    total: int
    chunk: int = CHUNK_BYTES

    def encode(self) -> bytes:
        """The first message of a stream."""
        return encode(KIND, asdict(self))


def read_opening(message: Buffer) -> Opening:
    """What a stream announces. Raises InvalidRequest for a message that announces nothing."""
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
    """A message that is sent in chunks: its buffers, as `encode_parts` made them, still those of the caller's arrays.

    `most` bounds the bytes of the answer, `chunk` those of one chunk either way.
    """

    parts: Sequence[Buffer] = field(repr=False)
    chunk: int = CHUNK_BYTES
    most: int = MAX_REQUEST_BYTES

    @classmethod
    def of(cls, parts: Sequence[Buffer], *, max_message_bytes: int = MAX_MESSAGE_BYTES, most: int) -> Streamed:
        """A stream whose chunks fit into messages of `max_message_bytes`."""
        return cls(parts, max(LEAST_CHUNK_BYTES, min(CHUNK_BYTES, max_message_bytes)), most)

    def messages(self) -> Iterator[bytes]:
        """What crosses, one message after the other; may be asked for again."""
        yield Opening(total=sum(len(part) for part in self.parts), chunk=self.chunk).encode()
        yield from chunks(self.parts, self.chunk)


def chunks(parts: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """The bytes of the buffers in chunks of `size`, the last one shorter; each byte is copied once."""
    pending: list[memoryview] = []
    room = size
    for part in parts:
        left = memoryview(part)
        while len(left):
            pending.append(left[:room])
            room -= len(pending[-1])
            left = left[len(pending[-1]) :]
            if room == 0:
                yield b"".join(pending)
                pending, room = [], size
    if pending:
        yield b"".join(pending)


class Assembly:
    """Puts a message of `total` bytes together, in one buffer; memory that no byte has come for is not taken yet."""

    def __init__(self, total: int) -> None:
        self._data = np.empty(total, np.uint8).data
        self._arrived = 0

    def take(self, chunk: Buffer) -> None:
        """Take the next chunk. Raises InvalidRequest for one of 0 bytes, DataLoss for more than was announced."""
        if not len(chunk):
            raise InvalidRequest("a chunk of a stream must have at least 1 byte")
        end = self._arrived + len(chunk)
        if end > len(self._data):
            raise DataLoss(f"the stream has more than the {len(self._data)} bytes that it announced")
        self._data[self._arrived : end] = chunk
        self._arrived = end

    def finish(self) -> memoryview:
        """The message, to be read only. Raises DataLoss where less came than was announced."""
        if self._arrived < len(self._data):
            raise DataLoss(f"the stream ended after {self._arrived} of the {len(self._data)} bytes that it announced")
        return self._data.toreadonly()


class StreamedAnswer:
    """Puts a reply of at most `most` bytes together, its opening included; what is wrong with it is data loss."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._assembly: Assembly | None = None

    def take(self, message: Buffer) -> None:
        """Take the next message of the reply. Raises DataLoss, or TooLarge."""
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
        """The reply. Raises DataLoss where it is not whole."""
        if self._assembly is None:
            raise DataLoss("the reply has no bytes")
        return self._assembly.finish()
