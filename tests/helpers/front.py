"""A gateway before a mesh on the test's own event loop, and clients of it: `async with opened(expert) as front`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from helpers.router_in_process import RouterInProcess

from expertmesh.cluster.client.client import AsyncClient
from expertmesh.cluster.gateway.authorise import TokenTable
from expertmesh.cluster.gateway.gateway import Gateway, GatewaySettings
from expertmesh.cluster.gateway.grpc_server import GrpcServer
from expertmesh.cluster.gateway.streams import StreamLimits
from expertmesh.cluster.machine.tokens import new_token, token_digest
from expertmesh.cluster.rpc.channel_options import client_options
from expertmesh.cluster.rpc.methods import SERVICE, Role
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

TOKEN = new_token()
METADATA = (("authorization", f"Bearer {TOKEN}"),)


class Front:
    """The gateway of one layer `l`, whose one expert answers every row; counts the requests that are inside."""

    def __init__(self, mesh: RouterInProcess, gateway: Gateway, server: GrpcServer) -> None:
        self.mesh, self.gateway, self.server = mesh, gateway, server
        self.endpoint = f"127.0.0.1:{server.port}"
        self.inside = self.most_inside = self.answered = 0
        self.hold: asyncio.Event | None = None
        self._forward = mesh.router.forward
        mesh.router.forward = self._counted  # type: ignore[method-assign]

    async def _counted(self, request: Any) -> Any:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if self.hold is not None:
                await self.hold.wait()
            reply = await self._forward(request)
            self.answered += 1
            return reply
        finally:
            self.inside -= 1

    def client(self, **options: Any) -> AsyncClient:
        return AsyncClient(self.endpoint, token=TOKEN, **options)

    def channel(self) -> Any:
        """A channel for messages that no client of ours would send."""
        return grpc.aio.insecure_channel(self.endpoint, options=client_options(loopback=True))


def raw_stream(channel: Any, timeout: float | None = 30.0, metadata: Any = METADATA) -> Any:
    """A stream that is written message by message."""
    return channel.stream_stream(f"/{SERVICE}/CallStream")(timeout=timeout, metadata=metadata)


@asynccontextmanager
async def opened(
    expert: Expert | None = None, limits: StreamLimits | None = None, **settings: Any
) -> AsyncIterator[Front]:
    layer = Layer("l", gates.Fixed([1.0]), {"e": expert or Expert("torch:abs")})
    tokens = TokenTable()
    tokens.add(token_digest(TOKEN), Role.READER)

    async def status() -> dict[str, Any]:
        return {}

    async with RouterInProcess(layer, max_rows_in_flight=10**9) as mesh:
        gateway = Gateway(mesh.router, tokens, GatewaySettings(streams=limits or StreamLimits(), **settings), status)
        server = GrpcServer(gateway)
        await server.start()
        try:
            yield Front(mesh, gateway, server)
        finally:
            await server.stop()
