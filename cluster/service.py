"""The router's process, without Ray: router, gateway and metrics page on one event loop."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from ..experts.errors import Unavailable
from ..router.forward import Router
from ..router.layer import Layer
from ..router.replicas import Replica
from ..router.transport import Transport
from .auth import Role, TokenTable
from .controller import Desired, RouterReport
from .gateway import Gateway, GatewaySettings
from .metrics import MetricsServer


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """All that a router's process needs to know: where it listens, whom it knows, what it bears.

    `tokens` are (sha256, role, expires in seconds since 1970 or None).
    """

    name: str
    gateway: GatewaySettings
    metrics_port: int | None
    tokens: tuple[tuple[str, Role, float | None], ...]
    max_rows_in_flight: int


class RouterService:
    """Serves requests and takes what the controller says."""

    def __init__(self, settings: ServiceSettings, transport: Transport) -> None:
        self.incarnation = uuid.uuid4().hex
        self.router = Router(transport, max_rows_in_flight=settings.max_rows_in_flight)
        self._settings = settings
        self._tokens = TokenTable()
        for digest, role, expires in settings.tokens:
            self._tokens.add_digest(digest, role, expires)
        self.gateway = Gateway(self.router, self._tokens, settings.gateway, self.status)
        self._metrics: MetricsServer | None = None
        self._revision = 0
        self._heard = 0.0

    async def start(self) -> tuple[int, int | None]:
        """Listen; returns the ports of the gateway and of the metrics page."""
        port = await self.gateway.start()
        wanted = self._settings.metrics_port
        if wanted is not None:
            try:
                self._metrics = MetricsServer(self.router, self._tokens, self._settings.gateway.host, wanted)
            except OSError as error:
                raise Unavailable(f"cannot listen on metrics port {wanted}: {error.strerror}") from None
        return port, self._metrics.port if self._metrics else None

    async def stop(self, grace: float = 0.0) -> None:
        """Drain, then close everything; idempotent."""
        await self.gateway.stop(grace)
        if self._metrics is not None:
            self._metrics.stop()
            self._metrics = None
        self.router.close()

    def apply(self, desired: Desired) -> None:
        """Adopt the epoch of a newer state of things."""
        if desired.revision > self._revision:
            self._revision = desired.revision
            self.router.adopt(desired.epoch)
            self.gateway.notify()

    def sync(self, replicas: tuple[Replica, ...]) -> RouterReport:
        """Take a report of all replicas."""
        self._heard = time.monotonic()
        self.router.update_view(replicas)
        return RouterReport(
            incarnation=self.incarnation,
            revision=self._revision,
            epoch=self.router.epochs.number,
            oldest_pinned=self.router.epochs.oldest_pinned(),
            rows_in_flight=self.router.view.rows_in_flight(),
        )

    async def status(self) -> dict[str, Any]:
        """Everything that is known here of the cluster, as plain JSON types."""
        telemetry, epochs = self.router.telemetry, self.router.epochs
        layers = epochs.current.layers if epochs.number else {}
        age = time.monotonic() - self._heard if self._heard else None
        return {
            "name": self._settings.name,
            "epoch": epochs.number,
            "layers": {name: self._layer(layer) for name, layer in layers.items()},
            "router": {
                "pid": os.getpid(),
                "incarnation": self.incarnation,
                "rows_in_flight": self.router.admission.rows,
                "requests": sum(telemetry.requests.values()),
                "failed_requests": sum(n for (_, code), n in telemetry.requests.items() if code != "OK"),
                "retries": telemetry.retries,
                "messages": dict(telemetry.messages),
                "batches": dict(telemetry.batches),
                "pins": {str(number): count for number, count in epochs.pins().items()},
            },
            "controller": {"heard_seconds_ago": age, "state": "ok" if age is not None and age < 3.0 else "silent"},
        }

    def _layer(self, layer: Layer) -> dict[str, Any]:
        versions = self.router.epochs.current.versions
        telemetry, replicas = self.router.telemetry, self.router.view.replicas()
        experts = {}
        for expert_id, expert in layer.everyone_by_id.items():
            experts[expert_id] = {
                "version": versions[expert_id],
                "ephemeral": expert.ephemeral,
                "rows": telemetry.rows[expert_id],
                "errors": telemetry.errors[expert_id],
                "replicas": [_plain(replica) for replica in replicas if expert_id in replica.experts],
            }
        gate = {"id": layer.gate_id, "kind": layer.gate.name, "version": versions[layer.gate_id]}
        return {"gate": gate, "combine": layer.combine, "on_missing": layer.on_missing, "experts": experts}


def _plain(replica: Replica) -> dict[str, Any]:
    plain = asdict(replica)
    plain["holds"] = sorted(f"{expert} {version}" for expert, version in replica.holds)
    return plain
