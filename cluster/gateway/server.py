"""The front door: gRPC in, frames checked, every call authorised, errors as status codes. The only place for grpc."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from ...experts.errors import ExpertMeshError, InvalidRequest, Unavailable
from ...experts.wire import Frame, decode
from ...router.request.forward import Router
from ..rpc import health
from ..rpc.channel_options import server_options
from ..rpc.documents import encode_document
from ..rpc.health import ServingStatus
from ..rpc.methods import SERVICE, Role, new_request_id
from ..rpc.status import REQUEST_ID_KEY, is_request_id, to_status
from ..rpc.streams import Buffer
from .authorise import TokenTable
from .frames import forward_request, one_message, reply_parts
from .streams import StreamedCalls, StreamLimits
from .swaps import FrameHandler

log = logging.getLogger(__name__)
NOT_WHILE_DRAINING = ("Upload", "Swap", "Pin")

T = TypeVar("T")
Answerer = Callable[[Any, "grpc.aio.ServicerContext"], Awaitable[Any]]
Handler = Callable[[Any, "grpc.aio.ServicerContext", Role], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Where the gateway listens and what it takes. `tls` is (private key, certificate chain), both PEM."""

    host: str = "127.0.0.1"
    port: int = 0
    max_message_bytes: int = 64 * 1024 * 1024
    streams: StreamLimits = field(default_factory=StreamLimits)
    default_timeout: float = 30.0
    tls: tuple[bytes, bytes] | None = None


