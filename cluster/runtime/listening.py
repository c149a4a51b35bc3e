"""A router with a port for clients, and one for its metrics page."""

from __future__ import annotations

from typing import Any

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

    async def start(self) -> tuple[int, int | None]:
        """Start to listen; returns the ports of gateway and metrics page."""
        self.begin()
        port = await self._server.start()
        metrics_port = self._settings.metrics_port
        if metrics_port is not None:
            host, gateway = self._settings.metrics_host, self._settings.gateway
            options: dict[str, Any] = {
                "name": self._settings.router,
                "port_held": gateway.port_held,
                "tls": gateway.tls,
            }
            try:
                self._metrics = MetricsServer(self.router, self._tokens, host, metrics_port, **options)
            except OSError as error:
                raise Unavailable(f"cannot listen on metrics_port {metrics_port}: {error.strerror}") from None
        return port, self._metrics.port if self._metrics else None

    async def stop(self, grace: float = 0.0) -> None:
        """Drain, then close everything; idempotent."""
        await self._server.stop(grace)
        if self._metrics is not None:
            self._metrics.stop()
            self._metrics = None
        self.close()
