"""The router's end of the channels: one full-duplex connection to each replica, on the event loop.

A connection belongs to one incarnation. When it closes, all calls in flight on it fail at once. When the view names
another incarnation, the old connection is closed first, so late replies of an abandoned actor are never read.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from ...experts.errors import ExpertMeshError, InvalidRequest, Unauthenticated, Unavailable
from ...experts.protocol import ExpertCall, TrainCall
from ...experts.wire import Buffer, Frame, decode
from ...router.fanout.replica_view import Replica
from ...router.fanout.transport import Cancel, Died, Done, Lost, Trained
from ..machine.ports import family_of
from .framed_socket import MAX_MESSAGE_BYTES, FramedSocket, tuned
from .messages import (
    NONCE_BYTES,
    REPLICA,
    ROUTER,
    attempt_of,
    decode_reply,
    decode_trained,
    encode_call,
    encode_train,
    message,
    proof,
    text_of,
)

CONNECT_SECONDS = 2.0
log = logging.getLogger(__name__)


class ChannelTransport:
    """Carries messages over direct sockets. Belongs to one event loop."""

    def __init__(
        self, secret: bytes, responds: Callable[[str], Awaitable[bool]] | None = None, *, node: str = ""
    ) -> None:
        """`responds` asks a replica, by its id and not over a channel, whether its process runs; None takes it to.

        `node` is where the router is, in the words of `Replica.node`.
        """
        self.carried: Counter[str] = Counter()
        self._secret = secret
        self._responds = responds
        self._node = node
        self._router = ""
        self._refused: Callable[[], None] = lambda: None
        self._channels: dict[str, Channel] = {}
        self._connecting: set[asyncio.Task[None]] = set()

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Send a call on the connection to this incarnation."""
        return self._sent(replica, call.attempt, encode_call(call), call.size, done)

    def train(self, replica: Replica, call: TrainCall, done: Trained) -> Cancel:
        """Send a message of training on the connection to this incarnation."""
        return self._sent(replica, call.attempt, encode_train(call), call.size, done)

    def _sent(
        self, replica: Replica, attempt: int, parts: list[Buffer], rows: int, done: Callable[[Any], None]
    ) -> Cancel:
        channel = self._channels.get(replica.id)
        if channel is None or channel.closed or channel.replica.incarnation != replica.incarnation:
            error = Unavailable("there is no connection to the replica; retry")
            return asyncio.get_running_loop().call_soon(done, error).cancel
        self.carried[channel.kind] += rows
        return channel.send(attempt, parts, done)

    async def responds(self, replica: Replica) -> bool:
        """Whether the process of a replica runs; its end of the channel says nothing while it computes."""
        return self._responds is None or await self._responds(replica.id)

    def identify(self, router: str, refused: Callable[[], None]) -> None:
        """Close what is open, and connect as this router from now on."""
        self._router, self._refused = router, refused
        self._close_all(Unavailable("this router was given up; retry"))

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Connect to every incarnation that has an address and no connection, and close outdated connections."""
        current = {replica.id: replica for replica in replicas if replica.address}
        for name, channel in list(self._channels.items()):
            replica = current.get(name)
            if replica is None or replica.incarnation != channel.replica.incarnation or channel.closed:
                ended = replica is not None and replica.incarnation != channel.replica.incarnation
                channel.close(Unavailable("the replica was replaced; retry"), died=ended)
                del self._channels[name]
        for name, replica in current.items():
            if name not in self._channels:
                known = self._from_here(replica)
                self._channels[name] = channel = Channel(known, self._secret, lost, self._router, self._refused)
                task = asyncio.get_running_loop().create_task(channel.connect())
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)

    def _from_here(self, replica: Replica) -> Replica:
        """The replica with the address that this node reaches."""
        away = replica.tcp_address and replica.node != self._node
        return replace(replica, address=replica.tcp_address) if away else replica

    def close(self) -> None:
        """Close every connection; idempotent."""
        self._close_all(Unavailable("the router is stopping"))

    def _close_all(self, why: Unavailable) -> None:
        for task in self._connecting:
            task.cancel()
        for channel in self._channels.values():
            channel.close(why)
        self._channels.clear()


class Channel:
    """A connection to one incarnation of a replica. `kind` is "unix" or "tcp"."""

    def __init__(
        self, replica: Replica, secret: bytes, lost: Lost, router: str = "", refused: Callable[[], None] = lambda: None
    ) -> None:
        self.replica = replica
        self.closed = False
        self.late = 0
        self.kind, _, self._where = replica.address.partition(":")
        self._secret = secret
        self._lost = lost
        self._router = router
        self._refused = refused
        self._nonces = ("", secrets.token_hex(NONCE_BYTES))
        self._framed: FramedSocket | None = None
        self._loop = asyncio.get_running_loop()
        self._open = False
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._early: dict[int, list[Buffer]] = {}
        self._pending: dict[int, Callable[[Any], None]] = {}

    async def connect(self) -> None:
        """Connect and authenticate both ends; a failure closes the connection."""
        connection = None
        try:
            family, target = self._target()
            connection = tuned(socket.socket(family, socket.SOCK_STREAM))
            await asyncio.wait_for(self._loop.sock_connect(connection, target), CONNECT_SECONDS)
            self._framed = FramedSocket(connection)
            self._loop.add_reader(self._framed.fileno(), self._readable)
            await asyncio.wait_for(self._opened, CONNECT_SECONDS)
        except (OSError, ValueError, asyncio.TimeoutError, TimeoutError, asyncio.CancelledError) as error:
            if connection is not None and self._framed is None:
                connection.close()
            self.close(Unavailable(f"the replica cannot be reached ({type(error).__name__}); retry"))

    def send(self, attempt: int, parts: list[Buffer], done: Callable[[Any], None]) -> Cancel:
        """Send a message as soon as the connection is open; `done` gets the reply, or how the connection was closed."""
        self._pending[attempt] = done
        if self._open:
            self._write(parts)
        else:
            self._early[attempt] = parts
        return partial(self._cancel, attempt)

    def _cancel(self, attempt: int) -> None:
        if self._pending.pop(attempt, None) is None:
            return
        if self._open:
            self._write(message("cancel", attempt=attempt))
        else:
            self._early.pop(attempt, None)

    def close(self, why: ExpertMeshError, *, died: bool = False) -> None:
        """Close the connection and fail all calls in flight on it; idempotent.

        They get `why`, and Died where the replica's process `died` after they were sent.
        """
        if self.closed:
            return
        self.closed = True
        if self._framed is not None:
            if self._framed.fileno() >= 0:
                self._loop.remove_reader(self._framed.fileno())
                self._loop.remove_writer(self._framed.fileno())
            self._framed.close()
        pending, self._pending = self._pending, {}
        for done in pending.values():
            self._loop.call_soon(done, Died() if died and self._open else Unavailable(why.message))
        if not self._opened.done():
            self._opened.set_result(None)

    def _target(self) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
        if self.kind == "unix":
            return socket.AF_UNIX, self._where
        host, _, port = self._where.rpartition(":")
        return family_of(host), (host, int(port))

    def _readable(self) -> None:
        framed = self._framed
        if framed is None or self.closed:
            return
        try:
            for data in framed.receive(most=1):
                self._take(decode(data, max_bytes=MAX_MESSAGE_BYTES))
                if self.closed:
                    return
        except (ExpertMeshError, OSError) as error:
            self._broken(error)

    def _writable(self) -> None:
        framed = self._framed
        if framed is None or self.closed:
            return
        try:
            if framed.flush():
                self._loop.remove_writer(framed.fileno())
        except OSError as error:
            self._broken(error)

    def _write(self, parts: list[Buffer]) -> None:
        framed = self._framed
        if framed is None or self.closed:
            return
        try:
            if not framed.send(parts):
                self._loop.add_writer(framed.fileno(), self._writable)
        except OSError as error:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        name = self.replica.id
        log.warning("lost the connection to a replica: %s", error, extra={"replica": name})
        died = isinstance(error, (Unavailable, ConnectionError))  # closed by the other end, as when a process ends
        self.close(Unavailable(f"the connection to the replica was closed ({error}); retry"), died=died)
        self._lost(self.replica)

    def _take(self, frame: Frame) -> None:
        if frame.kind in ("reply", "trained") and self._open:
            reply = (decode_reply if frame.kind == "reply" else decode_trained)(frame, self.replica.incarnation)
            done = self._pending.pop(attempt_of(frame), None)
            if done is None:
                self.late += 1  # cancelled: the rows are dropped
            else:
                done(reply)
        elif frame.kind == "refused" and self._nonces[0]:
            self._check(*text_of(frame, "refused", "proof"))
            self.close(Unavailable("this router was given up; retry"))
            self._refused()
        elif frame.kind == "hello" and not self._nonces[0]:
            self._prove(frame)
        elif frame.kind == "welcome" and self._nonces[0] and not self._open:
            (received, _) = text_of(frame, "welcome", "proof", "credits")
            self._check(received)
            self._open = True
            self._opened.set_result(None)
            early, self._early = self._early, {}
            for parts in early.values():
                self._write(parts)
        else:
            raise InvalidRequest(f"unexpected message of kind {frame.kind[:64]!r}")

    def _check(self, received: str) -> None:
        expected = proof(self._secret, REPLICA, self.replica.incarnation, self._nonces)
        if not hmac.compare_digest(received.encode(), expected.encode()):
            raise Unauthenticated("the process listening there does not know the secret of this cluster")

    def _prove(self, frame: Frame) -> None:
        replica, incarnation, nonce = text_of(frame, "hello", "replica", "incarnation", "nonce")
        if (replica, incarnation) != (self.replica.id, self.replica.incarnation) or not nonce:
            raise Unavailable("another incarnation of the replica listens there")
        self._nonces = (nonce, self._nonces[1])
        own = proof(self._secret, ROUTER, incarnation, self._nonces)
        self._write(message("prove", nonce=self._nonces[1], proof=own, router=self._router))
