"""Where a cluster listens: the ports that its owner chooses and holds, its routers' settings, and its run file."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...experts.package_version import version
from ..config.cluster_config import ClusterConfig, allowed_factories
from ..gateway.gateway import GatewaySettings
from ..gateway.streams import StreamLimits
from ..machine.ports import check_port, free_port, hold_port
from ..machine.run_files import RunFile, socket_path, token_path
from ..machine.tokens import create_token_file, token_digest
from ..rpc.methods import Role
from ..runtime.places import Place
from ..runtime.router_process import ServiceSettings
from ..state.uploads import UploadLimits


class FrontPorts:
    """The ports of gateways and metrics pages, chosen here so that a restarted router listens on the same ones.

    They are held for the processes of this user, as those of a Ray that the owner starts are. Each router has one of
    `ports` and one of `metrics_ports`, which are None without metrics pages. Raises FailedPrecondition for a port in
    use.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._holders: list[socket.socket] = []
        self._joins = config.address is not None
        self.ports: list[int] = []
        self.metrics_ports: list[int | None] = []
        try:
            for number in range(config.routers):
                self.ports.append(self._take("port", number, config.host, config.port))
                metrics_port = config.metrics_port
                if metrics_port is not None:
                    metrics_port = self._take("metrics_port", number, config.metrics_host, metrics_port)
                self.metrics_ports.append(metrics_port)
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

    def _take(self, setting: str, number: int, host: str, first: int) -> int:
        what = setting if number == 0 else f"{setting} of {router_name(number)}"
        port = first and first + number
        if self._joins:
            check_port(host, port, what)
            return port or self._other(free_port(host), host)
        self._holders.append(hold_port(host, port, what))
        return int(self._holders[-1].getsockname()[1])

    def _other(self, port: int, host: str) -> int:
        """A free port that no other router was given: these are not held."""
        while port in (*self.ports, *self.metrics_ports):
            port = free_port(host)
        return port


def router_name(number: int) -> str:
    """The name of a router that the owner starts, counted from 0."""
    return f"router-{number}"


def router_settings(config: ClusterConfig, ports: FrontPorts, state_dir: Path) -> dict[str, ServiceSettings]:
    """The settings of every router's process, by its name. Writes the token file of the cluster, with new tokens."""
    shared = _shared_settings(config, ports.held, state_dir)
    settings = {}
    for number, (port, metrics_port) in enumerate(zip(ports.ports, ports.metrics_ports, strict=True)):
        gateway = replace(shared.gateway, port=port, socket=str(socket_path(config.name, number)))
        name = router_name(number)
        settings[name] = replace(shared, router=name, gateway=gateway, metrics_port=metrics_port)
    return settings


def run_file(
    config: ClusterConfig, places: Sequence[Place], ray_temp_dir: str | None, ray: Mapping[str, str]
) -> RunFile:
    """The run file of a cluster whose routers listen at these places; `ray` are its fields for who attaches."""
    return RunFile.of_this_process(
        config.name,
        places[0].endpoint,
        version(),
        metrics_endpoint=places[0].metrics_endpoint or None,
        ray_temp_dir=ray_temp_dir,
        **ray,
        socket=places[0].socket,
        endpoints=[place.endpoint for place in places],
        sockets=[place.socket for place in places],
        metrics_endpoints=[place.metrics_endpoint for place in places if place.metrics_endpoint],
    )


def followed(run: RunFile, routers: Mapping[str, Mapping[str, Any]]) -> RunFile:
    """The run file with every router where it says that it is: one that has started again may be on another node.

    `routers` are the facts of each by name; the first never leaves the owner's node.
    """
    here = routers.get(router_name(0), {}).get("node")
    endpoints, sockets, pages = list(run.endpoints), list(run.sockets), list(run.metrics_endpoints)
    for number in range(len(endpoints)):
        facts = routers.get(router_name(number), {})
        if "endpoint" in facts:
            endpoints[number] = facts["endpoint"]
            sockets[number] = str(socket_path(run.name, number)) if facts.get("node") == here else ""
            if pages:
                pages[number] = facts.get("metrics_endpoint", "")
    return replace(run, endpoints=endpoints, sockets=sockets, metrics_endpoints=pages)


def _shared_settings(config: ClusterConfig, ports_held: bool, state_dir: Path) -> ServiceSettings:
    own = [(token_digest(token), role, None) for role, token in create_token_file(token_path(config.name)).items()]
    configured = [(entry.sha256, entry.role, entry.expires) for entry in config.tokens]
    tokens: tuple[tuple[str, Role, float | None], ...] = (*own, *configured)
    tls = None
    if config.tls_key is not None and config.tls_cert is not None:
        tls = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
    gateway = GatewaySettings(
        host=config.host,
        port_held=ports_held,
        max_message_bytes=config.max_message_bytes,
        streams=StreamLimits(max_request_bytes=config.max_request_bytes, max_stream_bytes=config.max_stream_bytes),
        default_timeout=config.default_timeout,
        tls=tls,
    )
    return ServiceSettings(
        name=config.name,
        gateway=gateway,
        metrics_port=None,
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
