"""Where a cluster listens: the ports that its owner chooses and holds, and the settings of the router's process."""

from __future__ import annotations

import socket
from pathlib import Path

from ..config.cluster_config import ClusterConfig, allowed_factories
from ..gateway.gateway import GatewaySettings
from ..gateway.streams import StreamLimits
from ..machine.ports import check_port, free_port, hold_port, is_loopback, with_port
from ..machine.run_files import socket_path, token_path
from ..machine.tokens import create_token_file, token_digest
from ..rpc.methods import Role
from ..runtime.router_process import ServiceSettings
from ..state.uploads import UploadLimits

_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}
"""The address for clients on this machine when a server listens on all addresses."""


class FrontPorts:
    """The ports of gateway and metrics page, chosen here so that a restarted router listens on the same ones.

    They are held for the processes of this user, as those of a Ray that the owner starts are. `metrics_port` is None
    without a metrics page. Raises FailedPrecondition for a port in use.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._holders: list[socket.socket] = []
        self._joins = config.address is not None
        self.metrics_port: int | None = None
        try:
            self.port = self._take("port", config.host, config.port)
            if config.metrics_port is not None:
                self.metrics_port = self._take("metrics_port", config.metrics_host, config.metrics_port)
        except BaseException:
            self.close()
            raise

    @property
    def held(self) -> bool:
        """Whether the owner holds the ports."""
        return bool(self._holders)

    def close(self) -> None:
        """Let the ports go; idempotent."""
        while self._holders:
            self._holders.pop().close()

    def _take(self, setting: str, host: str, port: int) -> int:
        if self._joins:
            check_port(host, port, setting)
            return port or free_port(host)
        self._holders.append(hold_port(host, port, setting))
        return int(self._holders[-1].getsockname()[1])


def endpoint(config: ClusterConfig, port: int) -> str:
    """The address of the gateway for clients on this machine: "host:port"."""
    return with_port(_HERE.get(config.host, config.host), port)


def metrics_endpoint(config: ClusterConfig, port: int | None) -> str:
    """The URL of the metrics page for this machine, "" without one."""
    if port is None:
        return ""
    scheme = "http" if is_loopback(config.metrics_host) else "https"
    return f"{scheme}://{with_port(_HERE.get(config.metrics_host, config.metrics_host), port)}/metrics"


def service_settings(config: ClusterConfig, ports: FrontPorts, state_dir: Path) -> ServiceSettings:
    """The settings of the router's process. Writes the token file of the cluster's name, with new tokens."""
    own = [(token_digest(token), role, None) for role, token in create_token_file(token_path(config.name)).items()]
    configured = [(entry.sha256, entry.role, entry.expires) for entry in config.tokens]
    tokens: tuple[tuple[str, Role, float | None], ...] = (*own, *configured)
    tls = None
    if config.tls_key is not None and config.tls_cert is not None:
        tls = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
    gateway = GatewaySettings(
        host=config.host,
        port=ports.port,
        port_held=ports.held,
        socket=str(socket_path(config.name)),
        max_message_bytes=config.max_message_bytes,
        streams=StreamLimits(max_request_bytes=config.max_request_bytes, max_stream_bytes=config.max_stream_bytes),
        default_timeout=config.default_timeout,
        tls=tls,
    )
    return ServiceSettings(
        name=config.name,
        gateway=gateway,
        metrics_port=ports.metrics_port,
        metrics_host=config.metrics_host,
        tokens=tokens,
        max_rows_in_flight=config.max_rows_in_flight,
        state_dir=str(state_dir),
        uploads=UploadLimits(
            max_upload_bytes=config.max_upload_bytes,
            max_uploads_bytes=config.max_uploads_bytes,
            upload_rate=config.upload_rate,
        ),
        allowed_factories=allowed_factories(config),
    )
