"""The replica's end of the channel: one thread that reads calls, computes them one at a time, and replies.

It reads all sockets between two computations, so queued calls that were cancelled or expired are never computed.
Routers take turns: a call of each is computed before a second one of any. What waits here is bounded, however many
routers there are: beyond `MOST_QUEUED_ROWS` none is read, and what it sends stays with it. A peer that violates the
protocol, stops reading or does not authenticate in time is closed, without effect on the others. If the thread ends by
an error all the same, the replica has failed, and its process is told.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ...experts.errors import ExpertMeshError, InvalidRequest, Unauthenticated
from ...experts.host import ExpertHost
from ...experts.protocol import ExpertCall, ExpertReply, PartFailure, TrainCall
from ...experts.wire import Buffer, Frame, decode
from ..machine.ports import family_of
from .core_slots import CoreSlots
from .framed_socket import MAX_MESSAGE_BYTES, FramedSocket, tuned
from .messages import (
    NONCE_BYTES,
    REPLICA,
    ROUTER,
    attempt_of,
    decode_call,
    decode_train,
    encode_reply,
    encode_trained,
    message,
    proof,
    text_of,
)
from .refused import Refused

CREDITS = 4
"""How many calls a router may have in flight to one replica; a connection that sends more is closed."""

MOST_QUEUED_ROWS = 65_536
"""While as many rows wait here nothing more is read: as many as `CREDITS` full messages of one router have."""

STRANGERS = 64
STRANGER_BYTES = 4096
STRANGER_SECONDS = 2.0
STALL_SECONDS = 30.0
log = logging.getLogger(__name__)


class _Peer:
    """A connection; `authenticated` once its router has proved the secret."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.framed = FramedSocket(tuned(connection), STRANGER_BYTES)
        self.nonce = secrets.token_hex(NONCE_BYTES)
        self.authenticated = False
        self.router = ""
        self.proof = ""
        self.since = now
        self.waiting: deque[tuple[ExpertCall | TrainCall, float]] = deque()


