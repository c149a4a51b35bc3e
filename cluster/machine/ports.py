"""Addresses and ports of this machine: how they are written, which can be listened on, and one that is free."""

from __future__ import annotations

import ipaddress
import random
import socket
from contextlib import suppress

from ...experts.errors import FailedPrecondition

PORT_TRIES = 50


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 for an address with colons, with or without brackets; IPv4 for any other, and for names."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def with_port(host: str, port: int) -> str:
    """An address as a client takes it: "127.0.0.1:80", "[::1]:80"."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address, with or without brackets, can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int, what: str) -> None:
    """Check that an address can be listened on. Raises FailedPrecondition; port 0 is always free."""
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
    """A port that nobody listens on at the moment, and that the system gives to nobody by itself if there is one.

    It is used only once many processes have started: a port that any connection may be given could be gone by then.
    Ray's workers take 10002 to 19999, systems begin to give away at 32768.
    """
    draw = random.SystemRandom()
    for _ in range(PORT_TRIES):
        with suppress(OSError):
            return _bound(host, draw.randrange(20_000, 32_768))
    return _bound(host, 0)


def _bound(host: str, port: int, *, reuse: bool = False) -> int:
    """The port of a socket that was bound there and closed again. Raises OSError."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        probe.bind((host.strip("[]"), port))
        return int(probe.getsockname()[1])
