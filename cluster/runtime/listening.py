"""A router with a port for clients, and one for its metrics page."""

from __future__ import annotations

import asyncio

from ...experts.errors import Unavailable
from ...router.fanout.transport import Transport
from ..control.ports import ControlPort
from ..gateway.grpc_server import GrpcServer
from ..gateway.metrics import MetricsServer
from .router_process import RouterService, ServiceSettings


class ListeningService(RouterService):
    """Serves requests that come over gRPC. The gateway is on the event loop that starts it."""

    def __init__(self, settings: ServiceSettings, transport: Transport, control: ControlPort) -> None:
        super().__init__(settings, transport, control)
        self._server = GrpcServer(self.gateway)
        self._metrics: MetricsServer | None = None
        self._starting = asyncio.Lock()
        self._port: int | None = None

    async def start(self) -> tuple[int, int | None]:
        """Start to listen; idempotent, also while it starts. Returns the ports of gateway and metrics page.

        Raises Unavailable for a port in use; then it listens nowhere, and may be started again.
        """
        async with self._starting:
            if self._port is None:
                self._port = await self._listen()
            return self._port, self._metrics.port if self._metrics else None

    async def _listen(self) -> int:
        self.begin()
        settings, gateway = self._settings, self._settings.gateway
        if settings.metrics_port is not None:
            try:
                self._metrics = MetricsServer(
                    self.router,
                    self._tokens,
                    settings.metrics_host,
                    settings.metrics_port,
                    name=settings.router,
                    port_held=gateway.port_held,
                    tls=gateway.tls,
                )
            except OSError as error:
                raise Unavailable(f"cannot listen on metrics_port {settings.metrics_port}: {error.strerror}") from None
        try:
            return await self._server.start()
        except BaseException:
            self._stop_metrics()
            raise

    async def stop(self, grace: float = 0.0) -> None:
        """Drain, then close everything; idempotent."""
        await self._server.stop(grace)
        self._stop_metrics()
        self.close()

    def _stop_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()
            self._metrics = None