class ChannelServer:
    """Serves a host to routers that know the secret. `counted` counts calls and closed connections by outcome.

    `address` is where it listens, and `tcp_address` where it does so for routers on other nodes as well.
    `failed` is called with the reason if the thread ends by itself: nothing is served from then on.
    """

    def __init__(
        self,
        host: ExpertHost,
        replica_id: str,
        secret: bytes,
        slots: CoreSlots | None = None,
        failed: Callable[[str], None] = log.critical,
    ) -> None:
        self.counted: Counter[str] = Counter()
        self.address = ""
        self.tcp_address = ""
        self._host = host
        self._replica_id = replica_id
        self._secret = secret
        self._slots = slots
        self._failed = failed
        self._selector = selectors.DefaultSelector()
        self._peers: deque[_Peer] = deque()
        self._passed: deque[_Peer] = deque()
        self._refused = Refused()
        self._listeners: list[socket.socket] = []
        self._path: Path | None = None
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, lambda mask: self._woken.recv(4096))
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="expertmesh-channel", daemon=True)

    def listen_unix(self, path: Path, *, also_on: str = "") -> None:
        """Start to serve on a Unix socket, in a folder private to this user, and also on a free port of a host."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        self._path = path
        self.address = self._listen(listener, f"unix:{path}")
        if also_on:
            self.tcp_address = self._listen_tcp(also_on)
        self._thread.start()

    def listen_tcp(self, host: str) -> None:
        """Start to serve on a free port of an address that other nodes can reach."""
        self.address = self._listen_tcp(host)
        self._thread.start()

    def close(self) -> None:
        """Close every connection and end the thread after its current computation; idempotent."""
        if self._stopping:
            return
        self._stopping = True
        with suppress(OSError):  # the thread has ended already, and has closed it
            self._waker.send(b"x")
        if self._thread.is_alive():
            self._thread.join(timeout=STALL_SECONDS)

    def refuse(self, given_up: Mapping[str, str]) -> None:
        """Serve these routers no longer: by name, their session, or "" for whichever is connected. Any thread may ask.

        When this returns nothing more is sent to them; their connections are closed as soon as the thread is free.
        """
        self._refused.add(given_up, [peer.router for peer in list(self._peers)])
        with suppress(OSError):
            self._waker.send(b"x")

    def queued_rows(self) -> int:
        """The rows of the calls that wait to be computed."""
        return sum(call.size for peer in self._peers for call, _ in peer.waiting)

    def _listen_tcp(self, host: str) -> str:
        listener = socket.create_server((host, 0), family=family_of(host))
        return self._listen(listener, f"tcp:{host}:{listener.getsockname()[1]}")

    def _listen(self, listener: socket.socket, address: str) -> str:
        listener.listen(STRANGERS)
        listener.setblocking(False)
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ, lambda mask: self._accept(listener))
        return address

    def _run(self) -> None:
        try:
            while not self._stopping:
                busy = any(peer.waiting for peer in self._peers)
                self._turn(0.0 if busy else STRANGER_SECONDS / 4)
                call = self._next()
                if call is not None:
                    self._serve(*call)
        except BaseException as error:  # whatever it is: a thread that has ended is a replica that has failed
            log.exception("the channel's thread ended", extra={"replica": self._replica_id})
            self._failed(f"its channel ended with {type(error).__name__}")
        finally:
            for peer in list(self._peers):
                self._close(peer)
            for listener in self._listeners:
                listener.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            self._selector.close()
            self._waker.close()
            self._woken.close()

    def _turn(self, timeout: float) -> None:
        """Handle socket events, first of the peers that were passed over, and close stalled or unauthenticated ones."""
        passed, self._passed = self._passed, deque()
        for peer in passed:
            self._ready(peer, selectors.EVENT_READ)
        for key, mask in self._selector.select(timeout):
            key.data(mask)
        now = time.monotonic()
        for peer in list(self._peers):
            if peer.router in self._refused:
                self._send(peer, message("refused", proof=peer.proof))
                self._drop(peer, "given up", f"the controller has given up {peer.router}")
                continue
            stalled = peer.framed.unsent and now - peer.since > STALL_SECONDS
            if not peer.authenticated and (stalled or now - peer.since > STRANGER_SECONDS):
                self._drop(peer, "stranger", "it did not authenticate in time")
            elif stalled:
                self._drop(peer, "stalled", "it did not read its replies in time")

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the backlog is empty, or the peer disconnected
                return
            strangers = [peer for peer in self._peers if not peer.authenticated]
            if len(strangers) >= STRANGERS:
                self._drop(strangers[0], "stranger", "too many connections are not authenticated yet")
            peer = _Peer(connection, time.monotonic())
            self._peers.append(peer)
            self._selector.register(peer.framed, selectors.EVENT_READ, lambda mask, peer=peer: self._ready(peer, mask))
            self._send(
                peer,
                message("hello", replica=self._replica_id, incarnation=self._host.incarnation, nonce=peer.nonce),
            )

    def _ready(self, peer: _Peer, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE and peer.framed.flush():
                self._selector.modify(peer.framed, selectors.EVENT_READ, self._selector.get_key(peer.framed).data)
            if mask & selectors.EVENT_READ:
                self._read(peer)
        except Unauthenticated as error:
            self._drop(peer, "refused", error.message)
        except InvalidRequest as error:
            self._drop(peer, "malformed", error.message)
        except (ExpertMeshError, OSError) as error:  # the peer disconnected, or announced an invalid length
            self._drop(peer, "closed", str(error))

    def _read(self, peer: _Peer) -> None:
        """Read a peer while there is room for its calls; if there is none, it is the first to be read later."""
        if self._may_read(peer):
            for data in peer.framed.receive():
                self._take(peer, decode(data, max_bytes=MAX_MESSAGE_BYTES))
                if not self._may_read(peer):
                    return
        elif peer not in self._passed:
            self._passed.append(peer)

    def _may_read(self, peer: _Peer) -> bool:
        return not peer.authenticated or self.queued_rows() < MOST_QUEUED_ROWS

    def _take(self, peer: _Peer, frame: Frame) -> None:
        if not peer.authenticated:
            self._prove(peer, frame)
        elif frame.kind in ("call", "train"):
            call = decode_call(frame) if frame.kind == "call" else decode_train(frame)
            if len(peer.waiting) >= CREDITS:
                raise InvalidRequest(f"it has more than {CREDITS} calls in flight")
            peer.waiting.append((call, time.monotonic()))
        elif frame.kind == "cancel":
            attempt = attempt_of(frame)
            kept = deque(waiting for waiting in peer.waiting if waiting[0].attempt != attempt)
            self.counted["cancelled"] += len(peer.waiting) - len(kept)
            peer.waiting = kept
        else:
            raise InvalidRequest(f"unexpected message of kind {frame.kind[:64]!r}")

    def _prove(self, peer: _Peer, frame: Frame) -> None:
        nonce, received, router = text_of(frame, "prove", "nonce", "proof", "router")
        nonces = (peer.nonce, nonce)
        expected = proof(self._secret, ROUTER, self._host.incarnation, nonces)
        if not hmac.compare_digest(received.encode(), expected.encode()):
            raise Unauthenticated("it does not know the secret of this cluster")
        peer.authenticated, peer.router = True, router
        peer.proof = proof(self._secret, REPLICA, self._host.incarnation, nonces)
        if router in self._refused:
            return  # it is told, and closed, with the others
        peer.framed.limit = MAX_MESSAGE_BYTES
        self._send(peer, message("welcome", proof=peer.proof, credits=str(CREDITS)))

    def _next(self) -> tuple[_Peer, ExpertCall | TrainCall, float] | None:
        """The next queued call, round-robin over the peers."""
        for _ in range(len(self._peers)):
            peer = self._peers[0]
            self._peers.rotate(-1)
            if peer.waiting:
                return peer, *peer.waiting[0]
        return None

    def _serve(self, peer: _Peer, call: ExpertCall | TrainCall, arrived: float) -> None:
        try:
            if self._slots is not None and self._host.computes(call) and self._slots.take():
                self._turn(0.0)  # it may have been cancelled in the meantime
                if not peer.waiting or peer.waiting[0][0] is not call:
                    return
            peer.waiting.popleft()
            queued = time.monotonic() - arrived
            if queued > call.timeout:
                self.counted["expired"] += 1
                late = "the deadline passed while the rows were queued"
                reply = self._failed_reply(call, "DeadlineExceeded", late, queued)
            else:
                self.counted["computed"] += 1
                reply = self._computed(call, queued)
        finally:
            if self._slots is not None:
                self._slots.give_back()
        if peer.router not in self._refused:
            self._send(peer, reply)

    def _computed(self, call: ExpertCall | TrainCall, queued: float) -> list[Buffer]:
        try:
            if isinstance(call, TrainCall):
                return encode_trained(call.attempt, self._host.train(call))
            return encode_reply(call.attempt, self._host.compute(call), queued)
        except BaseException as error:  # out of memory, a device error, foreign code: it fails this call, no other
            if isinstance(call, TrainCall) and isinstance(error, InvalidRequest):
                return self._failed_reply(call, "InvalidRequest", error.message, queued)
            log.exception("a call failed", extra={"attempt": call.attempt})
            text = f"the replica raised {type(error).__name__}; see its log"
            return self._failed_reply(call, "ExpertFailed", text, queued)

    def _failed_reply(self, call: ExpertCall | TrainCall, error: str, text: str, queued: float) -> list[Buffer]:
        if isinstance(call, TrainCall):
            return encode_trained(call.attempt, PartFailure(error, text))
        return encode_reply(call.attempt, _all_failed(self._host, call, error, text), queued)

    def _send(self, peer: _Peer, parts: list[Buffer]) -> None:
        if peer.framed.fileno() < 0:
            return
        try:
            if not peer.framed.send(parts):
                peer.since = time.monotonic()
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self._selector.modify(peer.framed, both, self._selector.get_key(peer.framed).data)
        except OSError as error:
            self._drop(peer, "closed", str(error))

    def _drop(self, peer: _Peer, why: str, details: str) -> None:
        if peer not in self._peers:
            return
        self.counted[why] += 1
        level = logging.INFO if why == "closed" else logging.WARNING
        log.log(level, "closing a connection: %s", details, extra={"replica": self._replica_id, "why": why})
        self._close(peer)

    def _close(self, peer: _Peer) -> None:
        self._selector.unregister(peer.framed)
        self._peers.remove(peer)
        if peer in self._passed:
            self._passed.remove(peer)
        peer.waiting.clear()
        peer.framed.close()


def socket_path(folder: Path, replica_id: str, incarnation: str) -> Path:
    """The socket of an incarnation of a replica; sockets of earlier incarnations are removed."""
    name = f"{hashlib.sha256(replica_id.encode()).hexdigest()[:8]}-"  # an id may be too long for a path
    for old in folder.glob(f"{name}*"):
        old.unlink(missing_ok=True)
    return folder / f"{name}{incarnation[:8]}"


def _all_failed(host: ExpertHost, call: ExpertCall, error: str, text: str) -> ExpertReply:
    failure = PartFailure(error, text)
    return ExpertReply(host.incarnation, (failure,) * len(call.parts), (failure,) * len(call.sums))
