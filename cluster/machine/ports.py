"""Addresses and ports of this machine: their notation, whether a server can listen there, and free ports."""

from __future__ import annotations

import ipaddress
import random
import socket
from contextlib import suppress

from ...experts.errors import FailedPrecondition

PORT_TRIES = 50


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 for an address with colons, with or without brackets; IPv4 for other addresses and for names."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def with_port(host: str, port: int) -> str:
    """An address as clients write it: "127.0.0.1:80", "[::1]:80"."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address, with or without brackets, is reachable only from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int, what: str) -> None:
    """Check that a server can listen on an address; port 0 is always free. Raises FailedPrecondition."""
    if port == 0:
        return
    try:
        _bound(host, port, reuse=True)
    except OSError as error:
        raise FailedPrecondition(
            f"{what} {host}:{port} cannot be used: {error.strerror}. Another cluster may listen there "
            "(`expertmesh status`); choose another port, or 0 for any free one"
        ) from None


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with suppress(OSError):
        return _bound(host, port, reuse=True) >= 0
    return False


def free_port(host: str) -> int:
    """A port that is free now, if possible outside the ranges that the system and Ray assign by themselves.

    The port is bound only after many processes have started. By then, an ephemeral port could be taken by a connection.
    Ray's workers use 10002 to 19999; the ephemeral range starts at 32768.
    """
    draw = random.SystemRandom()
    for _ in range(PORT_TRIES):
        with suppress(OSError):
            return _bound(host, draw.randrange(20_000, 32_768))
    return _bound(host, 0)


def _bound(host: str, port: int, *, reuse: bool = False) -> int:
    """Bind a socket to an address, close it, and return its port. Raises OSError."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        probe.bind((host.strip("[]"), port))
        return int(probe.getsockname()[1])
