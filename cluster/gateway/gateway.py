"""The logic that all front ends of a router share: authorisation, admission, answers, and draining.

It does not depend on gRPC: a front end passes bytes and the metadata of a call, and sends back the answer or the error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ...experts.errors import DeadlineExceeded, ExpertMeshError, InvalidRequest, Overloaded, RouterUnavailable, TooLarge
from ...experts.wire import Buffer, Frame, decode, encode_parts
from ...router.request.admission import CallAdmission
from ...router.request.answer import ForwardReply
from ...router.request.forward import Router
from ..machine.tokens import token_digest
from ..rpc import health
from ..rpc.documents import encode_document
from ..rpc.health import ServingStatus
from ..rpc.methods import SERVICE
from .authorise import ID_DIGITS, Caller, TokenTable
from .frames import forward_request, one_message, reply_frame, reply_parts
from .streams import Read, StreamContext, StreamedCalls, StreamLimits
from .swaps import FrameHandler

log = logging.getLogger(__name__)
NOT_WHILE_DRAINING = {
    "Call": "requests", "CallStream": "requests", "Upload": "changes", "Swap": "changes", "Pin": "leases",
    "Pass": "requests", "PassStream": "requests", "Train": "requests", "TrainStream": "requests",
}  # fmt: skip

TRAINING = ("Pass", "Train")
"""The methods of training, each of which is also called in chunks, with "Stream" after its name."""

Trainer = Callable[[Frame, Caller, bool, float], Coroutine[Any, Any, Frame]]
"""Answers a frame of training: of a session or not, within some seconds."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """The gateway's address and limits. `tls` is (private key, certificate chain), both PEM.

    The owner may hold the port (`machine/ports.py`). `socket` is the path of a Unix socket to listen on as well.
    """

    host: str = "127.0.0.1"
    port: int = 0
    port_held: bool = False
    socket: str | None = None
    max_message_bytes: int = 64 * 1024 * 1024
    streams: StreamLimits = field(default_factory=StreamLimits)
    default_timeout: float = 30.0
    tls: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class CallInfo:
    """The metadata of a call. `deadline` is in monotonic seconds, None without a deadline.

    `client` identifies the caller, so that the router can serve callers fairly. `layer` is the layer that the caller
    says to call: a hint, so that a call which cannot be answered in time is refused before it is received.
    """

    request_id: str
    token: str | None = field(repr=False)
    deadline: float | None = None
    client: str = ""
    layer: str = ""


class Run(Protocol):
    """Runs a coroutine on the router's event loop, and waits for it."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> Awaitable[T]: ...


async def _here(work: Coroutine[Any, Any, T]) -> T:
    return await work