class Run(Protocol):
    """Runs a coroutine where the router is, and waits for it."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> Awaitable[T]: ...


async def _here(work: Coroutine[Any, Any, T]) -> T:
    return await work


class Gateway:
    """Serves a router over gRPC: calls, Status, Drain, the health protocol, and what `more` handles, by method.

    `run` runs what is the router's on its event loop: all that needs torch. Each call of torch lets other threads go
    first, so that two threads which both use it wait for each other all the time.
    """

    def __init__(
        self,
        router: Router,
        tokens: TokenTable,
        settings: GatewaySettings,
        status: Callable[[], Awaitable[dict[str, Any]]],
        more: Mapping[str, FrameHandler] | None = None,
        run: Run = _here,
    ) -> None:
        self._router = router
        self._run = run
        self._tokens = tokens
        self._settings = settings
        self._status = status
        self._more = dict(more or {})
        self.streams = StreamedCalls(settings.streams, settings.max_message_bytes)
        self._server: grpc.aio.Server | None = None
        self._draining = False
        self._changed = asyncio.Event()
        self.port = 0

    async def start(self) -> int:
        """Listen; returns the port. Raises Unavailable when the address is in use."""
        settings = self._settings
        server = grpc.aio.server(options=server_options(settings.max_message_bytes))
        server.add_generic_rpc_handlers((self._handlers(),))
        host = f"[{settings.host}]" if settings.host.count(":") > 1 and settings.host[0] != "[" else settings.host
        address = f"{host}:{settings.port}"
        try:
            if settings.tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials([settings.tls]))
        except RuntimeError:
            raise Unavailable(f"cannot listen on {address}: is the port in use?") from None
        await server.start()
        self._server = server
        return self.port

    async def stop(self, grace: float = 0.0) -> None:
        """Refuse new calls, give those under way `grace` seconds, and close the port."""
        self.drain()
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None

    def drain(self) -> None:
        """Answer NOT_SERVING and refuse new calls; those that were accepted are finished."""
        self._draining = True
        self.notify()

    def notify(self) -> None:
        """Tell those who watch the health that it may have changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def state(self) -> ServingStatus:
        """SERVING once there are layers and the gateway does not drain."""
        ready = not self._draining and self._router.epochs.number > 0
        return ServingStatus.SERVING if ready else ServingStatus.NOT_SERVING

    def _handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, tuple[str, Handler]] = {
            f"/{SERVICE}/Call": ("Call", self._call),
            f"/{SERVICE}/Status": ("Status", self._get_status),
            f"/{SERVICE}/Drain": ("Drain", self._drain),
            health.CHECK: ("Check", self._check),
        }
        unary |= {f"/{SERVICE}/{name}": (name, self._framed(name, handler)) for name, handler in self._more.items()}
        table = {path: grpc.unary_unary_rpc_method_handler(self._guarded(*entry)) for path, entry in unary.items()}
        stream = self._guarded("CallStream", self._call_stream)
        table[f"/{SERVICE}/CallStream"] = grpc.stream_stream_rpc_method_handler(stream)
        table[f"/{health.SERVICE}/Watch"] = grpc.unary_stream_rpc_method_handler(self._watch)

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
                return table.get(details.method)

        return Handlers()

    def _guarded(self, method: str, handler: Handler) -> Answerer:
        """Authorise, run, and turn every error into a status with the request's id."""

        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            request_id = _request_id(context)
            try:
                role = self._authorise(method, context)
                return await handler(request, context, role)
            except ExpertMeshError as error:
                error.request_id = error.request_id or request_id
                _log_error(method, error)
                await _abort(context, error)
            except Exception:  # the border of the process: a bug of ours must not kill the call silently
                log.exception("internal error", extra={"method": method, "request_id": request_id})
                await _abort(
                    context, ExpertMeshError("internal error; the log has the request id", request_id=request_id)
                )
            raise AssertionError("abort always raises")

        return guarded

    def _authorise(self, method: str, context: grpc.aio.ServicerContext) -> Role:
        scheme, _, token = _metadata(context, "authorization").partition(" ")
        return self._tokens.authorise(method, token if scheme.lower() == "bearer" else None, time.time())

    def _framed(self, method: str, handler: FrameHandler) -> Handler:
        """A handler of bytes that decodes the frame for one of frames."""

        async def framed(request: bytes, context: grpc.aio.ServicerContext, role: Role) -> bytes:
            if self._draining and method in NOT_WHILE_DRAINING:
                raise Unavailable("this cluster is draining: it takes no changes")
            return await handler(decode(request, max_bytes=self._settings.max_message_bytes), role)

        return framed

    async def _call(self, request: bytes, context: grpc.aio.ServicerContext, role: Role) -> bytes:
        self._check_accepting()
        parts = await self._answer(decode(request, max_bytes=self._settings.max_message_bytes), context)
        return one_message(parts, self._settings.max_message_bytes)

    async def _call_stream(self, requests: object, context: grpc.aio.ServicerContext, role: Role) -> None:
        """Reads and writes through `context`, so that what it holds is given back when the call is cancelled."""
        self._check_accepting()
        await self.streams.serve(context, self._seconds(context), lambda frame: self._answer(frame, context))

    def _check_accepting(self) -> None:
        if self._draining:
            raise Unavailable("this cluster is draining: it takes no new requests")

    def _seconds(self, context: grpc.aio.ServicerContext) -> float:
        left: float | None = context.time_remaining()
        return self._settings.default_timeout if left is None else max(0.0, left)

    async def _answer(self, frame: Frame, context: grpc.aio.ServicerContext) -> list[Buffer]:
        return await self._run(self._forward(frame, _request_id(context), self._seconds(context), context.peer()))

    async def _forward(self, frame: Frame, request_id: str, timeout: float, client: str) -> list[Buffer]:
        forward = forward_request(frame, request_id, timeout, client)
        request_id = forward.options.request_id or request_id
        started = time.perf_counter()
        try:
            reply = await self._router.forward(forward)
        except ExpertMeshError as error:
            error.request_id = request_id
            raise
        if log.isEnabledFor(logging.DEBUG):
            seconds = time.perf_counter() - started
            log.debug("call", extra={"request_id": request_id, "layer": forward.options.layer, "seconds": seconds})
        return reply_parts(reply)

    async def _get_status(self, request: bytes, context: grpc.aio.ServicerContext, role: Role) -> bytes:
        _expect(decode(request), "status")
        return await self._document()

    async def _drain(self, request: bytes, context: grpc.aio.ServicerContext, role: Role) -> bytes:
        _expect(decode(request), "drain")
        log.warning("draining: asked for by a client")
        self.drain()
        return await self._document()

    async def _document(self) -> bytes:
        status = await self._status()
        status["state"] = "draining" if self._draining else self.state.name.lower()
        return encode_document("status", status)

    async def _check(self, request: bytes, context: grpc.aio.ServicerContext, role: Role) -> bytes:
        return health.encode_response(self._health_of(health.decode_request(request)))

    async def _watch(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        try:
            self._authorise("Watch", context)
            service = health.decode_request(request)
        except ExpertMeshError as error:
            error.request_id = _request_id(context)
            await _abort(context, error)
        last = None
        while True:
            changed, now = self._changed, self._health_of(service)
            if now != last:
                yield health.encode_response(now)
                last = now
            await changed.wait()

    def _health_of(self, service: str) -> ServingStatus:
        if service in ("", SERVICE):
            return self.state
        known = self._router.epochs.number > 0 and service in self._router.epochs.current.layers
        return self.state if known else ServingStatus.SERVICE_UNKNOWN


def _expect(frame: Frame, kind: str) -> None:
    if frame.kind != kind or frame.meta or frame.tensors:
        raise InvalidRequest(f"an empty {kind} frame was expected")


def _metadata(context: grpc.aio.ServicerContext, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value[:4200]
    return ""


def _request_id(context: grpc.aio.ServicerContext) -> str:
    given = _metadata(context, REQUEST_ID_KEY)
    return given if is_request_id(given) else new_request_id()


async def _abort(context: grpc.aio.ServicerContext, error: ExpertMeshError) -> None:
    code, text, metadata = to_status(error)
    await context.abort(grpc.StatusCode[code], text, metadata)


def _log_error(method: str, error: ExpertMeshError) -> None:
    level = logging.WARNING if error.code in ("INTERNAL", "UNAVAILABLE", "DATA_LOSS") else logging.INFO
    details = {"method": method, "code": error.code, "request_id": error.request_id}
    log.log(level, error.message, extra=details)
