"""A peer that speaks just enough HTTP/2 to begin a message of gRPC and never end it."""

from __future__ import annotations

import select
import socket
import struct
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
ACK = END_HEADERS = 4
INITIAL_WINDOW = 65_535
LARGEST_FRAME = 16_384
STREAM = 1


class HalfSent:
    """One connection with one call to `path`, of whose message of `size` bytes all but the last is sent.

    `sent` counts bytes; `closed` is true once the server has ended the call or the connection.
    """

    def __init__(self, host: str, port: int, path: str, size: int) -> None:
        self.sent = 0
        self.closed = False
        self._left = 5 + size - 1
        self._head = b"\0" + struct.pack(">I", size)
        self._windows = {0: INITIAL_WINDOW, STREAM: INITIAL_WINDOW}
        self._received = b""
        self._socket = socket.create_connection((host, port), timeout=5)
        self._write(PREFACE + _frame(SETTINGS, 0, 0))
        self._write(_frame(HEADERS, END_HEADERS, STREAM, _headers(path)))

    def send(self, seconds: float) -> None:
        """Send as much as the server takes, for at most so long."""
        deadline = time.monotonic() + seconds
        while self._left and not self.closed and time.monotonic() < deadline:
            room = min(LARGEST_FRAME, self._left, *self._windows.values())
            if room <= 0:
                self.listen(0.1)
                continue
            body = (self._head if not self.sent else b"").ljust(room, b"\0")[:room]
            self._write(_frame(DATA, 0, STREAM, body))
            self.sent += room
            self._left -= room
            self._windows = {stream: window - room for stream, window in self._windows.items()}
            self.listen(0.0)

    def listen(self, seconds: float) -> None:
        """Handle what the server has sent; wait at most so long for it."""
        while not self.closed and select.select([self._socket], [], [], seconds)[0]:
            seconds = 0.0
            try:
                received = self._socket.recv(65_536)
            except OSError:
                received = b""
            self.closed = not received
            self._received += received
            while len(self._received) >= 9 + (size := int.from_bytes(self._received[:3], "big")):
                kind, flags = self._received[3], self._received[4]
                stream = int.from_bytes(self._received[5:9], "big") & 0x7FFFFFFF
                body, self._received = self._received[9 : 9 + size], self._received[9 + size :]
                self._take(kind, flags, stream, body)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _take(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == WINDOW:
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(body, "big")
        elif kind == SETTINGS and not flags & 1:
            for at in range(0, len(body), 6):
                name, value = struct.unpack(">HI", body[at : at + 6])
                if name == 4:
                    self._windows[STREAM] += value - INITIAL_WINDOW
            self._write(_frame(SETTINGS, 1, 0))
        elif kind == PING and not flags & 1:
            self._write(_frame(PING, 1, 0, body))
        elif kind in (GO_AWAY, RESET) or (kind == HEADERS and stream == STREAM):
            self.closed = True

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            self.closed = True


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + body


def _headers(path: str) -> bytes:
    """POST, http and the path, each as HPACK has it without compression, and what gRPC wants besides."""
    literal = b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
    )
    authority = b"localhost"
    address = b"\x04" + bytes([len(path)]) + path.encode() + b"\x01" + bytes([len(authority)]) + authority
    return b"\x83\x86" + address + literal
