"""Where a router listens, in the words of its clients; and how one listens on another node than its owner's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..machine.ports import is_loopback, with_port
from .router_process import ServiceSettings

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}
"""The address for clients on its machine of a server that listens on all addresses."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a router listens: its endpoint "host:port", the URL of its metrics page, the path of its socket.

    `metrics_endpoint` is "" without a metrics page, and `socket` where the router is not on its owner's machine.
    """

    endpoint: str
    metrics_endpoint: str = ""
    socket: str = ""

    def described(self) -> dict[str, str]:
        """In the words of the status, which others than the owner's user read, too."""
        return {"endpoint": self.endpoint, "metrics_endpoint": self.metrics_endpoint}


def place_of(settings: ServiceSettings, port: int, metrics_port: int | None, address: str | None = None) -> Place:
    """Where a router with these settings listens, on these ports.

    One that listens on all addresses is named by `address`, or for its own machine if that is None.
    """

    def named(host: str, port: int) -> str:
        return with_port((address or _LOOPBACK[host]) if host in _LOOPBACK else host, port)

    scheme = "http" if is_loopback(settings.metrics_host) else "https"
    page = "" if metrics_port is None else f"{scheme}://{named(settings.metrics_host, metrics_port)}/metrics"
    return Place(
        endpoint=named(settings.gateway.host, port), metrics_endpoint=page, socket=settings.gateway.socket or ""
    )


def away_from_owner(settings: ServiceSettings, address: str) -> ServiceSettings:
    """The settings of a router on another node than its owner's, whose IP address is `address`.

    It listens there instead of at an address that only the owner's node has. It has no socket, nobody holds its ports,
    and it takes no uploads: `state_dir` is a folder of the owner's node.
    """

    def there(host: str) -> str:
        return host if host in _LOOPBACK or is_loopback(host) else address

    gateway = replace(settings.gateway, host=there(settings.gateway.host), socket=None, port_held=False)
    return replace(settings, gateway=gateway, metrics_host=there(settings.metrics_host), state_dir=None)
