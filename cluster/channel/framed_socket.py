"""Complete messages over a non-blocking socket: vectored writes, and each message read into its own memory."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch

from ...experts.errors import DataLoss, TooLarge, Unavailable
from ...experts.wire import Buffer
from .messages import LENGTH

SOCKET_BUFFER_BYTES = 4 * 2**20
USER_TIMEOUT_MS = 10_000
MAX_BUFFERS = 512
MAX_MESSAGE_BYTES = 2**31


class FramedSocket:
    """One end of a connection. `limit` is the maximum size of a received message in bytes."""

    def __init__(self, connection: socket.socket, limit: int = MAX_MESSAGE_BYTES) -> None:
        self.limit = limit
        self._socket = connection
        self._out: deque[Buffer] = deque()
        self._prefix = memoryview(bytearray(LENGTH.size))
        self._body: memoryview | None = None
        self._filled = 0

    def fileno(self) -> int:
        """The descriptor, for a selector; -1 when closed."""
        return self._socket.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return sum(map(len, self._out))

    def send(self, parts: list[Buffer]) -> bool:
        """Write as much of a message as the kernel accepts; returns True when everything is written.

        Raises OSError. The buffers must not change until `unsent` is 0.
        """
        self._out.extend(part for part in parts if len(part))
        return self.flush()

    def flush(self) -> bool:
        """Continue writing; returns True when everything is written. Raises OSError."""
        while self._out:
            try:
                count = self._socket.sendmsg(list(islice(self._out, MAX_BUFFERS)))
            except (BlockingIOError, InterruptedError):
                return False
            self._written(count)
        return True

    def receive(self, most: int | None = None) -> Iterator[memoryview]:
        """Yield the complete messages, at most `most`; for the others the socket stays readable.

        Raises Unavailable at the end of the stream, OSError, and TooLarge or DataLoss for an invalid length.
        """
        taken = 0
        while True:
            target = self._prefix if self._body is None else self._body
            if self._filled < len(target):
                try:
                    count = self._socket.recv_into(target[self._filled :])
                except (BlockingIOError, InterruptedError):
                    return
                if count == 0:
                    raise Unavailable("the connection was closed")
                self._filled += count
            if self._filled < len(target):
                continue
            self._filled = 0
            if self._body is None:
                self._body = self._memory(LENGTH.unpack(self._prefix)[0])
            else:
                done, self._body = self._body, None
                yield done
                taken += 1
                if taken == most:
                    return

    def close(self) -> None:
        """Close the socket and discard unwritten data."""
        self._out.clear()
        self._body = None
        self._socket.close()

    def _memory(self, size: int) -> memoryview:
        """Memory for a message, aligned for tensors; the kernel allocates pages only as bytes arrive."""
        if size > self.limit:
            raise TooLarge(f"a message announces {size} bytes; the limit is {self.limit}")
        if size == 0:
            raise DataLoss("a message announces 0 bytes")
        memory: memoryview = torch.empty(size, dtype=torch.uint8).numpy().data
        return memory

    def _written(self, count: int) -> None:
        while count:
            first = self._out[0]
            if count < len(first):
                self._out[0] = memoryview(first)[count:]
                return
            count -= len(first)
            self._out.popleft()


def tuned(connection: socket.socket) -> socket.socket:
    """Make a socket non-blocking with large buffers; over TCP, also without delay and with keepalive."""
    connection.setblocking(False)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    return connection
