"""A client of HTTP/2 in raw frames, for what no client of gRPC would send: messages that are half sent, and no more."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
INITIAL_WINDOW = 4
FIRST_WINDOW = 65_535
MOST_IN_A_FRAME = 16_384


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + body


def _field(name: bytes, value: bytes) -> bytes:
    """A header that is not indexed, as HPACK writes it."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


class RawConnection:
    """One connection; `ended` holds the streams that the server has ended, `closed` is true once it has hung up."""

    def __init__(self, port: int, patience: float = 0.5) -> None:
        self.closed = False
        self.ended: set[int] = set()
        self._windows: dict[int, int] = {0: FIRST_WINDOW}
        self._first_window = FIRST_WINDOW
        self._received = b""
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.settimeout(patience)
        self._send(PREFACE + _frame(SETTINGS, 0, 0))

    def close(self) -> None:
        self._socket.close()

    def half_a_message(self, stream: int, path: str, size: int, token: str = "") -> int:
        """Begin a message of `size` bytes, and send all but its last byte as far as the server takes it.

        Returns the bytes of the message that were sent before the server ended the stream, hung up, or took no more.
        """
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost",
                  "content-type": "application/grpc", "te": "trailers"}  # fmt: skip
        if token:
            fields["authorization"] = f"Bearer {token}"
        self.listen()  # for the settings, which say how much it takes
        self._send(_frame(HEADERS, 4, stream, b"".join(_field(k.encode(), v.encode()) for k, v in fields.items())))
        self._windows[stream] = self._first_window
        rest, sent = b"\x00" + struct.pack(">I", size) + bytes(size - 1), 0
        while sent < len(rest) and stream not in self.ended and not self.closed:
            room = min(self._windows[0], self._windows[stream], MOST_IN_A_FRAME, len(rest) - sent)
            if room > 0:
                self._send(_frame(DATA, 0, stream, rest[sent : sent + room]))
                self._windows[0] -= room
                self._windows[stream] -= room
                sent += room
            elif not self.listen():
                break
        return sent

    def listen(self) -> bool:
        """Take what the server says next; False if it says nothing for as long as the patience lasts."""
        try:
            data = self._socket.recv(65_536)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return False
        self._received += data
        while len(self._received) >= 9 and len(self._received) >= 9 + int.from_bytes(self._received[:3], "big"):
            end = 9 + int.from_bytes(self._received[:3], "big")
            self._take(self._received[3], self._received[4], self._received[5:9], self._received[9:end])
            self._received = self._received[end:]
        return True

    def _take(self, kind: int, flags: int, number: bytes, body: bytes) -> None:
        stream = int.from_bytes(number, "big") & 0x7FFFFFFF
        if kind == WINDOW_UPDATE and stream in self._windows:
            self._windows[stream] += int.from_bytes(body, "big")
        elif kind == SETTINGS and not flags & 1:
            settings = dict(struct.unpack_from(">HI", body, at) for at in range(0, len(body), 6))
            self._first_window = settings.get(INITIAL_WINDOW, self._first_window)
            self._send(_frame(SETTINGS, 1, 0))
        elif kind == PING and not flags & 1:
            self._send(_frame(PING, 1, 0, body))
        elif kind == RESET or (kind == HEADERS and flags & 1):
            self.ended.add(stream)
        elif kind == GOAWAY:
            self.closed = True

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            self.closed = True
