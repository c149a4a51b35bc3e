"""Serves the gateway over gRPC: reads token, id and deadline of a call from its context, and sends errors as status.

Every method takes its request as a stream, also where that is one message: gRPC would otherwise receive the message
whole before any of our code sees whose it is. On the wire both are the same.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

import grpc
import grpc.aio

from ...experts.errors import ExpertMeshError, Unavailable
from ..machine.ports import with_port
from ..machine.unix_socket import grpc_address
from ..rpc import health
from ..rpc.channel_options import server_options
from ..rpc.methods import SERVICE, new_request_id
from ..rpc.status import LAYER_KEY, REQUEST_ID_KEY, is_request_id, to_status
from .gateway import TRAINING, CallInfo, Gateway, GatewaySettings

Status = tuple[str, str, tuple[tuple[str, str], ...]]


class GrpcServer:
    """Serves a gateway over gRPC, with the health methods under their standard names."""

    def __init__(self, gateway: Gateway) -> None:
        self.port = 0
        self._gateway = gateway
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port. Raises Unavailable if the address is in use."""
        settings = self._gateway.settings
        server = grpc.aio.server(options=server_options(settings.max_message_bytes, port_held=settings.port_held))
        server.add_generic_rpc_handlers((self._handlers(),))
        self.port = _bind(server, settings)
        await server.start()
        self._server = server
        return self.port

    async def stop(self, grace: float = 0.0) -> None:
        """Refuse new calls, give calls in flight `grace` seconds, and close the port."""
        self._gateway.drain()
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None

    def _handlers(self) -> grpc.GenericRpcHandler:
        paths = {method: f"/{SERVICE}/{method}" for method in self._gateway.methods} | {"Check": health.CHECK}
        table = {path: grpc.stream_unary_rpc_method_handler(self._unary(method)) for method, path in paths.items()}
        for method in ("CallStream", *(f"{name}Stream" for name in TRAINING)):
            table[f"/{SERVICE}/{method}"] = grpc.stream_stream_rpc_method_handler(self._stream(method))
        table[f"/{health.SERVICE}/Watch"] = grpc.stream_stream_rpc_method_handler(self._watch)

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
                return table.get(details.method)

        return Handlers()

    def _unary(self, method: str) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[bytes]]:
        async def unary(requests: object, context: grpc.aio.ServicerContext) -> bytes:
            call = _call_info(context)
            try:
                return await self._gateway.unary(method, context.read, call)
            except Exception as error:  # noqa: BLE001 (the border of the process: every error becomes a status)
                status = self._status(method, error, call)
            return _end(context, status)

        return unary

    def _stream(self, method: str) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[None]]:
        async def stream(requests: object, context: grpc.aio.ServicerContext) -> None:
            call = _call_info(context)
            try:
                return await self._gateway.stream(context, call, method)
            except Exception as error:  # noqa: BLE001 (as above)
                status = self._status(method, error, call)
            _end(context, status)

        return stream

    async def _watch(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        call = _call_info(context)
        try:
            async for health_now in self._gateway.watch(context.read, call):
                await context.write(health_now)
            return
        except ExpertMeshError as error:
            status = self._status("Watch", error, call)
        _end(context, status)

    def _status(self, method: str, error: Exception, call: CallInfo) -> Status:
        return to_status(self._gateway.refusal(method, error, call.request_id))


def _bind(server: grpc.aio.Server, settings: GatewaySettings) -> int:
    """Bind the port of the settings, which is returned, and the socket. Raises Unavailable if one is in use."""
    address = with_port(settings.host, settings.port)
    try:
        if settings.tls is None:
            port = int(server.add_insecure_port(address))
        else:
            port = int(server.add_secure_port(address, grpc.ssl_server_credentials([settings.tls])))
    except RuntimeError:
        raise Unavailable(f"cannot listen on {address}: is the port in use?") from None
    if settings.socket is not None:
        try:
            server.add_insecure_port(grpc_address(settings.socket))  # its folder is the user's alone
        except RuntimeError:
            where = f"cannot listen on {settings.socket}"
            raise Unavailable(f"{where}: set EXPERTMESH_HOME to a folder on a local disk") from None
    return port


def _end(context: grpc.aio.ServicerContext, status: Status) -> bytes:
    """End a call with this status once its handler returns.

    `context.abort` would do so with an exception whose traceback holds the context, which holds the exception: a cycle
    that keeps the call, and what it received, until a garbage collection.
    """
    code, text, metadata = status
    context.set_code(grpc.StatusCode[code])
    context.set_details(text)
    context.set_trailing_metadata(metadata)
    return b""


def _call_info(context: grpc.aio.ServicerContext) -> CallInfo:
    metadata = {key: value[:4200] for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    request_id, seconds = metadata.get(REQUEST_ID_KEY, ""), context.time_remaining()
    return CallInfo(
        request_id=request_id if is_request_id(request_id) else new_request_id(),
        token=token if scheme.lower() == "bearer" else None,
        deadline=None if seconds is None else time.monotonic() + seconds,
        client=_client_of(context, metadata),
        layer=metadata.get(LAYER_KEY, ""),
    )


def _client_of(context: grpc.aio.ServicerContext, metadata: Mapping[str, str]) -> str:
    """The caller's address; on the Unix socket, where nobody has one, the name that the client gave itself."""
    peer: str = context.peer()
    return f"unix:{metadata.get('user-agent', '')}" if peer.startswith("unix:") else peer