class Gateway:
    """Answers calls to a router: Call, CallStream, Status, Drain, health, and the methods of `more`.

    `run` runs the router's work, and everything that needs torch, on the router's event loop. Every call of torch
    releases the GIL, so two threads that both use torch would constantly wait for each other.
    """

    def __init__(
        self,
        router: Router,
        tokens: TokenTable,
        settings: GatewaySettings,
        status: Callable[[], Awaitable[dict[str, Any]]],
        more: Mapping[str, FrameHandler] | None = None,
        run: Run = _here,
        clock: Callable[[], float] = time.monotonic,
        train: Trainer | None = None,
    ) -> None:
        self.settings = settings
        self.streams = StreamedCalls(settings.streams, settings.max_message_bytes)
        self._router = router
        self._run = run
        self._clock = clock
        self._tokens = tokens
        self._status = status
        self._admission = CallAdmission()
        self._draining = False
        self._changed = asyncio.Event()
        self._unary: dict[str, Callable[[bytes, Caller, CallInfo], Awaitable[bytes]]] = {
            "Call": self._call,
            "Status": self._get_status,
            "Drain": self._drain,
            "Check": self._check,
        }
        self._unary |= {method: self._framed(method, handler) for method, handler in (more or {}).items()}
        self._train = train
        if train is not None:
            self._unary |= {method: self._trained_message(method) for method in TRAINING}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that `unary` answers."""
        return tuple(self._unary)

    def authorise(self, method: str, token: str | None) -> Caller:
        """Whose token may call a method. Raises Unauthenticated or PermissionDenied."""
        role = self._tokens.authorise(method, token, time.time())
        return Caller(role, token_digest(token or "")[:ID_DIGITS])

    async def unary(self, method: str, read: Read, call: CallInfo) -> bytes:
        """Authorise a call of one message, then `read` and answer it. Raises an ExpertMeshError."""
        caller = self.authorise(method, call.token)
        self._check_draining(method)
        if method == "Call":
            self._check_wait(call.layer, call)
        request = await self.streams.one_message(read, caller.id, self._seconds(call), of_layer=method == "Call")
        with self.streams.holding(len(request)):
            return await self._unary[method](request, caller, call)

    async def stream(self, context: StreamContext, call: CallInfo, method: str = "CallStream") -> None:
        """Authorise a call in chunks, then read and answer it through `context`. Raises an ExpertMeshError.

        A cancelled stream also releases its memory reservation.
        """
        caller = self.authorise(method, call.token)
        self._check_draining(method)
        if method == "CallStream":
            self._check_wait(call.layer, call)
            await self.streams.serve(context, caller.id, self._seconds(call), lambda frame: self.answer(frame, call))
            return

        async def trained(frame: Frame) -> list[Buffer]:
            answer = await self.trained(method.removesuffix("Stream"), frame, caller, call)
            return encode_parts(answer.kind, answer.meta, answer.tensors)

        await self.streams.serve(context, caller.id, self._seconds(call), trained)

    async def trained(self, method: str, frame: Frame, caller: Caller, call: CallInfo) -> Frame:
        """Answer an authorised frame of training. Raises an ExpertMeshError."""
        self._check_draining(method)
        if self._train is None:
            raise InvalidRequest("this router trains nothing")
        return await self._run(self._train(frame, caller, method == "Train", self._seconds(call)))

    def _trained_message(self, method: str) -> Callable[[bytes, Caller, CallInfo], Awaitable[bytes]]:
        async def trained(request: bytes, caller: Caller, call: CallInfo) -> bytes:
            frame = decode(request, max_bytes=self.settings.max_message_bytes)
            answer = await self.trained(method, frame, caller, call)
            parts = encode_parts(answer.kind, answer.meta, answer.tensors)
            return one_message(parts, self.settings.max_message_bytes)

        return trained

    async def answer(self, frame: Frame, call: CallInfo) -> list[Buffer]:
        """Answer an authorised call with the buffers of its reply frame. Raises an ExpertMeshError."""
        return await self._answered(frame, call, reply_parts)

    async def exchange(self, frame: Frame, call: CallInfo) -> Frame:
        """Answer a call of this process with its reply frame, which shares memory with the reply's tensors.

        The frame of the call must not change until then. Raises an ExpertMeshError.
        """
        self._check_draining("Call")
        return await self._answered(frame, call, reply_frame)

    async def _answered(self, frame: Frame, call: CallInfo, made: Callable[[ForwardReply], T]) -> T:
        layer = self._check_layer(frame, call)
        started, ahead, took = self._clock(), self._admission.began(layer), None
        try:
            answer = await self._run(self._forward(frame, call, self._seconds(call), made))
            took = self._clock() - started
            return answer
        except DeadlineExceeded:
            took = self._clock() - started
            raise
        finally:
            self._admission.ended(layer, ahead, took, self._clock())

    async def watch(self, read: Read, call: CallInfo) -> AsyncIterator[bytes]:
        """Yield the health of a service now, and at every change. Raises Unauthenticated or PermissionDenied."""
        caller = self.authorise("Watch", call.token)
        request = await self.streams.one_message(read, caller.id, self.settings.default_timeout, of_layer=False)
        service, last = health.decode_request(request), None
        while True:
            changed, now = self._changed, self.health_of(service)
            if now != last:
                yield health.encode_response(now)
                last = now
            await changed.wait()

    def health_of(self, service: str) -> ServingStatus:
        """The health of a layer, which serves while its experts do, or of all ("" or the service's name)."""
        if service in ("", SERVICE):
            return self.state
        if not self._has_layer(service):
            return ServingStatus.SERVICE_UNKNOWN
        return _serving_if(not self._draining and self._router.serves(service))

    @property
    def state(self) -> ServingStatus:
        """SERVING if there are layers, all can answer, and the gateway is not draining, else NOT_SERVING."""
        return _serving_if(not self._draining and self._router.epochs.number > 0 and self._router.serves())

    def drain(self) -> None:
        """Report NOT_SERVING and refuse new calls; accepted calls still finish."""
        self._draining = True
        self.notify()

    def notify(self) -> None:
        """Wake the health watchers, because the health may have changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def refusal(self, method: str, error: Exception, request_id: str) -> ExpertMeshError:
        """Log an error with its request id, and return the one for the caller; bugs become internal errors.

        The frames that it was raised in hold the request, and may hold the error: they are let go of here, or refused
        requests would stay in memory until a garbage collection.
        """
        error = self._logged(method, error, request_id)
        _forget_frames(error)
        return error

    def _logged(self, method: str, error: Exception, request_id: str) -> ExpertMeshError:
        if not isinstance(error, ExpertMeshError):
            log.error("internal error", exc_info=error, extra={"method": method, "request_id": request_id})
            _forget_frames(error)
            return ExpertMeshError("internal error: look up the request id in the log", request_id=request_id)
        error.request_id = error.request_id or request_id
        level = logging.WARNING if error.code in ("INTERNAL", "UNAVAILABLE", "DATA_LOSS") else logging.INFO
        if isinstance(error, Overloaded):
            level = logging.DEBUG  # counted by layer: in an overload, a line for each would cost more than the refusal
        details = {"method": method, "code": error.code, "request_id": error.request_id}
        log.log(level, error.message, extra=details)
        return error

    def _framed(self, method: str, handler: FrameHandler) -> Callable[[bytes, Caller, CallInfo], Awaitable[bytes]]:
        """Wrap a handler that takes a frame."""

        async def framed(request: bytes, caller: Caller, call: CallInfo) -> bytes:
            return await handler(decode(request, max_bytes=self.settings.max_message_bytes), caller)

        return framed

    async def _call(self, request: bytes, caller: Caller, call: CallInfo) -> bytes:
        parts = await self.answer(decode(request, max_bytes=self.settings.max_message_bytes), call)
        return one_message(parts, self.settings.max_message_bytes)

    def _check_draining(self, method: str) -> None:
        if self._draining and method in NOT_WHILE_DRAINING:
            raise RouterUnavailable(f"this router is draining and accepts no new {NOT_WHILE_DRAINING[method]}")

    def _check_wait(self, layer: str, call: CallInfo) -> None:
        """Refuse a call of a layer, or of the only one that is called, that would wait too long. Raises Overloaded."""
        layer = layer or self._admission.only_layer()
        try:
            self._admission.check(layer, self._seconds(call))
        except Overloaded as error:  # the name is the caller's own word: metrics count only layers that there are
            self._router.telemetry.requests[layer if self._has_layer(layer) else "", error.code] += 1
            raise

    def _check_layer(self, frame: Frame, call: CallInfo) -> str:
        """The layer of a call, or "" for one that there is not; refuses it here if the router would refuse it.

        Handing a call to the router costs more than all the rest of refusing it. Raises Overloaded or TooLarge.
        """
        layer, x = frame.meta.get("layer"), frame.tensors.get("x")
        if not isinstance(layer, str) or not self._has_layer(layer):
            return ""
        self._check_wait(layer, call)  # again, for others were let in while it was received
        try:
            self._router.admission.check(layer, max(1, x.shape[0]) if x is not None and x.shape else 1)
        except (Overloaded, TooLarge) as error:
            self._router.telemetry.requests[layer, error.code] += 1
            raise
        return layer

    def _has_layer(self, name: str) -> bool:
        return self._router.epochs.number > 0 and name in self._router.epochs.current.layers

    def _seconds(self, call: CallInfo) -> float:
        return self.settings.default_timeout if call.deadline is None else max(0.0, call.deadline - self._clock())

    async def _forward(self, frame: Frame, call: CallInfo, timeout: float, made: Callable[[ForwardReply], T]) -> T:
        forward = forward_request(frame, call.request_id, timeout, call.client)
        request_id = forward.options.request_id or call.request_id
        started = time.perf_counter()
        try:
            reply = await self._router.forward(forward)
        except ExpertMeshError as error:
            error.request_id = request_id
            raise
        if log.isEnabledFor(logging.DEBUG):
            seconds = time.perf_counter() - started
            log.debug("call", extra={"request_id": request_id, "layer": forward.options.layer, "seconds": seconds})
        return made(reply)

    async def _get_status(self, request: bytes, caller: Caller, call: CallInfo) -> bytes:
        _expect(decode(request), "status")
        return await self._document()

    async def _drain(self, request: bytes, caller: Caller, call: CallInfo) -> bytes:
        _expect(decode(request), "drain")
        log.warning("draining: requested by a client")
        self.drain()
        return await self._document()

    async def _document(self) -> bytes:
        status = await self._status()
        status["state"] = "draining" if self._draining else self.state.name.lower()
        return encode_document("status", status)

    async def _check(self, request: bytes, caller: Caller, call: CallInfo) -> bytes:
        return health.encode_response(self.health_of(health.decode_request(request)))


def _serving_if(serves: bool) -> ServingStatus:
    return ServingStatus.SERVING if serves else ServingStatus.NOT_SERVING


def _forget_frames(error: BaseException) -> None:
    """Drop the traceback of an error, and of those that it followed."""
    cause: BaseException | None = error
    while cause is not None:
        following = cause.__context__ or cause.__cause__
        cause.__traceback__ = cause.__context__ = cause.__cause__ = None
        cause = following


def _expect(frame: Frame, kind: str) -> None:
    if frame.kind != kind or frame.meta or frame.tensors:
        raise InvalidRequest(f"expected an empty {kind} frame")
