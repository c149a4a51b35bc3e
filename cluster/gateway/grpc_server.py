"""Serves the gateway over gRPC: reads token, id and deadline of a call from its context, and sends errors as status."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from ...experts.errors import ExpertMeshError, Unavailable
from ..machine.ports import with_port
from ..machine.unix_socket import grpc_address
from ..rpc import health
from ..rpc.channel_options import server_options
from ..rpc.methods import SERVICE, new_request_id
from ..rpc.status import REQUEST_ID_KEY, is_request_id, to_status
from .gateway import CallInfo, Gateway


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
        address = with_port(settings.host, settings.port)
        try:
            if settings.tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials([settings.tls]))
        except RuntimeError:
            raise Unavailable(f"cannot listen on {address}: is the port in use?") from None
        if settings.socket is not None:
            try:
                server.add_insecure_port(grpc_address(settings.socket))  # its folder is the user's alone
            except RuntimeError:
                where = f"cannot listen on {settings.socket}"
                raise Unavailable(f"{where}: set EXPERTMESH_HOME to a folder on a local disk") from None
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
        table = {path: grpc.unary_unary_rpc_method_handler(self._unary(method)) for method, path in paths.items()}
        table[f"/{SERVICE}/CallStream"] = grpc.stream_stream_rpc_method_handler(self._stream)
        table[f"/{health.SERVICE}/Watch"] = grpc.unary_stream_rpc_method_handler(self._watch)

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
                return table.get(details.method)

        return Handlers()

    def _unary(self, method: str) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
        async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            call = _call_info(context)
            try:
                return await self._gateway.unary(method, request, call)
            except Exception as error:  # noqa: BLE001 (the border of the process: every error becomes a status)
                return await self._abort(method, error, call, context)

        return unary

    async def _stream(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """Reads and writes through `context`, not through `requests`."""
        call = _call_info(context)
        try:
            await self._gateway.stream(context, call)
        except Exception as error:  # noqa: BLE001 (as above)
            await self._abort("CallStream", error, call, context)

    async def _watch(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        call = _call_info(context)
        try:
            async for status in self._gateway.watch(request, call):
                yield status
        except ExpertMeshError as error:
            await self._abort("Watch", error, call, context)

    async def _abort(self, method: str, error: Exception, call: CallInfo, context: grpc.aio.ServicerContext) -> bytes:
        code, text, metadata = to_status(self._gateway.refusal(method, error, call.request_id))
        await context.abort(grpc.StatusCode[code], text, metadata)
        raise AssertionError("abort always raises")


def _call_info(context: grpc.aio.ServicerContext) -> CallInfo:
    scheme, _, token = _metadata(context, "authorization").partition(" ")
    request_id, seconds = _metadata(context, REQUEST_ID_KEY), context.time_remaining()
    return CallInfo(
        request_id=request_id if is_request_id(request_id) else new_request_id(),
        token=token if scheme.lower() == "bearer" else None,
        deadline=None if seconds is None else time.monotonic() + seconds,
        client=_client_of(context),
    )


def _client_of(context: grpc.aio.ServicerContext) -> str:
    """The caller's address; on the Unix socket, where nobody has one, the name that the client gave itself."""
    peer: str = context.peer()
    return f"unix:{_metadata(context, 'user-agent')}" if peer.startswith("unix:") else peer


def _metadata(context: grpc.aio.ServicerContext, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value[:4200]
    return ""
